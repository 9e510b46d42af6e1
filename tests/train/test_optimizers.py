"""Every optimizer: it trains, resumes bit for bit from a checkpoint, and needs the memory that is predicted."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from resumed import assert_resumes_exactly
from torch import nn

from benchmarks.measure import peak_extra_bytes
from hypo_train.checkpoint.files import checkpoint_folder, load_checkpoint, save_checkpoint
from hypo_train.config import Config, ConfigError
from hypo_train.distributed.zero import require_deepspeed
from hypo_train.model.load import build_on_meta
from hypo_train.model.meta_pass import num_bytes
from hypo_train.optim import build_optimizer, build_scheduler, footprint, parameter_roles
from hypo_train.prepare import prepare

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "muon")


class Model(nn.Module):
    """A parameter of every role; the matrix is large enough for 8 bits, the embedding too, but it gets 32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.matrix = nn.Linear(64, 80)
        self.norm = nn.LayerNorm(80)
        self.head = nn.Linear(80, 96, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.matrix(self.embedding(ids))))


@pytest.fixture(params=OPTIMIZERS)
def optim(request):
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    return request.param


class Run:
    """A model under an optimizer and a schedule."""

    def __init__(self, optim):
        self.model = Model()
        self.roles = parameter_roles(self.model, self.model.head)
        self.optimizer = build_optimizer(
            self.model.named_parameters(), optim=optim, roles=self.roles, learning_rate=1e-2, weight_decay=0.1
        )
        self.scheduler = build_scheduler(self.optimizer, "cosine", 1, 8)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            ids = torch.arange(96)
            loss = nn.functional.cross_entropy(self.model(ids), ids.roll(1))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self):
        return [p.detach().clone() for p in self.model.parameters()]


def test_every_parameter_is_trained(optim):
    run = Run(optim)
    before = run.state()
    losses = run.train(6)
    assert losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))


def test_a_resumed_optimizer_gives_the_same_bits(optim, tmp_path):
    whole, first, second = Run(optim), Run(optim), Run(optim)
    whole.train(7)
    first.train(4)
    folder = checkpoint_folder(tmp_path, 4)
    save_checkpoint(
        folder,
        step=4,
        model_state=dict(first.model.named_parameters()),
        optimizer=first.optimizer,
        scheduler=first.scheduler,
        extra={},
    )
    loaded = load_checkpoint(folder, optimizer=second.optimizer, scheduler=second.scheduler)
    second.model.load_state_dict(loaded.model_state)
    second.train(3)
    for expected, weight in zip(whole.state(), second.state(), strict=True):
        assert torch.equal(expected, weight)


def test_the_schedule_sets_the_rate_of_all_groups(optim):
    run = Run(optim)
    run.train(5)
    [rate] = {group["lr"] for group in run.optimizer.param_groups}
    assert rate == run.scheduler.get_last_lr()[0] < 1e-2


def test_state_takes_the_predicted_bytes(optim):
    run = Run(optim)
    run.train(1)
    entries = [dict(entry) for entry in run.optimizer.state.values()]
    tables = ("qmap1", "qmap2")  # 1 KiB each, that all parameters share
    held = [v for entry in entries for k, v in entry.items() if torch.is_tensor(v) and v.ndim and k not in tables]
    found = footprint(optim, run.model.named_parameters(), roles=run.roles, device_type="cpu")
    assert found.state == num_bytes(held)


def test_temporaries_take_the_predicted_bytes(optim):
    model = nn.Linear(512, 1024)
    optimizer = build_optimizer(model.named_parameters(), optim=optim, learning_rate=1e-3)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        _, extra = peak_extra_bytes(optimizer.step, torch.device("cpu"))
    roles = parameter_roles(model, None)
    predicted = footprint(optim, model.named_parameters(), roles=roles, device_type="cpu").temporary
    if optim == "muon":
        predicted += workspace_of_newton_schulz(512, 1024)
    assert extra == pytest.approx(predicted, rel=0.01, abs=2**18)


def workspace_of_newton_schulz(short, long):
    """Return what this machine's BLAS library allocates in Newton-Schulz's largest bf16 product, beside its result.

    That is nothing where the CPU multiplies bf16 matrices as they lie, 0.1 MB where they are reordered for AMX, and an
    fp32 copy of the operands (2 MB) where it has AVX-512 without bf16.
    """
    matrix, square = torch.randn(short, long).bfloat16(), torch.randn(short, short).bfloat16()
    result, extra = peak_extra_bytes(lambda: torch.addmm(matrix, square, matrix), torch.device("cpu"))
    return extra - result.nbytes


def test_muon_updates_matrices_and_adamw_the_rest():
    run, adamw = Run("muon"), Run("adamw_torch")
    run.train(1)
    adamw.train(1)
    moved = {
        name: not torch.equal(a, b)
        for (name, a), b in zip(run.model.named_parameters(), adamw.model.parameters(), strict=True)
    }
    assert [name for name, differs in moved.items() if differs] == []  # the first rate of a warm-up is 0
    run.train(1)
    adamw.train(1)
    states = {name: set(run.optimizer.state[p]) for name, p in run.model.named_parameters()}
    assert [name for name, state in states.items() if state == {"momentum_buffer"}] == ["matrix.weight"]
    for (name, a), b in zip(run.model.named_parameters(), adamw.model.parameters(), strict=True):
        assert torch.equal(a, b) == (name != "matrix.weight"), name


def test_muon_without_a_trained_matrix_is_refused():
    model = Model()
    named = [("norm.weight", model.norm.weight)]
    with pytest.raises(ValueError, match="none of the trained parameters is a matrix"):
        build_optimizer(named, optim="muon", learning_rate=1e-3)


def test_embeddings_and_small_parameters_keep_32_bits():
    pytest.importorskip("bitsandbytes")
    run = Run("adamw_8bit")
    run.train(1)
    dtypes = {name: run.optimizer.state[p]["state1"].dtype for name, p in run.model.named_parameters()}
    assert [name for name, dtype in dtypes.items() if dtype == torch.uint8] == ["matrix.weight", "head.weight"]


def test_a_run_resumes_with_the_same_bits(optim, settings):
    config = settings(
        algorithm="dpo", optim=optim, model=None, use_peft=optim == "muon", lora_r=4, precompute_ref_log_probs=False
    )
    assert_resumes_exactly(config)


def test_8_bits_without_bitsandbytes_are_refused_first(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="optim=adamw_8bit needs bitsandbytes: pip install"):
        prepare(settings(optim="adamw_8bit", model="no/model/anywhere"))


def test_zero_needs_deepspeed_and_several_processes(settings, monkeypatch):
    config = settings(zero_stage=2, model="no/model/anywhere")
    with pytest.raises(ConfigError, match="zero_stage=2 in one process: start several, as with torchrun"):
        prepare(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zero_stage=2 needs DeepSpeed: pip install deepspeed \(or use fsdp: true"):
        require_deepspeed(config)


def test_accelerates_own_deepspeed_is_refused(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch --use_deepspeed sets it
    with pytest.raises(ConfigError, match="ACCELERATE_USE_DEEPSPEED is set: set zero_stage: 1 or 2 here"):
        prepare(settings(model="no/model/anywhere"))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="adamw_8bit"):
        Config(model_name_or_path="-", dataset_name="-", optim="adamw")


def test_embeddings_and_head_have_their_roles():
    architecture = tiny.new_config("gpt_neox")
    config = Config(model_name_or_path="-", dataset_name="-", max_prompt_length=16, max_completion_length=16)
    policy = build_on_meta(config, architecture, device_type="cpu", autocast=False)
    roles = policy.parameter_roles
    names = {role: [n for n, found in roles.items() if found == role] for role in ("embedding", "head")}
    assert [n.split(".")[-2] for n in names["embedding"]] == ["embed_in"]
    assert len(names["head"]) == 1
    assert roles.keys() == dict(policy.named_parameters()).keys()
