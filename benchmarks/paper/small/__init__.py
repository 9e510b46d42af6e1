"""Table 1 and Figure 1 of the paper in small, trained for real: ``python -m benchmarks.paper.small``."""
