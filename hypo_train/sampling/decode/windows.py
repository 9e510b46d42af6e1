"""The attention masks of a decode step for layers with a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypo_train.model.windows import layer_windows


@dataclass(frozen=True)
class Windows:
    """How many tokens the layers of a decoder see: the newest token, and those just before it in its own text."""

    size: int | None  # of the layers that have a window; None: no layer has one
    in_every_layer: bool = False

    @classmethod
    def of(cls, config: Any) -> Windows:
        """Return the windows of a transformers config. Raise ValueError if one pair of masks cannot describe them."""
        windows = layer_windows(config)
        sizes = {window for window in windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"it has sliding windows of several sizes ({', '.join(map(str, sorted(sizes)))})")
        return cls(next(iter(sizes), None), in_every_layer=None not in windows)

    def masks(self, mask: Tensor, tokens_before: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what a forward pass takes as ``attention_mask``.

        Args:
            mask: additive, (P, 1, rows, slots), of the tokens that each query may see without a window.
            tokens_before: int64 (P, slots), how many tokens the token in each slot lies before the newest one.
        """
        if self.size is None:
            return mask
        in_window = mask.masked_fill((tokens_before >= self.size)[:, None, None], torch.finfo(mask.dtype).min)
        # A model with two kinds of layers takes a mask for each kind.
        return in_window if self.in_every_layer else {"full_attention": mask, "sliding_attention": in_window}
