"""Freed memory stays with the process, unless the user has settings of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Prints the fewest page faults of one of 16 allocations of 64 MB. It takes some of them until the heap is large enough;
# where memory is given back, every one has its 16,384 faults.
FAULTS = """
import resource, torch
from hypo_train.utils.allocator import keep_freed_memory
kept, counts = keep_freed_memory(), []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20).add_(1)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(counts))
"""


def faults(environment):
    run = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_unless_the_user_sets_malloc():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept, few = faults(environment)
    assert kept
    kept, many = faults({**environment, "MALLOC_TOP_PAD_": "0"})
    assert not kept
    assert few < 100 < many
