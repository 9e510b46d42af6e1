"""``--dry-run`` as its user meets it: a page of what a run would do, or a line for every reason why it would not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from hypo_train import preflight
from hypo_train.cli import main
from hypo_train.config import ConfigError
from hypo_train.dry_run import DryRun, take_dry_run
from hypo_train.preflight import hub, memory
from hypo_train.prepare import prepare

RECIPES = Path(preflight.__file__).parents[1] / "recipes"
PYTHIA = "EleutherAI/pythia-1.4b-deduped"


def without_weights(folder, source, **changes):
    """A model's folder before its weights are there: config and tokenizer."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    if changes:
        tiny.new_config("llama", **changes).save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(hub.socket, "create_connection", refuse)


@pytest.fixture(autouse=True)
def no_memory_estimate():
    """Here there is one."""


@pytest.fixture
def dry_run(settings, saved_model, tmp_path, capfd):
    """``dry_run("--flag", field=value)`` -> (exit status, page, problems), of the tiny run without its weights."""
    model = without_weights(tmp_path / "model", saved_model())

    def run(*flags, **changes):
        values = {**settings(model=model).model_dump(exclude_defaults=True), **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        status = main(["--config", str(path), "--dry-run", *flags])
        out, err = capfd.readouterr()
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
        lines = [line.removeprefix("hypo_train: ") for line in err.splitlines() if line.startswith("hypo_train: ")]
        return status, out, lines

    return run


def lines_of(page, title):
    """What the page says under a title."""
    part = next(part for part in page.split("\n\n") if part.startswith(title + "\n"))
    return [line.strip() for line in part.splitlines()[1:]]


# The page


def test_the_page_of_a_run_without_weights(dry_run, tmp_path):
    status, page, problems = dry_run(num_eval_rows=4, seed=3)
    assert (status, problems) == (0, [])
    assert page.startswith("dry run: nothing was trained or written, and no weights were read\n")
    assert lines_of(page, "model") == [
        f"config of {tmp_path}/model: local folder",
        "LlamaForCausalLM, 2 layers, 17,888 parameters",
        "training 17,888 of them (100.0%): all",
        "completions share their prompt (checked on a tiny model of the architecture)",
        "computing in float32 (bf16: false)",
    ]
    steps = lines_of(page, "steps")
    assert steps[0] == "hypo: 3 steps of 4 pairs in one micro-batch, 0.6 epochs"
    assert "2 samples of each prompt, of up to 8 tokens" in steps
    assert f"output in {tmp_path}/run" in steps
    assert lines_of(page, "data")[0] == "train: 20 of 20 rows used"
    assert "eval: 4 of 4 rows used" in lines_of(page, "data")
    names = [line.split("  ")[0] for line in lines_of(page, "memory")]
    assert "trained weights (float32)" in names
    assert "the reference's copy of trained weights" in names
    assert "the sampler's keys and values" in names
    assert any("the weights themselves" in line for line in lines_of(page, "not checked"))


def test_the_page_counts_what_the_run_does(settings, saved_model):
    config, page = settings(num_layers_unfrozen=1), []
    found = preflight.check(config, DryRun())
    run = prepare(config, show=page.extend)
    trained = sum(p.numel() for p in run.trained.trained_parameters().values())
    everything = sum(p.numel() for p in run.trained.parameters())
    assert found.model[1:3] == [
        f"LlamaForCausalLM, 2 layers, {everything:,} parameters",
        f"training {trained:,} of them ({trained / everything:.1%}): "
        "the last 1 layers, the final norm and an untied head",
    ]
    assert found.steps[0].startswith(f"hypo: {run.plan.total_steps} steps of {run.plan.batch_size} pairs")
    found.unchecked.clear()
    dry, sizes = found.page(), page.index("memory")  # what is free there changes
    assert page[:sizes] == dry[: dry.index("memory")]
    assert page[sizes + 1].split(" of ")[0] == f"  {found.memory[-1]}".split(" of ")[0]


def test_the_largest_micro_batch_is_the_one_of_most_tokens(settings):
    run = prepare(settings(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=9))
    sizes = []
    for step in range(run.plan.total_steps):
        rows = run.plan.rows_of_step(step)
        lengths = [run.plan.train_rows[i].num_tokens + 2 * 8 for i in rows]
        sizes += [sum(lengths[part]) for part in run.plan.micro_batches(lengths)]
    largest = run.plan.largest_micro_batch
    assert largest.tokens == sum(run.plan.train_rows[i].num_tokens + 2 * 8 for i in largest.rows) == max(sizes)


def test_only_online_prompts_count_their_samples(settings):
    run = prepare(settings(online_fraction=0.25, num_generations=3))
    largest = run.plan.largest_micro_batch
    assert largest.num_online == 1
    assert largest.tokens == sum(run.plan.train_rows[i].num_tokens for i in largest.rows) + 3 * 8


@pytest.mark.parametrize(("budget", "rows"), [(None, 4), (1, 1), (10_000, 24)])
def test_no_steps_are_checked_for_an_impossible_micro_batch(settings, budget, rows):
    everything = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}  # in every step
    run = prepare(settings(max_tokens_per_micro_batch=budget, max_steps=10**12, **everything))
    assert run.plan.largest_micro_batch.rows == run.plan.rows_of_step(0)[:rows]


def test_memory_can_be_estimated_for_a_gpu_that_is_not_here(dry_run):
    status, page, _ = dry_run("--dry_run_device", "cuda", bf16=True)
    assert status == 0
    memory = lines_of(page, "memory")
    assert memory[0].startswith("GiB on cuda, computing in bfloat16")
    if not torch.cuda.is_available():
        assert memory[-1].endswith("fits a device of 24 GiB, with 10% left free")


def test_too_little_memory_is_a_warning_that_says_what_to_change(dry_run, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: int(0.3 * 2**20))
    status, page, _ = dry_run()
    assert status == 0
    (warning,) = lines_of(page, "warnings")
    assert warning.startswith("memory: ")
    assert "per_device_train_batch_size" in warning or "use_peft: true" in warning


def test_settings_that_are_seldom_meant_are_warned_of(dry_run):
    _, page, _ = dry_run(top_k=5)
    assert any(line.startswith("top_k=5") for line in lines_of(page, "warnings"))


def test_an_architecture_whose_attention_takes_no_trees_says_so(dry_run):
    _, page, _ = dry_run(attn_implementation="sdpa")
    assert "each completion is trained on in a row of its own: sdpa attention takes no trees" in lines_of(page, "model")


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ipo", "rloo", "reward"])
def test_every_algorithm_has_a_page(dry_run, algorithm):
    extra = {"reward": "tiny:reward_of_length"} if algorithm == "rloo" else {}
    status, page, problems = dry_run(algorithm=algorithm, kl_coef=1e-4, **extra)
    assert (status, problems) == (0, [])
    assert lines_of(page, "steps")[0].startswith(f"{algorithm}: 3 steps")
    assert lines_of(page, "memory")[-1].startswith("at least ")


# What a run would be refused for


def test_a_missing_column_is_a_problem(dry_run, tmp_path):
    data = tiny.write_rows(tmp_path / "other.jsonl", [{"prompt": "film", "chosen": "good"}] * 4)
    status, page, problems = dry_run(dataset_name=str(data))
    assert status == 2
    assert len(problems) == 1
    assert problems[0].endswith("the columns are 'prompt', 'chosen'")
    assert "LlamaForCausalLM, 2 layers" in page, "the model is looked at all the same"
    assert lines_of(page, "memory")[-1].startswith("at least ")
    assert any("rows of the maximal length" in line for line in lines_of(page, "warnings"))


def test_more_layers_than_there_are_is_a_problem(dry_run):
    status, page, problems = dry_run(num_layers_unfrozen=3)
    assert (status, problems) == (2, ["num_layers_unfrozen=3: LlamaForCausalLM has 2 layers"])
    assert lines_of(page, "data")[0] == "train: 24 of 24 rows used"


def test_lora_targets_that_are_not_found_are_a_problem(dry_run):
    status, _, problems = dry_run(use_peft=True, lora_target_modules=["nowhere"])
    assert status == 2
    assert len(problems) == 1
    assert problems[0].startswith("lora_target_modules=['nowhere']: LlamaForCausalLM has no module 'nowhere'")


def test_a_window_that_is_too_short_is_a_problem(dry_run):
    status, _, problems = dry_run(max_prompt_length=512)
    assert status == 2
    assert problems[0].startswith("LlamaForCausalLM has 128 positions")


def test_a_used_output_dir_and_a_bad_reward_are_two_problems(dry_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    status, page, problems = dry_run(reward="no_such_module:reward")
    assert status == 2
    assert len(problems) == 2
    assert "already holds a run" in problems[0]
    assert problems[1].startswith("reward='no_such_module:reward'")
    assert lines_of(page, "memory")


def test_a_checkpoint_that_is_not_there_is_a_problem(dry_run):
    (problem,) = dry_run(resume_from_checkpoint="runs/no")[2]
    assert problem.startswith("resume_from_checkpoint='runs/no': there is no such folder: ")


def test_mistakes_in_the_settings_come_before_everything(dry_run):
    status, page, problems = dry_run(learning_rte=1)
    assert (status, page) == (2, "")
    assert problems[0].startswith("1 problem in the configuration: unknown key 'learning_rte'")


# A model that is not there yet


def test_a_chain_of_runs_is_checked_before_its_first_run(dry_run, tmp_path):
    recipe = "algorithm: {}\nmodel_name_or_path: {}\ndataset_name: pairs.jsonl\noutput_dir: runs/chain/{}\n"
    start = f"{tmp_path}/model"
    (tmp_path / "a.yaml").write_text(recipe.format("sft", start, "sft"), encoding="utf-8")
    (tmp_path / "b.yaml").write_text(recipe.format("dpo", "runs/chain/sft/final", "dpo"), encoding="utf-8")
    status, page, problems = dry_run(model_name_or_path="runs/chain/dpo/final")
    assert (status, problems) == (0, [])
    assert lines_of(page, "model")[:2] == [
        f"runs/chain/dpo/final is no folder here ({tmp_path}/b.yaml makes it): {start} stands in for it",
        f"config of {start}: local folder",
    ]
    assert any(line.startswith("train: prompt tokens: ") for line in lines_of(page, "data"))


def test_a_model_that_no_recipe_makes_is_a_problem(dry_run):
    status, page, problems = dry_run(model_name_or_path="runs/chain/sft/final")
    assert (status, problems) == (
        2,
        [
            "model_name_or_path: there is no folder 'runs/chain/sft/final': --dry_run_model NAME names a model that "
            "stands in for it in a dry run"
        ],
    )
    assert lines_of(page, "data")[0] == "train: 24 of 24 rows used", "the texts are looked at all the same"


def test_another_model_stands_in_for_one_that_is_not_there_yet(dry_run, tmp_path):
    status, page, _ = dry_run("--dry_run_model", str(tmp_path / "model"), model_name_or_path="runs/chain/sft/final")
    assert status == 0
    assert lines_of(page, "model")[:2] == [
        f"runs/chain/sft/final is no folder here: {tmp_path}/model stands in for it",
        f"config of {tmp_path}/model: local folder",
    ]
    assert any(line.startswith("train: prompt tokens: ") for line in lines_of(page, "data"))


def test_a_built_in_architecture_needs_no_hub_and_no_lengths(dry_run):
    changes = {"model_name_or_path": PYTHIA, "num_layers_unfrozen": 2, "dtype": "bfloat16", "bf16": True}
    status, page, _ = dry_run("--dry_run_device=cuda", **changes)
    assert status == 0
    assert lines_of(page, "model")[:2] == [
        f"config of {PYTHIA}: built in, the Hub was not reached",
        "GPTNeoXForCausalLM, 24 layers, 1,414,647,808 parameters",
    ]
    assert lines_of(page, "data") == ["train: 24 of 24 rows used"]
    assert any("lengths are unknown" in line for line in lines_of(page, "warnings"))
    assert any(line.startswith("tokens of the data") for line in lines_of(page, "not checked"))


def test_a_model_name_that_cannot_be_resolved_is_a_problem(dry_run):
    status, _, problems = dry_run(model_name_or_path="someone/some-model")
    assert status == 2
    assert problems[0].startswith("cannot read the config of 'someone/some-model': no local folder, and from the Hub: ")


def test_a_missing_reward_model_is_counted_as_the_policy(dry_run):
    status, page, _ = dry_run(algorithm="rloo", reward_model_path="runs/chain/reward/final")
    assert status == 0
    line = "reward model runs/chain/reward/final: does not exist yet, counted with the policy's architecture"
    assert line in lines_of(page, "model")
    assert any(line.startswith("the reward model ") for line in lines_of(page, "memory"))


def test_a_shipped_recipe_runs_dry_with_a_local_stand_in(saved_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(RECIPES.parents[1])
    model = without_weights(tmp_path / "model", saved_model(chat=True), max_position_embeddings=512)
    recipe = "hypo_train/recipes/smollm2-lora.yaml"
    flags = ["--dry-run", "--dry_run_model", str(model), "--output_dir", str(tmp_path / "run")]
    assert main(["--config", recipe, *flags]) == 0
    page, _ = capfd.readouterr()
    assert lines_of(page, "steps")[0].startswith("hypo: 20 steps of 4 pairs in 2 micro-batches of 2")
    assert " of 138 rows used" in lines_of(page, "data")[0]


def test_a_reward_model_on_an_unreachable_hub_is_not_checked(dry_run):
    status, page, _ = dry_run(algorithm="rloo", reward_model_path="someone/some-reward-model")
    assert status == 0
    assert "reward model someone/some-reward-model and its memory: the Hub was not reached" in lines_of(
        page, "not checked"
    )


# The flags


def test_the_flags_of_a_dry_run_are_taken_out_of_the_others():
    argv = ["--config", "a.yaml", "--dry-run", "--beta", "1", "--dry_run_model=m", "--dry-run-device", "cuda", "--bf16"]
    dry, rest = take_dry_run(argv)
    assert dry == DryRun(recipe="a.yaml", model="m", device="cuda")
    assert rest == ["--config", "a.yaml", "--beta", "1", "--bf16"]
    assert take_dry_run(["--beta", "1"]) == (None, ["--beta", "1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dry_run_model", "m"], "--dry_run_model is for dry runs alone: add --dry_run"),
        (["--dry_run", "x"], "dry_run='x': should be a valid boolean, unable to interpret input"),
        (["--dry_run", "--dry_run_model"], "dry_run_model='': needs a value"),
        (
            ["--dry_run", "--dry_run_device", "tpu"],
            "dry_run_device='tpu': should be 'cuda', 'cpu', 'A100', 'H100', 'H200', 'B200' or 'L40S'",
        ),
        (["--dry_run", "--num_devices", "0"], "num_devices='0': should be greater than 0"),
        (["--num_devices", "8"], "--num_devices is for dry runs alone: add --dry_run"),
        (["--dry_run", "--dry-run"], "--dry_run is given more than once"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(argv, message):
    with pytest.raises(ConfigError) as caught:
        take_dry_run(argv)
    assert str(caught.value).removeprefix("1 problem in the command line: ") == message


def test_help_mentions_the_dry_run(capsys):
    assert main(["--help"]) == 0
    assert "--dry-run " in capsys.readouterr().out
