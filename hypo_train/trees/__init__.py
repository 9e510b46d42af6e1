"""Batches of prompts that share the computation of a prompt between its completions, and the attention for them."""

from hypo_train.data.rows import Pair
from hypo_train.trees.pack import Batcher
from hypo_train.trees.tree import Tree

__all__ = ["Batcher", "Pair", "Tree"]
