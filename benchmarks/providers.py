"""The measured programs: this library, its peers, and the bare GEMMs of the same work.

A per-token peer is one function ``(hidden (T, D), weight (V, D), targets (T,)) -> log-probs (T,)``,
differentiable; ``_token_steps`` puts the same sequence sums and the same loss on top of all of them. A
peer that cannot run raises its ImportError or ``Unavailable``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import hypo_kernels
from benchmarks import liger_types
from benchmarks.workloads import BETA, IGNORE_INDEX, NUM_GENERATIONS, Batch, Group
from hypo_kernels import fused_preference_loss, sequence_logprobs, token_logprobs
from hypo_kernels.losses import LOSSES

TokenHead = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """The provider cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Provider:
    """A measured program: ``make_step(batch, mode)`` returns a function that runs the work once, returns log-probs (S,)
    and leaves gradients in ``batch.hidden.grad`` and ``batch.weight.grad``.
    """

    name: str
    make_step: Callable[[Batch, str], Callable[[], Tensor]]
    package: str = "torch"
    tasks: tuple[str, ...] = ("hypo", "dpo")
    has_forward: bool = True  # does other work under ``no_grad``
    only_ignored: bool = False  # measured only if some rows are ignored
    compiles: bool = False  # uses torch.compile: seconds before the first result
    is_fused_head: bool = False  # a per-token loss without full logits, which the targets compare with
    is_ours: bool = False

    def serves(self, group: Group) -> bool:
        if self.only_ignored and group.workload.counted == 1:
            return False
        if group.workload.against and self.name not in (*group.workload.against, GEMMS, *OURS.values()):
            return False
        return group.workload.task in self.tasks and (self.has_forward or group.mode != "forward")

    @property
    def version(self) -> str:
        if self.is_ours:
            return hypo_kernels.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs as most training code does: a GEMM in the tested dtype, a softmax in fp32."""
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(dim=-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)


@functools.cache
def _compiled_full_logits() -> TokenHead:
    return torch.compile(full_logits, fullgraph=True)


def full_logits_compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compiled_full_logits()(hidden, weight, targets)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()  # without chunks it is full logits
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).float()


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs as ``trl.trainer.utils.add_fused_lm_head`` does."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    vocabulary_chunk, outputs = 32768, ("log_probs",)
    if hidden.is_cuda:  # TRL drops ignored rows only on devices with Triton
        mask = targets != IGNORE_INDEX
        picked = ChunkedLogProbFunction.apply(
            hidden[mask], weight, None, targets[mask], 1.0, vocabulary_chunk, None, 1.0, outputs
        )[0]
        return picked.new_zeros(targets.shape).masked_scatter(mask, picked)
    targets = targets.clamp(min=0)
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, vocabulary_chunk, None, 1.0, outputs)[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, filtered: bool = True) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    if not hidden.is_cuda:  # its own error without CUDA
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")
    filter_eps = "high" if filtered else None
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=filter_eps, impl="cce").float()


def cut_cross_entropy_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise Unavailable("needs CUDA: its gradient filter, here turned off, is in the Triton kernels")
    return cut_cross_entropy(hidden, weight, targets, filtered=False)


def liger_scaled_ce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def liger_flce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if not hidden.is_cuda:
        raise Unavailable("needs CUDA: its row kernel is Triton")
    return -LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, IGNORE_INDEX, 0.0, 0.0, "none"
    )[0].float()


@functools.cache
def _unsloth_fused_linear() -> Any:
    """Import unsloth's fused head alone, without ``import unsloth``, which patches the other peers."""
    # The first variable stands for that import, the second keeps transformers' models as they are, and the third is a
    # folder for generated code. What this import sets itself (an allocator for CUDA among others) is undone too:
    # processes of other peers would inherit it.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, UNSLOTH_IS_PRESENT="1", UNSLOTH_FUSED_FORWARD="0", UNSLOTH_COMPILE_LOCATION=folder),
    ):
        return importlib.import_module("unsloth_zoo.fused_losses.fused_linear")


def unsloth_fused_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs with unsloth_zoo's fused head; ``mask`` keeps the ignored rows from it."""
    log_probs: Tensor = _unsloth_fused_linear().fused_linear_logprobs(
        hidden, weight, targets, mask=targets != IGNORE_INDEX
    )
    return log_probs


def hypo_token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets)


def _token_steps(head: TokenHead, *, pick_rows: bool = False) -> Callable[[Batch, str], Callable[[], Tensor]]:
    """Return the steps of a per-token peer. ``pick_rows`` passes it only the counted rows, as a caller can."""

    def make_step(batch: Batch, mode: str) -> Callable[[], Tensor]:
        rows, targets = batch.counted_rows, batch.counted_targets

        def sums(hidden: Tensor, weight: Tensor) -> Tensor:
            if pick_rows:
                picked = head(hidden[rows], weight, targets)
                return torch.segment_reduce(picked, "sum", lengths=batch.lengths, unsafe=True, initial=0.0)
            return batch.sequence_sums(head(hidden, weight, batch.targets))

        def step() -> Tensor:
            if mode == "forward":
                with torch.no_grad():
                    return sums(batch.hidden, batch.weight)
            ref_logps = batch.ref_logps
            if batch.ref_hidden is not None and batch.ref_weight is not None:
                with torch.no_grad():
                    ref_logps = sums(batch.ref_hidden, batch.ref_weight)
            logps = sums(batch.hidden, batch.weight)
            with torch.no_grad():
                loss, coefficients = batch.loss_and_coefficients(logps, ref_logps)
            surrogate = (coefficients * logps).sum()
            (loss + surrogate - surrogate.detach()).backward()
            return logps.detach()

        return step

    return make_step


def _hypo_steps(impl: str) -> Callable[[Batch, str], Callable[[], Tensor]]:
    def make_step(batch: Batch, mode: str) -> Callable[[], Tensor]:
        if impl.startswith("triton") and not batch.hidden.is_cuda:
            raise Unavailable("needs CUDA")

        def forward() -> Tensor:
            with torch.no_grad():
                return sequence_logprobs(batch.hidden, batch.weight, batch.host_targets, batch.cu_seqlens, impl=impl)

        loss_type = batch.workload.loss_type
        smoothing = {"label_smoothing": liger_types.SMOOTHING[loss_type]} if loss_type in liger_types.SMOOTHING else {}
        loss = LOSSES[loss_type](beta=BETA, **smoothing)

        def backward() -> Tensor:
            out = fused_preference_loss(
                batch.hidden,
                batch.weight,
                batch.host_targets,
                batch.cu_seqlens,
                loss=loss,
                num_pairs=batch.num_pairs,
                num_generations=NUM_GENERATIONS,
                ref_logps=batch.ref_logps if batch.ref_hidden is None else None,
                ref_hidden=batch.ref_hidden,
                ref_lm_head_weight=batch.ref_weight,
                kl_coef=batch.objective.kl_coef,
                impl=impl,
            )
            out.loss.backward()
            return out.logps

        return forward if mode == "forward" else backward

    return make_step


def _liger_dpo_steps(*, compiled: bool, chunk_bytes: int = 0) -> Callable[[Batch, str], Callable[[], Tensor]]:
    """Return the step of Liger's DPO loss on the same rows, padded, chosen then rejected, as its trainer calls it.

    A chunk is a pair, Liger's default, or as many pairs as have fp32 logits of ``chunk_bytes``.
    """

    def make_step(batch: Batch, mode: str) -> Callable[[], Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        sequences, ref_hidden = len(batch.spans), batch.ref_hidden
        bytes_a_pair = 2 * batch.workload.rows // sequences * batch.workload.vocab * 4
        loss_of = LigerFusedLinearDPOLoss(
            beta=BETA,
            compiled=compiled,
            chunk_size=max(1, min(batch.num_pairs, chunk_bytes // bytes_a_pair)),
            **liger_types.options(batch.workload.loss_type),
        )
        assert ref_hidden is not None
        targets = batch.targets.view(sequences, -1)

        def step() -> Tensor:
            hidden, ref = (x.view(sequences, -1, x.shape[1]) for x in (batch.hidden, ref_hidden))
            loss, statistics = loss_of(batch.weight, hidden, targets, ref_input=ref, ref_weight=batch.ref_weight)
            loss.backward()
            return torch.cat(statistics[:2]).detach()

        return step

    return make_step


def _gemm_steps(batch: Batch, mode: str) -> Callable[[], Tensor]:
    """Return the steps of the necessary GEMMs alone, into preallocated memory."""
    x = batch.hidden.detach()[batch.counted_rows]
    weight = batch.weight.detach()
    logits = x @ weight.t()
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    ref = None if batch.ref_hidden is None else batch.ref_hidden[batch.counted_rows]

    def step() -> Tensor:
        torch.mm(x, weight.t(), out=logits)
        if mode == "forward":
            return logits
        if ref is not None and batch.ref_weight is not None:
            torch.mm(ref, batch.ref_weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        if mode == "trained":
            torch.mm(logits.t(), x, out=dweight)
        return logits

    return step


def _fused_heads(
    name: str, head: TokenHead, *, package: str = "torch", picks_rows: bool = False, compiles: bool = False
) -> tuple[Provider, ...]:
    """Return the peer as it is and, unless it picks the counted rows itself, with rows that the caller picked."""
    whole = Provider(name, _token_steps(head), package, compiles=compiles, is_fused_head=True)
    if picks_rows:
        return (whole,)
    return whole, replace(
        whole, name=f"{name}, rows picked", make_step=_token_steps(head, pick_rows=True), only_ignored=True
    )


OURS = {"cuda": "hypo_kernels triton", "cpu": "hypo_kernels torch"}  # the default of each device
EAGER = "full logits"
GEMMS = "bare GEMMs"

PROVIDERS = (
    Provider(GEMMS, _gemm_steps),
    Provider("hypo_kernels triton", _hypo_steps("triton"), is_ours=True),
    Provider("hypo_kernels triton-epilogue", _hypo_steps("triton-epilogue"), has_forward=False, is_ours=True),
    Provider("hypo_kernels torch", _hypo_steps("torch"), is_ours=True),
    Provider("hypo_kernels reference", _hypo_steps("reference"), is_ours=True),
    Provider("hypo_kernels token_logprobs", _token_steps(hypo_token_logprobs), has_forward=False, is_ours=True),
    Provider(EAGER, _token_steps(full_logits)),
    Provider("full logits, rows picked", _token_steps(full_logits, pick_rows=True), only_ignored=True),
    Provider("full logits, torch.compile", _token_steps(full_logits_compiled), compiles=True),
    *_fused_heads("torch linear CE", torch_linear_cross_entropy),
    *_fused_heads("TRL ChunkedLogProb", trl_chunked, package="trl", picks_rows=True),
    *_fused_heads("Cut Cross-Entropy", cut_cross_entropy, package="cut-cross-entropy", picks_rows=True, compiles=True),
    *_fused_heads("Cut Cross-Entropy, exact", cut_cross_entropy_exact, package="cut-cross-entropy", picks_rows=True),
    *_fused_heads("unsloth fused linear", unsloth_fused_linear, package="unsloth_zoo", picks_rows=True),
    *_fused_heads("Liger scaled CE", liger_scaled_ce, package="liger-kernel"),
    *_fused_heads("Liger FLCE", liger_flce, package="liger-kernel"),
    Provider(
        "Liger DPO",
        _liger_dpo_steps(compiled=True),
        package="liger-kernel",
        tasks=("dpo",),
        has_forward=False,
        compiles=True,
    ),
    Provider(
        "Liger DPO, large chunks",
        _liger_dpo_steps(compiled=True, chunk_bytes=2**30),  # the budget of ours
        package="liger-kernel",
        tasks=("dpo",),
        has_forward=False,
        compiles=True,
    ),
    Provider(
        "Liger DPO, not compiled",
        _liger_dpo_steps(compiled=False),
        package="liger-kernel",
        tasks=("dpo",),
        has_forward=False,
    ),
)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
