"""The model folder, the tokenizer and the pairs that both sides load.

TRL takes text, so the tokenizer's words are the ids: id 17 is the word ``t17``, and both sides tokenize a text of such
words to exactly these ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.step.cases import SHAPES, SMOLLM, Case, Lengths

SEED = 20240603
PAD, EOS = 0, 2
FIRST_WORD = 16  # ids below are left to special tokens
SMOLLM_FOLDER = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"

Ids = tuple[int, ...]


class Missing(Exception):
    """A case cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class IdPair:
    """One preference pair; both completions end with EOS."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass(frozen=True)
class Material:
    """The files that a case's trainers load, and the ids that must reach their models."""

    case: Case
    folder: Path  # model and tokenizer
    data: Path  # .jsonl of texts
    pairs: list[IdPair]

    @property
    def rows(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def given_samples(self, *, equal: bool = False) -> dict[Ids, list[list[int]]]:
        """Return fixed completions of each prompt, for the steps whose gradients are compared.

        ``equal``: a prompt's completions are the same, so that their KL gradient is 0 (each is compared with the rest).
        """
        rng, case = random.Random(SEED + 1), self.case
        words = range(FIRST_WORD, self.vocab_size)

        def completions() -> list[list[int]]:
            if equal:
                return [rng.choices(words, k=case.new_tokens)] * case.num_generations
            return [rng.choices(words, k=case.new_tokens) for _ in range(case.num_generations)]

        return {pair.prompt: completions() for pair in self.pairs}

    @property
    def vocab_size(self) -> int:
        return int(json.loads((self.folder / "config.json").read_text())["vocab_size"])


def prepare_material(case: Case, folder: Path, device: torch.device) -> Material:
    """Write model, tokenizer and pairs below ``folder``. Raises Missing if the real weights are not installed."""
    model = folder / "model"
    config = _write_smollm(model) if case.model == SMOLLM else _write_random(case, model, device)
    id_tokenizer(config.vocab_size).save_pretrained(model)
    pairs = draw_pairs(case, config.vocab_size)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(_text(pair)) + "\n" for pair in pairs))
    return Material(case, model, data, pairs)


def id_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads ``t17 t4`` as [17, 4], and knows ``<eos>`` and ``<pad>``."""
    special = {PAD: "<pad>", EOS: "<eos>"}
    words = {special.get(i, f"t{i}"): i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def draw_pairs(case: Case, vocab_size: int) -> list[IdPair]:
    """Draw pairs of uniform ids: the cost of a step depends on lengths alone."""
    rng = random.Random(SEED)
    words = range(FIRST_WORD, vocab_size)

    def ids(lengths: Lengths) -> Ids:
        count = round(rng.gauss(lengths.mean, lengths.spread))
        return tuple(rng.choices(words, k=min(max(count, lengths.low), lengths.high)))

    def response() -> Ids:
        return (*ids(case.response)[:-1], EOS)

    return [IdPair(ids(case.prompt), response(), response()) for _ in range(case.pairs)]


def _text(pair: IdPair) -> dict[str, str]:
    # A completion starts with the space between it and its prompt: TRL tokenises the two joined.
    return {"prompt": _words(pair.prompt), "chosen": " " + _words(pair.chosen), "rejected": " " + _words(pair.rejected)}


def _words(ids: Sequence[int]) -> str:
    return " ".join("<eos>" if i == EOS else f"t{i}" for i in ids)


def _write_smollm(folder: Path) -> Any:
    if not (SMOLLM_FOLDER / "model.safetensors").is_file():
        raise Missing("needs SmolLM2 at the repository's root: make models/SmolLM2-135M-Instruct")
    config = _with_our_tokens(AutoConfig.from_pretrained(SMOLLM_FOLDER))
    config.save_pretrained(folder)
    (folder / "model.safetensors").symlink_to((SMOLLM_FOLDER / "model.safetensors").resolve())
    return config


def _write_random(case: Case, folder: Path, device: torch.device) -> Any:
    kind, shape = SHAPES[case.model]
    config = _with_our_tokens(kind(**shape))
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.frozen_dtype))
    model.save_pretrained(folder)
    return config


def _with_our_tokens(config: Any) -> Any:
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, EOS, PAD
    return config
