"""Model FLOPs of a step's passes: what its matrix products cost, whatever computes them.

A multiply-add is two FLOPs. A linear layer of n weights costs 2 n a token forward; backward as much again for its
weights' gradient where they are trained, and as much for its input's where something below is trained, nothing
where the frozen layers begin. Attention costs 4 D_head a head for each token and each one it attends to (itself
included; causal, so half a square), and twice that backward. The LM head's rows are the counted tokens.

Left out, as is usual: norms, activations, rotations, softmax, the optimizer; and what is computed again, as
under gradient checkpointing or in a second pass over the head. What sharing saves is not counted either: a
prompt's tokens are counted once for all of its completions, and frozen layers once for policy and reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.meta_pass import without_memory
from hypo_train.model.policy import Head, Policy
from hypo_train.model.quantization import num_elements
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.trunk import decoder_layers
from hypo_train.trees.attention import Layout, causal
from hypo_train.trees.tree import Tree, pack, separate_rows

Tokens = Sequence[Sequence[int]]


class Size(NamedTuple):
    """How much a pass computes; known on the host."""

    tokens: int  # through the layers, padding left out
    attended: int  # (token, token it attends to)
    rows: int  # through the LM head

    @classmethod
    def of(cls, tree: Tree) -> Size:
        return cls(tree.num_tokens, tree.num_attended, len(tree.targets))

    @classmethod
    def of_samples(cls, prompts: Tokens, completions: Tokens, *, prefill: bool) -> Size:
        """Of drawing ``completions``, as many consecutive ones a prompt; ``prefill``: the prompts are run as well."""
        each = len(completions) // len(prompts)
        # The last token of a completion is drawn and never an input.
        inputs = [max(0, len(completion) - 1) for completion in completions]
        branches = tuple(tuple(inputs[i * each : (i + 1) * each]) for i in range(len(prompts)))
        layout = Layout(tuple(map(len, prompts)), branches)
        tokens, attended = layout.num_tokens, layout.num_attended
        if not prefill:
            tokens, attended = tokens - layout.num_prompt_tokens, attended - sum(map(causal, layout.prompts))
        return cls(tokens, attended, sum(map(len, completions)))


class Rates(NamedTuple):
    """FLOPs a token, a pair of attention and a row of the head."""

    token: float
    attended: float
    row: float

    def of(self, size: Size) -> float:
        return self.token * size.tokens + self.attended * size.attended + self.row * size.rows


@dataclass(frozen=True)
class ModelFlops:
    """What the passes of a step cost, a multiple of their :class:`Size`."""

    policy: Rates  # without gradients, as in sampling
    backward: Rates
    reference: Rates
    above_trunk: Rates  # the reference, where the frozen layers below the trained ones have run already

    @classmethod
    def of_outline(cls, policy: Policy | RewardModel, *, autocast: bool) -> ModelFlops:
        """The same of a model on the meta device. Raises UncountedError."""
        with without_memory(policy, autocast=autocast):
            return cls.of(policy)

    @classmethod
    def of(cls, policy: Policy | RewardModel) -> ModelFlops:
        """Asked of the model itself, which runs a few tokens: which layers it has and where gradients pass.

        Raises:
            UncountedError: the model computes with weights in a way that is not known here.
        """
        linears, through_head = _probe(policy)
        _check_complete(policy, linears)
        config = policy.base.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4.0 * config.num_attention_heads * head_dim
        layers = [id(layer) for layer in _layers(policy)]
        head = _head_weights(policy.head())
        full = sum(linear.flops for linear in linears)
        of_head = sum(2.0 * weight.numel() for weight in head)
        # LoRA's reference is the model with its adapter off: what is trained is not in it.
        adapter = sum(linear.flops for linear in linears if linear.trained) if policy.is_peft else 0.0
        frozen = {id(layer) for layer in policy.trunk_layers}
        trunk = sum(linear.flops for linear in linears if linear.layer in frozen)
        with_gradient = {linear.layer for linear in linears if linear.input_gradient or linear.trained}
        reference = Rates(full - adapter, attention * len(layers), 2.0 * head[0].numel())
        return cls(
            policy=Rates(full, attention * len(layers), of_head),
            backward=Rates(
                sum(linear.flops * (linear.input_gradient + linear.trained) for linear in linears),
                2 * attention * len(with_gradient.intersection(layers)),
                sum(2.0 * weight.numel() * (through_head + weight.requires_grad) for weight in head),
            ),
            reference=reference,
            above_trunk=reference._replace(
                token=reference.token - trunk, attended=attention * (len(layers) - len(frozen))
            ),
        )


class UncountedError(ValueError):
    """A model whose FLOPs are not known; the message says what of it is not."""


class _Linear(NamedTuple):
    weight: int  # its id
    flops: float  # a token, forward
    trained: bool
    input_gradient: bool  # whether its input's gradient is asked for
    layer: int | None  # the id of the decoder layer it is in


def _probe(policy: Policy | RewardModel) -> tuple[list[_Linear], bool]:
    """Every call of a linear layer in a forward pass of the decoder, and whether the head's input needs a gradient."""
    layer_of = {id(module): id(layer) for layer in _layers(policy) for module in layer.modules()}
    weight = policy.base.get_input_embeddings().weight
    tree = _one_row() if isinstance(weight, FakeTensor) else _one_tree(policy).to(weight.device)
    found: list[_Linear] = []

    def record(module: Any, args: Any) -> None:
        (x,) = args
        if x[..., 0].numel() != tree.num_tokens:
            raise UncountedError(f"{type(module).__name__} is not called once for each token")
        flops, trained = 2.0 * num_elements(module.weight), module.weight.requires_grad
        found.append(_Linear(id(module.weight), flops, trained, x.requires_grad, layer_of.get(id(module))))

    decoder = policy.base.get_decoder()
    handles = [m.register_forward_pre_hook(record) for m in decoder.modules() if isinstance(m, nn.Linear | Conv1D)]
    try:
        with eval_mode(policy), torch.enable_grad():
            through_head = policy(tree, lambda hidden, head: hidden.requires_grad)
    finally:
        for handle in handles:
            handle.remove()
    return found, through_head


def _one_tree(policy: Policy | RewardModel) -> Tree:
    calls = ([[0, 0]], [(0, [0, 0])])
    return pack(*calls) if policy.shares_prompts else separate_rows(*calls, pad_token_id=0)


def _one_row() -> Tree:
    """Of tokens without values: the mask's four dimensions say that it needs no look at them."""
    ids, row = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    return Tree(ids, ids, None, mask, row, row, row, num_tokens=3, num_attended=causal(3))


def _check_complete(policy: Policy | RewardModel, linears: list[_Linear]) -> None:
    """Refuse a decoder with weights that multiply elsewhere than in a linear layer, such as fused experts."""
    decoder = policy.base.get_decoder()
    known = {linear.weight for linear in linears}
    known |= {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in decoder.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known:
            raise UncountedError(f"{name} {tuple(parameter.shape)} is no linear layer's weight")


def _layers(policy: Policy | RewardModel) -> list[nn.Module]:
    return list(decoder_layers(policy.base.get_decoder()) or [])


def _head_weights(head: Head | nn.Module) -> Sequence[Tensor]:
    """Every matrix of the head, the model's own first."""
    if isinstance(head, nn.Module):
        return [p for p in head.parameters() if p.ndim == 2][-1:]
    return [head.weight, *([head.lora.A, head.lora.B] if head.lora is not None else [])]
