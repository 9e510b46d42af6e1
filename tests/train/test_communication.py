"""What a step is predicted to exchange is what the collectives of a real one move, in two processes."""

import json

import pytest
from ranks import WORLD, ended, start
from stand_in import ROOT
from tiny import make_config, new_model, save, word_tokenizer
from transformers import AutoConfig

from hypo_train.data.plan import load_plan
from hypo_train.model.load import build_on_meta
from hypo_train.preflight.memory_estimate import Conditions
from hypo_train.preflight.step_time import exchanges, work_of
from hypo_train.sampling.registry import SAMPLERS
from hypo_train.utils.rank_share import RankShare

FSDP = {"fsdp": True}
BF16 = {"bf16": True}
LORA = {"use_peft": True, "lora_r": 4}
CASES = {
    "DDP, LoRA, micro-batches": {**LORA, "gradient_accumulation_steps": 2},
    "fsdp, micro-batches, samples drawn ahead": {**FSDP, "gradient_accumulation_steps": 2, "rollout_steps": 2},
    "fsdp, last 2 of 4 layers, checkpointing": {**FSDP, "num_layers_unfrozen": 2, "gradient_checkpointing": True},
    "fsdp, exact KL, bf16": {**FSDP, **BF16, "kl_estimator": "exact"},
    # Its first pass is the reference's, whose adapter is off.
    "fsdp, dpo, LoRA, bf16": {**FSDP, **LORA, **BF16, "algorithm": "dpo", "dtype": "bfloat16"},
}


def config_of(name, folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    return make_config(folder, model, **{"per_device_train_batch_size": 2, "max_steps": 3, **CASES[name]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case, trained in two processes with the bytes of its collectives beside it; 37 tokens are no even number
    of rows."""
    folder = tmp_path_factory.mktemp("communication")
    model = save(new_model("llama", num_hidden_layers=4), folder / "model")
    configs = [config_of(name, folder / name, model) for name in CASES]
    (folder / "configs.json").write_text(json.dumps([config.model_dump() for config in configs]), encoding="utf-8")
    for status, _, error in ended(start([str(ROOT / "benchmarks/scaling/recorded.py"), str(folder)])):
        assert status == 0, error
    return folder


def predicted(config):
    """Of a run's step, by phase and kind."""
    tokenizer, autocast = word_tokenizer(), bool(config.bf16)
    plan, _ = load_plan(config, tokenizer, [tokenizer.eos_token_id], RankShare(0, WORLD))
    architecture = AutoConfig.from_pretrained(config.model_name_or_path)
    trained = build_on_meta(config, architecture, device_type="cpu", autocast=autocast)
    passes = work_of(plan, Conditions("cpu", autocast, True, SAMPLERS["decode"])).passes
    found = exchanges(trained, passes, count=WORLD, sharded=config.fsdp, autocast=autocast)
    return {f"{exchange.phase} {exchange.kind}": exchange.whole for exchange in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_real_step_moves_the_bytes_that_are_predicted(name, runs):
    moved = json.loads((runs / name / "run" / "collectives.json").read_text(encoding="utf-8"))
    moved = {what: number for what, number in moved.items() if not what.startswith("forward broadcast")}  # buffers
    assert moved == pytest.approx(predicted(config_of(name, runs / name, runs / "model")))
