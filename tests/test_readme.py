"""What README says works: its code runs, its configurations load, its commands do what they say.

Where a command is cheap it runs, with a small model under the name that README has; of any other one every flag must
be one that its program knows. A command that this test does not know how to check fails it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from stand_in import ROOT, make_workplace
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

from hypo_kernels import sequence_logprobs
from hypo_train.__main__ import main
from hypo_train.config import load_config
from hypo_train.evaluation.settings import load_settings as evaluate_settings
from hypo_train.invocation import take_dry_run
from hypo_train.judges.settings import load_settings as judge_settings

LOOP = "docs/plain_loop.md"
DEVICES = "docs/many_devices.md"
# Small enough for a test, whatever the recipe says.
SHORT = ["--max_steps", "1", "--max_prompt_length", "64", "--max_completion_length", "8", "--num_eval_prompts", "2"]
SHORT += ["--per_device_train_batch_size", "2", "--bf16", "false", "--report_to", "none"]


@functools.cache
def text_of(name="README.md"):
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def blocks(*languages, name="README.md"):
    """The fenced blocks of a file in a language, each under the number of its first line."""
    text = text_of(name)
    found = re.finditer(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [pytest.param(match[1], id=f"{name}, line {text[: match.start(1)].count(chr(10)) + 1}") for match in found]


def commands(name="README.md"):
    """The commands of the shell blocks as lists of words, without comments, variables in front and line breaks."""
    joined = "".join(block.values[0] for block in blocks("bash", "sh", "console", name=name)).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [_without_variables(line) for line in words if line]


def _without_variables(words):
    first = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
    return words[first:]


def commands_that(start, name="README.md"):
    """Those that begin so, without it."""
    start = start.split()
    found = [words[len(start) :] for words in commands(name) if words[: len(start)] == start]
    return [pytest.param(words, id=" ".join(words) or "alone") for words in found]


OTHER_COMMANDS = ("demo", "evaluate", "export", "judge", "report")


def training_commands():
    found = commands_that("python -m hypo_train")
    return [command for command in found if command.values[0][:1] not in [[name] for name in OTHER_COMMANDS]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def at_work(workplace, monkeypatch):
    """In the workplace, offline, with a cache of its own, and README's configuration as recipe.yaml."""
    import datasets
    import huggingface_hub
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(workplace / "tensorboard"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(workplace / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    [recipe] = [block.values[0] for block in blocks("yaml") if "dataset_name:" in block.values[0]][:1]
    (workplace / "recipe.yaml").write_text(recipe, encoding="utf-8")
    yield workplace
    AcceleratorState._reset_state(reset_partial_state=True)


def test_readme_has_code_settings_and_commands():
    assert blocks("python")
    assert blocks("yaml")
    assert commands()


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("code", [*blocks("python"), *blocks("python", name="docs/trl.md")])
def test_a_python_block_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_yaml_block_is_a_configuration(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    load_config(["--config", str(path)])


# The plain loop


def test_the_plain_loop_has_less_than_thirty_lines_and_needs_three_imports_of_ours():
    [block] = blocks("python", name=LOOP)
    lines = [line for line in block.values[0].splitlines() if line.strip()]
    assert len(lines) < 30
    assert sum("import" in line and "hypo_" in line for line in lines) == 3


@pytest.mark.usefixtures("at_work")
def test_the_plain_loop_trains():
    [block] = blocks("python", name=LOOP)
    code = block.values[0]
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
        again = sequence_logprobs(loop["hidden_states"](policy, tree), *weights)
    log_ratios = again - out.ref_logps
    assert (log_ratios[:4] - log_ratios[4:8]).mean() * 0.1 > out.margins.mean(), "its last step has raised the margin"


# Commands


def test_every_command_is_of_a_kind_that_is_checked():
    kinds = ("make", "pip", "python -m hypo_train", "python -m pytest", "python -m benchmarks", "git clone", "cd ")
    kinds += ("torchrun --nproc_per_node 8 -m hypo_train --config",)
    assert [words for words in map(" ".join, commands()) if not words.startswith(kinds)] == []


@pytest.mark.parametrize("words", commands_that("make"))
def test_a_make_command_has_a_recipe(words):
    found = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("words", commands_that("pip install"))
def test_an_installation_names_files_and_extras_that_are_there(words):
    options = dict(pairwise(words))
    for flag in ("-c", "--constraint", "-r", "--requirement"):
        assert flag not in options or (ROOT / options[flag]).is_file()
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    asked = {extra for word in words for names in re.findall(r"\[(.*)\]", word) for extra in names.split(",")}
    assert asked <= extras


@pytest.mark.parametrize("words", training_commands())
def test_a_training_command_runs(words, at_work, capsys):
    if not words:
        return  # the demo takes minutes, and has tests of its own
    if "--help" in words:
        assert main(words) == 0
        assert "usage: python -m hypo_train" in capsys.readouterr().out
        return
    dry_run, rest = take_dry_run(words)
    load_config(rest)
    own_folder = [] if dry_run is not None else ["--output_dir", f"runs/{len(list(at_work.glob('runs/*')))}"]
    assert main([*words, *SHORT, *own_folder]) == 0
    assert ("model saved in" in capsys.readouterr().out) == (dry_run is None)


@pytest.fixture
def finished_run(at_work):
    """README's run, short, in the folder that its evaluations name."""
    if not (at_work / "runs/hypo/final").exists():
        assert main(["--config", "recipe.yaml", "--output_dir", "runs/hypo", *SHORT]) == 0
    return at_work


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train evaluate"))
def test_an_evaluation_command_runs_or_is_understood(words):
    evaluate_settings(words)
    if len(words) == 1:
        assert main(["evaluate", *words]) == 0
        assert Path(words[0], "evaluation", "samples.jsonl").is_file()


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train report"))
def test_a_reporting_command_writes_a_page(words):
    for run in words:
        if not Path(run).exists():  # the same run stands for another one
            shutil.copytree("runs/hypo", run)
    assert main(["report", *words]) == 0
    assert Path("report.html" if len(words) > 1 else f"{words[0]}/report.html").is_file()


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train export"))
def test_an_export_command_writes_a_model(words):
    assert main(["export", *words]) == 0
    folder = Path(words[words.index("--output_dir") + 1])
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("words", commands_that("torchrun --nproc_per_node 8 -m hypo_train"))
def test_a_command_for_several_processes_is_understood(words):
    load_config(words)


# Several devices


def test_every_command_for_several_devices_is_of_a_kind_that_is_checked():
    kinds = ("python -m hypo_train --config", "torchrun", "export MASTER_", "srun bash -c", "if [ $? -eq 143 ]")
    assert [words for words in map(" ".join, commands(DEVICES)) if not words.startswith(kinds)] == []


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("words", commands_that("torchrun", DEVICES))
def test_a_launchers_flags_are_torchruns_and_the_rest_is_understood(words):
    launched = get_args_parser().parse_args(words)
    assert (launched.module, launched.training_script) == (True, "hypo_train")
    load_config(launched.training_script_args)


@pytest.mark.usefixtures("at_work")
@pytest.mark.parametrize("words", commands_that("python -m hypo_train", DEVICES))
def test_a_dry_run_for_several_devices_is_understood(words):
    dry_run, rest = take_dry_run(words)
    assert dry_run.num_devices > 1
    assert load_config(rest).fsdp


# What stands in for Slurm's programs and for python, which was told to stop: each writes down what it was given.
SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> said; fi',
    "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@"; done',
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $@" >> said; exit 143',
}


def test_the_slurm_script_starts_every_process_and_puts_a_stopped_job_in_the_queue_again(at_work):
    [script] = [block.values[0] for block in blocks("bash", name=DEVICES) if "#SBATCH" in block.values[0]]
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


@pytest.mark.parametrize("words", commands_that("python -m hypo_train judge"))
def test_a_judging_command_is_understood(words, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "none")
    judge_settings(words)


def test_the_flags_of_every_other_program_are_in_its_help():
    checked = {}
    for words in commands():
        if words[:2] != ["python", "-m"] or (words[2] == "hypo_train" and words[3:4] != ["demo"]):
            continue
        program = words[2 : 4 if words[2] in ("hypo_train", "pytest") else 3]
        checked.setdefault(tuple(program), set()).update(word.split("=")[0] for word in words if word.startswith("--"))
    for program, flags in checked.items():
        command = [sys.executable, "-m", *program, "--help"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr
        assert {flag for flag in flags if not re.search(rf"{flag}\b", found.stdout)} == set(), program


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of()))))
def test_a_link_leads_to_a_file_that_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "hypo_train" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_a_configuration(path):
    config = load_config(["--config", str(path)])
    assert (ROOT / config.dataset_name).is_file()
