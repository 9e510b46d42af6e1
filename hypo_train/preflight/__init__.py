"""Check a run before it starts, for ``--dry-run`` and for the first page of every run. Nothing is built here."""

from hypo_train.preflight.checks import check, check_run
from hypo_train.preflight.findings import Findings, PreflightError

__all__ = ["Findings", "PreflightError", "check", "check_run"]
