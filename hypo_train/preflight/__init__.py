"""Checks a run before it starts: ``--dry-run``, and the first page of every run. Findings only; builds nothing."""

from hypo_train.preflight.checks import check, check_run
from hypo_train.preflight.findings import Findings, PreflightError

__all__ = ["Findings", "PreflightError", "check", "check_run"]
