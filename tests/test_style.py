"""Habits of this repository that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("hypo_kernels", "hypo_train")


def trees(*folders: str) -> list[tuple[Path, ast.Module]]:
    """Return every Python file of these folders and its syntax tree."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_test_names_have_at_most_60_characters():
    functions = [
        f"{path}: {node.name}"
        for path, tree in trees("tests")
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
        if len(node.name) > 60
    ]
    assert functions == []


def test_tests_import_no_tests():
    imports = [
        f"{path}: {node.module}"
        for path, tree in trees("tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1].startswith("test_")
    ]
    assert imports == []


def test_only_the_registry_compares_names_of_algorithms():
    pattern = re.compile(r"algorithm (==|!=|in|not in) ")
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "hypo_train").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert all(line.startswith("hypo_train/algorithms/registry.py") for line in lines), lines


def test_docstrings_start_with_what_the_function_does():
    riddles = re.compile(r"^(What|Of|The same|As|Whether|Those|That|Where|How|Which)\b")
    docstrings = [
        f"{path}: {node.name}: {docstring.splitlines()[0]}"
        for path, tree in trees(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (docstring := ast.get_docstring(node))
        if riddles.match(docstring) and not any("property" in getattr(d, "id", "") for d in node.decorator_list)
    ]
    assert docstrings == []
