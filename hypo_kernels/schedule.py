"""The group-closed schedule: a loss of pairs and groups, finished on the logits of the chunk.

The derivative of the loss by a sequence's log-prob depends on its own pair or group alone. So a chunk of
whole groups needs its logits once: GEMM → row step → sequence sums → coefficients → two GEMMs, 6 NVD
with a trained head and 4 NVD with a frozen one, where a per-token loss has to compute the logits again.
Only a group that does not fit in the buffer takes a second pass (8 and 6 NVD), that group alone.

The exact estimator of the KL works on rows: derivatives by each row's log-prob and by its divergence from the
reference, whose logits stand in the buffer below the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypo_kernels.call import Call, Outcome
from hypo_kernels.chunks import BYTES_PER_OTHER_SAMPLE, BYTES_PER_WEIGHTED_ROW, Chunk, chunks
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.objective import Importance
from hypo_kernels.room import HeadRoom
from hypo_kernels.statistics import RowStatistics, sequence_sums


def run(call: Call, needed: Sequence[bool], *, sums_are_wide: bool = False) -> tuple[Outcome, Gradients]:
    """Loss and log-probs, and the gradients of the :class:`Leaves` that are ``needed``.

    ``sums_are_wide`` asks for the same dtypes whatever the number of chunks.
    """
    heads = [call.policy.head] if call.ref is None else [call.policy.head, call.ref.head]
    exact = call.kl_estimator == "exact"
    room = HeadRoom(
        heads,
        call.layout,
        call.compute_dtype,
        call.impl,
        call.max_chunk_bytes,
        largest_group=call.largest_group(),
        with_divergence=exact,
        buffers=2 if exact else 1,
        statistics_only=not any(needed) and not exact,
        objective_bytes=_objective_bytes(call),
    )
    objective = call.objective
    plan = chunks(call.layout.lengths.tolist(), objective.num_pairs, objective.num_generations, room.max_rows)
    gradients = Gradients(
        Leaves.of(call.policy),
        needed,
        call.compute_dtype,
        room.shard,
        in_one_product=len(plan) == 1 and len(call.layout.rows) <= room.max_rows and not sums_are_wide,
        scale_=room.steps.scale_,
    )
    lengths = call.layout.on(room.rows.device).lengths
    step = _exact if exact else _sampled
    parts = [step(call, room, gradients, chunk, lengths[chunk.sequences]) for chunk in plan]
    gradients.close(room.shard)
    return (
        Outcome(
            loss=torch.stack([part.loss for part in parts]).sum(),
            logps=torch.cat([part.logps for part in parts]),
            ref_logps=torch.cat([part.ref_logps for part in parts]),
            kl=torch.cat([part.kl for part in parts]),
            importance=_importance_of(parts),
        ),
        gradients,
    )


def _objective_bytes(call: Call) -> int:
    """What the objective holds of a counted row, beside what every call does."""
    if call.kl_estimator == "exact":
        return BYTES_PER_OTHER_SAMPLE * (call.objective.num_generations - 1)
    return 0 if call.behavior_logps is None else BYTES_PER_WEIGHTED_ROW


def _importance_of(parts: Sequence[Outcome]) -> Importance | None:
    found = [part.importance for part in parts if part.importance is not None]
    return Importance(*(torch.cat(sums) for sums in zip(*found, strict=True))) if found else None


def _sampled(call: Call, room: HeadRoom, gradients: Gradients, chunk: Chunk, lengths: Tensor) -> Outcome:
    """A chunk whose coefficients are a number a sequence, times a weight a row where another policy drew it."""
    rows, count = chunk.rows, chunk.rows.stop - chunk.rows.start
    # Closed: the unit gradients of the whole chunk stay in the buffer until the coefficients are known.
    closed = count <= room.max_rows and gradients.any
    raw = None
    if closed and call.ref is not None and 2 * count <= room.capacity and not room.straight:
        # One GEMM where both heads are one.
        raw, ref_raw = room.logits([call.policy, call.ref], rows)
        ref_logps = sequence_sums(room.statistics_of(ref_raw, call.ref, rows).logps(), lengths)
    else:
        ref_logps = _ref_logps(call, room, chunk, lengths)
    if closed:
        unit, own, logps = room.unit_gradients(call.policy, rows, raw=raw)
    else:
        stats = room.statistics(call.policy, rows)
        logps = stats.logps()
    sums = sequence_sums(logps, lengths)
    loss, coefficients = call.objective(sums, ref_logps, lengths, chunk.num_pairs)
    pairs, importance = 2 * chunk.num_pairs, None
    if call.behavior_logps is not None:
        offline = int(call.layout.lengths[chunk.sequences][:pairs].sum())  # rows of the pairs, which come first
        weights, importance = call.objective.importance(
            logps[offline:], call.behavior_logps[rows][offline:], lengths[pairs:]
        )
    if gradients.any:
        # U is the derivative of −log p.
        factor = -coefficients.repeat_interleave(lengths, output_size=count)
        if importance is not None:
            factor[offline:] *= weights
        if closed:
            room.finish(gradients, unit, call.policy, rows, factor, own)
        else:
            for block, local in chunk.blocks(room.max_rows):
                unit, own, _ = room.unit_gradients(call.policy, block, stats.norms[local])
                room.finish(gradients, unit, call.policy, block, factor[local], own)
    return Outcome(loss, sums, ref_logps, (sums - ref_logps)[pairs:], importance)


def _ref_logps(call: Call, room: HeadRoom, chunk: Chunk, lengths: Tensor) -> Tensor:
    """Reference log-probs of the chunk's sequences, given or computed in the chunk's own buffer."""
    if call.ref is None:
        assert call.ref_logps is not None
        return call.ref_logps[chunk.sequences]
    return sequence_sums(room.statistics(call.ref, chunk.rows).logps(), lengths)


def _exact(call: Call, room: HeadRoom, gradients: Gradients, chunk: Chunk, lengths: Tensor) -> Outcome:
    """A chunk whose coefficients are two numbers a row: by its log-prob and by its divergence."""
    policy, ref, objective = call.policy, call.ref, call.objective
    assert ref is not None
    blocks = list(chunk.blocks(room.max_rows))
    stats_parts, ref_parts = [], []
    for block, _ in blocks:
        raw, ref_raw = room.logits([policy, ref], block)
        stats, ref_stats = room.divergence_statistics(policy, raw, ref, ref_raw, block)
        assert ref_stats is not None
        stats_parts.append(stats)
        ref_parts.append(ref_stats)
    stats, ref_stats = RowStatistics.cat(stats_parts), RowStatistics.cat(ref_parts)
    divergence = stats.divergence(ref_stats)
    sums, ref_sums = sequence_sums(stats.logps(), lengths), sequence_sums(ref_stats.logps(), lengths)
    on_host = call.layout.lengths[chunk.sequences]
    offline = int(on_host[: 2 * chunk.num_pairs].sum())  # rows of the pairs, which come first
    longest = int(on_host.max())
    loss, of_pairs, online = objective.exact(sums, ref_sums, lengths, chunk.num_pairs, divergence[offline:], longest)
    if gradients.any:
        of_pairs = of_pairs.repeat_interleave(lengths[: 2 * chunk.num_pairs], output_size=offline)
        by_logp = torch.cat([of_pairs, online.by_logp])
        by_divergence = torch.zeros_like(by_logp)
        by_divergence[offline:] = online.by_divergence
        for block, local in blocks:
            if len(blocks) > 1:  # else they are in the buffer still
                raw, ref_raw = room.logits([policy, ref], block)
            unit, factor = room.mixed_gradients(
                policy,
                raw,
                ref,
                ref_raw,
                block,
                norms=stats.norms[local],
                ref_norms=ref_stats.norms[local],
                divergence=divergence[local],
                by_logp=by_logp[local],
                by_divergence=by_divergence[local],
            )
            room.finish(gradients, unit, policy, block, factor)
    return Outcome(loss, sums, ref_sums, online.kl.flatten())
