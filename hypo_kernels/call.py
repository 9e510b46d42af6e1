"""One loss call, checked and laid out: what an implementation is handed, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import checks
from hypo_kernels.layout import TargetLayout, sequence_layout
from hypo_kernels.objective import Importance, Objective
from hypo_kernels.projection import Projection


class Reference(NamedTuple):
    """The reference as the caller has it: log-probs, or hidden states and a head."""

    logps: Tensor | None  # (S,)
    hidden: Tensor | None  # the shape of the policy's
    weight: Tensor | None  # (V, D); by default the policy's
    bias: Tensor | None  # (V,)


class Outcome(NamedTuple):
    """Of a whole call, or of a chunk of it."""

    loss: Tensor  # ()
    logps: Tensor  # (S,)
    ref_logps: Tensor  # (S,)
    kl: Tensor  # (N,), of each online sample, as the call's estimator has it
    importance: Importance | None = None  # (N,) each, where the samples' behaviour log-probs are given


@dataclass(frozen=True)
class Call:
    """Everything per sequence is in group order: each pair's two sequences, then each prompt's samples."""

    policy: Projection
    layout: TargetLayout
    objective: Objective
    compute_dtype: torch.dtype
    impl: str
    kl_estimator: str
    max_chunk_bytes: int
    ref_logps: Tensor | None  # (S,)
    ref: Projection | None
    behavior_logps: Tensor | None  # (N,) of the counted rows; those of pairs mean nothing
    order: Tensor  # (S,), each sequence's place in the caller's order, on the device
    lengths: Tensor  # (S,), counted tokens in the caller's order, on the device

    def largest_group(self) -> int:
        """Rows of the largest pair or group, the smallest chunk that keeps every group whole."""
        pairs, samples = self.layout.lengths.split(
            [2 * self.objective.num_pairs, len(self.layout.lengths) - 2 * self.objective.num_pairs]
        )
        sizes = torch.cat([pairs.view(-1, 2).sum(1), samples.view(-1, self.objective.num_generations).sum(1)])
        return int(sizes.max())

    def in_call_order(self, found: Outcome) -> Outcome:
        """The samples come last, and in the same order, in both."""
        logps, ref_logps = (torch.empty_like(x).index_copy_(0, self.order, x) for x in (found.logps, found.ref_logps))
        return found._replace(logps=logps, ref_logps=ref_logps)


def prepare(
    policy: Projection,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference: Reference,
    behavior_logps: Tensor | None,
    *,
    num_pairs: int,
    num_generations: int,
    beta: float,
    kl_coef: float,
    length_penalty: float,
    preference: str,
    label_smoothing: float,
    kl_estimator: str,
    importance_cap: float,
    max_chunk_bytes: int,
    validate: bool,
    impl: str,
) -> Call:
    """Check the arguments of ``fused_hypo_loss``, which has their meaning, and lay them out."""
    hidden = policy.hidden
    checks.inputs(policy, targets, cu_seqlens)
    layout = sequence_layout(targets, cu_seqlens)
    num_sequences = len(layout.lengths)
    num_prompts = checks.batch(num_sequences, num_pairs, num_generations)
    objective = Objective(
        beta=beta,
        kl_coef=kl_coef,
        length_penalty=length_penalty,
        preference=preference,
        label_smoothing=label_smoothing,
        num_pairs=num_pairs,
        num_generations=num_generations,
        num_prompts=num_prompts,
        importance_cap=importance_cap,
    )
    checks.objective(objective)
    checks.chunk_budget(max_chunk_bytes)
    ref = _reference(policy, targets, cu_seqlens, reference, num_sequences)
    checks.kl_estimator(kl_estimator, reference.hidden)
    if behavior_logps is not None:
        checks.behavior_logps(behavior_logps, targets, hidden.device, kl_estimator)
    dtype = checks.compute_dtype(hidden, policy.head.weight)
    impl = checks.implementation(impl, policy.head, dtype)
    checks.targets_in_vocabulary(layout, policy.head)
    grouped, order = layout.in_groups(num_pairs, hidden.device)
    wide = torch.promote_types(dtype, torch.float32)
    if behavior_logps is not None:
        behavior_logps = behavior_logps.flatten()[grouped.on(hidden.device).rows].to(wide)
    if validate:
        checks.values_are_finite(
            hidden=hidden,
            ref_hidden=reference.hidden,
            ref_logps=reference.logps,
            behavior_logps=None if behavior_logps is None else behavior_logps[grouped.num_rows(2 * num_pairs) :],
        )
    return Call(
        policy=policy,
        layout=grouped,
        objective=objective,
        compute_dtype=dtype,
        impl=impl,
        kl_estimator=kl_estimator,
        max_chunk_bytes=max_chunk_bytes,
        ref_logps=None if reference.logps is None else reference.logps.detach().to(wide)[order],
        ref=ref,
        behavior_logps=behavior_logps,
        order=order,
        lengths=layout.on(hidden.device).lengths,
    )


def _reference(
    policy: Projection,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference: Reference,
    num_sequences: int,
) -> Projection | None:
    """The reference's projection, or None where its log-probs are given."""
    checks.one_reference(policy, reference.logps, reference.hidden, reference.weight, reference.bias)
    if reference.hidden is None:
        assert reference.logps is not None
        checks.reference_logps(reference.logps, num_sequences, policy.hidden.device)
        return None
    head = policy.head
    own_bias = head.bias if reference.weight is None else None
    ref_head = replace(
        head,
        weight=head.weight if reference.weight is None else reference.weight,
        bias=own_bias if reference.bias is None else reference.bias,
        lora_weight=None,
    )
    ref = Projection.of(reference.hidden.detach(), ref_head)
    checks.inputs(ref, targets, cu_seqlens, name="ref_")
    checks.same_vocabulary(head, ref.head)
    checks.compute_dtype(ref.hidden, ref.head.weight, name="ref_")
    return ref
