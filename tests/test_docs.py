"""README and the documentation: their code runs, their settings load, their commands do what they say.

A command runs where that is cheap, with a small model under the name that the pages use. Of any other command, every
flag must be one that its program knows. A block or a command that this test cannot check fails it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from markdown_blocks import PAGES, blocks, commands, commands_that, flags, text_of
from stand_in import MODEL, ROOT, make_workplace
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

import hypo_kernels
from hypo_kernels import sequence_logprobs
from hypo_train.cli import help_text, main
from hypo_train.config import Config, load_config

LOOP = "docs/plain_loop.md"
EXTENDING = "docs/extending.md"  # tests/train/test_extending.py runs its blocks and commands
SUBCOMMANDS = ("demo", "evaluate", "export", "judge", "report")
# Small enough for a test, whatever the recipe says.
SHORT = ["--max_steps", "1", "--max_prompt_length", "64", "--max_completion_length", "8", "--num_eval_prompts", "2"]
SHORT += ["--per_device_train_batch_size", "2", "--bf16", "false", "--report_to", "none"]


def ids(words):
    return " ".join(words) or "alone"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    (folder / "recipe.yaml").write_text(blocks("yaml", "README.md")[0].text, encoding="utf-8")
    return folder


@pytest.fixture
def at_work(workplace, monkeypatch):
    """Change to the workplace, offline, with a cache of its own and README's settings as recipe.yaml."""
    import datasets
    import huggingface_hub
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(workplace / "tensorboard"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield workplace
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def finished_run(at_work):
    """Train README's recipe for a step into the folder that the pages evaluate."""
    if not (at_work / "runs/hypo/final").exists():
        assert main(["--config", "recipe.yaml", "--output_dir", "runs/hypo", *SHORT]) == 0
    return at_work


def test_readme_has_at_most_150_lines():
    assert len(text_of("README.md").splitlines()) <= 150


def test_every_block_has_a_language_that_is_checked():
    languages = ("python", "yaml", "bash", "json", "text", "bibtex")
    assert [str(block) for block in blocks() if block.language not in languages] == []


# Python


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")} - {LOOP, EXTENDING}))
def test_the_python_blocks_of_a_page_run(page):
    namespace = {"__name__": "__main__"}
    if page.endswith("trl.md"):
        pytest.importorskip("trl", reason="needs trl, which needs Python 3.11")
    for block in blocks("python", page):
        exec(compile(block.text, str(block), "exec"), namespace)


def test_the_plain_loop_has_less_than_30_lines():
    [block] = blocks("python", LOOP)
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) < 30
    assert sum("import" in line and "hypo_" in line for line in lines) == 3


@pytest.mark.usefixtures("at_work")
def test_the_plain_loop_trains():
    [block] = blocks("python", LOOP)
    code = block.text
    for written, small in {"lr=1e-6": "lr=1e-3", "range(0, len(pairs) - 3, 4)": "range(0, 24, 4)"}.items():
        assert code.count(written) == 1
        code = code.replace(written, small)
    loop = {}
    exec(compile(code, LOOP, "exec"), loop)
    out, tree, policy = (loop[name] for name in ("out", "tree", "policy"))
    assert loop["step"] == 5
    assert out.kl.abs().max() > 0, "the policy has left its reference"
    weights = (policy.lm_head.weight.detach(), tree.targets, tree.cu_seqlens)
    with torch.no_grad():
        logps_after_step = sequence_logprobs(loop["hidden_states"](policy, tree), *weights)
    log_ratios = logps_after_step - out.ref_logps
    assert (log_ratios[:4] - log_ratios[4:8]).mean() * 0.1 > out.margins.mean(), "its last step has raised the margin"


# Settings and data


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_yaml_block_is_a_configuration(block):
    Path("fragment.yaml").write_text(block.text, encoding="utf-8")
    required = {"model_name_or_path": MODEL, "dataset_name": "data.jsonl"}
    missing = [f"--{name}={value}" for name, value in required.items() if name not in block.text]
    load_config(["--config", "fragment.yaml", *missing])


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_json_block_is_a_row_that_trains(block, capsys):
    row = json.loads(block.text)
    Path("row.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    algorithm = "sft" if "completion" in row else "dpo"
    flags = ["--model_name_or_path", MODEL, "--dataset_name", "row.jsonl", "--algorithm", algorithm, "--dry-run"]
    assert main(flags) == 0
    assert "1 of 1 rows used" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "hypo_train" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_a_configuration(path):
    config = load_config(["--config", str(path)])
    assert (ROOT / config.dataset_name).is_file()


@pytest.mark.usefixtures("finished_run")
def test_every_logged_metric_is_documented():
    lines = Path("runs/hypo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name.removeprefix("eval_") for line in lines for name in json.loads(line)} - {"step"}
    assert {name for name in names if f"`{name}`" not in text_of("docs/metrics.md")} == set()


def test_the_api_page_names_everything_public():
    names = [*hypo_kernels.__all__, *hypo_kernels.HypoLoss._fields]
    assert [name for name in names if not re.search(rf"[`.]{name}\b", text_of("docs/hypo_kernels.md"))] == []


# Commands

KINDS = (
    "make",
    "pip install",
    "python -c",
    "python -m hypo_train",
    "python -m pytest",
    "python -m benchmarks",
    "python tests/",
    "hypo-train",
    "pre-commit",
    "torchrun",
)


def test_every_command_is_of_a_kind_that_is_checked():
    assert [line for line in map(" ".join, commands()) if not line.startswith(KINDS)] == []


@pytest.mark.parametrize("words", commands_that("make"), ids=ids)
def test_a_make_command_has_a_recipe(words):
    dry = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("words", commands_that("pip install"), ids=ids)
def test_pip_is_given_files_and_extras_that_exist(words):
    options = dict(pairwise(words))
    for flag in ("-c", "--constraint", "-r", "--requirement"):
        assert flag not in options or (ROOT / options[flag]).is_file()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    asked = {extra for word in words for names in re.findall(r"\[(.*)\]", word) for extra in names.split(",")}
    assert asked <= set(extras)


def test_install_page_lists_every_extra():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE)
    assert [extra for extra in extras if f"| `{extra}` |" not in text_of("docs/install.md")] == []


@functools.cache
def help_of(*command):
    """Return the help page of a command of ours."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def check_flags(words, page):
    assert [flag for flag in flags(words) if not re.search(rf"{flag.replace('-', '[-_]')}\b", page)] == []


def training_commands():
    elsewhere = commands(EXTENDING)
    found = commands_that("python -m hypo_train")
    return [
        words
        for words in found
        if words and words[0] not in SUBCOMMANDS and ["python", "-m", "hypo_train", *words] not in elsewhere
    ]


def settings_of(words):
    """Return the words of a training command without the flags of a dry run."""
    settings, kept = [], True
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            kept = name in Config.model_fields or name in ("config", "resume")
        if kept:
            settings.append(word)
    return settings


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("words", training_commands(), ids=ids)
def test_a_training_command_is_understood(words):
    check_flags(words, help_text())
    if "--help" not in words:
        load_config(settings_of(words))


def commands_that_train():
    return [words for words in training_commands() if words in commands_that("python -m hypo_train", "README.md")]


@pytest.mark.parametrize("words", commands_that_train(), ids=ids)
def test_a_training_command_of_readme_runs(words, at_work, capsys):
    trains = "--dry-run" not in words
    folder = f"runs/{len(list(at_work.glob('runs/*')))}"
    assert main([*words, *SHORT, "--output_dir", folder]) == 0
    assert ("model saved in" in capsys.readouterr().out) == trains


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("words", commands_that("torchrun"), ids=ids)
def test_a_torchrun_command_is_understood(words):
    parser = get_args_parser()
    if "--shutdown-timeout" in words and "--shutdown-timeout" not in parser.format_help():
        pytest.skip("torch 2.11 has no --shutdown-timeout")
    launched = parser.parse_args(words)
    assert (launched.module, launched.training_script) == (True, "hypo_train")
    load_config(launched.training_script_args)


def test_the_flags_of_a_subcommand_are_in_its_help():
    for name in SUBCOMMANDS:
        for words in commands_that(f"python -m hypo_train {name}"):
            check_flags(words, help_of(name))


@pytest.mark.usefixtures("finished_run")
def test_evaluate_writes_samples_and_judge_compares_them():
    assert ["runs/hypo"] in commands_that("python -m hypo_train evaluate")
    assert main(["evaluate", "runs/hypo"]) == 0
    shutil.copytree("runs/hypo", "runs/dpo")
    [words] = [words for words in commands_that("python -m hypo_train judge") if "runs/hypo-vs-dpo" in words]
    assert main(["judge", *words]) == 0
    assert Path("runs/hypo-vs-dpo/summary.json").is_file()


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train report"), ids=ids)
def test_a_report_command_writes_a_page(words):
    for run in words:
        if not Path(run).exists():
            shutil.copytree("runs/hypo", run)
    assert main(["report", *words]) == 0
    assert Path("report.html" if len(words) > 1 else f"{words[0]}/report.html").is_file()


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train export"), ids=ids)
def test_an_export_command_writes_a_model(words):
    assert main(["export", *words]) == 0
    folder = Path(words[words.index("--output_dir") + 1])
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


@pytest.mark.parametrize("words", commands_that("python -c"), ids=ids)
def test_a_python_command_runs(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["-c", *words[1:]])
    exec(compile(words[0], "python -c", "exec"), {})
    assert capsys.readouterr().out


def test_every_script_of_a_command_exists():
    scripts = [words[1] for words in commands() if words[0] == "python" and words[1].endswith(".py")]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.slow  # a process a program
def test_the_flags_of_other_programs_are_in_their_help():
    programs = {}
    for words in commands():
        if words[:2] == ["python", "-m"] and words[2] != "hypo_train":
            programs.setdefault(tuple(words[2 : 4 if words[2] == "pytest" else 3]), []).extend(flags(words))
    for program, used in programs.items():
        command = [sys.executable, "-m", *program, "--help"]
        page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert page.returncode == 0, page.stderr
        check_flags(used, page.stdout)


# Shell scripts that replace Slurm's programs and python in the test; each appends its arguments to a file.
SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> said; fi',
    "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@"; done',
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $@" >> said; exit 143',
}


def test_the_slurm_script_starts_all_and_requeues_a_stopped_job(at_work):
    [script] = [block.text for block in blocks("bash", "docs/many_devices.md") if "#SBATCH" in block.text]
    programs = at_work / "slurm"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "both"}
    subprocess.run(["bash", "-c", script], cwd=programs, env=os.environ | path, check=True, timeout=60)
    *tasks, requeued = (programs / "said").read_text(encoding="utf-8").splitlines()
    assert requeued == "requeue 7"
    for rank, task in enumerate(tasks):
        *variables, _, module, rest = task.split(maxsplit=7)
        assert (variables, module) == ([str(rank), str(rank), "2", "first", "29500"], "hypo_train")
        load_config(rest.split())
    assert len(tasks) == 2


# Links and the site


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.slow  # builds the site
def test_the_site_loads_nothing_from_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, timeout=300)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert re.findall(r'(?:src|<link[^>]*href)="?(?:https?:)?//[^ >]+', page.read_text(encoding="utf-8")) == [], (
            page
        )
