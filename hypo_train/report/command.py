"""``python -m hypo_train report RUN [RUN ...]``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypo_train.arguments import OneLineParser
from hypo_train.config import ConfigError
from hypo_train.report.page import REPORT_FILE, write_report

_DESCRIPTION = """\
One HTML file about a run, or several side by side: curves, the last evaluation, samples, settings, environment.
A run that is still going on, was killed or failed is shown as far as it got. The file loads nothing from anywhere."""


def main(argv: Sequence[str]) -> int:
    """Exit status 0; ConfigError: a folder is no run, or the file cannot be written."""
    parser = OneLineParser(prog="python -m hypo_train report", description=_DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="output_dir of a training run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {REPORT_FILE} in the run's folder, or here for several"
    )
    options = parser.parse_args(list(argv))
    if not options.runs:
        raise ConfigError("nothing to report on: name a run's folder, as in python -m hypo_train report runs/hypo")
    own = Path(options.runs[0] if len(options.runs) == 1 else ".") / REPORT_FILE
    path = options.output or own
    write_report(options.runs, path)
    print(f"report written to {path}")
    return 0
