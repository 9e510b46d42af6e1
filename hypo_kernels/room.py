"""The kernel room: one chunk of rows through the LM head, never the full-vocabulary logits.

A chunk of rows passes through the head once: library GEMMs write its raw logits into one reused buffer,
the row step (``blockwise.rows`` or ``kernels.rows``) reduces them to softmax norms and a log-prob a row and,
where gradients are wanted, turns the buffer into unit gradients U = softmax − onehot. With the derivative
c of the loss by each row's log-prob, two more GEMMs give ``dHidden = −c ⊙ (U·W)`` and
``dWeight += Uᵀ·(−c ⊙ hidden)``: coefficients never touch the (C, V) buffer.

Two Triton kernels go straight from hidden states where they serve the head: ``kernels.statistics``, which stores
no logits at all, wherever statistics are all that is wanted, and ``kernels.exponentials`` (the epilogue
schedule), which writes exponentials into the buffer instead of logits: they are U but for a factor a row.

A loss that also depends on each row's divergence from a reference has the reference's logits in a second
buffer, and its row step (``blockwise.divergence`` or ``kernels.divergence``) mixes the two derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from hypo_kernels import chunks, gemm
from hypo_kernels.blockwise import divergence as divergence_blocks
from hypo_kernels.blockwise import rows as rows_blocks
from hypo_kernels.chunks import split
from hypo_kernels.gradients import Gradients
from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import EPILOGUE_IS_FASTER
from hypo_kernels.layout import TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.statistics import RowStatistics, over_ranks

# fp16 has no exponent to spare for the tail of a softmax; 2^12 keeps 1.5e-11 of it and cannot overflow.
FP16_GRADIENT_SCALE = 2.0**12


class HeadRoom:
    """One call's way through its LM heads: the plan, the operands and the chunk buffers.

    ``heads`` may hold several heads of one vocabulary (policy and reference). With ``buffers=1`` they take
    turns; a call that needs both heads' logits at once asks for 2. Rows are named by their position in the
    layout, not in the hidden states.
    """

    def __init__(
        self,
        heads: Sequence[LMHead],
        layout: TargetLayout,
        compute_dtype: torch.dtype,
        impl: str,
        max_chunk_bytes: int,
        *,
        largest_group: int = 1,
        with_divergence: bool = False,
        buffers: int = 1,
        statistics_only: bool = False,
        objective_bytes: int = 0,
    ) -> None:
        weight, self.shard = heads[0].weight, heads[0].shard
        self.compute_dtype = compute_dtype
        self.wide = gemm.accumulator_dtype(compute_dtype)
        self.operand_dtype = gemm.operand_dtype(weight.device, compute_dtype)
        self.steps, self.divergence_steps = _row_steps(impl)
        matrices = {id(matrix): matrix for head in heads for matrix in head.weights}
        largest = heads[0].largest_share
        self.panels = {
            key: gemm.Panels.of(matrix, compute_dtype, max_chunk_bytes, largest) for key, matrix in matrices.items()
        }
        self.straight = impl != "torch" and all(self._is_served_straight(head) for head in heads)
        self.epilogue = self._takes_epilogue(impl, with_divergence)
        self.rows, self.targets, _ = layout.on(weight.device)
        if self.shard is not None:
            self.targets = self.targets - self.shard.start
        self.all_rows = slice(0, len(layout.rows))
        self.scale = FP16_GRADIENT_SCALE if self.operand_dtype == torch.float16 else 1.0
        self.max_rows = chunks.max_rows(
            heads,
            compute_dtype,
            len(layout.rows),
            max_chunk_bytes,
            scratch_bytes=(self.divergence_steps if with_divergence else self.steps).scratch_bytes,
            gradients_in_place=self.steps.GRADIENTS_IN_PLACE,
            largest_group=largest_group,
            buffers=buffers,
            buffer_dtype=self._buffer_dtype,
            straight=self.straight,
            stacked=2 if self._is_shared(heads) else 1,
            objective_bytes=objective_bytes,
        )
        self.pitch = chunks.pitch(weight.shape[0], weight.device)
        self.capacity = buffers * self.max_rows
        # Statistics straight from hidden states leave the buffer's memory to further rows.
        self.rows_of_statistics = self.max_rows
        if self.straight and statistics_only:
            unused = self.max_rows * chunks.pitch(largest, weight.device) * self._buffer_dtype.itemsize
            per_row = chunks.straight_bytes(largest) + 2 * weight.shape[1] * self.operand_dtype.itemsize
            self.rows_of_statistics += unused // per_row

    @cached_property
    def buffer(self) -> Tensor:
        """Flat; not there until logits are."""
        return torch.empty(self.capacity * self.pitch, dtype=self._buffer_dtype, device=self.rows.device)

    @property
    def _buffer_dtype(self) -> torch.dtype:
        return self.operand_dtype if self.epilogue else self.wide

    def logits(self, projections: Sequence[Projection], rows: slice) -> list[Tensor]:
        """Raw logits ``Σ features·matrixᵀ`` (C, V) of ``rows`` by each projection, one below the other in the buffer.

        All of them together are at most ``capacity`` rows. Projections by one and the same weight are one GEMM.
        """
        count, first = rows.stop - rows.start, projections[0].head
        stacked = self._in_buffer(len(projections) * count)[:, : first.vocab_size]
        parts = [stacked[i * count : (i + 1) * count] for i in range(len(projections))]
        if len(parts) > 1 and all(_only_matrix(p) is first.weight for p in projections):
            self._multiply(stacked, [(torch.cat([self._inputs(p.hidden, rows) for p in projections]), first.weight)])
            return parts
        for raw, projection in zip(parts, projections, strict=True):
            self._multiply(raw, [(self._inputs(features, rows), matrix) for features, matrix in projection.terms()])
        return parts

    def _multiply(self, raw: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> None:
        for i, (x, matrix) in enumerate(terms):
            for vocab, panel in self.panels[id(matrix)]:
                gemm.mm_(raw[:, vocab], x, panel.t(), accumulate=i > 0)

    def statistics(self, projection: Projection, rows: slice, *, with_moment: bool = False) -> RowStatistics:
        """Of ``rows``, as many as there are; no logits outlive the buffer. The moment is for the entropy."""
        parts = []
        for part in split(rows, self.rows_of_statistics):
            if self.straight:
                parts.append(self._straight_statistics(projection, part, with_moment))
                continue
            (raw,) = self.logits([projection], part)
            if with_moment:
                parts.append(self.divergence_statistics(projection, raw, None, None, part)[0])
            else:
                parts.append(self.statistics_of(raw, projection, part))
        return RowStatistics.cat(parts)

    def _straight_statistics(self, projection: Projection, rows: slice, with_moment: bool) -> RowStatistics:
        from hypo_kernels.kernels import statistics as statistics_kernels

        x, weight = self._inputs(projection.hidden, rows), self._operand(projection.head.weight)
        stats = RowStatistics(
            *statistics_kernels.statistics(x, weight, self.targets[rows], projection.head, with_moment=with_moment)
        )
        return stats if self.shard is None else over_ranks(stats, None, self.shard)[0]

    def statistics_of(self, raw: Tensor, projection: Projection, rows: slice) -> RowStatistics:
        """Of raw logits (C, V), which stay as they are."""
        stats = self.steps.statistics(raw, self.targets[rows], projection.head)
        return stats if self.shard is None else over_ranks(stats, None, self.shard)[0]

    def unit_gradients(
        self, projection: Projection, rows: slice, norms: Tensor | None = None, raw: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(U, factor, log-probs) of at most ``max_rows`` rows: ``factor ⊙ U`` is softmax − onehot times ∂z/∂raw.

        U is (C, V) in the buffer; a factor (C,) of None is 1. ``norms`` (C, 2) of an earlier pass spare the
        statistics, unless they came straight from hidden states: the logits of another product differ in their
        last digits, and probabilities would no longer add up to 1. ``raw`` are logits that are in the buffer.
        """
        targets, logps = self.targets[rows], None
        norms = None if self.straight else norms
        if self.epilogue:
            return self._exponentials(projection, rows)
        if raw is None:
            (raw,) = self.logits([projection], rows)
        if self.shard is not None and norms is None:
            stats, _ = over_ranks(self.steps.statistics(raw, targets, projection.head), None, self.shard)
            norms, logps = stats.norms, stats.logps()
        unit, factor, own_logps = self.steps.unit_gradients(
            raw, targets, projection.head, norms=norms, out_dtype=self.operand_dtype, scale=self.scale
        )
        return unit, factor, own_logps if logps is None else logps

    def _exponentials(self, projection: Projection, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        from hypo_kernels.kernels import exponentials as exponentials_kernels

        head, targets, count = projection.head, self.targets[rows], rows.stop - rows.start
        x, out = self._inputs(projection.hidden, rows), self._in_buffer(count)[:, : head.vocab_size]
        offset, norms, target_logits = exponentials_kernels.exponentials(
            x, self._operand(head.weight), targets, head, out
        )
        stats = RowStatistics(norms, target_logits)
        if self.shard is not None:
            stats, _ = over_ranks(stats, None, self.shard)
        factor = exponentials_kernels.fix_targets(out, targets, stats.target, offset, stats.norms, head)
        return out, factor, stats.logps()

    def divergence_statistics(
        self, projection: Projection, raw: Tensor, ref: Projection | None, ref_raw: Tensor | None, rows: slice
    ) -> tuple[RowStatistics, RowStatistics | None]:
        """With the moment, of raw logits of ``rows``, and those of the reference's."""
        ref_head = None if ref is None else ref.head
        stats, ref_stats = self.divergence_steps.statistics(raw, ref_raw, self.targets[rows], projection.head, ref_head)
        return (stats, ref_stats) if self.shard is None else over_ranks(stats, ref_stats, self.shard)

    def mixed_gradients(
        self,
        projection: Projection,
        raw: Tensor,
        ref: Projection | None,
        ref_raw: Tensor | None,
        rows: slice,
        *,
        norms: Tensor,  # (C, 2)
        ref_norms: Tensor | None,  # (C, 2)
        divergence: Tensor,  # (C,)
        by_logp: Tensor,  # (C,)
        by_divergence: Tensor,  # (C,)
    ) -> tuple[Tensor, Tensor]:
        """(U, factor): ``factor ⊙ U`` is the derivative by the raw logits of a loss with the given derivatives.

        Each row's larger derivative is taken out of U, (C, V) in the buffer, into the factor (C,).
        """
        factor = torch.maximum(by_logp.abs(), by_divergence.abs())
        divisor = factor.clamp_min(torch.finfo(factor.dtype).tiny)
        unit = self.divergence_steps.gradients(
            raw,
            ref_raw,
            self.targets[rows],
            projection.head,
            None if ref is None else ref.head,
            norms=norms,
            ref_norms=ref_norms,
            divergence=divergence,
            score=-by_logp / divisor,
            weight=by_divergence / divisor,
            out_dtype=self.operand_dtype,
            scale=self.scale,
        )
        return unit, factor

    def finish(
        self,
        gradients: Gradients,
        unit: Tensor,
        projection: Projection,
        rows: slice,
        factor: Tensor,
        own_factor: Tensor | None = None,
    ) -> None:
        """Add the gradients of a loss whose derivative by the raw logits of ``rows`` is ``factor ⊙ own_factor ⊙ U``.

        Factors are (C,); an ``own_factor`` of None is 1.
        """
        if len(unit) == 0:  # every token of the group is ignored
            return
        sums = gradients.sums
        factor = factor.to(self.wide) if own_factor is None else factor.to(self.wide) * own_factor
        factor = factor[:, None] / self.scale
        of_terms = [(sums.hidden, sums.weight), (sums.lora, sums.lora_weight)]
        for (features, matrix), (by_features, by_matrix) in zip(projection.terms(), of_terms, strict=False):
            if by_features is not None:
                out = torch.empty(len(unit), features.shape[-1], dtype=self.wide, device=unit.device)
                for i, (vocab, panel) in enumerate(self.panels[id(matrix)]):
                    gemm.mm_(out, unit[:, vocab], panel, accumulate=i > 0)
                by_features.index_copy_(0, self.rows[rows], out.mul_(factor).to(by_features.dtype))
            if by_matrix is not None:
                self._add_products(by_matrix, unit, self._inputs(features, rows), factor, gradients.begun(by_matrix))
        if sums.bias is not None:
            ones = unit.new_ones(len(unit), 1)
            self._add_products(sums.bias[:, None], unit, ones, factor, gradients.begun(sums.bias))

    def _add_products(self, out: Tensor, unit: Tensor, x: Tensor, factor: Tensor, begun: bool) -> None:
        """``out += Uᵀ·(factor ⊙ x)``, summed in fp32; the first product is written, not added."""
        if self.operand_dtype != torch.float16:
            gemm.mm_(out, unit.t(), (x * factor).to(self.operand_dtype), accumulate=begun)
            return
        # fp16 coefficients would underflow: the largest is taken out, on the device, and put back after.
        top = factor.abs().amax().clamp_min(torch.finfo(factor.dtype).tiny)
        x = (x * (factor / top)).to(self.operand_dtype)
        step = max(1, chunks.FP16_BLOCK_BYTES // (4 * out.shape[1]))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            product = torch.empty_like(part) if begun else part
            gemm.mm_(product, unit[:, start : start + step].t(), x)
            part.addcmul_(product, top) if begun else part.mul_(top)

    def _in_buffer(self, rows: int) -> Tensor:
        """(rows, pitch) at the front of the buffer."""
        return self.buffer[: rows * self.pitch].view(rows, self.pitch)

    def _operand(self, weight: Tensor) -> Tensor:
        """The weight (V, D) as one GEMM operand."""
        whole = self.panels[id(weight)].whole
        assert whole is not None
        return whole

    def _is_served_straight(self, head: LMHead) -> bool:
        """One matrix, there as a whole, that Triton multiplies as well as a library: 16 bits (or interpreted)."""
        fast = self.operand_dtype.itemsize == 2 or head.weight.device.type == "cpu"
        return fast and head.lora_weight is None and self.panels[id(head.weight)].whole is not None

    def _is_shared(self, heads: Sequence[LMHead]) -> bool:
        """Whether ``logits`` makes one GEMM of all the heads."""
        first = heads[0].weight
        return len(heads) > 1 and not self.straight and all(len(h.weights) == 1 and h.weight is first for h in heads)

    def _takes_epilogue(self, impl: str, with_divergence: bool) -> bool:
        device = next(iter(self.panels.values())).weight.device
        served = self.straight and not with_divergence and self.operand_dtype != torch.float16
        if impl == "triton-epilogue" and not served:
            raise ValueError(
                "impl='triton-epilogue' serves bf16 heads that fit beside the chunks as a whole, without lora, entropy "
                "or exact KL: use impl='triton' for this call"
            )
        if impl == "triton" and served:
            from hypo_kernels.kernels.head import capability

            return (capability(device), self.operand_dtype) in EPILOGUE_IS_FASTER
        return impl == "triton-epilogue"

    def _inputs(self, features: Tensor, rows: slice) -> Tensor:
        """The rows' features (C, D) as a GEMM operand."""
        index = self.rows[rows]
        if features.ndim == 3:
            return gemm.convert(features[index // features.shape[1], index % features.shape[1]], self.compute_dtype)
        return gemm.convert(features[index], self.compute_dtype)


def _only_matrix(projection: Projection) -> Tensor | None:
    terms = projection.terms()
    return terms[0][1] if len(terms) == 1 else None


def _row_steps(impl: str) -> tuple[ModuleType, ModuleType]:
    """The row step of log-probs and that of divergences."""
    if impl == "torch":
        return rows_blocks, divergence_blocks
    from hypo_kernels.kernels import divergence as divergence_kernels
    from hypo_kernels.kernels import rows as rows_kernels  # Triton is imported by the first call that needs it

    return rows_kernels, divergence_kernels
