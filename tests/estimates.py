"""Turn off the memory estimate of a run, for tests of something else."""

import pytest


@pytest.fixture(autouse=True)
def no_memory_estimate(monkeypatch):
    """Leave the memory estimate out of a run's first page, because it takes longer than training a tiny model.

    Modules that test the estimate override this fixture.
    """
    monkeypatch.setattr("hypo_train.preflight.checks._check_memory", lambda *_, **__: None)
