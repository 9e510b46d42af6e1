"""A reward model: one number for a response, read from the hidden state of its last token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hypo_train.model.tree_model import ModelError, TreeModel
from hypo_train.trees.tree import Tree


class RewardModel(TreeModel[nn.Module]):
    """A sequence classifier with one label, as transformers' ``AutoModelForSequenceClassification`` has it."""

    def __init__(self, model: Any, *, is_peft: bool) -> None:
        super().__init__(model, is_peft=is_peft)
        if not isinstance(getattr(self.base, "score", None), nn.Module):
            raise ModelError(f"{type(self.base).__name__} has no linear layer called score to give the reward")

    def head(self) -> nn.Module:
        """(..., D) -> (..., 1)."""
        return self.base.score

    def rewards(self, tree: Tree) -> Tensor:
        """Of each sequence of a tree that :meth:`.batch.Batcher.scored` has laid out, fp32 (S,)."""
        return self(tree, rewards_of(tree))

    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Weights (LoRA: merged) that ``AutoModelForSequenceClassification.from_pretrained(folder)`` loads."""
        # An adapter's folder would leave the score to peft, which the classifier alone does not ask.
        model = copy.deepcopy(self.model).merge_and_unload() if self.is_peft else self.model
        model.save_pretrained(folder, state_dict=state)


def rewards_of(tree: Tree) -> Callable[[Tensor, nn.Module], Tensor]:
    """What is asked of the hidden states and the score: the reward of each of the tree's sequences, fp32 (S,)."""
    last = (tree.cu_seqlens[1:] - 1).to(tree.rows.device, non_blocking=True)

    def rewards(hidden: Tensor, score: nn.Module) -> Tensor:
        return score(hidden[last]).squeeze(-1).float()

    return rewards
