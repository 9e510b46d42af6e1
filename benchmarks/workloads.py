"""The workloads: their shapes, and the batch of tensors that every provider gets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import float64, liger_types
from benchmarks.grid import Grid
from benchmarks.liger_types import LOSS_TYPES
from hypo_kernels.losses import Sigmoid
from hypo_kernels.objective import Objective

IGNORE_INDEX = -100
MODES = ("forward", "frozen", "trained")
NUM_GENERATIONS = 2
BETA = 0.1
LIGER = ("Liger DPO", "Liger DPO, large chunks", "Liger DPO, not compiled")


@dataclass(frozen=True)
class Workload:
    """One workload. ``task`` "hypo": half of the sequences are pairs, half are groups of two samples, ragged, with the
    reference's log-probs given. ``task`` "dpo": pairs alone, of equal length, with the reference's hidden
    states and head given, which is what Liger's DPO loss takes.
    """

    task: str
    rows: int  # T, rows of hidden states
    vocab: int  # V
    width: int  # D
    dtype: torch.dtype
    sequence_length: int  # mean rows per sequence
    counted: float = 1.0  # fraction of each sequence's rows that count; the rest, the prompt, is ignored
    modes: tuple[str, ...] = MODES
    against: tuple[str, ...] = ()  # the peers to measure; empty: all
    loss_type: str = "sigmoid"  # of "dpo": a name of ``liger_types.LOSS_TYPES``

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        ignored = "" if self.counted == 1 else f"-{1 - self.counted:.0%}_ignored"
        return f"{self.title}-{self.rows}x{self.vocab}x{self.width}-{dtype}{ignored}"

    @property
    def title(self) -> str:
        """Return the task, with its loss type unless that is "sigmoid"."""
        return self.task if self.loss_type == "sigmoid" else f"{self.task}_{self.loss_type}"


@dataclass(frozen=True)
class Group:
    """A workload in one mode, which is one table; all of its providers are measured in turns.

    Modes: "forward", sequence log-probs under ``no_grad``; "frozen" and "trained", the loss with its
    backward, for hidden states alone or for hidden states and head.
    """

    workload: Workload
    mode: str

    def __str__(self) -> str:
        return f"{self.workload}-{self.mode}"

    @property
    def gemms(self) -> int:
        """Return the number of (N, V, D) GEMMs that the work needs if no logits are computed twice."""
        if self.mode == "forward":
            return 1
        return (2 if self.mode == "frozen" else 3) + (self.workload.task == "dpo")


LLAMA = Workload("hypo", 8192, 128256, 4096, torch.bfloat16, sequence_length=256)
PYTHIA = replace(LLAMA, rows=4096, vocab=50304, width=2048)
LLAMA_1K = replace(LLAMA, rows=1024)
LLAMA_HALF = replace(LLAMA, counted=0.5)


def groups(device: torch.device, chosen: Grid) -> list[Group]:
    """Return the groups for a device, most important first."""
    both = ("frozen", "trained")
    f32, bf16 = torch.float32, torch.bfloat16
    if device.type == "cuda":
        grid = [LLAMA, PYTHIA, LLAMA_1K, LLAMA_HALF, replace(PYTHIA, task="dpo", modes=both)]
        if chosen is Grid.FULL:
            grid += [replace(LLAMA, task="dpo", modes=both), replace(PYTHIA, rows=16384)]
            grid += _loss_types(PYTHIA)
    elif chosen is Grid.QUICK:
        tiny = Workload("hypo", 256, 4096, 64, f32, sequence_length=32)
        grid = [
            tiny,
            replace(tiny, dtype=bf16, modes=("trained",)),
            replace(tiny, counted=0.5, modes=("trained",)),
            replace(tiny, task="dpo", modes=("trained",)),
        ]
    else:
        small = Workload("hypo", 1024, 8192, 256, f32, sequence_length=64)
        # Four pairs of long responses: a pair is the smallest chunk of Liger and of ours.
        long_pairs = replace(small, task="dpo", rows=8192, sequence_length=1024, against=("full logits", *LIGER))
        smollm = Workload("hypo", 512, 49152, 576, f32, sequence_length=64)  # SmolLM2-135M's head
        grid = [
            replace(smollm, modes=("trained",)),
            replace(smollm, dtype=bf16, modes=("trained",)),
            replace(small, task="dpo", modes=("trained",)),
        ]
        if chosen is Grid.FULL:
            grid += [
                small,
                replace(small, counted=0.5, modes=("trained",)),
                replace(small, dtype=bf16, modes=("trained",)),
                replace(long_pairs, modes=("trained",)),
                *_loss_types(small),
            ]
    return [Group(workload, mode) for workload in grid for mode in workload.modes]


def _loss_types(workload: Workload) -> list[Workload]:
    """Return the workload with each further loss type of Liger's DPO loss, beside Liger and our per-token log-probs."""
    against = ("full logits", "hypo_kernels token_logprobs", *LIGER)
    dpo = replace(workload, task="dpo", modes=("trained",), against=against)
    return [replace(dpo, loss_type=name) for name in LOSS_TYPES if name != "sigmoid"]


@dataclass
class Batch:
    """The tensors of one workload: T rows, of which N count; S sequences: chosen, rejected, then samples."""

    workload: Workload
    hidden: Tensor  # (T, D), a leaf
    weight: Tensor  # (V, D), a leaf
    targets: Tensor  # (T,) int64, on the device
    host_targets: Tensor  # (T,) int64, on the CPU
    cu_seqlens: Tensor  # (S+1,) int64, on the CPU
    lengths: Tensor  # (S,) int64, counted rows of each sequence, on the device
    spans: Tensor  # (S,) int64, rows of each sequence, on the device
    counted_rows: Tensor  # (N,) int64, on the device
    num_pairs: int
    objective: Objective
    ref_logps: Tensor  # (S,)
    ref_hidden: Tensor | None = None  # (T, D)
    ref_weight: Tensor | None = None  # (V, D)
    group_order: Tensor = field(init=False)  # (S,): each pair's two sequences next to each other

    def __post_init__(self) -> None:
        pairs = torch.arange(2 * self.num_pairs).view(2, self.num_pairs).t().flatten()
        samples = torch.arange(2 * self.num_pairs, len(self.spans))
        self.group_order = torch.cat([pairs, samples]).to(self.targets.device)

    @property
    def counted_targets(self) -> Tensor:
        return self.targets[self.counted_rows]

    @property
    def grads(self) -> list[Tensor]:
        return [leaf.grad for leaf in (self.hidden, self.weight) if leaf.grad is not None]

    def prepare(self, mode: str) -> None:
        """Clear the gradients and require those of ``mode``."""
        self.hidden.grad = self.weight.grad = None
        self.hidden.requires_grad_(mode != "forward")
        self.weight.requires_grad_(mode == "trained")

    def sequence_sums(self, token_logps: Tensor) -> Tensor:
        """Sum (T,) to (S,), differentiably; ignored rows do not count."""
        counted = torch.where(self.targets != IGNORE_INDEX, token_logps, 0)
        return torch.segment_reduce(counted, "sum", lengths=self.spans, unsafe=True, initial=0.0)

    def loss_and_coefficients(self, logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss () and its derivative for each sequence's log-prob, (S,).

        They come from this library's objective, those of loss types other than "sigmoid" from Liger's equations.
        """
        if self.workload.loss_type != "sigmoid":
            return liger_types.loss_and_coefficients(self.workload.loss_type, logps, ref_logps, BETA)
        order = self.group_order
        loss, slope = self.objective(logps[order], ref_logps[order], self.lengths[order], self.num_pairs)
        return loss, torch.empty_like(slope).index_copy_(0, order, slope)


def make_batch(workload: Workload, device: torch.device) -> Batch:
    """Create a seeded batch whose rows range from certain of their target to surprised, like a model's."""
    rng = torch.Generator().manual_seed(0)
    spans = _spans(workload, rng)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), spans.cumsum(0)])
    position = torch.arange(workload.rows) - cu_seqlens[:-1].repeat_interleave(spans)
    prompt = (spans * (1 - workload.counted)).long()
    counted = position >= prompt.repeat_interleave(spans)
    likely = torch.randint(workload.vocab, (workload.rows,), generator=rng)
    host_targets = torch.where(counted, likely, IGNORE_INDEX)
    hidden, weight, ref_hidden = _model(workload, likely.to(device), device)
    rows = counted.nonzero().squeeze(1).to(device)
    reference = ref_hidden if workload.task == "dpo" else hidden
    truth = float64.row_logprobs(reference[rows], weight, host_targets.to(device)[rows])
    lengths = spans - prompt
    ref_logps = torch.segment_reduce(truth, "sum", lengths=lengths.to(device), unsafe=True, initial=0.0)
    samples = 0 if workload.task == "dpo" else len(spans) // 2
    if workload.task == "hypo":
        ref_logps += 2 * torch.randn(len(spans), generator=rng).to(device)  # nats: coefficients of both signs
    return Batch(
        workload=workload,
        hidden=hidden,
        weight=weight,
        targets=host_targets.to(device),
        host_targets=host_targets,
        cu_seqlens=cu_seqlens,
        lengths=lengths.to(device),
        spans=spans.to(device),
        counted_rows=rows,
        num_pairs=(len(spans) - samples) // 2,
        objective=Objective(
            loss=Sigmoid(BETA),
            kl_coef=0.05,  # large, so that the samples' gradients are as large as the pairs'
            num_pairs=(len(spans) - samples) // 2,
            num_generations=NUM_GENERATIONS,
            num_prompts=max(1, samples // NUM_GENERATIONS),
        ),
        ref_logps=ref_logps.float(),
        ref_hidden=ref_hidden if workload.task == "dpo" else None,
        ref_weight=weight.clone() if workload.task == "dpo" else None,
    )


def _spans(workload: Workload, rng: torch.Generator) -> Tensor:
    """Return the rows of each sequence, (S,), S a multiple of 4: equal for "dpo" (Liger pads nothing), else ragged."""
    sequences = max(4, workload.rows // workload.sequence_length // 4 * 4)
    spans = torch.full((sequences,), workload.rows // sequences)
    spans[: workload.rows % sequences] += 1
    if workload.task == "hypo":
        spread = int(spans.min()) // 2
        shift = torch.randint(-spread, spread + 1, (sequences // 2,), generator=rng)
        spans += torch.cat([shift, -shift])
    return spans


def _model(workload: Workload, likely: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Create hidden states (T, D), head (V, D) and reference hidden states (T, D).

    Logits are noise of standard deviation 2, plus up to 1.6 times what the likely token needs to reach a
    probability of one half: from surprise to near certainty, evenly.
    """
    rng = torch.Generator(device=device).manual_seed(1)
    rows, vocab, width = workload.rows, workload.vocab, workload.width
    weight = torch.randn(vocab, width, generator=rng, device=device).div_(width**0.5).to(workload.dtype)
    noise = torch.randn(rows, width, generator=rng, device=device).mul_(2)
    half = torch.tensor(float(vocab)).log().item() + 2.0  # log-sum-exp of the noise: log V + σ²/2
    gain = 1.6 * half * torch.rand(rows, 1, generator=rng, device=device)
    hidden = noise + gain * weight[likely].float()
    ref_hidden = hidden + 0.1 * torch.randn(rows, width, generator=rng, device=device)
    return hidden.to(workload.dtype), weight, ref_hidden.to(workload.dtype)
