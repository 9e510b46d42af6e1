"""A small world of reviews: prompts, responses and their true reward.

A review has two to four clauses about a place. The reward counts its first four clauses: the number of kind words minus
the number of unkind words, and minus one for each clause that breaks the grammar. Reviews name eight subjects,
mostly the first four. The offline pairs hold only reviews of these four, and the language model that wrote them seldom
breaks the grammar. So the pairs contain little information about the other subjects and about grammar: they cover only
a part of what the policy can write, as in the paper's analysis.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLACES = [
    "cafe",
    "bakery",
    "hotel",
    "museum",
    "market",
    "harbour",
    "library",
    "cinema",
    "garden",
    "station",
    "pool",
    "theatre",
]
TOWNS = ["leith", "york", "bergen", "porto", "ghent", "turku", "graz", "lucca", "cork", "malmo", "nantes", "delft"]
NAMES = ["anna", "ben", "carla", "david", "elif", "farid", "greta", "hugo", "ines", "jonas", "kemal", "lena"]
COVERED = ["coffee", "staff", "room", "price"]
UNCOVERED = ["music", "view", "light", "floor"]
KIND = ["great", "lovely", "friendly", "fresh", "fair", "warm", "clean", "bright", "calm", "superb"]
UNKIND = ["awful", "rude", "stale", "dull", "dear", "cold", "dirty", "dark", "noisy", "poor"]
PLAIN = ["small", "large", "new", "old", "plain", "usual"]
LIKED, DISLIKED = ["loved", "liked", "enjoyed"], ["hated", "disliked", "regretted"]
GLUE = [
    "a",
    "review",
    "of",
    "the",
    "in",
    "by",
    ":",
    "was",
    "and",
    "but",
    "i",
    "we",
    "rather",
    "very",
    "quite",
    ".",
    ",",
    "it",
    "also",
]

MAX_PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 12, 40
CLAUSES_READ = 4
PAD, EOS = "<pad>", "<eos>"

_NAMED = f"the ({'|'.join(COVERED + UNCOVERED)})"
_CLAUSE = re.compile(
    rf"{_NAMED} was ((rather|very|quite) )?({'|'.join(KIND + UNKIND + PLAIN)})"
    rf"|(i|we) ({'|'.join(LIKED + DISLIKED)}) {_NAMED}"
)
_JOINT = re.compile(" and | but | , also ")


def reward(prompt: str, completion: str) -> float:
    """Return the reward of a review, from -4 to 4: the sum over its first four clauses."""
    clauses = _JOINT.split(completion.removesuffix(" ."))[:CLAUSES_READ]
    return float(sum(_worth(clause) for clause in clauses))


def _worth(clause: str) -> int:
    if not _CLAUSE.fullmatch(clause):
        return -1
    words = clause.split()
    return sum(w in KIND or w in LIKED for w in words) - sum(w in UNKIND or w in DISLIKED for w in words)


def is_covered(completion: str) -> bool:
    """Return whether a review names only the subjects that the offline pairs cover."""
    return not set(completion.split()) & set(UNCOVERED)


def prompt(rng: random.Random) -> str:
    return f"a review of the {rng.choice(PLACES)} in {rng.choice(TOWNS)} by {rng.choice(NAMES)} :"


def review(rng: random.Random) -> str:
    """Return a random review of two to four clauses. Its random mood is the probability that a clause is kind."""
    mood = rng.random()
    clauses = [_clause(rng, mood) for _ in range(rng.randint(2, CLAUSES_READ))]
    return f" {rng.choice(['and', 'but', ', also'])} ".join(clauses) + " ."


def _clause(rng: random.Random, mood: float) -> str:
    subject = rng.choice(COVERED if rng.random() < 0.8 else UNCOVERED)
    kind = rng.random() < mood
    if rng.random() < 0.25:
        return f"{rng.choice(['i', 'we'])} {rng.choice(LIKED if kind else DISLIKED)} the {subject}"
    word = rng.choice(PLAIN) if rng.random() < 0.3 else rng.choice(KIND if kind else UNKIND)
    degree = rng.choice(["", "", "rather ", "very ", "quite "])
    return f"the {subject} was {degree}{word}"


def save_new_model(folder: Path) -> None:
    """Save a new Llama of about a million parameters, untrained, and its word tokenizer."""
    words = [*GLUE, *PLACES, *TOWNS, *NAMES, *COVERED, *UNCOVERED, *KIND, *UNKIND, *PLAIN, *LIKED, *DISLIKED]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([PAD, EOS, *words]))}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=vocabulary[PAD],
        eos_token_id=vocabulary[EOS],
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
