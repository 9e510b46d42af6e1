"""Concurrent calls, from several threads and on several CUDA streams, are bitwise equal to sequential ones.

Triton's interpreter keeps the running program's index in one global object and swaps ``triton.language``'s
functions for its own during a launch, so two threads cannot use it at once: Triton is tested on CUDA alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from contract import NO_TRITON, Batch, random_batch
from torch import Tensor

from hypo_kernels import fused_hypo_loss, token_logprobs

NUM_THREADS = 4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
THREADED = ["torch", pytest.param("triton", marks=[pytest.mark.cuda, needs_cuda, NO_TRITON])]
CUDA_IMPLS = ["torch", pytest.param("triton", marks=NO_TRITON)]
# Several chunks a call, so that threads meet in the middle of one.
BUDGET = 400_000

Call = Callable[[Batch, str], Tensor]


def loss_of(batch: Batch, impl: str) -> Tensor:
    out = fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens,
        bias=batch.bias, impl=impl, max_chunk_bytes=BUDGET, **batch.options,
    )  # fmt: skip
    return out.loss


def exact_loss_of(batch: Batch, impl: str) -> Tensor:
    """With the exact estimator of the KL: the policy's hidden states, rolled by a row, serve as the reference's."""
    options = {**batch.options, "ref_logps": None, "kl_estimator": "exact"}
    reference = {
        "ref_hidden": batch.hidden.detach().roll(1, 0),
        "ref_lm_head_weight": batch.weight.detach(),
        "ref_bias": None if batch.bias is None else batch.bias.detach(),
    }
    out = fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens,
        bias=batch.bias, impl=impl, max_chunk_bytes=BUDGET, **options, **reference,
    )  # fmt: skip
    return out.loss


def log_probs_and_entropies_of(batch: Batch, impl: str) -> Tensor:
    """Return a loss () whose gradient differs from row to row."""
    logps, entropies = token_logprobs(
        batch.hidden, batch.weight, batch.targets,
        bias=batch.bias, impl=impl, max_chunk_bytes=BUDGET, return_entropy=True,
    )  # fmt: skip
    return (logps * logps.detach() + entropies).sum()


CALLS = [loss_of, exact_loss_of, log_probs_and_entropies_of]


def batches(device: torch.device, count: int = NUM_THREADS) -> list[Batch]:
    """Different tensors and different shapes, one batch a thread."""
    return [
        random_batch(
            [40 + i, 55, 37, 60], 257 + 32 * i, num_pairs=1, with_bias=True, width=16 + 8 * i, seed=i, device=device
        )
        for i in range(count)
    ]


def leaves(batch: Batch) -> list[Tensor]:
    assert batch.bias is not None
    return [batch.hidden, batch.weight, batch.bias]


def forward_and_backward(call: Call, batch: Batch, impl: str) -> list[Tensor]:
    """Return the value and the gradients of one call."""
    value = call(batch, impl)
    return [value.detach(), *torch.autograd.grad(value, leaves(batch))]


def in_threads(work: Callable[[int], Any], count: int = NUM_THREADS) -> list[Any]:
    """Run ``work(i)`` for each i, started together, each in its own thread."""
    start = threading.Barrier(count)

    def run(i: int) -> Any:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run, i) for i in range(count)]]


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, x, y in zip(("value", "hidden", "weight", "bias"), a, b, strict=True):
            assert y.isfinite().all()
            assert torch.equal(x, y), f"call {i}: {name} differs by {float((x - y).abs().max())}"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", THREADED)
def test_calls_in_several_threads_give_what_they_give_in_one(impl: str, call: Call, device: torch.device) -> None:
    todo = batches(device)
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    for _ in range(3):
        found = in_threads(lambda i: forward_and_backward(call, todo[i], impl))
        assert_equal(found, expected)


@pytest.mark.parametrize("impl", THREADED)
def test_different_functions_can_run_at_once(impl: str, device: torch.device) -> None:
    """The loss, the exact KL and per-token log-probs: calls share no state."""
    todo = list(zip(CALLS, batches(device, len(CALLS)), strict=True))
    expected = [forward_and_backward(call, batch, impl) for call, batch in todo]
    found = in_threads(lambda i: forward_and_backward(*todo[i], impl), len(CALLS))
    assert_equal(found, expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", THREADED)
def test_threads_can_share_the_head_and_the_hidden_states(impl: str, call: Call, device: torch.device) -> None:
    """Data parallelism by threads: the inputs are read by all calls and written by none."""
    (batch,) = batches(device, 1)
    before = [x.detach().clone() for x in leaves(batch)]
    expected = forward_and_backward(call, batch, impl)
    found = in_threads(lambda _: forward_and_backward(call, batch, impl))
    assert_equal(found, [expected] * NUM_THREADS)
    assert all(torch.equal(x, y) for x, y in zip(leaves(batch), before, strict=True))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", THREADED)
def test_graph_of_a_thread_is_differentiated_in_the_main_one(impl: str, call: Call, device: torch.device) -> None:
    todo = batches(device)
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    values = in_threads(lambda i: call(todo[i], impl))
    found = [
        [value.detach(), *torch.autograd.grad(value, leaves(batch))]
        for value, batch in zip(values, todo, strict=True)
    ]  # fmt: skip
    assert_equal(found, expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", THREADED)
def test_graph_of_the_main_thread_is_differentiated_in_others(impl: str, call: Call, device: torch.device) -> None:
    todo = batches(device)
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    values = [call(batch, impl) for batch in todo]
    found = in_threads(lambda i: [values[i].detach(), *torch.autograd.grad(values[i], leaves(todo[i]))])
    assert_equal(found, expected)


@pytest.mark.parametrize("impl", THREADED)
def test_one_backward_call_can_serve_several_losses_at_once(impl: str, device: torch.device) -> None:
    """Autograd runs through all graphs together, with functions of different losses in turn."""
    todo = [(call, batch) for call in CALLS for batch in batches(device)]
    expected = [forward_and_backward(call, batch, impl) for call, batch in todo]
    values = in_threads(lambda i: todo[i][0](todo[i][1], impl), len(todo))
    torch.autograd.backward(values)
    found = [
        [value.detach(), *(leaf.grad for leaf in leaves(batch))]
        for value, (_, batch) in zip(values, todo, strict=True)
    ]  # fmt: skip
    assert_equal(found, expected)


@pytest.mark.parametrize("impl", THREADED)
def test_a_threads_autocast_is_its_own(impl: str, device: torch.device) -> None:
    """Half of the threads compute in bf16; the others, at the same time, in fp32."""
    todo = batches(device)

    def work(i: int) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=i % 2 == 0):
            value = loss_of(todo[i], impl)
        return [value.detach(), *torch.autograd.grad(value, leaves(todo[i]))]

    expected = [work(i) for i in range(NUM_THREADS)]
    assert_equal(in_threads(work), expected)
    assert not torch.equal(expected[0][0], forward_and_backward(loss_of, todo[0], impl)[0])


# On a CUDA device


def on_stream(stream: torch.cuda.Stream, work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Return results that the current stream may read after it waits for ``stream``."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        return work()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", CUDA_IMPLS)
def test_two_streams_at_once_give_what_one_gives(impl: str, call: Call, device: torch.device) -> None:
    """The second stream is given its work while the first has only begun, twice, to reuse the memory freed."""
    todo, streams = batches(device, 2), [torch.cuda.Stream(device) for _ in range(2)]
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    torch.cuda.synchronize(device)
    for _ in range(2):
        found = [
            on_stream(stream, lambda batch=batch: forward_and_backward(call, batch, impl))
            for stream, batch in zip(streams, todo, strict=True)
        ]
        torch.cuda.synchronize(device)
        assert_equal(found, expected)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", CUDA_IMPLS)
def test_backward_on_another_stream_than_forward_waits_for_it(impl: str, call: Call, device: torch.device) -> None:
    """Autograd runs a backward pass on its forward's stream, where the caller's stream has the upstream gradient."""
    todo, stream = batches(device, 2), torch.cuda.Stream(device)
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values = [call(batch, impl) for batch in todo]
    torch.cuda.current_stream().wait_stream(stream)
    found = [
        [value.detach(), *torch.autograd.grad(value, leaves(batch))]
        for value, batch in zip(values, todo, strict=True)
    ]  # fmt: skip
    torch.cuda.synchronize(device)
    assert_equal(found, expected)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", CUDA_IMPLS)
def test_threads_with_streams_of_their_own_give_what_one_gives(impl: str, call: Call, device: torch.device) -> None:
    todo, streams = batches(device), [torch.cuda.Stream(device) for _ in range(NUM_THREADS)]
    expected = [forward_and_backward(call, batch, impl) for batch in todo]
    torch.cuda.synchronize(device)
    found = in_threads(lambda i: on_stream(streams[i], lambda: forward_and_backward(call, todo[i], impl)))
    torch.cuda.synchronize(device)
    assert_equal(found, expected)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """Return a function; after its call, everything that waits for the GPU raises until the test ends."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", CUDA_IMPLS)
def test_warm_call_with_host_targets_never_waits_for_the_gpu(
    impl: str, call: Call, device: torch.device, no_synchronisation: Callable[[], None]
) -> None:
    (batch,) = batches(device, 1)
    assert not batch.targets.is_cuda
    assert not batch.cu_seqlens.is_cuda
    expected = forward_and_backward(call, batch, impl)  # compiles, and makes the handles of the libraries
    no_synchronisation()
    with pytest.raises(RuntimeError):  # the mode is armed: reading a number waits
        expected[0].item()
    found = forward_and_backward(call, batch, impl)
    torch.cuda.set_sync_debug_mode("default")
    assert_equal([found], [expected])
