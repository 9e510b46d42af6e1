"""What README says works: its code runs, its configurations load, its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from hypo_train.config import load_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""


def blocks(*languages):
    """The fenced blocks of README in a language, each under the number of its first line."""
    found = re.finditer(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [pytest.param(match[1], id=f"line {TEXT[: match.start(1)].count(chr(10)) + 1}") for match in found]


def commands():
    """The lines of the shell blocks, without their comments."""
    lines = "".join(block.values[0] for block in blocks("bash", "sh", "console")).splitlines()
    return [command for line in lines if (command := line.split("#")[0].strip())]


def named_in_commands(pattern):
    """What ``pattern`` catches in the commands, each once."""
    return sorted(set(re.findall(pattern, "\n".join(commands()), flags=re.MULTILINE)))


def test_readme_has_code_settings_and_commands():
    assert blocks("python")
    assert blocks("yaml")
    assert commands()


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_yaml_block_is_a_configuration(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    load_config(["--config", str(path)])


@pytest.mark.parametrize("target", named_in_commands(r"^make ([\w-]+)"))
def test_a_make_command_is_a_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("module", named_in_commands(r"python -m ([\w.]+)"))
def test_a_python_command_names_a_module_that_is_there(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT))))
def test_a_link_leads_to_a_file_that_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "hypo_train" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_a_configuration(path):
    config = load_config(["--config", str(path)])
    assert (ROOT / config.dataset_name).is_file()
