"""Read a flat YAML file, with one-line error messages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from hypo_train.utils.errors import ConfigError


def read_mapping(path: str, where: str) -> tuple[dict[Any, Any], list[str]]:
    """Return the mapping in the file ``path``, and the keys that occur more than once.

    Raises:
        ConfigError: the file cannot be read or holds no mapping; the message begins with ``where``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}: not valid YAML: line {line} is no UTF-8, save the file in that encoding") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_explain(error)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep, and should hold lines of the form 'name: value'") from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: should hold lines of the form 'name: value'")
    counts = Counter(str(key.value) for key, _ in node.value)  # ``values`` silently keeps the last of equal keys
    return values, [key for key, count in counts.items() if count > 1]


def _explain(error: Exception) -> str:
    """Return the line number, the problem, and the fix if it is obvious."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, fix = error.problem_mark, ""
    if "'\\t'" in error.problem:
        fix = ": indent with spaces, and not with a tab"
    elif error.context == "while scanning a simple key" and error.context_mark is not None:
        mark, fix = error.context_mark, ": a line is of the form 'name: value'"
    return f"line {mark.line + 1}: {' '.join(error.problem.split())}{fix}"
