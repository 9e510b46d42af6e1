"""The LM head applied to chunks of rows, so that logits of all rows never exist together.

A chunk of rows passes through the head once. Library GEMMs write its raw logits into one reused buffer. The row step
(``blockwise.rows`` or ``kernels.rows``) reduces them to softmax norms and a log-prob a row and, where gradients are
wanted, turns the buffer into unit gradients U = softmax − onehot. With c = ∂loss/∂log-prob of each row, two more GEMMs
give ``dHidden = −c ⊙ (U·W)`` and ``dWeight += Uᵀ·(−c ⊙ hidden)``. So no pass multiplies the (C, V) buffer by c.

Two Triton kernels contain the GEMM themselves, for the heads that they support. ``kernels.statistics`` (fused
statistics) stores no logits, and is used where only statistics are needed. ``kernels.exponentials`` (the epilogue
schedule) writes exponentials into the buffer instead of logits: they equal U up to one factor for each row.

If the loss also depends on each row's divergence from a reference, the reference's logits are in a second buffer, and
the row step (``blockwise.divergence`` or ``kernels.divergence``) adds the two derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hypo_kernels import gemm, workspace
from hypo_kernels.blockwise import divergence as divergence_blocks
from hypo_kernels.blockwise import rows as rows_blocks
from hypo_kernels.chunks import split
from hypo_kernels.errors import require
from hypo_kernels.gradients import Gradients
from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import EPILOGUE_IS_FASTER, is_listed
from hypo_kernels.layout import TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.statistics import RowStatistics, over_ranks
from hypo_kernels.workspace import Workspace

# fp16 cannot represent the tail of a softmax; times 2^12 it keeps 1.5e-11 of it and cannot overflow.
FP16_GRADIENT_SCALE = 2.0**12


class ChunkedLMHead:
    """The LM heads of one call, their matrices as GEMM operands, and the workspace.

    ``heads`` may hold several heads of one vocabulary (policy and reference). With ``buffers=1`` the buffer holds the
    logits of one head at a time; a call that needs the logits of both together passes 2. Row indices are positions
    in the layout, not in the hidden states.
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
        weight, self.shard = heads[0].weight, heads[0].vocab_shard
        self.compute_dtype = compute_dtype
        self.accumulator_dtype = gemm.accumulator_dtype(compute_dtype)
        self.operand_dtype = gemm.operand_dtype(weight.device, compute_dtype)
        self.row_step, self.divergence_step = _row_steps(impl)
        matrices = {id(matrix): matrix for head in heads for matrix in head.weights}
        largest = heads[0].largest_share
        copies = gemm.copy_bytes(list(matrices.values()), compute_dtype, max_chunk_bytes, largest)
        self.panels = {
            key: gemm.Panels.of(matrix, compute_dtype, size, largest)
            for (key, matrix), size in zip(matrices.items(), copies, strict=True)
        }
        self.fused_statistics = impl != "torch" and all(self._can_fuse_statistics(head, impl) for head in heads)
        self.epilogue = self._takes_epilogue(impl, with_divergence)
        buffer_dtype = self.operand_dtype if self.epilogue else self.accumulator_dtype
        self.rows, self.targets, _ = layout.on(weight.device)
        if self.shard is not None:
            self.targets = self.targets - self.shard.start
        self.all_rows = slice(0, len(layout.rows))
        self.scale = FP16_GRADIENT_SCALE if self.operand_dtype == torch.float16 else 1.0
        self.max_rows = workspace.max_rows(
            heads,
            compute_dtype,
            len(layout.rows),
            max_chunk_bytes,
            scratch_bytes=(self.divergence_step if with_divergence else self.row_step).scratch_bytes,
            gradients_in_place=self.row_step.GRADIENTS_IN_PLACE,
            largest_group=largest_group,
            buffers=buffers,
            buffer_dtype=buffer_dtype,
            fused_statistics=self.fused_statistics,
            stacked=2 if self._share_a_weight(heads) else 1,
            objective_bytes=objective_bytes,
        )
        self.workspace = Workspace(buffers * self.max_rows, weight.shape[0], buffer_dtype, weight.device)
        # Fused statistics need no logits buffer, so more rows fit into the budget.
        self.rows_of_statistics = self.max_rows
        if self.fused_statistics and statistics_only:
            unused = self.max_rows * workspace.pitch(largest, weight.device) * buffer_dtype.itemsize
            per_row = workspace.fused_statistics_bytes(largest) + 2 * weight.shape[1] * self.operand_dtype.itemsize
            self.rows_of_statistics += unused // per_row

    def raw_logits(self, projections: Sequence[Projection], rows: slice) -> list[Tensor]:
        """Return ``Σ features·matrixᵀ`` (C, V) of ``rows`` for each projection, stacked in the workspace.

        Together they must fit in the workspace. Projections with the same weight are computed by one GEMM.
        """
        count, first = rows.stop - rows.start, projections[0].head
        stacked = self.workspace.rows(len(projections) * count)
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
        """Return the statistics of any number of rows; ``with_moment`` for the entropy. Overwrites the workspace."""
        parts = []
        for part in split(rows, self.rows_of_statistics):
            if self.fused_statistics:
                parts.append(self._fused_statistics(projection, part, with_moment))
                continue
            (raw,) = self.raw_logits([projection], part)
            if with_moment:
                parts.append(self.divergence_statistics(projection, raw, None, None, part)[0])
            else:
                parts.append(self.statistics_of(raw, projection, part))
        return RowStatistics.cat(parts)

    def _fused_statistics(self, projection: Projection, rows: slice, with_moment: bool) -> RowStatistics:
        from hypo_kernels.kernels import statistics as statistics_kernels

        x, weight = self._inputs(projection.hidden, rows), self._operand(projection.head.weight)
        stats = RowStatistics(
            *statistics_kernels.statistics(x, weight, self.targets[rows], projection.head, with_moment=with_moment)
        )
        return stats if self.shard is None else over_ranks(stats, None, self.shard)[0]

    def statistics_of(self, raw: Tensor, projection: Projection, rows: slice) -> RowStatistics:
        """Return the statistics of raw logits (C, V), which stay unchanged."""
        stats = self.row_step.statistics(raw, self.targets[rows], projection.head)
        return stats if self.shard is None else over_ranks(stats, None, self.shard)[0]

    def unit_gradients(
        self, projection: Projection, rows: slice, norms: Tensor | None = None, raw: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (U, row factor, log-probs) of at most ``max_rows`` rows.

        ``row factor ⊙ U`` is softmax − onehot times ∂z/∂raw. U is (C, V) in the workspace; a row factor (C,) of None
        is 1. With ``norms`` (C, 3) from an earlier pass, the statistics are not computed again. Norms from fused
        statistics must not be passed: that GEMM rounds differently, so the probabilities would not sum to 1. ``raw``
        are logits that are already in the workspace.
        """
        targets, logps = self.targets[rows], None
        norms = None if self.fused_statistics else norms
        if self.epilogue:
            return self._exponentials(projection, rows)
        if raw is None:
            (raw,) = self.raw_logits([projection], rows)
        if self.shard is not None and norms is None:
            stats, _ = over_ranks(self.row_step.statistics(raw, targets, projection.head), None, self.shard)
            norms, logps = stats.norms, stats.logps()
        unit, row_factor, rank_logps = self.row_step.unit_gradients(
            raw, targets, projection.head, norms=norms, out_dtype=self.operand_dtype, scale=self.scale
        )
        return unit, row_factor, rank_logps if logps is None else logps

    def _exponentials(self, projection: Projection, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        from hypo_kernels.kernels import exponentials as exponentials_kernels

        head, targets = projection.head, self.targets[rows]
        x, out = self._inputs(projection.hidden, rows), self.workspace.rows(rows.stop - rows.start)
        offset, norms, target_logits = exponentials_kernels.exponentials(
            x, self._operand(head.weight), targets, head, out
        )
        stats = RowStatistics(norms, target_logits)
        if self.shard is not None:
            stats, _ = over_ranks(stats, None, self.shard)
        row_factor = exponentials_kernels.fix_targets(out, targets, stats.target, offset, stats.norms, head)
        return out, row_factor, stats.logps()

    def divergence_statistics(
        self, projection: Projection, raw: Tensor, ref: Projection | None, ref_raw: Tensor | None, rows: slice
    ) -> tuple[RowStatistics, RowStatistics | None]:
        """Return the statistics (with moment) of the policy's raw logits (C, V), and those of the reference's."""
        ref_head = None if ref is None else ref.head
        stats, ref_stats = self.divergence_step.statistics(raw, ref_raw, self.targets[rows], projection.head, ref_head)
        return (stats, ref_stats) if self.shard is None else over_ranks(stats, ref_stats, self.shard)

    def mixed_gradients(
        self,
        projection: Projection,
        raw: Tensor,
        ref: Projection | None,
        ref_raw: Tensor | None,
        rows: slice,
        *,
        norms: Tensor,  # (C, 3)
        ref_norms: Tensor | None,  # (C, 3)
        divergence: Tensor,  # (C,)
        by_logp: Tensor,  # (C,)
        by_divergence: Tensor,  # (C,)
    ) -> tuple[Tensor, Tensor]:
        """Return (U, factor) of a loss with derivatives ``by_logp`` and ``by_divergence``.

        ``factor ⊙ U`` is its derivative by the raw logits. U is (C, V) in the workspace. The factor (C,) is the larger
        of each row's two derivatives.
        """
        factor = torch.maximum(by_logp.abs(), by_divergence.abs())
        divisor = factor.clamp_min(torch.finfo(factor.dtype).tiny)
        unit = self.divergence_step.gradients(
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

    def accumulate(
        self,
        gradients: Gradients,
        unit: Tensor,
        projection: Projection,
        rows: slice,
        coefficients: Tensor,
        row_factor: Tensor | None = None,
    ) -> None:
        """Add the gradients of a loss to ``gradients``, from its derivative by the raw logits of ``rows``.

        That derivative is ``coefficients ⊙ row_factor ⊙ unit``, (C,) ⊙ (C,) ⊙ (C, V); a row factor of None is 1.
        """
        if len(unit) == 0:  # every token of the group is ignored
            return
        sums = gradients.sums
        factor = coefficients.to(self.accumulator_dtype)
        factor = factor if row_factor is None else factor * row_factor
        factor = factor[:, None] / self.scale
        sums_of_terms = [(sums.hidden, sums.weight), (sums.lora, sums.lora_weight)]
        for (features, matrix), (by_features, by_matrix) in zip(projection.terms(), sums_of_terms, strict=False):
            if by_features is not None:
                product = torch.empty(len(unit), features.shape[-1], dtype=self.accumulator_dtype, device=unit.device)
                for i, (vocab, panel) in enumerate(self.panels[id(matrix)]):
                    gemm.mm_(product, unit[:, vocab], panel, accumulate=i > 0, may_round=True)
                by_features.index_copy_(0, self.rows[rows], product.mul_(factor).to(by_features.dtype))
            if by_matrix is not None:
                self._add_products(by_matrix, unit, self._inputs(features, rows), factor, gradients.begun(by_matrix))
        if sums.bias is not None:
            ones = unit.new_ones(len(unit), 1)
            self._add_products(sums.bias[:, None], unit, ones, factor, gradients.begun(sums.bias))

    def _add_products(self, out: Tensor, unit: Tensor, x: Tensor, factor: Tensor, begun: bool) -> None:
        """Add ``Uᵀ·(factor ⊙ x)`` to ``out``, summed in fp32. If not ``begun``, overwrite ``out``."""
        if self.operand_dtype != torch.float16:
            gemm.mm_(out, unit.t(), (x * factor).to(self.operand_dtype), accumulate=begun, may_round=True)
            return
        # fp16 coefficients would underflow: divide by the largest, on the device, and multiply by it afterwards.
        top = factor.abs().amax().clamp_min(torch.finfo(factor.dtype).tiny)
        x = (x * (factor / top)).to(self.operand_dtype)
        step = max(1, workspace.FP16_BLOCK_BYTES // (4 * out.shape[1]))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            product = torch.empty_like(part) if begun else part
            gemm.mm_(product, unit[:, start : start + step].t(), x)
            part.addcmul_(product, top) if begun else part.mul_(top)

    def _operand(self, weight: Tensor) -> Tensor:
        operand = self.panels[id(weight)].operand
        assert operand is not None
        return operand

    def _can_fuse_statistics(self, head: LMHead, impl: str) -> bool:
        """Return whether the GEMM of fused statistics is as fast as a library's for this head, or asked for.

        It is for a single 16-bit matrix (any dtype in the interpreter) that is one operand, not panels, on a device
        with tiles of its own.
        """
        from hypo_kernels.kernels.head import capability

        if impl != "triton-epilogue" and not is_listed(capability(head.weight.device)):
            return False
        fast = self.operand_dtype.itemsize == 2 or head.weight.device.type == "cpu"
        return fast and head.lora is None and self.panels[id(head.weight)].operand is not None

    def _share_a_weight(self, heads: Sequence[LMHead]) -> bool:
        """Return whether one GEMM computes ``raw_logits`` of all heads."""
        first = heads[0].weight
        return (
            len(heads) > 1
            and not self.fused_statistics
            and all(len(head.weights) == 1 and head.weight is first for head in heads)
        )

    def _takes_epilogue(self, impl: str, with_divergence: bool) -> bool:
        device = next(iter(self.panels.values())).weight.device
        supported = self.fused_statistics and not with_divergence and self.operand_dtype != torch.float16
        require(
            impl != "triton-epilogue" or supported,
            "impl='triton-epilogue' supports bf16 heads that fit in memory as one operand, without lora, entropy or "
            "exact KL: use impl='triton' for this call",
        )
        if impl == "triton" and supported:
            from hypo_kernels.kernels.head import capability

            return (capability(device), self.operand_dtype) in EPILOGUE_IS_FASTER
        return impl == "triton-epilogue"

    def _inputs(self, features: Tensor, rows: slice) -> Tensor:
        """Return the rows' features (C, ·) as a GEMM operand."""
        index = self.rows[rows]
        if features.ndim == 3:
            return gemm.convert(features[index // features.shape[1], index % features.shape[1]], self.compute_dtype)
        return gemm.convert(features[index], self.compute_dtype)


def _only_matrix(projection: Projection) -> Tensor | None:
    terms = projection.terms()
    return terms[0][1] if len(terms) == 1 else None


def _row_steps(impl: str) -> tuple[ModuleType, ModuleType]:
    """Return the modules with the row step of log-probs and that of divergences."""
    if impl == "torch":
        return rows_blocks, divergence_blocks
    from hypo_kernels.kernels import divergence as divergence_kernels
    from hypo_kernels.kernels import rows as rows_kernels  # the first call that needs Triton imports it

    return rows_kernels, divergence_kernels
