"""Two runs in one output_dir: the second is refused before it reads weights, and a killed one leaves no lock."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypo_train.checkpoint.lock import LOCK_FILE, locked, require_unlocked
from hypo_train.config import ConfigError
from hypo_train.train import train

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(3600)
"""


@contextmanager
def other_run(folder):
    """A process that holds the lock of ``folder``, as a run does."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(folder / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_second_run_is_refused_before_weights_are_read(settings, monkeypatch):
    config = settings(resume_from_checkpoint="auto")
    monkeypatch.setattr("hypo_train.build.load_policy", None)
    with (
        other_run(Path(config.output_dir)),
        pytest.raises(ConfigError, match=r"output_dir='.*run': another run is using it: wait until that run has ended"),
    ):
        train(config, progress=False)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [LOCK_FILE]


def test_a_killed_run_leaves_no_lock(tmp_path):
    with other_run(tmp_path) as holder:
        with pytest.raises(ConfigError, match="another run is using it"):
            require_unlocked(tmp_path)
        with pytest.raises(ConfigError, match="another run is using it"), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        require_unlocked(tmp_path)
        with locked(tmp_path):
            pass


def test_looking_for_a_lock_creates_nothing(tmp_path):
    require_unlocked(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        pass
