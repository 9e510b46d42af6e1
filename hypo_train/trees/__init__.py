"""Prompts and their completions as packed rows, and attention over them."""

from hypo_train.data.rows import Pair
from hypo_train.trees.batch import Batcher
from hypo_train.trees.tree import Tree

__all__ = ["Batcher", "Pair", "Tree"]
