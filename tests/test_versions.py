"""The lists of versions agree with each other."""

from __future__ import annotations

import re

import pytest
from stand_in import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer have it")


def test_the_oldest_versions_are_the_floors_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [
        *project["dependencies"],
        *(line for name in ("train", "bnb", "gguf", "triton") for line in extras[name]),
    ]
    floors = {re.sub(r"\[.*?\]", "", line.split(";")[0]).strip().replace(">=", "==") for line in required}
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == floors
