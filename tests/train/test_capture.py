"""Captured steps. Without a GPU, a stand-in for the graph replays the step: all but CUDA's own part is tested."""

import pytest
import tiny
import torch

from hypo_train.sampling import DecodeSampler
from hypo_train.sampling.decode import cuda_graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS, PAD = 1, 0
PROMPTS = [[5, 3, 8, 2], [4], [7, PAD, EOS, 6, 9, 2, 5], [3, 3], [6, 2]]


class Captures(list):
    """The widths that were captured, one after the other."""

    def __call__(self, step, *, rewind, pool):
        for _ in range(2):
            rewind()
            step()
        self.append(step.args[0])
        return step, pool


@pytest.fixture
def captures(monkeypatch):
    stand_in = Captures()
    if DEVICE == "cuda":
        plain = cuda_graphs.captured

        def counted(step, **options):
            stand_in.append(step.args[0])
            return plain(step, **options)

        monkeypatch.setattr(cuda_graphs, "captured", counted)
    else:
        monkeypatch.setattr(cuda_graphs, "captured", stand_in)
    return stand_in


def new_model():
    return tiny.new_model("llama", vocab_size=12, eos_token_id=EOS, pad_token_id=None).to(DEVICE)


def sampler_of(model, **options):
    return DecodeSampler(model, eos_token_ids=(EOS,), pad_token_id=PAD, score=True, **options)


def assert_same_draws(found, expected):
    assert found.completions() == expected.completions()
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.logprobs[found.mask], expected.logprobs[expected.mask], atol=1e-5, rtol=1e-5)


def test_a_captured_step_draws_the_same_before_and_after_updates(captures):
    model = new_model()
    sampler, plain = sampler_of(model, capture=True), sampler_of(model, capture=False)
    for step in range(3):
        for seed in range(2):
            assert_same_draws(sampler.sample(PROMPTS, 2, 20, seed=seed), plain.sample(PROMPTS, 2, 20, seed=seed))
        tiny.perturb(model.parameters(), seed=step)  # in place: a graph reads it
    assert len(captures) == 1


def test_batches_share_one_graph(captures):
    model = new_model()
    token_bytes = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 8 * 4
    budget = 2 * (128 + 2 * 24) * token_bytes  # two prompts of a bucket
    found = sampler_of(model, capture=True, max_kv_bytes=budget).sample(PROMPTS, 2, 24, seed=1)
    assert_same_draws(found, sampler_of(model, capture=False).sample(PROMPTS, 2, 24, seed=1))
    assert len(captures) == 1


def test_weights_that_moved_are_captured_again(captures):
    model = new_model()
    sampler = sampler_of(model, capture=True)
    sampler.sample(PROMPTS, 2, 8, seed=1)
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    assert_same_draws(
        sampler.sample(PROMPTS, 2, 8, seed=1), sampler_of(model, capture=False).sample(PROMPTS, 2, 8, seed=1)
    )
    assert len(captures) == 2


def test_shapes_of_one_bucket_share_a_graph_and_others_do_not(captures):
    sampler = sampler_of(new_model(), capture=True)
    sampler.sample(PROMPTS, 2, 8, seed=1)
    sampler.sample([[4] * 100] * len(PROMPTS), 2, 8, seed=1)
    assert len(captures) == 1
    sampler.sample(PROMPTS[:2], 2, 8, seed=1)
    assert len(captures) == 2
    sampler.release()
    sampler.sample(PROMPTS[:2], 2, 8, seed=1)
    assert len(captures) == 3


def test_a_long_completion_has_graphs_of_growing_width(captures, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_WIDTH_STEP", 16)
    model = new_model()
    found = sampler_of(model, capture=True).sample(PROMPTS, 2, 20, seed=1)
    assert captures == [128 + 16, 128 + 32, 128 + 48]
    assert_same_draws(found, sampler_of(model, capture=False).sample(PROMPTS, 2, 20, seed=1))


def test_one_new_token_needs_no_graph(captures):
    sampler_of(new_model(), capture=True).sample(PROMPTS, 2, 1, seed=1)
    assert captures == []


@pytest.mark.parametrize(("length", "expected"), [(1, 128), (128, 128), (129, 256), (512, 512), (513, 1024)])
def test_prompts_fall_into_buckets_of_powers_of_two(length, expected):
    assert cuda_graphs.bucket(length) == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="there, it can be captured")
def test_a_step_that_cannot_be_captured_raises():
    with pytest.raises((RuntimeError, AssertionError)):
        sampler_of(new_model(), capture=True).sample(PROMPTS, 2, 8, seed=1)


on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.cuda
@on_cuda
def test_on_a_gpu_a_graph_follows_fused_optimizer_updates():
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    captured, plain = sampler_of(model), sampler_of(model, capture=False)
    for step in range(4):
        assert_same_draws(captured.sample(PROMPTS, 2, 40, seed=step), plain.sample(PROMPTS, 2, 40, seed=step))
        model(input_ids=torch.tensor([[3, 1, 4]], device=DEVICE)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        captured.weights_changed(step + 1)
        plain.weights_changed(step + 1)


@pytest.mark.cuda
@on_cuda
def test_on_a_gpu_a_graph_under_autocast_reads_updated_weights():
    """Three runs: fp32 truth, the model's plain forward under autocast, and the graph under autocast."""
    model = new_model()
    sampler = sampler_of(model)
    eps = torch.finfo(torch.bfloat16).eps
    for step in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            samples = sampler.sample(PROMPTS, 4, 20, seed=step)
        rows = [(PROMPTS[r // 4], completion) for r, completion in enumerate(samples.completions())]
        truth = torch.cat([tiny.plain_token_logprobs(model, *row) for row in rows])
        with torch.autocast(DEVICE, torch.bfloat16):
            plain = torch.cat([tiny.plain_token_logprobs(model, *row) for row in rows])
        error = (samples.logprobs[samples.mask] - truth).abs().max()
        assert error <= 2 * ((plain - truth).abs().max() + eps * truth.abs().max())
        tiny.perturb(model.parameters(), seed=step, size=0.2)
        sampler.weights_changed(step + 1)
