"""Samples drawn for several steps at once: one draw a window, each step its own, and a window that survives a kill."""

import json
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from hypo_kernels import Importance, fused_hypo_loss, token_logprobs
from hypo_train.data.rows import Pair
from hypo_train.metrics.meter import Meter, add_importance
from hypo_train.model.policy import Policy
from hypo_train.sampling import GenerateSampler, Samples
from hypo_train.sampling.rollouts import Rollouts, StepSamples
from hypo_train.trees.attention import NAME
from hypo_train.trees.pack import Batcher

K, LONGEST = 2, 5


class Recorder:
    """A sampler whose samples depend on the prompt, the seed and its weights, and that writes down its calls."""

    live = True

    def __init__(self, weights=0, *, score=True):
        self.weights, self.score, self.calls = weights, score, []

    def sample(self, prompts, n, max_new_tokens, *, seed, prompt_kv=None, prompt_indices=None):
        self.calls.append((prompts, n, max_new_tokens, seed))
        rng = random.Random(f"{seed},{self.weights}")
        lengths = torch.tensor([rng.randint(1, max_new_tokens) for _ in range(n * len(prompts))])
        tokens = torch.tensor([[rng.randrange(100) for _ in range(max_new_tokens)] for _ in lengths])
        mask = torch.arange(max_new_tokens) < lengths[:, None]
        logps = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, 0.0)
        return Samples(tokens, mask, logps if self.score else None, torch.ones(len(tokens), dtype=torch.bool), 0)

    def weights_changed(self, step):
        self.weights = step

    def release(self):
        pass


class Untouched(Recorder):
    """A sampler that no one may call."""

    def sample(self, prompts, n, max_new_tokens, *, seed, prompt_kv=None, prompt_indices=None):
        raise AssertionError("drawn again")


def prompts_of(step):
    """Batches of three prompts, and one of two: epochs may leave smaller ones."""
    return [[step, i] for i in range(2 if step == 4 else 3)]


def rollouts(sampler, num_steps, total_steps=8):
    return Rollouts(
        sampler, num_steps=num_steps, total_steps=total_steps, num_generations=K, max_new_tokens=LONGEST,
        prompts_of=prompts_of, seed_of=lambda step: 1000 + step,
    )  # fmt: skip


def run(ahead, steps):
    """The samples of ``steps``, with an optimizer step after each."""
    out = []
    for step in steps:
        out.append(ahead.of_step(step))
        ahead.sampler.weights_changed(step + 1)
    return out


def assert_same(found, expected):
    assert [s.completions for s in found] == [s.completions for s in expected]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.logps, b.logps)
        assert a.logps.dtype == torch.float32


def test_one_step_at_a_time_is_a_plain_draw_that_holds_nothing():
    sampler = Recorder(score=False)
    ahead = rollouts(sampler, 1)
    for step in range(8):
        samples = ahead.of_step(step)
        assert sampler.calls == [(prompts_of(step), K, LONGEST, 1000 + step)]
        plain = Recorder(score=False).sample(*sampler.calls.pop()[:3], seed=1000 + step)
        assert samples.completions == plain.completions()
        assert samples.logps is None
        assert ahead.state() == []


def test_a_window_is_one_draw_of_the_prompts_of_all_its_steps():
    sampler = Recorder()
    run(rollouts(sampler, 3), range(8))
    windows = [(0, 1, 2), (3, 4, 5), (6, 7)]  # the run ends inside the last one
    assert [call[0] for call in sampler.calls] == [[p for s in steps for p in prompts_of(s)] for steps in windows]
    assert [call[3] for call in sampler.calls] == [1000, 1003, 1006]


def test_each_step_gets_samples_of_its_own_prompts():
    sampler = Recorder()
    found = run(rollouts(sampler, 3), range(8))
    row = 0
    plain = Recorder(weights=3).sample([p for s in (3, 4, 5) for p in prompts_of(s)], K, LONGEST, seed=1003)
    for step in (3, 4, 5):
        rows = slice(row, row + K * len(prompts_of(step)))
        assert found[step].completions == plain.completions()[rows]
        assert torch.equal(found[step].logps, plain.logprobs[rows][plain.mask[rows]])
        row = rows.stop


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("num_steps", [2, 3, 8])
def test_a_resumed_window_has_the_same_samples(num_steps, stop):
    """By way of JSON, as a checkpoint keeps it, and without drawing what is left of a window again."""
    whole = run(rollouts(Recorder(), num_steps), range(8))
    killed = rollouts(Recorder(), num_steps)
    run(killed, range(stop))
    state = json.loads(json.dumps(killed.state()))
    assert bool(state) == (stop % num_steps != 0)
    inside = stop % num_steps != 0
    resumed = rollouts((Untouched if inside else Recorder)(weights=stop), num_steps)
    resumed.load(state)
    end = min(8, stop + num_steps - stop % num_steps)
    assert_same(run(resumed, range(stop, end)), whole[stop:end])
    resumed.sampler = Recorder(weights=end)
    assert_same(run(resumed, range(end, 8)), whole[end:])


def test_a_state_is_as_it_was_after_the_window_went_on():
    ahead = rollouts(Recorder(), 3)
    run(ahead, [0])
    state = ahead.state()
    before = json.dumps(state)
    run(ahead, [1, 2, 3])
    assert json.dumps(state) == before


def test_a_lost_window_is_not_drawn_again_from_new_weights():
    with pytest.raises(ValueError, match=r"the samples of step 4 were drawn at step 3 and are gone.*num_steps=3"):
        rollouts(Untouched(), 3).of_step(4)


def test_a_sampler_without_log_probs_serves_single_steps_alone():
    with pytest.raises(ValueError, match=r"num_steps=2 needs the log-probs .* Recorder did not give"):
        rollouts(Recorder(score=False), 2).of_step(0)


def test_a_window_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        rollouts(Recorder(), 0)


def test_micro_batches_split_a_step():
    samples = run(rollouts(Recorder(), 3), [0])[0]
    parts = [samples.of_prompts(0, 1), samples.of_prompts(1, 3)]
    assert [c for part in parts for c in part.completions] == samples.completions
    assert torch.equal(torch.cat([part.logps for part in parts]), samples.logps)
    assert [len(part.logps) for part in parts] == [sum(map(len, part.completions)) for part in parts]
    assert StepSamples(samples.completions, K, None).of_prompts(0, 1).logps is None


# With a model: the log-probs meet the tokens that they are of


PAIRS = [
    Pair(0, (5, 6, 7), (8, 9, tiny.EOS), (10, tiny.EOS)),
    Pair(1, (5, 9), (11, tiny.EOS), (8, 7, 6, tiny.EOS)),
]


def loss_of(policy, samples):
    tree = Batcher(tiny.PAD).pairs(PAIRS, samples.completions)

    def loss(hidden, head):
        return fused_hypo_loss(
            hidden, head.weight, tree.targets, tree.cu_seqlens, num_pairs=2, num_generations=K,
            ref_logps=torch.zeros(8), beta=0.1, kl_coef=0.1, behavior_logps=samples.behavior_logps(tree),
        ), token_logprobs(hidden, head.weight, tree.targets).detach()  # fmt: skip

    return policy(tree, loss)


def test_importance_ratios_are_one_for_the_policys_own_samples():
    model = tiny.new_model("llama")
    model.set_attn_implementation(NAME)
    policy = Policy(model, is_peft=False)
    sampler = GenerateSampler(policy.model, eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD, score=True)
    ahead = Rollouts(
        sampler, num_steps=2, total_steps=4, num_generations=K, max_new_tokens=6,
        prompts_of=lambda step: [list(pair.prompt) for pair in PAIRS], seed_of=lambda step: step,
    )  # fmt: skip
    out, _ = loss_of(policy, ahead.of_step(0))
    torch.testing.assert_close(out.importance.ratio, out.lengths[4:].float(), rtol=1e-4, atol=0)
    older = ahead.of_step(1)
    before = loss_of(policy, older)[1]
    tiny.perturb(policy.trained_parameters().values(), size=0.02)
    out, after = loss_of(policy, older)
    ratios = (after - before)[-len(older.logps) :].exp().split(out.lengths[4:].tolist())
    torch.testing.assert_close(out.importance.ratio, torch.stack([x.sum() for x in ratios]), rtol=1e-4, atol=0)
    assert (out.importance.ratio / out.lengths[4:] - 1).abs().max() > 0.01


def test_own_samples_have_no_behavior_log_probs():
    tree = Batcher(tiny.PAD).pairs(PAIRS, [[5, 1]] * 4)
    assert StepSamples([[5, 1]] * 4, K, None).behavior_logps(tree) is None


# Metrics


def outcome(importance, lengths):
    return SimpleNamespace(importance=importance, lengths=torch.tensor(lengths))


def test_metrics_are_of_the_tokens_of_the_samples():
    meter = Meter()
    importance = Importance(
        log_ratio=torch.zeros(2), ratio=torch.tensor([5.0, 1.0]), weight=torch.tensor([4.0, 1.0]),
        squared_weight=torch.tensor([6.0, 1.0]), truncated=torch.tensor([1.0, 0.0]),
    )  # fmt: skip
    add_importance(meter, outcome(importance, [7, 9, 3, 1]))
    assert meter.read() == pytest.approx(
        {
            "sampling/importance_sampling_ratio/mean": 6 / 4,
            "sampling/truncated": 1 / 4,
            "sampling/effective_sample_size": 5**2 / (4 * 7),
        }
    )


def test_a_loss_that_corrected_nothing_reports_nothing():
    meter = Meter()
    add_importance(meter, outcome(None, [7, 9, 3, 1]))
    add_importance(meter, outcome(Importance(*[torch.zeros(0)] * 5), [7, 9]))
    assert meter.read() == {}
