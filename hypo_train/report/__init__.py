"""Reports of runs: one self-contained HTML file, which :mod:`hypo_train.report.page` writes."""
