"""How many examples a fuzz test draws: a few, the same in every run; or a share of FUZZ_EXAMPLES, ever new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FULL = int(os.environ.get("FUZZ_EXAMPLES", "0"))
_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(few: int, *, share: float) -> settings:
    """``few`` examples; ``share`` of FUZZ_EXAMPLES where that is set."""
    return settings(
        max_examples=max(few, round(share * FULL)) if FULL else few,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=_CHECKS,
    )
