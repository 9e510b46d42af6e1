"""The kernel room: one chunk of rows through the LM head, never the full-vocabulary logits.

A chunk of rows passes through the head once: a library GEMM writes its raw logits into one reused
buffer, the row step (``rows_torch`` or ``rows_triton``) reduces them to softmax norms and a log-prob a
row and, where gradients are wanted, turns the buffer into unit gradients U = softmax − onehot. With the
derivative c of the loss by each row's log-prob, two more GEMMs give
``dHidden = −c ⊙ (U·W)`` and ``dWeight += Uᵀ·(−c ⊙ hidden)``: coefficients never touch the (C, V) buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hypo_kernels import chunks, gemm, rows_torch
from hypo_kernels.chunks import Layout, split
from hypo_kernels.head import LMHead

# fp16 has no exponent to spare for the tail of a softmax; 2^12 keeps 1.5e-11 of it and cannot overflow.
FP16_GRADIENT_SCALE = 2.0**12


@dataclass
class Gradients:
    """What a call is asked for: gradients of hidden (T, D), weight (V, D) and bias (V,), or None each.

    A 16-bit weight's gradient is summed in fp32 and rounded once, at the end.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def like(cls, hidden: Tensor, head: LMHead, needed: Sequence[bool], compute_dtype: torch.dtype) -> Gradients:
        wide = gemm.accumulator_dtype(compute_dtype)
        # fp16 would flush gradients that a later loss scale could still have saved.
        hidden_dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        return cls(
            hidden.new_zeros((hidden.numel() // hidden.shape[-1], hidden.shape[-1]), dtype=hidden_dtype)
            if needed[0]
            else None,
            torch.zeros_like(head.weight, dtype=wide, memory_format=torch.contiguous_format) if needed[1] else None,
            torch.zeros_like(head.bias, dtype=wide) if needed[2] and head.bias is not None else None,
        )

    def scaled(self, factor: Tensor | None, hidden: Tensor, head: LMHead) -> tuple[Tensor | None, ...]:
        """Gradients of (hidden, weight, bias), times ``factor`` (), in their inputs' shapes and dtypes.

        Scales the accumulators in place: a call's gradients are handed out once.
        """
        inputs = (hidden, head.weight, head.bias)
        out: list[Tensor | None] = []
        for gradient, like in zip((self.hidden, self.weight, self.bias), inputs, strict=True):
            if gradient is None or like is None:
                out.append(None)
                continue
            if factor is not None:
                gradient.mul_(factor)
            out.append(gradient.view(like.shape).to(like.dtype))
        return tuple(out)


class HeadRoom:
    """One call's way through its LM heads: the plan, the operands and the one chunk buffer.

    ``heads`` may hold several heads of one vocabulary (policy and reference); they take turns in the
    buffer. Rows are named by their position in the layout, not in ``hidden``.
    """

    def __init__(
        self,
        heads: Sequence[LMHead],
        layout: Layout,
        compute_dtype: torch.dtype,
        impl: str,
        max_chunk_bytes: int,
        largest_group: int = 1,
    ) -> None:
        weight = heads[0].weight
        self.compute_dtype = compute_dtype
        self.operand_dtype = gemm.operand_dtype(weight.device, compute_dtype)
        self.steps = _row_steps(impl)
        self.rows = layout.rows.to(weight.device, non_blocking=True)
        self.targets = layout.targets.to(weight.device, non_blocking=True)
        self.all_rows = slice(0, len(layout.rows))
        self.scale = FP16_GRADIENT_SCALE if self.operand_dtype == torch.float16 else 1.0
        self.max_rows = chunks.max_rows(
            heads,
            compute_dtype,
            len(layout.rows),
            max_chunk_bytes,
            scratch_bytes=self.steps.scratch_bytes,
            gradients_in_place=self.steps.GRADIENTS_IN_PLACE,
            largest_group=largest_group,
        )
        self.pitch = chunks.pitch(weight.shape[0], weight.device)
        self.buffer = torch.empty(
            self.max_rows * self.pitch, dtype=gemm.accumulator_dtype(compute_dtype), device=weight.device
        )
        self.panels = {id(h.weight): gemm.Panels.of(h.weight, compute_dtype, max_chunk_bytes) for h in heads}

    def statistics(self, hidden: Tensor, head: LMHead, rows: slice) -> tuple[Tensor, Tensor]:
        """Softmax norms and log-prob of ``rows``, as many as there are; no logits outlive the buffer."""
        parts = [
            self.steps.statistics(self._raw(self._inputs(hidden, part), head), self.targets[part], head)
            for part in split(rows, self.max_rows)
        ]
        if not parts:
            return (self.buffer.new_zeros(0),) * 2
        return torch.cat([norms for norms, _ in parts]), torch.cat([logp for _, logp in parts])

    def unit_gradients(
        self, hidden: Tensor, head: LMHead, rows: slice, norms: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (C, V) in the buffer, softmax norms and log-prob of at most ``max_rows`` rows."""
        raw = self._raw(self._inputs(hidden, rows), head)
        return self.steps.unit_gradients(
            raw, self.targets[rows], head, norms=norms, out_dtype=self.operand_dtype, scale=self.scale
        )

    def finish(
        self,
        gradients: Gradients,
        unit: Tensor,
        hidden: Tensor,
        head: LMHead,
        rows: slice,
        coefficients: Tensor,
    ) -> None:
        """Add the gradients of ``Σ coefficients · logp`` over ``rows``; ``coefficients`` (C,)."""
        if len(unit) == 0:  # every token of the group is ignored
            return
        panels = self.panels[id(head.weight)]
        factor = coefficients.to(self.buffer.dtype).neg()[:, None] / self.scale
        if gradients.hidden is not None:
            out = self.buffer.new_empty(len(unit), hidden.shape[-1])
            for i, (vocab, weight) in enumerate(panels):
                gemm.mm_(out, unit[:, vocab], weight, accumulate=i > 0)
            gradients.hidden.index_copy_(0, self.rows[rows], out.mul_(factor).to(gradients.hidden.dtype))
        if gradients.weight is not None:
            self._add_products(gradients.weight, unit, self._inputs(hidden, rows), factor)
        if gradients.bias is not None:
            ones = unit.new_ones(len(unit), 1)
            self._add_products(gradients.bias[:, None], unit, ones, factor)

    def _add_products(self, out: Tensor, unit: Tensor, x: Tensor, factor: Tensor) -> None:
        """``out += Uᵀ·(factor ⊙ x)``, summed in fp32."""
        if self.operand_dtype != torch.float16:
            gemm.mm_(out, unit.t(), (x * factor).to(self.operand_dtype), accumulate=True)
            return
        # fp16 coefficients would underflow: the largest is taken out, on the device, and put back after.
        top = factor.abs().amax().clamp_min(torch.finfo(factor.dtype).tiny)
        x = (x * (factor / top)).to(self.operand_dtype)
        step = max(1, chunks.FP16_BLOCK_BYTES // (4 * out.shape[1]))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            product = torch.empty_like(part)
            gemm.mm_(product, unit[:, start : start + step].t(), x)
            part.addcmul_(product, top)

    def _inputs(self, hidden: Tensor, rows: slice) -> Tensor:
        """The rows' hidden states (C, D) as a GEMM operand."""
        index = self.rows[rows]
        picked = hidden[index] if hidden.ndim == 2 else hidden[index // hidden.shape[1], index % hidden.shape[1]]
        return gemm.convert(picked, self.compute_dtype)

    def _raw(self, x: Tensor, head: LMHead) -> Tensor:
        """``x·Wᵀ`` (C, V) in the buffer."""
        raw = self.buffer[: len(x) * self.pitch].view(len(x), self.pitch)[:, : head.vocab_size]
        for vocab, weight in self.panels[id(head.weight)]:
            gemm.mm_(raw[:, vocab], x, weight.t())
        return raw


def _row_steps(impl: str) -> ModuleType:
    if impl == "torch":
        return rows_torch
    from hypo_kernels import rows_triton  # Triton is imported by the first call that needs it

    return rows_triton


def sequence_sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """Deterministic sum of each sequence's rows, (N,) -> (S,); ``lengths`` (S,) on the rows' device."""
    return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True, initial=0.0)
