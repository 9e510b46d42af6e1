"""ZeRO by DeepSpeed: two processes train as one does, and as two without it."""

from pathlib import Path

import pytest
import torch
from ranks import WORLD, assert_logged_alike, assert_saved_alike, final, launch
from tiny import make_config, new_model, save

from hypo_train.config import Config
from hypo_train.train import train

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # ranks.py waits by the processes' progress
STEPS = 20
FULL = {"learning_rate": 1e-3}
AS_ONE = {
    "1, dpo": {"algorithm": "dpo", **FULL, "zero_stage": 1},
    "1, hypo, micro-batches": {**FULL, "zero_stage": 1, "max_tokens_per_micro_batch": 60},
    "2, hypo, micro-batches, tied head": {**FULL, "zero_stage": 2, "max_tokens_per_micro_batch": 60},
    "2, hypo, exact KL, LoRA": {"use_peft": True, "lora_r": 4, "kl_estimator": "exact", "zero_stage": 2},
}
# Where nothing is clipped, the two divide and add gradients in the same order.
AS_DDP = {
    "1, reward": {"zero_stage": 1, "algorithm": "reward"},
    "1, sft, LoRA on 4 bits": {"zero_stage": 1, "algorithm": "sft", "use_peft": True, "load_in_4bit": True},
    "2, last layer, checkpointing, bfloat16": {
        "zero_stage": 2,
        "bf16": True,
        "dtype": "bfloat16",
        "num_layers_unfrozen": 1,
        "gradient_checkpointing": True,
        "lr_scheduler_type": "cosine",
    },
}


def config_of(folder: Path, model: Path, changes: dict[str, object], world: int = 1) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    # Adam divides by a gradient's size: of one that is zero but for rounding, it would train on the rounding.
    settings = {"per_device_train_batch_size": 4 // world, "num_eval_rows": 8, "adam_epsilon": 1e-5}
    return make_config(folder, model, **settings, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case with ZeRO in ``zero``, and as it is compared in ``one`` or ``ddp``."""
    folder = tmp_path_factory.mktemp("deepspeed")
    model = save(new_model("llama"), folder / "llama")
    tied = save(new_model("llama", tie_word_embeddings=True), folder / "tied")
    launched = []
    for name, case in AS_ONE.items():
        case, start = {**case, "max_steps": STEPS}, tied if "tied" in name else model
        launched.append(config_of(folder / "zero" / name, start, case, WORLD))
        train(config_of(folder / "one" / name, start, case | {"zero_stage": 0}), progress=False)
    for name, case in AS_DDP.items():
        case = {**FULL, **case, "max_grad_norm": 0, "max_steps": 6}
        launched.append(config_of(folder / "zero" / name, model, case, WORLD))
        launched.append(config_of(folder / "ddp" / name, model, case | {"zero_stage": 0}, WORLD))
    for precision in ("bf16", "fp32"):  # one a start
        launch(folder / precision, [config for config in launched if config.bf16 == (precision == "bf16")])
    return folder


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_log_and_save_what_one_does_without_it(name: str, runs: Path) -> None:
    zero, one = (runs / kind / name / "run" for kind in ("zero", "one"))
    assert_logged_alike(zero, one)
    assert_saved_alike(zero, one)


@pytest.mark.parametrize("name", AS_DDP)
def test_two_processes_save_to_the_bit_what_two_do_without_it(name: str, runs: Path) -> None:
    zero, ddp = (final(runs / kind / name / "run") for kind in ("zero", "ddp"))
    assert zero.keys() == ddp.keys()
    assert all(torch.equal(value, ddp[key]) for key, value in zero.items())
