"""Set the number of examples of a fuzz test: a few fixed ones, or a share of FUZZ_EXAMPLES new random ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FULL = int(os.environ.get("FUZZ_EXAMPLES", "0"))
_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(few: int, *, share: float) -> settings:
    """Return settings for ``few`` fixed examples, or for ``share`` of FUZZ_EXAMPLES if that is set."""
    return settings(
        max_examples=max(few, round(share * FULL)) if FULL else few,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=_CHECKS,
    )
