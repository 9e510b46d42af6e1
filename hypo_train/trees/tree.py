"""A batch of prompts and completions as tensors: one packed row of trees, or a padded row for each completion.

A packed row is ``[prompt | prompt ... | branch | branch ...]``. Each prompt is computed once for all its completions.
The positions of a branch continue those of its prompt, and a token attends to its prompt and its own branch, causally,
so every hidden state equals that of the plain row ``prompt + completion``.

    row     A  B  C | d  e | f  g        prompt A B C, completions d e x and f g y
    pos     0  1  2 | 3  4 | 3  4        x and y predict nothing, so the row leaves them out
    rows    C d e     C f g              the hidden states that predict ...
    targets d e x     f g y              ... these tokens
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypo_kernels.transfer import on_device
from hypo_train.trees.layout import Layout, causal_pairs


@dataclass(frozen=True)
class Tree:
    """A batch for one forward pass: R rows of N tokens, T target tokens, S sequences (completions).

    The loss takes ``hidden.flatten(0, 1)[rows]`` (T, D), ``targets`` and ``cu_seqlens``.
    """

    input_ids: Tensor  # int64 (R, N)
    position_ids: Tensor  # int64 (R, N)
    layout: Layout | None  # of the packed row's trees; None = separate rows
    attention_mask: Tensor | None  # bool (R, N), False = padding; None = a packed row
    rows: Tensor  # int64 (T,) indices into the R * N hidden states, sequence after sequence
    targets: Tensor  # int64 (T,) tokens whose log-probs count, on the CPU
    cu_seqlens: Tensor  # int64 (S + 1,) start of each sequence in rows and targets, on the CPU
    num_tokens: int  # tokens in the rows, without padding
    row_lengths: tuple[int, ...] = ()  # of separate rows, without padding

    def num_attended(self, window: int | None = None) -> int:
        """Return the number of (query, key) pairs that the attention mask of a layer with ``window`` keeps."""
        if self.layout is not None:
            return self.layout.num_attended(window)
        return sum(causal_pairs(length, window) for length in self.row_lengths)

    def sequences_from(self, first: int) -> Tree:
        """Return the tree with the targets of sequences ``first`` and later only; the input rows stay."""
        start = int(self.cu_seqlens[first])
        return replace(
            self,
            rows=self.rows[start:],
            targets=self.targets[start:],
            cu_seqlens=self.cu_seqlens[first:] - start,
        )

    def to(self, device: torch.device | str) -> Tree:
        """Return the tree on ``device``. ``targets`` and ``cu_seqlens`` stay on the CPU, where the loss plans."""
        on_host = {name: getattr(self, name) for name in ("input_ids", "position_ids", "attention_mask", "rows")}
        present = {name: x for name, x in on_host.items() if x is not None}
        copies = on_device([x.long() for x in present.values()], torch.device(device))
        moved: dict[str, Any] = {
            name: copy.to(x.dtype) for (name, x), copy in zip(present.items(), copies, strict=True)
        }
        return replace(self, **moved)
