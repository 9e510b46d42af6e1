"""The wheel and the sdist hold everything, and work where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from stand_in import ROOT

pytestmark = pytest.mark.slow  # builds, and installs into a new environment
PACKAGES = ("hypo_kernels", "hypo_train")


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files():
    """Return the files of the packages, relative to the repository."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build both from a copy of the sources, without a network."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=source)
    return source / "dist"


def environment(folder):
    """Make an environment that has our dependencies, but not this repository; return its folder of programs."""
    run(sys.executable, "-m", "venv", str(folder), cwd=folder.parent)
    [packages] = (folder / "lib").glob("python*/site-packages")
    for old in packages.glob("setuptools*"):  # the one among our dependencies is newer
        shutil.rmtree(old)
    # As a line of a .pth file the folder is searched, but its own .pth files (editable installs) are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder / "bin"


def test_the_wheel_has_every_file_of_the_packages(built):
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() - names == set()
    assert {name.split("/")[0] for name in names} - set(PACKAGES) == {f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}


def test_twine_accepts_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir()), cwd=built)


@pytest.mark.parametrize("archive", ["*.whl", "*.tar.gz"])
def test_it_installs_and_runs_outside_of_the_repository(archive, built, tmp_path):
    [path] = built.glob(archive)
    programs = environment(tmp_path / "environment")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall")
    run(programs / "python", "-m", "pip", "install", *options, str(path), cwd=tmp_path)
    place = run(programs / "python", "-c", "import hypo_kernels; print(hypo_kernels.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(tmp_path)
    assert "--learning_rate" in run(programs / "hypo-train", "--help", cwd=tmp_path)
    code = "import hypo_train.report.page, hypo_train.judges.template as t; t.load_template('tldr')"
    assert run(programs / "python", "-c", code, cwd=tmp_path) == ""
