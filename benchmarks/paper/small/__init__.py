"""Small versions of the paper's Table 1 and Figure 1 from real training runs: ``python -m benchmarks.paper.small``."""
