"""Command-line flags from the fields of a pydantic model: reading, checking and the ``--help`` page.

One ``ConfigError`` lists all mistakes, one a line. Nothing heavy is imported here, so that a
mistake is reported at once.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from hypo_train.utils.errors import ConfigError
from hypo_train.utils.paths import usable_path

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(usable_path)]  # a path, or a name on the Hub
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

S = TypeVar("S", bound="Settings")
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}  # as pydantic reads them


class Settings(BaseModel):
    """Base class of a command's flags: each field is a flag, and the docstring below it is its ``--help`` text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    usage: ClassVar[str] = ""
    groups: ClassVar[Mapping[str, str]] = {}  # first field of a group in --help -> title of the group
    positional: ClassVar[str | None] = None  # the field for arguments without a flag
    short_flags: ClassVar[Mapping[str, str]] = {}  # alias of a flag -> its field
    bare_flags: ClassVar[Mapping[str, str]] = {}  # field -> value if its flag is given without one
    not_a_bool: ClassVar[Mapping[str, str]] = {}  # field -> advice in the message about true or false
    more_flags: ClassVar[Sequence[str]] = ()  # flags that are not fields
    source: ClassVar[str] = "the command line"
    how_to_set: ClassVar[str] = "set it with --{}"

    @classmethod
    def advice_on(cls, name: str, value: Any) -> str | None:
        """Return what to write instead of an unknown name with this value, if more is known than the nearest name."""
        return None

    @classmethod
    def advice_on_value(cls, name: str, value: Any) -> str | None:
        """Return what to write instead of a field's value that was refused, if more is known than its type."""
        return None

    @field_validator("*", mode="before")
    @classmethod
    def _check_not_a_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic reads yes and no as 1 and 0: ``save_steps: no`` or ``beta: on`` would pass.
        name = info.field_name or ""
        types = types_of(cls, name)
        if isinstance(value, bool) and bool not in types:
            fix = f": {cls.not_a_bool[name]}" if name in cls.not_a_bool else ""
            raise ValueError(f"should be {_type_names(types)}, not true or false{fix}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        texts = [*value, *value.values()] if isinstance(value, dict) else value
        for text in texts if isinstance(texts, list) else [texts]:
            if isinstance(text, (str, Path)) and (problem := why_unusable(str(text))):
                raise ValueError(f"should be {problem}")
        if isinstance(value, list) and any(isinstance(item, Path) for item in value):
            return [Path(usable_path(str(item))) for item in value]
        return Path(usable_path(str(value))) if isinstance(value, Path) else value


def parse(model: type[S], argv: Sequence[str]) -> S:
    """Return the settings from the arguments ``argv``.

    Raises:
        ConfigError: lists every mistake, one a line.
    """
    problems: list[str] = []
    words, flags = read_flags(model, argv, problems)
    values = read_values(model, flags, problems)
    if words and model.positional is not None:
        takes_all = _takes_several(model, model.positional)
        values[model.positional] = words if takes_all else words[0]
        problems += [f"unexpected argument {shown(word)}" for word in words[1:] if not takes_all]
    return validated(model, values, problems)


def split_argv(argv: Sequence[str], model: type[Settings]) -> tuple[list[str], list[str]]:
    """Return the arguments that set fields of ``model``, and the other arguments."""
    chosen: list[str] = []
    rest: list[str] = []
    part = rest
    for token in argv:
        if token.startswith("--"):
            part = chosen if flag_name(token) in model.model_fields else rest
        part.append(token)
    return chosen, rest


def flag_name(token: str) -> str:
    """Return the field name in ``--name``, ``--na-me`` or ``--name=value``."""
    return token[2:].partition("=")[0].replace("-", "_")


def read_flags(
    model: type[Settings], argv: Sequence[str], problems: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the arguments without a flag, and {flag name: its values}."""
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            name = model.short_flags.get(flag_name(token), flag_name(token))
            if name in flags:
                problems.append(f"--{shown_name(name)} is given more than once")
            flags[name] = [token.partition("=")[2]] if "=" in token else []
        elif name is not None and (model.positional is None or _takes(model, name, flags[name], token)):
            flags[name].append(token)
        elif model.positional is not None:
            words.append(token)
        else:
            is_recipe = token.isprintable() and token.endswith((".yaml", ".yml"))
            example = f"--config {token}" if is_recipe else "--name value"
            problems.append(f"unexpected argument {shown(token)}: settings are written as {example}")
    return words, flags


def _takes(model: type[Settings], name: str, tokens: list[str], token: str) -> bool:
    """Return whether ``token`` is a value of the flag ``name``, after the values ``tokens``."""
    types = types_of(model, name) if name in model.model_fields else []
    if bool in types:
        return not tokens and token.lower() in _BOOLEANS
    return not tokens


def read_values(model: type[Settings], flags: Mapping[str, list[str]], problems: list[str]) -> dict[str, Any]:
    """Return the value of each field that ``flags`` set; pydantic reads numbers from their text."""
    values = {}
    for name, tokens in flags.items():
        if name not in model.model_fields or name == model.positional:
            value = _bare_or_text(tokens)
            fix = nearest(model, name, value, prefix="--", also=model.more_flags)
            problems.append(f"unknown flag --{shown_name(name)}{fix}")
            continue
        if len(tokens) > 1 and not _takes_several(model, name):
            given = ", ".join(map(shown, tokens[:4]))
            problems.append(f"--{name} takes one value, and is given {given}: flags begin with --, quote spaces")
            tokens = tokens[:1]
        values[name] = _value(model, name, tokens)
    return values


def _bare_or_text(tokens: list[str]) -> Any:
    """Return the value of an unknown flag: true without one, a list of several, none for none."""
    if len(tokens) != 1:
        return tokens or True
    return None if tokens[0].lower() in ("none", "null") else tokens[0]


def _value(model: type[Settings], name: str, tokens: list[str]) -> Any:
    types = types_of(model, name)
    if not tokens:
        return True if bool in types else model.bare_flags.get(name, "")
    if any(get_origin(kind) is dict for kind in types) and all("=" in token for token in tokens):
        pairs = (token.split("=", 1) for token in tokens)
        return {key: None if value.lower() in ("none", "null") else value for key, value in pairs}
    if len(tokens) > 1:
        return tokens
    if NoneType in types and tokens[0].lower() in ("none", "null"):
        return None
    if re.fullmatch(r"\{.*\}", tokens[0]) and any(get_origin(kind) is dict for kind in types):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(tokens[0])
    if _takes_several(model, name) and re.fullmatch(r"\[.*\]", tokens[0]):
        return re.findall(r"[^\s,'\"]+", tokens[0][1:-1])
    return tokens[0]


def validated(model: type[S], values: Mapping[str, Any], problems: Sequence[str] = ()) -> S:
    """Return ``model`` with ``values``. Raises ConfigError for ``problems`` and for values that pydantic refuses."""
    listed = list(problems)
    try:
        settings = model.model_validate(values)
    except ValidationError as error:
        listed += explain(model, error)
    if len(listed) == 1:
        raise ConfigError(f"1 problem in {model.source}: {listed[0]}")
    if listed:
        raise ConfigError("\n  ".join([f"{len(listed)} problems in {model.source}:", *listed]))
    return settings


def explain(model: type[Settings], error: ValidationError) -> list[str]:
    """Return one line for each field or conflict in a pydantic error, which has one entry for each type of a union."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if not item["loc"]:
            return str(item["ctx"]["error"]).split("\n")
        name, value = str(item["loc"][0]), item["input"]
        required = model.model_fields[name].is_required()
        if item["type"] == "missing" or (required and value is None):
            lines[name] = f"{name} is missing: {model.how_to_set.format(name)}"
        elif value is None and NoneType not in types_of(model, name):
            lines[name] = f"{name} has no value: write one, or leave it out"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            message = "needs a value" if value == "" else message
            if item["type"] == "string_type" and isinstance(value, (list, dict)):
                message = "should be one name or value, not a list or a mapping"
            quotes = (
                " (put it in quotes)" if item["type"] == "string_type" and not isinstance(value, (list, dict)) else ""
            )
            if item["type"] == "literal_error" and name in lines:
                lines[name] += f"; or it {message}"
            lines.setdefault(name, f"{name}={shown(value)}: {message}{quotes}")
            if advice := model.advice_on_value(name, value):
                lines[name] = f"{name}={shown(value)}: {advice}"
    return list(lines.values())


def nearest(model: type[Settings], name: str, value: Any, *, prefix: str = "", also: Sequence[str] = ()) -> str:
    """Return the end of the message about an unknown name: what is known about it, or the name that it misspells.

    ``prefix`` is put before that name; ``also`` are known names that are not fields of ``model``.
    """
    if advice := model.advice_on(name, value):
        return f": {advice}"
    names = [field for field in (*model.model_fields, *also) if field != model.positional]
    # Letters in another order weigh too much in a short name.
    matches = [known for known in names if sorted(known) == sorted(name)]
    matches = matches or difflib.get_close_matches(name, names, n=1, cutoff=0.85)
    longer = [known for known in names if known.startswith(f"{name}_")]
    if not matches and len(longer) == 1:
        matches = longer
    return f": did you mean {prefix}{matches[0]}?" if matches else " (--help lists the fields)"


def help_page(model: type[Settings], *more: str) -> str:
    """Return the ``--help`` page: usage, the model's docstring, every flag, and the lines ``more``."""
    usage = model.usage.replace("\n", "\n       ")
    return "\n".join([f"usage: {usage}", "", inspect.getdoc(model) or "", "", *flag_lines(model), *more])


def flag_lines(model: type[Settings], names: Sequence[str] | None = None) -> list[str]:
    """Return the ``--help`` lines of the fields ``names``, or of all, at most 100 columns wide."""
    lines: list[str] = []
    for name in model.model_fields if names is None else names:
        if names is None and name in model.groups:
            lines += ["", f"{model.groups[name]}:"]
        field = model.model_fields[name]
        default = field.get_default(call_default_factory=False)
        default = str(default).lower() if isinstance(default, (bool, NoneType)) else default
        default = "required" if field.is_required() else f"default: {default}"
        flag = name.upper() if name == model.positional else f"--{name}"
        values = " | ".join(field.examples) if field.examples else _type_names(types_of(model, name))
        lines += [
            f"  {flag}  {values}  ({default})",
            *textwrap.wrap(field.description or "", width=100, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    return lines


def types_of(model: type[Settings], name: str) -> list[Any]:
    """Return the alternatives of a field's type, without pydantic's constraints."""
    return _alternatives(model.model_fields[name].annotation)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [annotation]


def _takes_several(model: type[Settings], name: str) -> bool:
    return any(get_origin(kind) in (list, dict) for kind in types_of(model, name))


def _type_names(types: Sequence[Any]) -> str:
    names = [get_args(kind) if get_origin(kind) is Literal else [kind.__name__] for kind in types]
    return " | ".join(name for group in names for name in group).replace("NoneType", "none").replace("Path", "path")


def why_unusable(text: str) -> str | None:
    """Return what ``text`` should be if it cannot be written to a file or be a file name, else None."""
    if "\0" in text:
        return "text without a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "valid Unicode: it has half of a surrogate pair"
    return None


def check_repository_name(name: str | None) -> None:
    """Raise ValueError if ``name`` cannot be that of a repository of the Hugging Face Hub."""
    part = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    is_one = name is None or re.fullmatch(rf"({part}/)?{part}", name, re.ASCII)
    if name is not None and (not is_one or "--" in name or ".." in name or name.endswith(".git") or len(name) > 96):
        raise ValueError(
            "should be organisation/name or name, of at most 96 letters, digits and single '-', '_' and '.'"
        )


def shown(value: Any) -> str:
    """Return a value as text of at most one line for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python limits the digits of an integer
        return "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


def shown_name(name: str) -> str:
    """Return a printable name of up to 200 characters unchanged, any other name as ``shown`` does."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)
