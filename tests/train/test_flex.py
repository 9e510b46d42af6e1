"""FlexAttention's mask for packed trees, pair by pair, and its attention against SDPA's, run by run."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hypo_train.trees import attention, flex
from hypo_train.trees.attention import Part
from hypo_train.trees.layout import Layout
from hypo_train.trees.scores import Scores

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

PARTS = {"whole row": (True, True), "prompts": (True, False), "branches": (False, True)}
# FlexAttention compiled for a CPU is C++, without gradients.
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

CPU = torch.device("cpu")
LAYOUTS = {
    "one tree within a block": Layout((5,), ((3, 4),)),
    "one token": Layout((1,), ((0,),)),
    "empty branches, and a tree of them": Layout((40, 3, 9), ((0, 7, 0), (0, 0), (90,))),
    "branches longer than a block": Layout((300,), ((290, 1, 140),)),
    "whole blocks": Layout((128, 256), ((128, 256), (384,))),  # nothing is padded, and blocks are full
    "many small trees": Layout((11,) * 23, ((5, 6),) * 23),
    # Several branches fill a block's rows that all see the whole of a block of their prompt.
    "full blocks of several branches": Layout((256, 7), ((64, 64, 64, 64, 100), (200,))),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.fixture(params=PARTS.values(), ids=PARTS.keys())
def part(request):
    return request.param


def random_layout(seed):
    """Up to six trees of up to four branches, their lengths about a block's or far less."""
    rng = random.Random(seed)
    longest = rng.choice([6, 60, 300])
    prompts = [rng.randint(1, longest) for _ in range(rng.randint(1, 6))]
    branches = [[rng.choice([0, rng.randint(0, longest)]) for _ in range(rng.randint(1, 4))] for _ in prompts]
    return Layout(tuple(prompts), tuple(map(tuple, branches)))


def seen(layout, has_prompts, has_branches, window=None):
    """(queries, keys) bool, by definition: of the same tree, in the prompt or the own branch, not later or too far."""
    tree = [t for t, n in enumerate(layout.prompts) for _ in range(n)]
    branch = [-1] * len(tree)
    position = [i for n in layout.prompts for i in range(n)]
    lengths = [(t, n) for t, branches in enumerate(layout.branches) for n in branches]
    for b, (t, n) in enumerate(lengths):
        tree += [t] * n
        branch += [b] * n
        position += range(layout.prompts[t], layout.prompts[t] + n)
    tree, branch, position, index = *map(torch.tensor, (tree, branch, position)), torch.arange(len(tree))
    of_prompt_or_own = (branch == -1) | (branch == branch.unsqueeze(1))
    mask = (tree == tree.unsqueeze(1)) & of_prompt_or_own & (index <= index.unsqueeze(1))
    if window is not None:
        mask &= position > position.unsqueeze(1) - window
    first, stop = layout.num_prompt_tokens * (not has_prompts), None if has_branches else layout.num_prompt_tokens
    return mask[first:stop, :stop]


def listed(count, columns, shape):
    """FlexAttention's lists -> bool ``shape``; what is listed twice or outside fails."""
    blocks = torch.zeros(shape, dtype=torch.long)
    for i, n in enumerate(count[0, 0].tolist()):
        for j in columns[0, 0, i, :n].tolist():
            blocks[i, j] += 1
    assert blocks.max() <= 1
    return blocks.bool()


def check_mask(layout, part, window=None):
    expected = seen(layout, *part, window)
    mask = flex.block_mask(layout, *part, window, CPU)
    assert mask.shape == (1, 1, *expected.shape)
    queries, keys = (torch.arange(n) for n in expected.shape)
    zero = torch.tensor(0)
    if len(queries):
        assert torch.equal(mask.mask_mod(zero, zero, queries.unsqueeze(1), keys), expected)

    shape = tuple(max(2, -(-n // flex.BLOCK)) for n in expected.shape)
    padded = expected.new_zeros([n * flex.BLOCK for n in shape])
    padded[: expected.shape[0], : expected.shape[1]] = expected
    blocks = padded.view(shape[0], flex.BLOCK, shape[1], flex.BLOCK)
    full, partial = blocks.all(3).all(1), blocks.any(3).any(1)
    partial &= ~full
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices, shape), partial)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices, shape), full)
    # What the backward pass of keys and values goes through.
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices, shape[::-1]), partial.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices, shape[::-1]), full.T)
    return int(full.sum())


def test_the_mask_lists_exactly_the_blocks_of_its_definition(layout, part):
    check_mask(layout, part)


def test_the_mask_of_random_layouts_is_its_definition():
    full = sum(check_mask(random_layout(seed), part) for seed in range(60) for part in PARTS.values())
    assert full > 0


@pytest.mark.parametrize("window", [1, 129, 200])  # a token alone, one more than a block, several blocks
def test_the_mask_within_a_window_lists_exactly_its_blocks(layout, part, window):
    check_mask(layout, part, window)


def test_the_mask_of_random_layouts_within_a_window_is_right():
    full = sum(check_mask(random_layout(s), part, 1 + s * 7) for s in range(60) for part in PARTS.values())
    assert full > 0


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.nbytes)
        return out


@pytest.mark.parametrize("trees", [1, 64], ids=["one tree", "64 trees"])
@pytest.mark.parametrize("window", [None, 4096])
def test_the_mask_of_65536_tokens_takes_a_few_megabytes(part, trees, window):
    prompt, branch = 32768 // trees, 8192 // trees
    layout = Layout((prompt,) * trees, ((branch,) * 4,) * trees)
    with Largest() as largest:
        flex.block_mask(layout, *part, window, CPU)
    assert largest.nbytes <= 8 * 2**20


# Attention


def inputs(layout, part, *, heads=6, kv_heads=2, dim=16, value_dim=None, seed=0, device="cpu", dtype=torch.float32):
    """Query (1, H, N, D), as a projection leaves it, and the row's key and value."""
    generator = torch.Generator().manual_seed(seed)
    keys = layout.num_tokens if part[1] else layout.num_prompt_tokens
    queries = keys if part[0] else keys - layout.num_prompt_tokens

    def states(tokens, heads, dim):
        return torch.randn(1, tokens, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)

    return states(queries, heads, dim), states(keys, kv_heads, dim), states(keys, kv_heads, value_dim or dim)


def by_flex(layout, part, states, *, window=None, **scores):
    mask = flex.block_mask(layout, *part, window, states[0].device)
    return flex.flex_tree_attention(*states, mask, Scores(**scores))


def by_sdpa(layout, part, states, *, window=None, **scores):
    return Part(layout, *part)._attend_by_group(*states, window, Scores(**scores))


@pytest.fixture
def compiled_for_cpu():
    """Sizes are taken for equal where they are at first: of ten sizes or more, torch 2.13 writes C++ that is none."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention's reference, which looks at the mask and score functions but at no list of blocks."""
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    # Off a GPU it refuses gradients, which it has all the same.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *states: None)


@compiles
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 50])
def test_flex_attention_is_attention_attend_by_group(compiled_for_cpu, layout, part, window):
    states = inputs(layout, part)
    if states[0].shape[2]:
        found, expected = (by(layout, part, states, window=window) for by in (by_flex, by_sdpa))
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


@compiles
@pytest.mark.slow
@torch.no_grad()
def test_the_models_scale_and_softcap_are_compiled_in(compiled_for_cpu):
    layout, part, options = Layout((150, 40), ((20, 0, 130), (9,))), PARTS["whole row"], {"scale": 0.7, "softcap": 1.5}
    states = inputs(layout, part, heads=4, kv_heads=4)
    expected = by_sdpa(layout, part, states, **options)
    for other in ({}, {"scale": 0.7}, {"softcap": 1.5}):
        assert (by_sdpa(layout, part, states, **other) - expected).abs().max() > 0.1
    assert_close(by_flex(layout, part, states, **options), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_autocast_casts_queries_and_keys_that_rope_left_in_fp32(uncompiled):
    layout, part = LAYOUTS["many small trees"], PARTS["whole row"]
    query, key, value = inputs(layout, part)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_flex(layout, part, (query, key, value.bfloat16()))
        expected = by_sdpa(layout, part, (query, key, value.bfloat16()))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, by_flex(layout, part, (query.bfloat16(), key.bfloat16(), value.bfloat16())))


@torch.no_grad()
def test_no_length_is_compiled_for_itself(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    shapes = set()
    for layout in [*LAYOUTS.values(), *map(random_layout, range(12))]:
        for part in PARTS.values():
            states = inputs(layout, part)
            if states[0].shape[2]:
                by_flex(layout, part, states)
                by_flex(layout, part, states, window=50)  # in the same graphs
                shapes.add((states[0].shape, states[1].shape))
    assert len(shapes) > 40
    # As many queries as keys, fewer of them, the first mask of several blocks, a row of one token; and since torch 2.15
    # a mask with more blocks than the first one of several.
    assert counter.frame_count <= 5


def test_gradients_are_those_of_attention_by_group(uncompiled, layout, part):
    states = [x.requires_grad_() for x in inputs(layout, part)]
    if not states[0].shape[2]:
        return
    options = {"scale": 0.3, "softcap": 2.0}
    found, expected = by_flex(layout, part, states, **options), by_sdpa(layout, part, states, **options)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(out, states, weight) for out in (found, expected)), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_branches_without_queries_call_no_kernel(monkeypatch, on_cuda):
    """Prompts ran first and every completion is one token long: Inductor compiles no kernel of zero queries."""
    monkeypatch.setattr(attention, "flex_supports", lambda *states: on_cuda)
    monkeypatch.setattr(flex, "_compiled", lambda: pytest.fail("FlexAttention is called without queries"))
    layout, part = Layout((40, 3), ((0, 0), (0,))), PARTS["branches"]
    states = [x.requires_grad_() for x in inputs(layout, part, value_dim=8)]
    query, key, value = states
    tree = Part(layout, *part, prompt={0: (key, value)})
    output = tree.attend(0, query, key[:, :, :0], value[:, :, :0])
    assert output.shape == (1, 0, 6, 8)
    for gradient in torch.autograd.grad(output.sum(), states):
        assert not gradient.any()


@pytest.mark.parametrize("window", [None, 50])
def test_windows_and_sinks_have_the_gradients_of_sdpa(uncompiled, layout, part, window):
    states = [x.requires_grad_() for x in inputs(layout, part)]
    if not states[0].shape[2]:
        return
    sink = torch.linspace(0, 6, 6).requires_grad_()
    leaves = [*states, sink]
    found, expected = (by(layout, part, states, window=window, sink=sink) for by in (by_flex, by_sdpa))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (by_sdpa(layout, part, states, window=window) - expected).abs().max() > 0.1, "the sink matters"
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(out, leaves, weight) for out in (found, expected)), strict=True):
        assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=1e-5)


def test_flex_attention_is_taken_on_cuda_where_it_has_a_kernel():
    def serves(device="cuda", dtype=torch.bfloat16, dim=64, value_dim=64):
        with FakeTensorMode():
            query, key = (torch.empty(1, 2, 7, dim, device=device, dtype=dtype) for _ in range(2))
            return flex.flex_supports(query, key, torch.empty(1, 2, 7, value_dim, device=device, dtype=dtype))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert serves(dtype=dtype)
    assert serves(dim=80, value_dim=80)
    assert not serves(device="cpu")
    assert not serves(dtype=torch.float64)
    assert not serves(dim=8)
    assert not serves(value_dim=8)


def test_a_mask_is_built_once_for_all_layers(monkeypatch, uncompiled):
    built = []
    plain = flex.block_mask
    monkeypatch.setattr(attention, "block_mask", lambda *args, **kw: built.append(kw) or plain(*args, **kw))
    monkeypatch.setattr(attention, "flex_supports", lambda *states: True)
    layout = Layout((3, 4), ((5, 6), (7,)))
    for part in PARTS.values():
        for layer in range(3):
            query, key, value = inputs(layout, part)
            prompt = None
            if part == PARTS["branches"]:
                (old_key, key), (old_value, value) = (x.split([7, 18], dim=2) for x in (key, value))
                prompt = {layer: (old_key, old_value)}
            options = {"has_prompts": part[0], "has_branches": part[1], "prompt": prompt}
            out = Part(layout, **options).attend(layer, query, key, value)
            assert_close(out, by_sdpa(layout, part, inputs(layout, part)), atol=1e-5, rtol=1e-5)
    assert len(built) == len(PARTS)


# On a GPU


def on_a_gpu(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def error(found, truth):
    return (found.double() - truth).abs().max().item()


def outcome(attend, states, weight):
    """Output and gradients of query, key and value."""
    states = [x.detach().requires_grad_() for x in states]
    out = attend(states)
    return [out, *torch.autograd.grad(out, states, weight.to(out).expand_as(out).contiguous())]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "softcap", "window", "has_sink"),
    [
        (9, 3, 64, None, None, False),  # SmolLM2
        (4, 4, 80, None, None, False),  # Pythia-2.8B's heads
        (8, 4, 256, 30.0, 100, False),  # Gemma 2
        (16, 2, 64, None, 100, True),  # GPT-OSS
    ],
    ids=["grouped", "80 dimensions", "softcapped within a window", "with sinks within a window"],
)
def test_on_a_gpu_flex_is_as_exact_as_sdpa(layout, part, heads, kv_heads, dim, softcap, window, has_sink, dtype):
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "device": "cuda"}
    states = inputs(layout, part, dtype=dtype, **sizes)
    if not states[0].shape[2]:
        return
    assert flex.flex_supports(*states)
    shape = states[0].transpose(1, 2).shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    sinks = [torch.linspace(0, 6, heads, device="cuda", dtype=dtype)] * has_sink

    def attend(by):
        def of(states):
            options = {"window": window, "softcap": softcap, "sink": states[3] if has_sink else None}
            return by(layout, part, states[:3], **options)

        return of

    truth = outcome(attend(by_sdpa), [x.double() for x in [*states, *sinks]], weight)
    eager = outcome(attend(by_sdpa), [*states, *sinks], weight)
    found = outcome(attend(by_flex), [*states, *sinks], weight)
    for kernel, plain, true in zip(found, eager, truth, strict=True):
        bound = 2 * (error(plain, true) + torch.finfo(dtype).eps * true.abs().max().item())
        assert error(kernel, true) <= bound


@on_a_gpu
def test_on_a_gpu_no_length_is_compiled_for_itself(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for layout in [*LAYOUTS.values(), *map(random_layout, range(12))]:
        for part in PARTS.values():
            states = inputs(layout, part, device="cuda", dtype=torch.bfloat16)
            if states[0].shape[2]:
                outcome(lambda x, layout=layout, part=part: by_flex(layout, part, x), states, torch.ones(()).cuda())
    assert counter.frame_count <= 4


@on_a_gpu
def test_on_a_gpu_memory_is_linear_in_the_length_of_a_row():
    layout, part = Layout((256,) * 128, ((64,) * 4,) * 128), PARTS["whole row"]
    states = inputs(Layout((65536,), ((),)), PARTS["prompts"], heads=2, dim=64, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones_like(states[0].transpose(1, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(lambda x: by_flex(layout, part, x), states, weight)
    # 16 MiB each: output, three gradients, and what the kernels need beside; N x N would be 4 GiB of booleans.
    assert torch.cuda.max_memory_allocated() - before <= 16 * 16 * 2**20


@on_a_gpu
def test_on_a_gpu_building_a_mask_does_not_wait_for_the_device():
    torch.zeros(1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in PARTS.values():
            layout, device = LAYOUTS["branches longer than a block"], torch.device("cuda", 0)
            flex.block_mask(layout, *part, 200, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_on_a_gpu_recomputing_under_autocast_keeps_gradients():
    layout, part = LAYOUTS["branches longer than a block"], PARTS["whole row"]
    states = inputs(layout, part, device="cuda")
    weight = torch.randn(1, states[0].shape[2], 6, 16, generator=torch.Generator().manual_seed(1)).cuda()

    def attend(states):
        return Part(layout).attend(0, *states)

    with torch.autocast("cuda", torch.bfloat16):
        expected = outcome(attend, states, weight)
        found = outcome(lambda x: checkpoint(attend, x, use_reentrant=False), states, weight)
    assert found[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, expected))
