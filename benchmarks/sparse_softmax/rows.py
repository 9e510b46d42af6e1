"""Rows of a real model on real text: what an LM-head loss gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "hypo_train" / "recipes" / "summaries.jsonl"


@dataclass(frozen=True)
class Rows:
    """Completion tokens of preference pairs. Hidden states and weight hold bf16 values in fp32."""

    hidden: Tensor  # (N, D) fp32
    weight: Tensor  # (V, D) fp32
    targets: Tensor  # (N,) int64
    signs: Tensor  # (N,) fp32, 1 in a chosen response and -1 in a rejected one, as DPO's first gradient

    def __len__(self) -> int:
        return len(self.targets)

    def probs(self) -> Tensor:
        """Return the softmax of every row, (N, V) fp32."""
        return (self.hidden @ self.weight.t()).softmax(dim=-1)

    def first(self, count: int) -> Rows:
        return Rows(self.hidden[:count], self.weight, self.targets[:count], self.signs[:count])


@dataclass(frozen=True)
class Text:
    """The measured rows, and what text of other prompts says about the vocabulary."""

    rows: Rows
    other: Rows
    counts: Tensor  # (V,) fp32, how often a token occurs in the other text

    def orders(self) -> dict[str, Tensor]:
        """Return orders of the vocabulary, (V,) int64, that need nothing of the measured rows."""
        return {
            "its own": torch.arange(len(self.counts)),
            "by frequency": self.counts.argsort(descending=True, stable=True),
            "by mean probability": self.other.probs().mean(0).argsort(descending=True, stable=True),
        }


@torch.no_grad()
def load(model_folder: Path, count: int) -> Text:
    """Run the model on the shipped pairs: the last ``count`` rows are measured, half as many others are other text."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    half = len(pairs) // 2
    rows = _rows(model, _responses(tokenizer, pairs[half:]), count)
    other = _rows(model, _responses(tokenizer, pairs[:half]), count // 2)
    ids = torch.tensor([i for _, all_ids, _ in _responses(tokenizer, pairs[:half]) for i in all_ids])
    return Text(rows, other, torch.bincount(ids, minlength=len(rows.weight)).float())


def _responses(tokenizer: Any, pairs: list[dict[str, Any]]) -> Iterator[tuple[int, list[int], float]]:
    """Yield the prompt's length, the ids of prompt and response, and the response's sign."""
    for pair in pairs:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
            ids = tokenizer.apply_chat_template(pair["prompt"] + pair[name], return_dict=False)
            yield len(prompt), ids, sign


def _rows(model: PreTrainedModel, responses: Iterator[tuple[int, list[int], float]], count: int) -> Rows:
    hidden, targets, signs = [], [], []
    for start, ids, sign in responses:
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        hidden.append(states[start - 1 : -1])
        targets += ids[start:]
        signs += [sign] * (len(ids) - start)
        if len(targets) >= count:
            break
    else:
        raise ValueError(f"{PAIRS.name} has {len(targets)} rows of this kind, not {count}: ask for fewer with --rows")
    weight = model.get_output_embeddings().weight
    bf16_hidden, bf16_weight = (x.bfloat16().float() for x in (torch.cat(hidden)[:count], weight))
    return Rows(bf16_hidden, bf16_weight, torch.tensor(targets[:count]), torch.tensor(signs[:count]))
