"""A run's report where the run ends, however it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypo_train.report.page import REPORT_FILE, write_report
from hypo_train.utils.safe_print import safe_print


@contextmanager
def report_at_the_end(output_dir: Path) -> Iterator[None]:
    """Write ``output_dir/report.html`` when the block is left, with or without an error.

    A run is worth more than its report: what keeps the report from being written is printed and hides no other error.
    """
    try:
        yield
    finally:
        try:
            write_report([output_dir], output_dir / REPORT_FILE)
        except Exception as error:
            safe_print(f"the report was not written ({type(error).__name__}: {error})", sys.stderr)
