"""A reward model: one number for a completion, computed from the hidden state of its last token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hypo_train.model.tree_model import ModelError, TreeModel
from hypo_train.trees.tree import Tree


class RewardModel(TreeModel[nn.Module]):
    """A sequence classifier with one label, from transformers' ``AutoModelForSequenceClassification``."""

    def __init__(self, model: Any, *, is_peft: bool) -> None:
        super().__init__(model, is_peft=is_peft)
        if not isinstance(getattr(self.base, "score", None), nn.Module):
            raise ModelError(f"{type(self.base).__name__} has no linear layer called score to give the reward")

    def head(self) -> nn.Module:
        """Return the score, a layer (..., D) -> (..., 1)."""
        return self.base.score

    def rewards(self, tree: Tree) -> Tensor:
        """Return the reward of each sequence of a tree from ``Batcher.scored``, fp32 (S,)."""
        return self(tree, rewards_of(tree))

    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save weights (LoRA: merged) that ``AutoModelForSequenceClassification.from_pretrained(folder)`` loads."""
        # In an adapter's folder peft would hold the score, and transformers' classifier could not load it.
        model = copy.deepcopy(self.model).merge_and_unload() if self.is_peft else self.model
        model.save_pretrained(folder, state_dict=state)


def rewards_of(tree: Tree) -> Callable[[Tensor, nn.Module], Tensor]:
    """Return a function of hidden states and score: the reward of each of the tree's sequences, fp32 (S,)."""
    last = (tree.cu_seqlens[1:] - 1).to(tree.rows.device, non_blocking=True)

    def rewards(hidden: Tensor, score: nn.Module) -> Tensor:
        return score(hidden[last]).squeeze(-1).float()

    return rewards
