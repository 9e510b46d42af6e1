"""One whole training step of every algorithm on a fake CUDA device, under bf16 autocast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from fake_device import CUDA, FakeCuda, Record, fake_cuda
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hypo_train.build import Run, precompute_ref_logps
from hypo_train.metrics.meter import FiniteWatch, Meter
from hypo_train.model.policy import Policy
from hypo_train.optim import build_optimizer
from hypo_train.prepare import prepare
from hypo_train.step import train_step
from hypo_train.trees import flex

ALGORITHMS: dict[str, dict[str, Any]] = {
    "hypo": {},
    "hypo, exact": {"kl_estimator": "exact"},
    "dpo": {},
    "ipo": {},
    "sft": {},
    "rloo": {"reward": "tiny:reward_of_length"},
    "reward": {},
}
TUNING: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "last layer": {"num_layers_unfrozen": 1},
}
ROWS: dict[str, dict[str, Any]] = {"trees": {}, "separate rows": {"attn_implementation": "sdpa"}}


class DrawnBefore:
    """A sampler whose completions are known before the step."""

    live = True
    takes_prompt_kv = True

    def sample(self, prompts: Any, n: int, max_new_tokens: int, **_: Any) -> Any:
        completions = [[7 + i % 3, 9, 1][i % 3 :] for i in range(len(prompts) * n)]
        return SimpleNamespace(completions=lambda: completions, logprobs=None)

    def weights_changed(self, step: int) -> None: ...

    def release(self) -> None: ...


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 16 dimensions, which FlexAttention takes on CUDA."""
    model = tiny.new_model("llama", hidden_size=64, num_attention_heads=4)
    return tiny.save(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def own_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hypo_train.preflight.checks._check_memory", lambda *_, **__: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def attention(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, **options: Any) -> Tensor:
    """Stand in for FlexAttention: check dtypes, and the mask's device and size; attend to every key."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert block_mask.kv_num_blocks.device == block_mask.kv_indices.device == CUDA
    assert block_mask.seq_lengths == (query.shape[2], key.shape[2])
    assert min(query.shape[2], key.shape[2]) > 0
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=CUDA)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=options["enable_gqa"])


def onto_device(run: Run) -> Run:
    """Return the run as it would be built on a GPU: weights, reference, optimizer and watch on the device."""
    config, accelerator = run.config, run.accelerator
    PartialState._shared_state["device"] = CUDA
    accelerator.autocast = lambda *_, **__: torch.autocast("cuda", torch.bfloat16)  # type: ignore[method-assign]
    run.trained.to(CUDA)
    if isinstance(run.trained, Policy):
        run.trained.move_reference(CUDA)
    optimizer = build_optimizer(
        run.trained.trained_parameters().items(),
        optim=config.optim,
        roles=run.trained.parameter_roles,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return replace(
        run,
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=scheduler,
        finite=FiniteWatch(CUDA),
        ref_logps={name: x.to(CUDA) for name, x in run.ref_logps.items()},
    )


def one_step(
    folder: Path, model_folder: Path, patch: pytest.MonkeyPatch, capability: tuple[int, int], **settings: Any
) -> FakeCuda:
    run = prepare(tiny.make_config(folder, model_folder, **settings))
    if isinstance(run.trained, Policy):
        run = replace(run, sampler=DrawnBefore())
        precompute_ref_logps(run, progress=False)
    run.model.train()
    patch.setattr(flex, "_compiled", lambda: attention)
    with fake_cuda(capability) as device:
        run = onto_device(run)
        device.record = Record()  # of the step alone
        with run.timer.step():
            train_step(run, 0, Meter())
        for parameter in run.trained.trained_parameters().values():
            assert parameter.device == CUDA
            assert parameter.dtype == torch.float32
    return device


HOPPER = (9, 0)
CASES = [
    *((HOPPER, *case) for case in itertools.product(ALGORITHMS, TUNING, ROWS)),
    # Other architectures compile other tiles: what is launched does not depend on the tuning.
    *((capability, algorithm, "full", "trees") for capability in ((8, 0), (10, 0)) for algorithm in ALGORITHMS),
]


@pytest.mark.parametrize(("capability", "algorithm", "tuning", "rows"), CASES, ids=str)
def test_a_step_runs_on_cuda(
    capability: tuple[int, int],
    algorithm: str,
    tuning: str,
    rows: str,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_table: list[str],
) -> None:
    """A read of the device by the host raises HostRead; transformers' question about masks is not asked of fakes."""
    settings = {"algorithm": algorithm.split(",")[0], **ALGORITHMS[algorithm], **TUNING[tuning], **ROWS[rows]}
    record = one_step(tmp_path, model_folder, monkeypatch, capability, **settings).record
    assert bool(record.launches) == (algorithm != "reward"), "a reward model has no LM head"
    assert all(copy.is_pinned for copy in record.copies if copy.num_bytes > 2**16), "the driver would wait for these"
    numbers = (
        len(record.operators),
        len(record.launches),
        len({launch.variant for launch in record.launches}),
        len(record.products),
        len(record.copies),
        sum(not copy.is_pinned for copy in record.copies),
    )
    name = f"sm_{capability[0]}{capability[1]:<3}{algorithm:14}{tuning:12}{rows:15}"
    step_table.append(name + "".join(f"{number:>10}" for number in numbers))
