"""Libraries that print less."""

from __future__ import annotations

import sys


def quiet_libraries() -> None:
    """Turn off the logging of errors, which are raised too, and without a terminal the libraries' progress bars."""
    import datasets
    from transformers.utils import logging

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
