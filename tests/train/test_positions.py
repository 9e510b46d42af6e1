"""Positions: RoPE whose frequencies depend on the longest row of a call, and rows longer than a table of positions."""

from __future__ import annotations

import datasets
import pytest
import tiny
import torch
from policies import PAIRS, model_config
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    HunYuanDenseV1Config,
    LlamaConfig,
    PhimoeConfig,
)

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.data.rows import Pair
from hypo_train.model.load import load_policy
from hypo_train.model.positions import LongestRow, rope_limit
from hypo_train.model.tree_model import ModelError
from hypo_train.sampling import DecodeSampler, GenerateSampler
from hypo_train.trees.pack import Batcher

LIMIT = 12
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
}
ALL_LONG = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.2}
NESTED = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}


def phi3_config(rope=LONGROPE):
    return tiny.new_config("phi3", original_max_position_embeddings=LIMIT, rope_parameters=dict(rope))


def new_phi3(rope=LONGROPE):
    return tiny.new_model("phi3", original_max_position_embeddings=LIMIT, rope_parameters=dict(rope))


# Which RoPE has a limit

LIMITS = {
    "LongRoPE": (phi3_config(), LIMIT),
    "LongRoPE by its older name": (LlamaConfig(rope_scaling={**LONGROPE, "type": "su", "rope_type": "su"}), LIMIT),
    "LongRoPE of one type of layer": (Gemma3TextConfig(rope_parameters=NESTED), LIMIT),
    "LongRoPE that changes its scale alone": (PhimoeConfig(rope_parameters={**ALL_LONG, **MSCALES}), LIMIT),
    "LongRoPE with one set of factors": (phi3_config(ALL_LONG), None),
    "dynamic NTK": (LlamaConfig(rope_parameters=DYNAMIC, max_position_embeddings=64), 64),
    "dynamic NTK with a fixed alpha": (HunYuanDenseV1Config(rope_parameters={**DYNAMIC, "alpha": 1000.0}), None),
    "YaRN": (LlamaConfig(rope_parameters={**DYNAMIC, "rope_type": "yarn"}), None),
    "linear": (LlamaConfig(rope_parameters={**DYNAMIC, "rope_type": "linear"}), None),
    "plain RoPE": (LlamaConfig(), None),
    "no RoPE": (GPT2Config(), None),
}


@pytest.mark.parametrize(("config", "tokens"), LIMITS.values(), ids=LIMITS.keys())
def test_rope_that_depends_on_the_longest_row_has_a_limit(config, tokens):
    limit = rope_limit(config)
    assert (None if limit is None else limit.tokens) == tokens


def test_samples_longer_than_completions_count():
    longest = LongestRow.of(model_config("-", max_new_tokens=40))
    assert longest == (56, "max_prompt_length + max_new_tokens")


# Rows in company


def load(model, folder, prompt, completion):
    lengths = {"max_prompt_length": prompt, "max_completion_length": completion}
    return load_policy(model_config(tiny.save(model, folder), **lengths), autocast=False)


def logprob_alone(model, prompt, completion):
    """Like ``tiny.plain_logprob``, with gradients."""
    logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum()


@pytest.mark.parametrize(("rope", "more"), [(LONGROPE, 0), (ALL_LONG, 9)], ids=["at the limit", "one set of factors"])
def test_loss_and_gradients_are_those_of_rows_alone(tmp_path, rope, more):
    policy = load(new_phi3(rope), tmp_path, 4, LIMIT - 4 + more)
    long = tuple(range(5, 5 + LIMIT - 4 + more))
    pairs = [PAIRS[1], Pair(0, (7, 20, 9, 8), long, (14, tiny.EOS))]
    tree = Batcher(tiny.PAD, shares_prompts=policy.shares_prompts).pairs(pairs, [])
    config = model_config("-", algorithm="dpo", beta=0.5)
    policy.base.get_decoder()(torch.ones(1, 40, dtype=torch.int64))  # a call that leaves nothing behind
    out = policy(tree, preference_loss_call(tree, Reference(logps=torch.zeros(4)), 2, config))
    out.loss.backward()

    alone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    chosen = torch.stack([logprob_alone(alone, pair.prompt, pair.chosen) for pair in pairs])
    rejected = torch.stack([logprob_alone(alone, pair.prompt, pair.rejected) for pair in pairs])
    loss = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    loss.backward()
    assert policy.shares_prompts
    assert_close(out.logps, torch.cat([chosen, rejected]), atol=1e-5, rtol=1e-5)
    assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    for (name, parameter), other in zip(policy.base.named_parameters(), alone.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def new_dynamic():
    return tiny.new_model("llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=LIMIT)


@pytest.mark.parametrize(
    ("make", "kind"), [(new_phi3, DecodeSampler), (new_phi3, GenerateSampler), (new_dynamic, GenerateSampler)]
)
def test_samples_up_to_the_limit_are_those_of_rows_alone(make, kind):
    model = make()
    sampler = kind(model, eos_token_ids=(), pad_token_id=tiny.PAD, score=True)
    prompts = [[5, 9, 11, 7], [6, 3]]
    samples = sampler.sample(prompts, 2, LIMIT - 4, seed=1)
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(model, prompts[row // 2], completion)
        assert_close(samples.logprobs[row], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"prompt \+ max_new_tokens allows 13: lower it to 12"):
        sampler.sample(prompts, 2, LIMIT - 3, seed=1)


# Refused before training


def test_longer_rows_are_refused_by_the_name_of_the_rope(tmp_path):
    with pytest.raises(ModelError) as caught:
        load(new_phi3(), tmp_path, 4, LIMIT - 3)
    assert str(caught.value) == (
        "Phi3ForCausalLM has RoPE of rope_type 'longrope', whose frequencies change for all rows of a batch once one "
        "has more than 12 tokens (original_max_position_embeddings), and max_prompt_length + max_completion_length "
        "allows 13: lower it to 12, or set short_factor to long_factor in the model's config.json: all rows then have "
        "the long ones"
    )


def test_samples_beyond_a_table_of_positions_are_refused(tmp_path):
    folder = tiny.save(tiny.new_model("gpt2"), tmp_path)
    with pytest.raises(ModelError, match=r"has 128 positions, .* lower max_prompt_length \+ max_new_tokens to 128"):
        load_policy(model_config(folder, max_new_tokens=113), autocast=False)


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that makes a TRL trainer of a tiny Phi-3 with LongRoPE; its longest row has 10 tokens."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl import DPOConfig, DPOTrainer

    from hypo_train.trl import HyPOConfig, HyPOTrainer

    folder = tiny.save(new_phi3(), tmp_path / "model")
    rows = [{"prompt": "tell me about the film ", "chosen": "the film was very good", "rejected": "bad"}]

    def make(*, streaming=False, plain=False, **changes):
        dataset = datasets.Dataset.from_list(rows)
        kind, config = (DPOTrainer, DPOConfig) if plain else (HyPOTrainer, HyPOConfig)
        return kind(
            str(folder),
            args=config(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none", **changes),
            train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )

    return make


def test_a_trl_trainer_reads_the_lengths_of_its_rows(make_trainer):
    make_trainer(kl_coef=0.0, max_new_tokens=100)  # draws nothing
    with pytest.raises(ModelError, match=r"longrope.* a prompt \+ max_new_tokens allows 13: lower it to 12"):
        make_trainer(max_new_tokens=8)


def test_loss_and_gradients_in_trl_are_those_of_dpo(make_trainer):
    found = []
    for trainer in (make_trainer(kl_coef=0.0), make_trainer(plain=True)):
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in trainer.model.parameters()]))
    assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_trl_trainer_needs_max_length_for_rows_that_stream(make_trainer):
    options = {"streaming": True, "max_steps": 1, "kl_coef": 0.0}
    make_trainer(max_length=12, **options)
    with pytest.raises(ModelError, match=r"longrope.* max_length=None allows rows of any length: lower it to 12"):
        make_trainer(max_length=None, **options)
