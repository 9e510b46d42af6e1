"""Two processes train as one does: the same rows, samples, losses and weights, however they divide the work."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from ranks import WORLD, assert_logged_alike, assert_saved_alike, launch
from tiny import make_config, new_model, save

from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics
from hypo_train.train import train

pytestmark = pytest.mark.timeout(0)  # ranks.py waits by the processes' progress
FULL = {"learning_rate": 1e-3}
LORA = {"use_peft": True, "lora_r": 4}
LAST = {"num_layers_unfrozen": 1}
KL_COEF = 0.05  # of make_config
RLOO = {"algorithm": "rloo", "reward": "tiny:reward_of_length", "beta": 0.1}
HEAD_TOO = {"lora_target_modules": ["q_proj", "lm_head"]}
VOCAB = {"fsdp": True, "vocab_parallel": True}
MICRO = {"max_tokens_per_micro_batch": 60}
EXACT = {"kl_estimator": "exact"}
UNEQUAL = {"num_eval_rows": 5}  # 19 rows, 4 a step: in the last one, a process has two rows and the other has one
# With the reason for each.
QUICK = {
    "hypo, micro-batches": {
        **FULL,
        **MICRO,
        **UNEQUAL,
    },  # DDP: each rank samples, gradients are reduced after the last micro-batch
    "fsdp, exact KL, LoRA": {**LORA, "fsdp": True, **EXACT},  # a reference that is the sharded model without adapter
    "fsdp, micro-batches, tied head": {
        **FULL,
        "fsdp": True,
        **MICRO,
        **UNEQUAL,
    },  # a parameter of two modules; swapped copies
    "fsdp, one online prompt": {**FULL, "fsdp": True, "online_fraction": 0.25},  # one of the ranks draws nothing
    "vocab-parallel, exact KL, last layer": {**LAST, **VOCAB, **EXACT},  # a reference head in shards
}
SLOW = {
    "hypo": FULL,
    "hypo, exact KL, LoRA": {**LORA, **EXACT},
    "hypo, LoRA, samples drawn ahead": {**LORA, "rollout_steps": 3},
    "hypo, last layer": LAST,
    "hypo, a third online, drawn ahead": {**FULL, **MICRO, "online_fraction": 0.3, "rollout_steps": 3},
    "dpo, GPT-NeoX": {"algorithm": "dpo", **FULL},
    "ipo, LoRA": {"algorithm": "ipo", **LORA},
    "rloo": {**RLOO, **FULL},
    "reward": {"algorithm": "reward", **FULL},
    "sft": {"algorithm": "sft", **FULL},
    "fsdp": {**FULL, "fsdp": True},
    "fsdp, exact KL, last layer, checkpointing": {**LAST, "fsdp": True, **EXACT, "gradient_checkpointing": True},
    "fsdp, dpo, GPT-NeoX": {"algorithm": "dpo", **FULL, "fsdp": True},
    "fsdp, separate rows": {**FULL, "fsdp": True, "attn_implementation": "sdpa"},
    "fsdp, reward": {"algorithm": "reward", **FULL, "fsdp": True},
    "fsdp, sft": {"algorithm": "sft", **FULL, "fsdp": True},
    "vocab-parallel, micro-batches, tied head": {**FULL, **VOCAB, **MICRO},
    "vocab-parallel, exact KL, LoRA, head too": {**LORA, **VOCAB, **EXACT, **HEAD_TOO},
    "vocab-parallel, dpo, GPT-NeoX": {"algorithm": "dpo", **FULL, **VOCAB},
    "vocab-parallel, ipo, phi": {"algorithm": "ipo", **FULL, **VOCAB},  # the head has a bias
    "vocab-parallel, rloo, drawn ahead": {**RLOO, **FULL, **VOCAB, "rollout_steps": 3},
    "vocab-parallel, sft": {"algorithm": "sft", **FULL, **VOCAB},
    "separate rows": {**FULL, "attn_implementation": "sdpa"},
}
STEPS = {"quick": 5, "slow": 20}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def config_of(folder: Path, model: Path, case: dict[str, object], steps: int, world: int = 1) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"per_device_train_batch_size": 4 // world, "num_eval_rows": 8, "max_steps": steps, **case}
    if world == 1:
        changes |= {"fsdp": False, "vocab_parallel": False}
    # Adam divides by a gradient's size. If that is zero but for rounding, it would train on the rounding.
    return make_config(folder, model, adam_epsilon=1e-5, **changes)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, int]]:
    """``runs_of(case)`` is the case's run in one process, its run in two, and their number of steps."""
    folder = tmp_path_factory.mktemp("processes")

    @cache
    def model_of(name: str) -> Path:
        kind = next((kind for part, kind in (("NeoX", "gpt_neox"), ("phi", "phi")) if part in name), "llama")
        return save(
            new_model(kind, **({"tie_word_embeddings": True} if "tied" in name else {})), folder / f"model {name}"
        )

    @cache
    def trained(group: str) -> None:
        cases, steps = QUICK if group == "quick" else SLOW, STEPS[group]
        launch(
            folder / f"launch {group}",
            [config_of(folder / "two" / name, model_of(name), case, steps, WORLD) for name, case in cases.items()],
        )
        alone: dict[str, Path] = {}  # cases that only divide the work otherwise are one run in one process
        for name, case in cases.items():
            settings = {key: value for key, value in case.items() if key not in VOCAB}
            kind = [part for part in ("NeoX", "phi", "tied") if part in name]
            one = folder / "one" / name
            first = alone.setdefault(json.dumps([kind, settings], sort_keys=True), one)
            if first is one:
                train(config_of(one, model_of(name), case, steps), progress=False)
            else:
                one.symlink_to(first)

    def runs(name: str) -> tuple[Path, Path, int]:
        group = "quick" if name in QUICK else "slow"
        trained(group)
        return folder / "one" / name / "run", folder / "two" / name / "run", STEPS[group]

    return runs


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(name, runs_of):
    one, two, steps = runs_of(name)
    assert len(read_metrics(one / "metrics.jsonl")) == steps + 1
    # With a tied head, rounding moves a KL by 7e-5 in one process too, from one attention to another. So the tolerance
    # of 1e-5 is that of its part in the loss.
    assert_logged_alike(two, one, kl=1e-5 / KL_COEF if "tied" in name else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_save_what_one_does(name, runs_of):
    one, two, steps = runs_of(name)
    assert_saved_alike(two, one)
    samples = [run / "samples" / f"step-{steps}.jsonl" for run in (one, two)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        texts = [[json.loads(line)["completion"] for line in path.read_text().splitlines()] for path in samples]
        assert texts[0] == texts[1]
