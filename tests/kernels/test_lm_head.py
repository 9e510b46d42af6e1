"""An ``LMHead`` in the place of the weight and the head's keyword arguments."""

from typing import Any

import pytest
import torch
from contract import random_batch
from torch import Tensor

from hypo_kernels import LMHead, LoRA, fused_hypo_loss, sequence_logprobs, token_logprobs

CPU = torch.device("cpu")


def loss(hidden: Tensor, head: Any, batch: Any, **arguments: Any) -> tuple[Tensor, ...]:
    out = fused_hypo_loss(hidden, head, batch.targets, batch.cu_seqlens, **batch.options, **arguments)
    return out.loss, out.logps, out.kl


def tokens(hidden: Tensor, head: Any, batch: Any, **arguments: Any) -> tuple[Tensor, ...]:
    return token_logprobs(hidden, head, batch.targets, return_entropy=True, **arguments)


def sequences(hidden: Tensor, head: Any, batch: Any, **arguments: Any) -> tuple[Tensor, ...]:
    return (sequence_logprobs(hidden, head, batch.targets, batch.cu_seqlens, **arguments),)


FUNCTIONS = [loss, tokens, sequences]


def arguments_of_head() -> tuple[Any, Tensor, dict[str, Any]]:
    batch = random_batch([4, 3, 5, 2], 67, num_pairs=1, with_bias=True, device=CPU)
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=gen).requires_grad_() for shape in ((3, 16), (67, 3)))
    head = {"bias": batch.bias, "lora": LoRA(a, b, 0.5), "logit_softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}
    return batch, batch.weight, head


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lm_head_equals_plain_arguments(function: Any, compiled: bool) -> None:
    batch, weight, head = arguments_of_head()
    lora = head["lora"]
    leaves = [batch.hidden, weight, head["bias"], lora.A, lora.B]

    def as_head(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        constants = {name: head[name] for name in ("logit_softcap", "logit_scale", "temperature")}
        return function(hidden, LMHead(weight, bias, lora=LoRA(a, b, 0.5), **constants), batch)

    call = torch.compile(as_head, fullgraph=True, backend="aot_eager") if compiled else as_head
    outputs, expected = call(*leaves), function(batch.hidden, weight, batch, **head)
    for got, value in zip(outputs, expected, strict=True):
        assert torch.equal(got, value)
    gradients = [torch.autograd.grad(run[0].sum(), leaves) for run in (outputs, expected)]
    for got, value in zip(*gradients, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_head_argument_beside_an_lm_head_is_refused(function: Any) -> None:
    batch, weight, head = arguments_of_head()
    for name, value in head.items():
        with pytest.raises(ValueError, match=rf"{name} is given beside an LMHead: .*LMHead\(weight, {name}=\.\.\.\)"):
            function(batch.hidden, LMHead(weight), batch, **{name: value})
