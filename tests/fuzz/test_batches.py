"""Trees of any shape through a tiny model: results are finite and equal to separate rows in float64."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from budget import examples
from hypothesis import given
from hypothesis import strategies as st

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.config import Config
from hypo_train.data.rows import Pair
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import load_policy
from hypo_train.trees.pack import Batcher

CONFIG = Config(model_name_or_path="m", dataset_name="d", bf16=False)
ARCHITECTURES = ["llama", "gpt_neox", "gemma2"]

ids = st.integers(0, len(tiny.WORDS) - 1)
lengths = st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 40))


def tokens(length):
    return st.lists(ids, min_size=length, max_size=length)


@st.composite
def batches(draw):
    """Draw (pairs, completions): 1 to 5 pairs, 0 to 3 samples per prompt, of any lengths."""
    sequence = lengths.flatmap(tokens)
    pairs = [Pair(i, *(tuple(draw(sequence)) for _ in range(3))) for i in range(draw(st.integers(1, 5)))]
    count = draw(st.integers(0, 3)) * len(pairs)
    return pairs, [draw(sequence) for _ in range(count)]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """``policies(architecture)`` returns the fp32 policy, and the plain model in float64."""

    @functools.cache
    def make(architecture):
        folder = tiny.save(tiny.new_model(architecture), tmp_path_factory.mktemp(architecture))
        policy = load_policy(
            CONFIG.model_copy(
                update={"model_name_or_path": str(folder), "max_prompt_length": 40, "max_completion_length": 40}
            ),
            autocast=False,
        )
        return policy.eval(), tiny.new_model(architecture, attn_implementation="eager").double()

    return make


def sequences_of(pairs, completions):
    """Return (prompt, completion) in the order of the loss."""
    each = len(completions) // len(pairs)
    found = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    return found + [(pairs[i // each].prompt, completion) for i, completion in enumerate(completions)]


def plain_logps(model, sequences):
    """Return log-probs (S,) from the model's own forward, row by row, with gradients."""
    found = []
    for prompt, completion in sequences:
        row = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None]).sum())
    return torch.stack(found)


def gradients(module, value):
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@examples(15, share=0.05)
@given(batch=batches(), architecture=st.sampled_from(ARCHITECTURES), seed=st.integers(0, 2**31))
def test_any_tree_equals_separate_rows(policies, batch, architecture, seed):
    policy, plain = policies(architecture)
    sequences = sequences_of(*batch)
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = plain_logps(plain, sequences)
    expected = gradients(plain, weights @ truth)
    for shares_prompts in (True, False):
        tree = Batcher(tiny.PAD, shares_prompts=shares_prompts).pairs(*batch)
        logps = policy(tree, sequence_logprobs_call(tree, CONFIG))
        torch.testing.assert_close(logps.double(), truth, rtol=1e-4, atol=1e-4)
        found = gradients(policy.model, weights.float() @ logps)
        assert found.keys() == expected.keys()
        largest = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=1e-4 * float(largest), msg=name)


@examples(15, share=0.05)
@given(
    batch=batches(),
    algorithm=st.sampled_from(["hypo", "dpo", "ipo"]),
    beta=st.floats(1e-4, 100),
    far=st.floats(-1000, 1000),
)
def test_any_batch_has_a_finite_loss_and_gradient(policies, batch, algorithm, beta, far):
    """This holds however far the reference is."""
    policy, _ = policies("llama")
    pairs, completions = batch
    completions = [] if algorithm != "hypo" or len(completions) < 2 * len(pairs) else completions
    generations = {"num_generations": len(completions) // len(pairs)} if completions else {}
    config = CONFIG.model_copy(update={"algorithm": algorithm, "beta": beta, **generations})
    losses = []
    for shares_prompts in (True, False):
        tree = Batcher(tiny.PAD, shares_prompts=shares_prompts).pairs(pairs, completions)
        ref_logps = torch.full((len(sequences_of(pairs, completions)),), far)
        function = preference_loss_call(tree, Reference(logps=ref_logps), len(pairs), config, None)
        out = policy(tree, function)
        found = gradients(policy.model, out.loss)
        assert torch.isfinite(out.loss)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
