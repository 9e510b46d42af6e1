"""What a run was and what came of it, as one HTML file that needs nothing else: see :mod:`hypo_train.report.page`."""
