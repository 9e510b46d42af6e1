"""Any recipe and any flags give a Config, or a ConfigError with one line per problem."""

from __future__ import annotations

import contextlib
import io

import pytest
import yaml
from budget import examples
from hypothesis import example, given
from hypothesis import strategies as st
from values import numbers, readable_text, text, values

from hypo_train.cli import main
from hypo_train.config import Config, ConfigError, load_config

FIELDS = list(Config.model_fields)
REQUIRED = {"model_name_or_path": "m", "dataset_name": "d"}


@pytest.fixture
def recipe(tmp_path):
    def write(content: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        return str(path)

    return write


def outcome(argv):
    """Return the Config, or None after checking the error message."""
    try:
        config = load_config(argv)
    except ConfigError as error:
        check_message(str(error))
        return None
    assert isinstance(config, Config)
    return config


def check_message(message):
    """Check for one line, or a count and one line per problem."""
    first, *rest = message.split("\n")
    assert first
    assert "Traceback" not in message
    if first.endswith(" problems in the configuration:"):
        assert int(first.split()[0]) == len(rest)
        assert all(line.startswith("  ") and line.strip() for line in rest)
    else:
        assert not rest
    assert all(len(line) < 1000 for line in [first, *rest]), "lines must be short enough to read"


def survives_its_own_yaml(config, recipe):
    assert load_config(["--config", recipe(config.to_yaml())]) == config


names = st.one_of(st.sampled_from(FIELDS), st.sampled_from(FIELDS).map(lambda name: name[:-1]), readable_text)
mappings = st.dictionaries(st.one_of(names, numbers, st.none(), st.booleans()), values, max_size=6)


@examples(150, share=0.2)
@given(mapping=mappings, with_required=st.booleans())
def test_any_mapping_is_a_config_or_a_list_of_problems(recipe, mapping, with_required):
    mapping = {**(REQUIRED if with_required else {}), **mapping}
    config = outcome(["--config", recipe(yaml.dump(mapping, allow_unicode=True))])
    if config is not None:
        survives_its_own_yaml(config, recipe)


_ALMOST = {  # values of the right type, so that most recipes pass
    bool: st.booleans(),
    int: st.integers(-1, 2**40),
    float: st.one_of(st.floats(0, 2), numbers),
    str: st.one_of(readable_text, st.sampled_from(["hypo", "dpo", "auto", "text"])),
}


@examples(150, share=0.2)
@given(data=st.data())
def test_any_typed_values_are_a_config_or_problems(recipe, data):
    mapping = dict(REQUIRED)
    for name in data.draw(st.lists(st.sampled_from(FIELDS), max_size=5, unique=True)):
        annotation = str(Config.model_fields[name].annotation)
        kinds = [kind for kind in _ALMOST if kind.__name__ in annotation] or [str]
        mapping[name] = data.draw(st.one_of([_ALMOST[kind] for kind in kinds]))
    config = outcome(["--config", recipe(yaml.dump(mapping, allow_unicode=True))])
    if config is not None:
        survives_its_own_yaml(config, recipe)
        config.warnings()


_PIECES = [
    "model_name_or_path: m\n",
    "dataset_name: d\n",
    "beta: 0.1\n",
    "beta: 0.2\n",
    "base: x.yaml\n",
    "a: &a [1]\n",
]
_PIECES += ["a: &a [1]\n", "b: *a\n", "<<: *a\n", "? [1, 2]\n: 3\n", "? {a: 1}\n: 3\n", "- x\n", "---\n", "..."]
_PIECES += ["{", "}", "[", "]"]
_PIECES += [
    "!!python/name:os.system ",
    "!!set {a}\n",
    "!!binary aGk=\n",
    "!unknown x\n",
    "seed: 2024-01-01\n",
    "\t",
    "#",
]
_PIECES += [
    "beta: 1:30:00\n",
    "seed: 0o17\n",
    "seed: 1e3\n",
    '"\\0": 1\n',
    "%YAML 9.9\n",
    "|\n",
    ">-\n",
    "'",
    '"',
    "\x07",
]


@examples(150, share=0.15)
@given(content=st.one_of(text, st.lists(st.one_of(st.sampled_from(_PIECES), text), max_size=8).map("".join)))
@example("[" * 20_000)
@example("a: " + "{a: " * 5000)
@example("seed: " + "9" * 5000)
@example("seed: 0b" + "1" * 20_000)
@example("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n")
@example("a: &a [*a]\n")
@example("model_name_or_path: &a [*a]\n")
@example("? [1]\n: 2\n")
@example("seed: 99999-99-99\n")
@example("!!python/object/apply:os.system ['false']\n")
def test_any_text_is_a_recipe_or_one_line_of_error(recipe, content):
    outcome(["--config", recipe(content)])


tokens = st.one_of(
    st.sampled_from(FIELDS).map(lambda name: f"--{name}"),
    st.tuples(st.sampled_from(FIELDS), text).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    st.sampled_from(["--", "--config", "--=", "---", "-1", "1e-6", "true", "none", "[a,b]", "[]"]),
    numbers.map(str),
    text,
)


@examples(150, share=0.15)
@given(argv=st.lists(tokens, max_size=8), with_required=st.booleans())
def test_any_flags_are_a_config_or_a_list_of_problems(recipe, argv, with_required):
    required = [part for name, value in REQUIRED.items() for part in (f"--{name}", value)] if with_required else []
    config = outcome([*required, *argv])
    if config is not None:
        survives_its_own_yaml(config, recipe)


@examples(40, share=0.02)
@given(argv=st.lists(st.one_of(st.just("--dry-run"), st.just("--dry_run_device"), tokens), min_size=1, max_size=4))
def test_the_program_exits_with_status_2(argv):
    argv = ["--no_such_field", *argv]
    if {"-h", "--help"} & set(argv):
        return
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as stderr is
    with contextlib.redirect_stderr(err):
        assert main(argv) == 2
    err.seek(0)
    assert err.read().startswith("hypo_train: ")
