"""A run checked before it starts: ``--dry-run``, and the first page of every run."""

from hypo_train.preflight.stages import Passed, check, passed
from hypo_train.preflight.findings import Findings, PreflightError, is_of_the_user

__all__ = ["Findings", "Passed", "PreflightError", "check", "is_of_the_user", "passed"]
