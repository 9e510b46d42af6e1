"""The group-closed schedule: the loss of pairs and groups is finished while the chunk's logits are in memory.

The derivative of the loss by a sequence's log-prob depends only on its pair or group. So a chunk of complete groups
needs its logits once: GEMM → row step → sequence sums → coefficients → two GEMMs. That costs 6 NVD with a trained head
and 4 NVD with a frozen one, where a per-token loss has to compute the logits again. Only a group that does not fit in
the workspace takes a second pass (8 and 6 NVD), and only that group.

The exact KL estimator works on rows: it needs derivatives by each row's log-prob and by its divergence from the
reference, whose logits follow the policy's in the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hypo_kernels.call import Call, LossOutput
from hypo_kernels.chunked_head import ChunkedLMHead
from hypo_kernels.chunks import Chunk, chunks
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.losses import wants_batch
from hypo_kernels.objective import Importance, with_batch_statistics
from hypo_kernels.statistics import RowStatistics, sequence_sums
from hypo_kernels.workspace import BYTES_PER_OTHER_SAMPLE, BYTES_PER_WEIGHTED_ROW


def run(call: Call, needed: Sequence[bool], *, sums_are_wide: bool = False) -> tuple[LossOutput, Gradients]:
    """Return loss and statistics, and the gradients of the :class:`Leaves` that are ``needed``.

    With ``sums_are_wide``, the gradients' dtypes do not depend on the number of chunks.
    """
    objective = call.objective
    lm_head = ChunkedLMHead(
        [call.policy.head] if call.ref is None else [call.policy.head, call.ref.head],
        call.layout,
        call.compute_dtype,
        call.impl,
        call.max_chunk_bytes,
        largest_group=call.largest_group(),
        with_divergence=objective.is_exact,
        buffers=2 if objective.is_exact else 1,
        statistics_only=not any(needed) and not objective.is_exact,
        objective_bytes=_objective_bytes(call),
    )
    plan = chunks(call.layout.lengths.tolist(), objective.num_pairs, objective.num_generations, lm_head.max_rows)
    gradients = Gradients(
        Leaves.of(call.policy),
        needed,
        call.compute_dtype,
        lm_head.shard,
        in_one_product=len(plan) == 1 and len(call.layout.rows) <= lm_head.max_rows and not sums_are_wide,
        scale_=lm_head.row_step.scale_,
    )
    lengths = call.layout.on(lm_head.rows.device).lengths
    call = _with_batch_statistics(call, lm_head, plan, lengths)
    run_chunk = _exact_chunk if objective.is_exact else _sampled_chunk
    parts = [run_chunk(call, lm_head, gradients, chunk, lengths[chunk.sequences]) for chunk in plan]
    gradients.close(lm_head.shard)
    return (
        LossOutput(
            loss=torch.stack([part.loss for part in parts]).sum(),
            logps=torch.cat([part.logps for part in parts]),
            ref_logps=torch.cat([part.ref_logps for part in parts]),
            kl=torch.cat([part.kl for part in parts]),
            importance=_concatenated([part.importance for part in parts if part.importance is not None]),
        ),
        gradients,
    )


def _with_batch_statistics(call: Call, lm_head: ChunkedLMHead, plan: Sequence[Chunk], lengths: Tensor) -> Call:
    """Return the call with the loss's statistics of all pairs, from a pass over their logits without gradients.

    A loss without such statistics needs no pass, nor does a batch whose pairs are in one chunk: there the objective
    computes them itself.
    """
    objective, with_pairs = call.objective, [chunk for chunk in plan if chunk.num_pairs]
    if not wants_batch(objective.loss) or len(with_pairs) <= 1:
        return call
    sums, ref_sums = [], []
    for chunk in with_pairs:
        rows = call.weighted(lm_head.statistics(call.policy, chunk.rows).logps(), chunk.rows)
        sums.append(sequence_sums(rows, lengths[chunk.sequences]))
        ref_sums.append(_ref_logps(call, lm_head, chunk, lengths[chunk.sequences]))
    offline = 2 * objective.num_pairs
    logps, ref_logps = (torch.cat(parts)[:offline] for parts in (sums, ref_sums))
    pairs = objective.pairs(logps, ref_logps, lengths[:offline], call.pair_tensors)
    return replace(call, pair_tensors=with_batch_statistics(objective.loss, pairs).tensors)


def _objective_bytes(call: Call) -> int:
    """Return the bytes for each counted row that this objective stores in addition to what every call stores."""
    if call.objective.is_exact:
        return BYTES_PER_OTHER_SAMPLE * (call.objective.num_generations - 1)
    return 0 if call.behavior_logps is None else BYTES_PER_WEIGHTED_ROW


def _concatenated(parts: Sequence[Importance]) -> Importance | None:
    return Importance(*(torch.cat(sums) for sums in zip(*parts, strict=True))) if parts else None


def _sampled_chunk(
    call: Call, lm_head: ChunkedLMHead, gradients: Gradients, chunk: Chunk, lengths: Tensor
) -> LossOutput:
    """Run a chunk with the sampled KL: each sequence has one coefficient; importance weights multiply it by row."""
    rows, count = chunk.rows, chunk.rows.stop - chunk.rows.start
    # Single pass: the chunk's unit gradients stay in the workspace until the coefficients are known.
    single_pass = count <= lm_head.max_rows and gradients.any
    raw = None
    if (
        single_pass
        and call.ref is not None
        and 2 * count <= lm_head.workspace.num_rows
        and not lm_head.fused_statistics
    ):
        # One GEMM if policy and reference have the same weight.
        raw, ref_raw = lm_head.raw_logits([call.policy, call.ref], rows)
        ref_rows = lm_head.statistics_of(ref_raw, call.ref, rows).logps()
        ref_logps = sequence_sums(call.weighted(ref_rows, rows), lengths)
    else:
        ref_logps = _ref_logps(call, lm_head, chunk, lengths)
    if single_pass:
        unit, row_factor, row_logps = lm_head.unit_gradients(call.policy, rows, raw=raw)
    else:
        stats = lm_head.statistics(call.policy, rows)
        row_logps = stats.logps()
    logps = sequence_sums(call.weighted(row_logps, rows), lengths)
    loss, sequence_coefficients = call.objective(
        logps, ref_logps, lengths, chunk.num_pairs, *call.tensors_of(chunk.sequences)
    )
    pairs, importance = 2 * chunk.num_pairs, None
    if call.behavior_logps is not None:
        offline = int(call.layout.lengths[chunk.sequences][:pairs].sum())  # rows of the pairs, which come first
        weights, importance = call.objective.importance(
            row_logps[offline:], call.behavior_logps[rows][offline:], lengths[pairs:]
        )
    if gradients.any:
        # Negative, as U is the derivative of −log p.
        coefficients = -call.weighted(sequence_coefficients.repeat_interleave(lengths, output_size=count), rows)
        if importance is not None:
            coefficients[offline:] *= weights
        if single_pass:
            lm_head.accumulate(gradients, unit, call.policy, rows, coefficients, row_factor)
        else:
            for block, local in chunk.blocks(lm_head.max_rows):
                unit, row_factor, _ = lm_head.unit_gradients(call.policy, block, stats.norms[local])
                lm_head.accumulate(gradients, unit, call.policy, block, coefficients[local], row_factor)
    return LossOutput(loss, logps, ref_logps, (logps - ref_logps)[pairs:], importance)


def _ref_logps(call: Call, lm_head: ChunkedLMHead, chunk: Chunk, lengths: Tensor) -> Tensor:
    """Return the reference's log-probs of the chunk's sequences: the caller's, or computed in the workspace."""
    if call.ref is None:
        assert call.ref_logps is not None
        return call.ref_logps[chunk.sequences]
    return sequence_sums(call.weighted(lm_head.statistics(call.ref, chunk.rows).logps(), chunk.rows), lengths)


def _exact_chunk(call: Call, lm_head: ChunkedLMHead, gradients: Gradients, chunk: Chunk, lengths: Tensor) -> LossOutput:
    """Run a chunk with the exact KL: each row has a coefficient for its log-prob and one for its divergence."""
    policy, ref, objective = call.policy, call.ref, call.objective
    assert ref is not None
    blocks = list(chunk.blocks(lm_head.max_rows))
    stats_parts, ref_parts = [], []
    for block, _ in blocks:
        raw, ref_raw = lm_head.raw_logits([policy, ref], block)
        stats, ref_stats = lm_head.divergence_statistics(policy, raw, ref, ref_raw, block)
        assert ref_stats is not None
        stats_parts.append(stats)
        ref_parts.append(ref_stats)
    stats, ref_stats = RowStatistics.cat(stats_parts), RowStatistics.cat(ref_parts)
    divergence = stats.divergence(ref_stats)
    logps, ref_logps = (sequence_sums(call.weighted(x.logps(), chunk.rows), lengths) for x in (stats, ref_stats))
    host_lengths = call.layout.lengths[chunk.sequences]
    offline = int(host_lengths[: 2 * chunk.num_pairs].sum())  # rows of the pairs, which come first
    loss, pair_slopes, online = objective.exact(
        logps,
        ref_logps,
        lengths,
        chunk.num_pairs,
        divergence[offline:],
        int(host_lengths.max()),
        *call.tensors_of(chunk.sequences),
    )
    if gradients.any:
        pair_slopes = pair_slopes.repeat_interleave(lengths[: 2 * chunk.num_pairs], output_size=offline)
        by_logp = call.weighted(torch.cat([pair_slopes, online.by_logp]), chunk.rows)
        by_divergence = torch.zeros_like(by_logp)
        by_divergence[offline:] = online.by_divergence
        for block, local in blocks:
            if len(blocks) > 1:  # a single block's logits are still in the workspace
                raw, ref_raw = lm_head.raw_logits([policy, ref], block)
            unit, coefficients = lm_head.mixed_gradients(
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
            lm_head.accumulate(gradients, unit, policy, block, coefficients)
    return LossOutput(loss, logps, ref_logps, online.kl.flatten())
