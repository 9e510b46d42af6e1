"""Reports of runs: one HTML file that needs nothing else. :mod:`hypo_train.report.page` writes it."""
