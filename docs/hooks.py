"""Fill in what the documentation takes from the code and from other files when ``mkdocs build`` runs.

A line of a page such as these is replaced:

- ``{{ configuration }}``: the fields of ``hypo_train.config.Config``
- ``{{ help evaluate }}``, ``{{ usage }}``: the help page of a command; that of training, without the fields
- ``{{ message --kl_coef -1 }}``: what the command line answers to these flags
- ``{{ settings_of axolotl }}``: the settings of another trainer, and what to write here instead
- ``{{ include CHANGELOG.md }}``: a file of this repository
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the documentation is about this checkout, not about an installed package

PICTURES = {
    "images/figure1.png": "benchmarks/paper/results/figure1.png",
    "images/interaction.png": "benchmarks/paper/results/interaction.png",
    "images/interaction_frontier.png": "benchmarks/paper/results/interaction_frontier.png",
    "images/step.png": "benchmarks/plots/step_waterfall_smollm2-135m-full_cpu.png",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures that lie beside the results they show."""
    for name, source in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the ``{{ … }}`` lines of a page; drop the note for those who read its source."""
    markdown = re.sub(r"^> `make docs` fills in this page.*\n\n", "", markdown, flags=re.MULTILINE)
    return re.sub(r"^\{\{ (\w+) ?(.*?) \}\}$", _filled_in, markdown, flags=re.MULTILINE)


def on_post_page(output: str, **_: Any) -> str:
    """Take the theme's one script from a network from here instead."""
    return _without_network(output)


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same for the page of a missing address."""
    return _without_network(output_content)


def _without_network(html: str) -> str:
    return html.replace("https://unpkg.com/iframe-worker/shim", "iframe-worker.js")


def _filled_in(line: re.Match[str]) -> str:
    fill = {
        "configuration": configuration,
        "help": command_help,
        "usage": usage,
        "message": message,
        "settings_of": settings_of,
        "include": included,
    }
    return fill[line[1]](line[2])


def configuration(_: str = "") -> str:
    """Return every field of ``Config`` in the groups of ``--help``: type, bounds, default and meaning."""
    from hypo_train.cli import help_text
    from hypo_train.config import Config

    lines: list[str] = []
    for line in help_text().splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            lines += ["", f"## {line[:-1].capitalize()}", ""]
        elif (flag := re.match(r"  --(\w+) ", line)) and flag[1] in Config.model_fields:
            lines += _field(flag[1], Config.model_fields[flag[1]])
    return "\n".join(lines)


def _field(name: str, field: Any) -> list[str]:
    default = "required" if field.is_required() else f"default `{_written(field.default)}`"
    about = ", ".join([_kind(field.annotation), *_bounds(field), default])
    return [f"### `{name}` {{ #{name} }}", "", about, "", field.description or "", ""]


def _written(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, (bool, NoneType)) else str(value)


def _kind(annotation: Any) -> str:
    """Return a type as a reader of YAML would name it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind(kind) for kind in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "none"}[annotation]


def _bounds(field: Any) -> list[str]:
    """Return what a number may be, from pydantic's constraints; ``lt=2**63`` only says that it fits in 64 bits."""
    metadata = [*field.metadata, *(rule for kind in get_args(field.annotation) for rule in _rules(kind))]
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = [(words[sign], getattr(rule, sign)) for rule in metadata for sign in words if hasattr(rule, sign)]
    return [f"{word} {value}" for word, value in bounds if value < 2**63]


def _rules(kind: Any) -> list[Any]:
    """Return pydantic's constraints on one alternative of a type, which it keeps in a ``FieldInfo``."""
    if get_origin(kind) is not Annotated:
        return []
    return [rule for extra in get_args(kind)[1:] for rule in getattr(extra, "metadata", [extra])]


def command_help(command: str = "") -> str:
    """Return the help page of a command of ``python -m hypo_train`` as a code block."""
    from hypo_train.cli import main

    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    text = printed.getvalue().rstrip()
    if not text.startswith("usage:"):
        raise ValueError(f"python -m hypo_train {command} --help printed no help page: {text[:80]!r}")
    return f"```text\n{text}\n```"


def usage(_: str = "") -> str:
    """Return training's help page up to its first group of fields."""
    from hypo_train.cli import help_text

    before_fields = re.split(r"^\w[\w ]*:$", help_text(), flags=re.MULTILINE)[0]
    return f"```text\n{before_fields.rstrip()}\n```"


def message(flags: str) -> str:
    """Return a command line with these flags, and the message that refuses it."""
    from hypo_train.config import ConfigError, load_config

    try:
        load_config(["--model_name_or_path", "models/m", "--dataset_name", "data.jsonl", *flags.split()])
    except ConfigError as error:
        return (
            f"``` {{ .text .message }}\n$ python -m hypo_train --config recipe.yaml {flags}\nhypo_train: {error}\n```"
        )
    raise ValueError(f"{flags} is refused by nothing: show another mistake in the documentation")


def settings_of(trainer: str) -> str:
    """Return a table of another trainer's settings, and what to write here instead."""
    from hypo_train.other_trainers import TABLES

    rows = ["| there | here |", "|---|---|"]
    for advice in TABLES[trainer]:
        names = list(advice)
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {advice.text} |")
        rows += [f"| `{names[0]}: {value}` | {text} |" for value, text in advice.values.items()]
    return "\n".join(rows)


def included(path: str) -> str:
    """Return a file of the repository; its links to pages lead to them here, other relative links become their text."""
    folder = (ROOT / path).parent

    def relinked(link: re.Match[str]) -> str:
        file, _, anchor = link[2].partition("#")
        target = (folder / file).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return f"[{link[1]}]({target.relative_to(ROOT / 'docs')}{'#' + anchor if anchor else ''})"
        return link[1]

    text = (ROOT / path).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", relinked, text)
