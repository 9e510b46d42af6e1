"""``torch.library``'s and ``torch.compile``'s conventions: opcheck, full graphs, no compilation per length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import random_batch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hypo_kernels import LoRA, fused_hypo_loss, ops, sequence_logprobs, token_logprobs
from hypo_kernels.call import Reference
from hypo_kernels.head import LMHead

VOCAB, WIDTH, RANK = 67, 16, 3
FULL_HEAD: dict[str, Any] = {"logit_softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}
LOSS: dict[str, Any] = {
    "loss": "sigmoid reverse_kl", "loss_parameters": [0.1, 0.5, 0.0], "group_loss": "", "num_pairs": 1,
    "num_generations": 2, "kl_coef": 0.05, "length_penalty": 0.1, "kl_estimator": "sampled", "importance_cap": 2.0,
    "max_chunk_bytes": 2**20, "validate": False, "impl": "torch",
}  # fmt: skip

# An operator's own checks: schema, gradient registration, fake kernel, and dispatch with dynamic shapes.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(hidden: Tensor, head: LMHead) -> tuple[Any, ...]:
    """Return an operator's arguments, with every tensor a leaf."""
    flat = ops._head_arguments(hidden, head)
    return tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in flat)


def heads(dtype: torch.dtype) -> dict[str, tuple[Tensor, LMHead, Tensor, Tensor]]:
    """Return (hidden, head, targets, cu_seqlens) of a plain head, of one with every option, and of a frozen one."""
    batch = random_batch([4, 3, 5, 2], VOCAB, num_pairs=1, with_bias=True, dtype=dtype, device=torch.device("cpu"))
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=gen).to(dtype).requires_grad_() for shape in ((RANK, WIDTH), (VOCAB, RANK)))
    rest = (batch.targets, batch.cu_seqlens)
    frozen = batch.weight.detach()
    return {
        "plain": (batch.hidden, LMHead(batch.weight), *rest),
        "whole": (batch.hidden, LMHead(batch.weight, batch.bias, lora=LoRA(a, b, 0.5), **FULL_HEAD), *rest),
        "frozen": (batch.hidden, LMHead(frozen), *rest),
    }


@pytest.mark.parametrize("reference", ["log-probs", "hidden states", "exact KL", "log-probs of stale samples"])
@pytest.mark.parametrize("head", ["plain", "whole", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_opcheck_of_the_loss(dtype: torch.dtype, head: str, reference: str) -> None:
    hidden, lm_head, targets, cu_seqlens = heads(dtype)[head]
    ref = Reference(torch.full((4,), -12.0), None, None, None)
    behavior_logps = torch.full((len(targets),), -4.0) if "stale" in reference else None
    if "log-probs" not in reference:
        ref = Reference(None, hidden.detach() + 0.1, lm_head.weight.detach().clone(), None)
    options = {**LOSS, "kl_estimator": "exact" if reference == "exact KL" else "sampled"}
    torch.library.opcheck(
        ops._hypo_loss,
        (*arguments(hidden, lm_head), targets, cu_seqlens, *ref, [], [], None, behavior_logps),
        options,
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", ["plain", "whole", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_opcheck_of_token_log_probs_and_their_backward(dtype: torch.dtype, head: str, entropy: bool) -> None:
    hidden, lm_head, targets, _ = heads(dtype)[head]
    args = (*arguments(hidden, lm_head), targets, 2**20, "torch", entropy)
    torch.library.opcheck(ops._token_logprobs, args, test_utils=CHECKS)
    logps, entropies, norms = (x.detach() for x in ops._token_logprobs(*args))
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    upstream = (torch.randn_like(logps), torch.randn_like(entropies))
    torch.library.opcheck(ops._token_logprobs_backward, (*detached, norms, entropies, *upstream), test_utils=CHECKS)


class Model(nn.Module):
    """A layer, a head with a bias and an update, and a loss of everything that the package computes."""

    def __init__(self, loss: Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.lm_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.A, self.B = nn.Parameter(torch.randn(RANK, WIDTH)), nn.Parameter(torch.randn(VOCAB, RANK))
        self.loss = loss

    def forward(self, x: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
        return self.loss(self, torch.tanh(self.trunk(x)), targets, cu_seqlens, ref_logps)


def hypo(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    out = fused_hypo_loss(
        hidden, model.lm_head.weight, targets, cu_seqlens, num_pairs=1, ref_logps=ref_logps, beta=0.1, kl_coef=0.05,
        bias=model.lm_head.bias, lora=LoRA(model.A, model.B, 0.5), **FULL_HEAD,
    )  # fmt: skip
    return out.loss * 1.7 + out.margins.sum().detach()


def stale(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    out = fused_hypo_loss(
        hidden, model.lm_head.weight, targets, cu_seqlens, num_pairs=1, ref_logps=ref_logps, beta=0.1, kl_coef=0.05,
        behavior_logps=-4.0 - 0.1 * (targets % 5).float(),
    )  # fmt: skip
    return out.loss + sum(x.sum() for x in out.importance)


def exact(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    return fused_hypo_loss(
        hidden, model.lm_head.weight, targets, cu_seqlens, num_pairs=1, ref_hidden=hidden.detach() + 0.1,
        ref_lm_head_weight=model.lm_head.weight.detach(), beta=0.1, kl_coef=0.05, kl_estimator="exact",
    ).loss  # fmt: skip


def tokens(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    logps, entropies = token_logprobs(
        hidden, model.lm_head.weight, targets, return_entropy=True, bias=model.lm_head.bias
    )
    plain = token_logprobs(hidden, model.lm_head.weight, targets, lora=LoRA(model.A, model.B))
    return (logps.exp() + 0.1 * entropies).sum() + plain.square().sum()


def sequences(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    return (sequence_logprobs(hidden, model.lm_head.weight, targets, cu_seqlens) - ref_logps).square().sum()


def padded(model: Model, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> Tensor:
    rows = len(targets) // 4 * 4
    hidden, targets = hidden[:rows].view(4, -1, WIDTH), targets[:rows].view(4, -1)
    out = fused_hypo_loss(
        hidden, model.lm_head.weight, targets, num_pairs=1, ref_logps=ref_logps, beta=0.1, kl_coef=0.05
    )
    return out.loss + sequence_logprobs(hidden, model.lm_head.weight, targets).sum()


LOSSES = [hypo, stale, exact, tokens, sequences, padded]


def batch_of(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(rows)
    targets = torch.randint(VOCAB, (rows,), generator=gen)
    targets[:2] = -100
    return (
        torch.randn(rows, WIDTH, generator=gen),
        targets,
        torch.tensor([0, 3, 6, 8, rows]),
        torch.full((4,), -12.0),
    )


def gradients(model: Model, call: Callable[..., Tensor], rows: int) -> list[Tensor]:
    """The loss and the gradients of all parameters that have one."""
    model.zero_grad()
    loss = call(*batch_of(rows))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_model_and_loss_are_one_graph_for_every_length(
    loss: Callable[..., Tensor], autocast: bool, device: torch.device
) -> None:
    """The first length compiles, the second makes the length dynamic, and no other length compiles again."""
    torch.compiler.reset()
    model = Model(loss)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in (12, 20, 16, 31, 40):
            for got, expected in zip(gradients(model, compiled, rows), gradients(model, model, rows), strict=True):
                torch.testing.assert_close(got, expected)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor_compiles_model_and_loss(device: torch.device) -> None:
    torch.compiler.reset()
    model = Model(hypo)
    compiled = torch.compile(model, fullgraph=True)
    for got, expected in zip(gradients(model, compiled, 12), gradients(model, model, 12), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_wrong_argument_is_named_inside_a_compiled_model_too() -> None:
    torch.compiler.reset()

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, targets)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"targets holds 67: must be in \[0, 67\)"):
        compiled(torch.randn(3, WIDTH), torch.randn(VOCAB, WIDTH), torch.tensor([1, 67, 2]))
