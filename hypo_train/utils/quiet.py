"""Reduce the output of libraries."""

from __future__ import annotations

import sys


def quiet_libraries() -> None:
    """Turn off the libraries' error logs, because errors are raised too, and their progress bars without a terminal."""
    import datasets
    from transformers.utils import logging

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
