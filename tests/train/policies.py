"""Small policies, and the batch that several tests of the model give them."""

from __future__ import annotations

import tiny
import torch

from hypo_train.config import Config
from hypo_train.data.rows import Pair
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import load_policy
from hypo_train.trees.pack import Batcher

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}

PAIRS = [
    Pair(0, (7, 20, 9), (11, 12, 13, tiny.EOS), (14, tiny.EOS)),
    Pair(1, (5,), (16, tiny.EOS), (17, 18, 19, 21, 22, tiny.EOS)),
]
SAMPLES = [[8, 9, 10], [23, tiny.EOS], [24, tiny.EOS], [6, 7, 8, 9, 10, 11, 12]]


def model_config(folder, **changes):
    settings = {"max_prompt_length": 16, "max_completion_length": 16, **changes}
    return Config(model_name_or_path=str(folder), dataset_name="-", bf16=False, **settings)


def policy_of(folder, *, autocast=False, **changes):
    return load_policy(model_config(folder, **changes), autocast=autocast)


def tree(*, shares_prompts=True):
    return Batcher(tiny.PAD, shares_prompts=shares_prompts).pairs(PAIRS, SAMPLES)


def logprobs():
    """Return a head function that computes the (S,) log-probs of ``tree()``."""
    return sequence_logprobs_call(tree(), model_config("-"))


def own_logprobs(model):
    """Return the (S,) log-probs of ``tree()`` by the model's own forward pass, with gradients: a plain row for each."""
    rows = [(pair.prompt, pair.chosen) for pair in PAIRS] + [(pair.prompt, pair.rejected) for pair in PAIRS]
    rows += [(PAIRS[i // 2].prompt, sample) for i, sample in enumerate(SAMPLES)]
    parts = []
    for prompt, completion in rows:
        row = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).sum())
    return torch.stack(parts)
