"""``fused_hypo_loss`` as a node of an autograd graph: tied and frozen weights, upstream gradients, repeats."""

import pytest
import torch
from contract import (
    FUSED,
    IMPLS,
    Batch,
    assert_close,
    assert_contract,
    eager_runs,
    plain_logps,
    plain_objective,
    random_batch,
    run_fused,
    truth,
    variants,
)
from torch import Tensor

from hypo_kernels import fused_hypo_loss, sequence_logprobs

BOTH = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": 67}


def loss_of(batch: Batch, impl: str) -> Tensor:
    return fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, impl=impl, **batch.options
    ).loss


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16, torch.float16, impls=IMPLS))
def test_the_upstream_gradient_scales_every_gradient(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_contract(random_batch(**BOTH, with_bias=True, device=device, dtype=dtype), impl, upstream=-0.37)


@pytest.mark.parametrize("impl", FUSED)
def test_backward_twice_raises_a_clear_error(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    loss = loss_of(batch, impl)
    loss.backward(retain_graph=True)
    first = batch.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"backward was called twice.*call the fused loss again"):
        loss.backward()
    assert torch.equal(batch.weight.grad, first)


@pytest.mark.parametrize("impl", FUSED)
def test_a_second_derivative_is_refused(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    upstream = torch.ones((), device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(batch, impl) * upstream, batch.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_the_same_inputs_give_bitwise_the_same_result(
    impl: str, dtype: torch.dtype, chunks: str, device: torch.device
) -> None:
    batch = random_batch(**BOTH, with_bias=True, device=device, dtype=dtype)
    if chunks == "many":
        batch = batch.with_options(max_chunk_bytes=20_000)
    first, second = (run_fused(batch.to(dtype), impl) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.float64, impls=IMPLS))
def test_a_weight_tied_to_the_embedding_gets_both_gradients(
    impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = random_batch(**BOTH, device=device, dtype=dtype)
    tokens = torch.randint(67, (len(batch.targets),), generator=torch.Generator().manual_seed(1)).to(device)
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)

    def gradient(compute: torch.dtype, impl: str | None) -> Tensor:
        tied = batch.weight.detach().to(compute).requires_grad_()
        run = batch.to(compute)
        run = Batch(torch.tanh(tied[tokens] @ mix.to(compute)), tied, run.targets, run.cu_seqlens, None, run.options)
        if impl is None:
            plain_objective(run, plain_logps(run), run.options["ref_logps"]).backward()
        else:
            loss_of(run, impl).backward()
        return tied.grad

    exact, kernel, eager = gradient(torch.float64, None), gradient(dtype, impl), gradient(dtype, None)
    if dtype == torch.float64:
        torch.testing.assert_close(kernel, exact)
    else:
        assert_close("gradient of the tied weight", kernel, [eager], exact, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_policy_and_reference_share_a_frozen_head(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, with_bias=True, with_ref_hidden=True, device=device)
    batch.weight.requires_grad_(False)
    batch.bias.requires_grad_(False)
    ref_hidden = batch.options["ref_hidden"]
    own = {name: value for name, value in batch.options.items() if not name.startswith("ref_")}
    shared = batch.with_options(ref_lm_head_weight=None, ref_bias=None)
    spelled_out = batch.with_options(ref_lm_head_weight=batch.weight.clone(), ref_bias=batch.bias.clone())
    ref_logps = sequence_logprobs(ref_hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, impl=impl)
    given = Batch(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, batch.bias, {**own, "ref_logps": ref_logps}
    )
    losses, gradients = [], []
    for form in (shared, spelled_out, given):
        batch.hidden.grad = None
        loss = loss_of(form, impl)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(batch.hidden.grad)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16, impls=IMPLS))
def test_reference_hidden_states_equal_given_log_probs(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    batch = random_batch(**BOTH, with_ref_hidden=True, device=device, dtype=dtype)
    ref_logps = sequence_logprobs(
        batch.options["ref_hidden"], batch.options["ref_lm_head_weight"], batch.targets, batch.cu_seqlens, impl=impl
    )
    own = {name: value for name, value in batch.options.items() if not name.startswith("ref_")}
    given = Batch(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, None, {**own, "ref_logps": ref_logps})
    from_hidden, from_logps = run_fused(batch, impl), run_fused(given.to(dtype), impl)
    for name, value in from_hidden.items():
        torch.testing.assert_close(value.to(dtype), from_logps[name].to(dtype), msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("impl", IMPLS)
def test_the_reference_gets_no_gradient(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, with_ref_hidden=True, device=device)
    for name in ("ref_hidden", "ref_lm_head_weight"):
        batch.options[name].requires_grad_()
    loss_of(batch, impl).backward()
    assert batch.options["ref_hidden"].grad is None
    assert batch.options["ref_lm_head_weight"].grad is None
    given = random_batch(**BOTH, device=device)
    given.options["ref_logps"].requires_grad_()
    loss_of(given, impl).backward()
    assert given.options["ref_logps"].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_add_to_those_that_are_there(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    loss_of(batch, impl).backward()
    once = batch.weight.grad.clone()
    loss_of(batch, impl).backward()
    torch.testing.assert_close(batch.weight.grad, 2 * once)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_losses_on_one_graph_add_up(impl: str, device: torch.device) -> None:
    """Gradient accumulation in one graph: the saved gradients of one call do not leak into another's."""
    batch = random_batch(**BOTH, device=device)
    weight = batch.weight.detach().requires_grad_()
    separate = Batch(
        batch.hidden.detach().requires_grad_(), weight, batch.targets, batch.cu_seqlens, None, batch.options
    )
    (loss_of(batch, impl) + 3 * loss_of(batch, impl)).backward()
    (4 * loss_of(separate, impl)).backward()
    torch.testing.assert_close(batch.weight.grad, separate.weight.grad)
    torch.testing.assert_close(batch.hidden.grad, separate.hidden.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_call_leaves_its_inputs_as_they_were(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, with_bias=True, logit_softcap=5.0, device=device)
    before = [x.detach().clone() for x in (batch.hidden, batch.weight, batch.bias, batch.options["ref_logps"])]
    loss_of(batch, impl).backward()
    after = [batch.hidden, batch.weight, batch.bias, batch.options["ref_logps"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_gives_the_same_statistics_and_no_graph(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    with torch.no_grad():
        quiet = loss_of(batch, impl)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss_of(batch, impl).detach())


@pytest.mark.parametrize("impl", FUSED)
def test_one_fused_call_is_a_step_of_eager_training(impl: str, device: torch.device) -> None:
    """Gradients reach the parameters behind the hidden states as eager's do."""
    batch = random_batch(**BOTH, device=device)
    exact, eager = truth(batch), eager_runs(batch)
    base = batch.hidden.detach()
    scale = torch.ones(16, device=device, requires_grad=True)
    out = fused_hypo_loss(base * scale, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options)
    out.loss.backward()

    def through(gradient: Tensor) -> Tensor:
        return (gradient * base.double()).sum(0)

    name = "gradient of hidden"
    assert_close("scale", scale.grad, [through(run[name]) for run in eager], through(exact[name]), torch.float32)
