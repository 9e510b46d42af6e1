"""Rows of TRL's data sets and batches: token ids of prompts and completions."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from pyarrow import compute
from torch import Tensor

from hypo_train.data.errors import DataError
from hypo_train.data.rows import Pair


def shown_name(dataset_name: str) -> str:
    """Return the argument of the trainer that TRL calls ``dataset_name``."""
    return f"{dataset_name}_dataset" if dataset_name in ("train", "eval") else f"eval_dataset[{dataset_name!r}]"


def refuse_no_rows(dataset: Any, problem: str) -> None:
    """Raise DataError with ``problem`` for a data set without rows."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(problem)


def refuse_empty_prompts(dataset: Any, dataset_name: str) -> None:
    """Raise DataError for a prompt without tokens: its only token may merge with the completion."""
    if not isinstance(dataset, Dataset):  # an iterable data set is not read in advance
        return
    empty = next((row for row, prompt in enumerate(dataset["prompt_ids"]) if not prompt), None)
    if empty is not None:
        raise DataError(
            f"row {empty} of {shown_name(dataset_name)} has an empty prompt once it is tokenised: give it text that "
            "ends where a token ends (a space, a line break), or a chat template"
        )


def longest_lengths(dataset: Any, max_length: int | None) -> tuple[float, float]:
    """Return the tokens of a data set's longest prompt with a completion, and of its longest prompt."""
    limit = math.inf if max_length is None else max_length
    if dataset is None:
        return 0, 0
    # An iterable data set is not read in advance, and images are tokenised batch by batch.
    if not isinstance(dataset, Dataset) or "prompt_ids" not in dataset.column_names:
        return limit, limit
    pair = prompt = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        prompts, chosen, rejected = (
            compute.list_value_length(batch[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        longest = compute.add(prompts, compute.max_element_wise(chosen, rejected))
        pair = max(pair, compute.max(longest).as_py())
        prompt = max(prompt, compute.max(prompts).as_py())
    return min(pair, limit), min(prompt, limit)


def pairs_of_batch(inputs: dict[str, Tensor]) -> list[Pair]:
    """Return the token ids of a batch; the device is read once."""
    rows = torch.stack([inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")], dim=-1).tolist()
    prompts, completions = [], []
    for row in rows:
        prompts.append(tuple(token for token, seen, counted in row if seen and not counted))
        completions.append(tuple(token for token, _, counted in row if counted))
    half = len(rows) // 2
    return [Pair(i, prompts[i], completions[i], completions[half + i]) for i in range(half)]


def reordered(inputs: dict[str, Tensor], pairs: list[int]) -> dict[str, Tensor]:
    """Return a batch with its pairs in another order; its tensors have P rows, or 2 P with all chosen first."""
    if pairs == sorted(pairs):
        return inputs
    order = torch.tensor(pairs, device=inputs["input_ids"].device)
    both = torch.cat([order, order + len(pairs)])
    return {name: x[order if len(x) == len(pairs) else both] for name, x in inputs.items()}
