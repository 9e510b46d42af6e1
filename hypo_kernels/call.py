"""The checked arguments of one call of the loss, and its output: the interface of every implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import checks
from hypo_kernels.layout import TargetLayout, sequence_layout
from hypo_kernels.objective import Importance, Objective
from hypo_kernels.pairs import NOTHING
from hypo_kernels.projection import Projection


class Reference(NamedTuple):
    """The arguments that describe the reference model: log-probs, or hidden states and a head."""

    logps: Tensor | None  # (S,)
    hidden: Tensor | None  # the shape of the policy's
    weight: Tensor | None  # (V, D); by default the policy's
    bias: Tensor | None  # (V,)


class Extras(NamedTuple):
    """Constants that the caller gives beside the batch; every tensor is in the caller's order."""

    pair_tensors: Mapping[str, Tensor] = NOTHING  # (P,) each
    sample_tensors: Mapping[str, Tensor] = NOTHING  # (N,) each
    token_weights: Tensor | None = None  # the shape of the targets
    behavior_logps: Tensor | None = None  # the shape of the targets


class LossOutput(NamedTuple):
    """Loss and statistics of a call, or of one chunk of it."""

    loss: Tensor  # ()
    logps: Tensor  # (S,)
    ref_logps: Tensor  # (S,)
    kl: Tensor  # (N,) KL of each online sample, by the objective's estimator
    importance: Importance | None = None  # fields of (N,); None without behavior_logps


@dataclass(frozen=True)
class Call:
    """A checked call. Sequences are in group order: each pair's two, then each prompt's samples."""

    policy: Projection
    layout: TargetLayout
    objective: Objective
    compute_dtype: torch.dtype
    impl: str
    max_chunk_bytes: int
    ref_logps: Tensor | None  # (S,)
    ref: Projection | None
    pair_tensors: Mapping[str, Tensor]  # (P,) each
    sample_tensors: Mapping[str, Tensor]  # (N,) each
    token_weights: Tensor | None  # of the counted rows; 1 for those of online samples
    behavior_logps: Tensor | None  # of the counted rows; the values of pairs are not read
    order: Tensor  # (S,), each sequence's index in the caller's order, on the device
    lengths: Tensor  # (S,), counted tokens in the caller's order, on the device

    def largest_group(self) -> int:
        """Return the number of rows of the largest pair or group. A chunk of this size splits no group."""
        pairs, samples = self.layout.lengths.split(
            [2 * self.objective.num_pairs, len(self.layout.lengths) - 2 * self.objective.num_pairs]
        )
        sizes = torch.cat([pairs.view(-1, 2).sum(1), samples.view(-1, self.objective.num_generations).sum(1)])
        return int(sizes.max())

    def tensors_of(self, sequences: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the pair tensors and the sample tensors of some sequences, whole pairs and groups."""
        offline = 2 * self.objective.num_pairs
        pairs = slice(min(sequences.start, offline) // 2, min(sequences.stop, offline) // 2)
        samples = slice(max(sequences.start - offline, 0), max(sequences.stop - offline, 0))
        return (
            {name: x[pairs] for name, x in self.pair_tensors.items()},
            {name: x[samples] for name, x in self.sample_tensors.items()},
        )

    def weighted(self, row_logps: Tensor, rows: slice) -> Tensor:
        """Return the log-probs (n,) of ``rows`` times the tokens' weights."""
        return row_logps if self.token_weights is None else self.token_weights[rows] * row_logps

    def in_call_order(self, output: LossOutput) -> LossOutput:
        """Return ``output`` with log-probs in the caller's order. The samples are not permuted."""
        logps, ref_logps = (torch.empty_like(x).index_copy_(0, self.order, x) for x in (output.logps, output.ref_logps))
        return output._replace(logps=logps, ref_logps=ref_logps)


def prepare(
    policy: Projection,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference: Reference,
    extras: Extras,
    objective: Objective,
    *,
    max_chunk_bytes: int | None,
    validate: bool,
    impl: str,
) -> Call:
    """Check the arguments of a loss and return them as a ``Call``. Raises ValueError if one is wrong."""
    hidden, behavior_logps = policy.hidden, extras.behavior_logps
    checks.inputs(policy, targets, cu_seqlens)
    layout = sequence_layout(targets, cu_seqlens)
    objective = objective.for_sequences(layout.lengths.tolist())
    budget = checks.chunk_budget(max_chunk_bytes, hidden.device)
    if not objective.needs_reference and all(x is None for x in reference):
        reference = Reference(hidden.new_zeros(len(layout.lengths), dtype=torch.float32), None, None, None)
    ref = _reference(policy, targets, cu_seqlens, reference, len(layout.lengths))
    checks.exact_kl_has_distributions(objective.kl_estimator, reference.hidden)
    if behavior_logps is not None:
        checks.behavior_logps(behavior_logps, targets, hidden.device, objective.kl_estimator)
    num_samples = len(layout.lengths) - 2 * objective.num_pairs
    checks.constants("pair_tensors", extras.pair_tensors, objective.num_pairs, "pair", hidden.device)
    checks.constants("sample_tensors", extras.sample_tensors, num_samples, "online sample", hidden.device)
    token_weights = extras.token_weights
    if token_weights is not None:
        checks.token_weights(token_weights, targets, hidden.device)
    dtype = checks.compute_dtype(hidden, policy.head.weight)
    impl = checks.implementation(impl, policy.head, dtype)
    checks.targets_in_vocabulary(layout, policy.head)
    grouped, order = layout.in_groups(objective.num_pairs, hidden.device)
    accumulator_dtype = torch.promote_types(dtype, torch.float32)
    if behavior_logps is not None:
        behavior_logps = behavior_logps.flatten()[grouped.on(hidden.device).rows].to(accumulator_dtype)
    offline = grouped.num_rows(2 * objective.num_pairs)
    if token_weights is not None:
        token_weights = token_weights.flatten()[grouped.on(hidden.device).rows].to(accumulator_dtype)
        token_weights[offline:] = 1
    if validate:
        checks.values_are_finite(
            hidden=hidden,
            ref_hidden=reference.hidden,
            ref_logps=reference.logps,
            behavior_logps=None if behavior_logps is None else behavior_logps[offline:],
        )
    return Call(
        policy=policy,
        layout=grouped,
        objective=objective,
        compute_dtype=dtype,
        impl=impl,
        max_chunk_bytes=budget,
        ref_logps=None if reference.logps is None else reference.logps.detach().to(accumulator_dtype)[order],
        ref=ref,
        pair_tensors={name: _wide(x, accumulator_dtype) for name, x in extras.pair_tensors.items()},
        sample_tensors={name: _wide(x, accumulator_dtype) for name, x in extras.sample_tensors.items()},
        token_weights=token_weights,
        behavior_logps=behavior_logps,
        order=order,
        lengths=layout.on(hidden.device).lengths,
    )


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _reference(
    policy: Projection,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference: Reference,
    num_sequences: int,
) -> Projection | None:
    """Return the reference's projection, or None if its log-probs are given."""
    checks.one_reference(policy, reference.logps, reference.hidden, reference.weight, reference.bias)
    if reference.hidden is None:
        assert reference.logps is not None
        checks.reference_logps(reference.logps, num_sequences, policy.hidden.device)
        return None
    head = policy.head
    default_bias = head.bias if reference.weight is None else None
    ref_head = replace(
        head,
        weight=head.weight if reference.weight is None else reference.weight,
        bias=default_bias if reference.bias is None else reference.bias,
        lora=None,
    )
    ref = Projection.of(reference.hidden.detach(), ref_head)
    checks.inputs(ref, targets, cu_seqlens, name="ref_")
    checks.same_vocabulary(head, ref.head)
    checks.compute_dtype(ref.hidden, ref.head.weight, name="ref_")
    return ref
