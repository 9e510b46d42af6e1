"""The group-closed schedule: a loss of pairs and groups, finished on the logits of the chunk.

The derivative of the loss by a sequence's log-prob depends on its own pair or group alone. So a chunk of
whole groups needs its logits once: GEMM → row step → sequence sums → coefficients → two GEMMs, 6 NVD
with a trained head and 4 NVD with a frozen one, where a per-token loss has to compute the logits again.
Only a group that does not fit in the buffer takes a second pass (8 and 6 NVD), that group alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels.call import Call
from hypo_kernels.chunks import Chunk, chunks
from hypo_kernels.head import LMHead
from hypo_kernels.room import Gradients, HeadRoom, sequence_sums


def run(call: Call, hidden: Tensor, needed: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Loss (), log-probs (S,), reference log-probs (S,) and the gradients that are ``needed``.

    ``needed`` says so for hidden, weight and bias. Log-probs are in group order.
    """
    head, objective = call.head, call.objective
    heads = [head] if call.ref_head is None else [head, call.ref_head]
    room = HeadRoom(
        heads,
        call.layout,
        call.compute_dtype,
        call.impl,
        call.max_chunk_bytes,
        largest_group=call.largest_group(),
    )
    gradients = Gradients.like(hidden, head, needed, call.compute_dtype)
    lengths = call.layout.lengths.to(hidden.device, non_blocking=True)
    losses, logps, ref_logps = [], [], []
    plan = chunks(call.layout.lengths.tolist(), objective.num_pairs, objective.num_generations, room.max_rows)
    for chunk in plan:
        ref = _reference(call, room, chunk, lengths)
        # One block: the unit gradients of the whole chunk stay in the buffer until the coefficients are known.
        closed = chunk.rows.stop - chunk.rows.start <= room.max_rows
        if closed and any(needed):
            unit, norms, rows = room.unit_gradients(hidden, head, chunk.rows)
        else:
            norms, rows = room.statistics(hidden, head, chunk.rows)
        sums = sequence_sums(rows, lengths[chunk.sequences])
        loss, coefficients = objective(sums, ref, lengths[chunk.sequences], chunk.num_pairs)
        if any(needed):
            per_row = coefficients.repeat_interleave(lengths[chunk.sequences], output_size=len(rows))
            if closed:
                room.finish(gradients, unit, hidden, head, chunk.rows, per_row)
            else:
                _finish_by_recompute(room, gradients, hidden, head, chunk, norms, per_row)
        losses.append(loss)
        logps.append(sums)
        ref_logps.append(ref)
    return torch.stack(losses).sum(), torch.cat(logps), torch.cat(ref_logps), gradients


def _reference(call: Call, room: HeadRoom, chunk: Chunk, lengths: Tensor) -> Tensor:
    """Reference log-probs of the chunk's sequences, given or computed in the chunk's own buffer."""
    if call.ref_logps is not None:
        return call.ref_logps[chunk.sequences]
    assert call.ref_hidden is not None
    assert call.ref_head is not None
    _, rows = room.statistics(call.ref_hidden, call.ref_head, chunk.rows)
    return sequence_sums(rows, lengths[chunk.sequences])


def _finish_by_recompute(
    room: HeadRoom,
    gradients: Gradients,
    hidden: Tensor,
    head: LMHead,
    chunk: Chunk,
    norms: Tensor,  # (rows of the chunk, 2)
    coefficients: Tensor,  # (rows of the chunk,)
) -> None:
    for block in chunk.blocks(room.max_rows):
        local = slice(block.start - chunk.rows.start, block.stop - chunk.rows.start)
        unit, _, _ = room.unit_gradients(hidden, head, block, norms[local])
        room.finish(gradients, unit, hidden, head, block, coefficients[local])
