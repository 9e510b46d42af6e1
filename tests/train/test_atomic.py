"""A file or folder that cannot be written is as it was before, and no temporary one is left."""

from __future__ import annotations

import os

import pytest

from hypo_train.utils.atomic import write_file, write_folder


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_keeps_the_old_file(tmp_path, shared):
    path = tmp_path / "settings.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "new", shared=shared)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("settings.json", "old")]


@pytest.mark.usefixtures("full_disk")
def test_a_failed_write_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, lambda new: (new / "config.json").write_text("new"))
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "config.json").read_text() == "old"


def test_written_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "shared.json", "{}", shared=True)
        write_folder(tmp_path / "final", lambda new: os.close(os.open(new / "weights", os.O_CREAT, 0o600)))
    finally:
        os.umask(before)
    assert (tmp_path / "shared.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "final" / "weights").stat().st_mode & 0o777 == 0o640
