"""A run checked before it starts: ``--dry-run``, and the first page of every run."""

from hypo_train.preflight.findings import Findings, PreflightError
from hypo_train.preflight.stages import Passed, check, passed

__all__ = ["Findings", "Passed", "PreflightError", "check", "passed"]
