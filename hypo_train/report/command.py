"""``python -m hypo_train report RUN [RUN ...]``"""

from __future__ import annotations

from pathlib import Path

from hypo_train.report.page import REPORT_FILE, write_report
from hypo_train.report.settings import ReportSettings


def run(settings: ReportSettings) -> int:
    """Write the report and return 0. Raises ConfigError if a folder is not a run or the file cannot be written."""
    folder = settings.run[0] if len(settings.run) == 1 else Path()
    path = settings.output or folder / REPORT_FILE
    write_report(settings.run, path)
    print(f"report written to {path}")
    return 0
