"""Count model FLOPs of a step: those of its matrix products, whichever kernels compute them.

A multiply-add is two FLOPs. A linear layer of n weights costs 2 n FLOPs a token forward. Backward it costs 2 n for the
weights' gradient if they are trained, and 2 n for the input's gradient if a layer below is trained. Attention costs
4 D_head a head for each pair of a token and a token that it attends to (itself included; causal, so half a square, and
within the layer's sliding window), and twice that backward. The LM head runs only on the tokens of completions.

Not counted, as is usual: norms, activations, rotary embeddings, softmax, the optimizer, and recomputation (gradient
checkpointing, a second pass over the head). Shared work counts once: a prompt for all of its completions, frozen
layers for policy and reference.

This module computes FLOPs from lengths. ``torch.utils.flop_counter`` counts a pass while it runs, includes padding and
misses 4-bit layers and custom kernels, so only the tests of this module use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.meta_pass import fake_weights
from hypo_train.model.policy import Head, Policy
from hypo_train.model.quantization import num_elements
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.text_parts import decoder_of
from hypo_train.model.trunk import decoder_layers
from hypo_train.trees.layout import Layout, causal_pairs
from hypo_train.trees.pack import pack, separate_rows
from hypo_train.trees.tree import Tree

Tokens = Sequence[Sequence[int]]


class Size(NamedTuple):
    """The size of a forward or backward pass, known on the host."""

    tokens: int  # through the decoder layers, without padding
    attended: Mapping[int | None, int]  # pairs of a token and a token that it attends to, for each sliding window
    rows: int  # tokens through the LM head

    @classmethod
    def of(cls, tree: Tree, windows: Iterable[int | None] = (None,)) -> Size:
        """Return the size of a pass over ``tree`` of a model whose layers have these sliding windows."""
        return cls(tree.num_tokens, {w: tree.num_attended(w) for w in windows}, len(tree.targets))

    @classmethod
    def of_samples(
        cls, prompts: Tokens, completions: Tokens, windows: Iterable[int | None] = (None,), *, prefill: bool
    ) -> Size:
        """Return the size of sampling ``completions``, the same number of consecutive ones for each prompt.

        ``prefill``: count the pass over the prompts too.
        """
        each = len(completions) // len(prompts)
        # The last token of a completion is not an input.
        inputs = [max(0, len(completion) - 1) for completion in completions]
        branches = tuple(tuple(inputs[i * each : (i + 1) * each]) for i in range(len(prompts)))
        layout = Layout(tuple(map(len, prompts)), branches)
        tokens, attended = layout.num_tokens, {w: layout.num_attended(w) for w in windows}
        if not prefill:
            tokens -= layout.num_prompt_tokens
            attended = {w: pairs - sum(causal_pairs(p, w) for p in layout.prompts) for w, pairs in attended.items()}
        return cls(tokens, attended, sum(map(len, completions)))


class Rates(NamedTuple):
    """FLOPs of a pass for each token, each attended pair and each row of the LM head."""

    token: float
    attended: Mapping[int | None, float]  # of all layers with a sliding window
    row: float

    def of(self, size: Size) -> float:
        """Return the FLOPs of a pass of this size."""
        attention = sum(rate * size.attended[window] for window, rate in self.attended.items())
        return self.token * size.tokens + attention + self.row * size.rows


@dataclass(frozen=True)
class ModelFlops:
    """FLOP rates of the passes of a step. ``rates.of(size)`` gives the FLOPs of a pass."""

    policy: Rates  # without gradients, as in sampling
    backward: Rates
    reference: Rates
    above_trunk: Rates  # reference pass that starts above the frozen layers that it shares with the policy

    @property
    def windows(self) -> list[int | None]:
        """Return the different sliding windows of the model's layers."""
        return list(self.policy.attended)

    @classmethod
    def of_outline(cls, policy: Policy | RewardModel, *, autocast: bool) -> ModelFlops:
        """Count the FLOPs of a model on the meta device. Raises UncountedError as :meth:`of` does."""
        with fake_weights(policy, autocast=autocast):
            return cls.of(policy)

    @classmethod
    def of(cls, policy: Policy | RewardModel) -> ModelFlops:
        """Count the FLOP rates of ``policy`` from its linear layers. Runs the model on a few tokens.

        Raises:
            UncountedError: the model multiplies by weights outside of linear layers.
        """
        linears, through_head = _probe(policy)
        _check_complete(policy, linears)
        config = policy.base.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4.0 * config.num_attention_heads * head_dim
        layers = [id(layer) for layer in _layers(policy)]
        windows = policy.windows or [None]
        if len(windows) != len(layers):  # the layers are not plain attention: taken for full
            windows = [None] * len(layers)

        def attended(chosen: Collection[int | None], flops: float = attention) -> dict[int | None, float]:
            counts = Counter(dict.fromkeys(windows, 0))
            counts.update(window for layer, window in zip(layers, windows, strict=True) if layer in chosen)
            return {window: count * flops for window, count in counts.items()}

        head = _head_weights(policy.head())
        full = sum(linear.flops for linear in linears)
        head_flops = sum(2.0 * weight.numel() for weight in head)
        # With LoRA, the reference is the model with its adapter off.
        adapter = sum(linear.flops for linear in linears if linear.trained) if policy.is_peft else 0.0
        frozen = {id(layer) for layer in policy.trunk_layers}
        trunk = sum(linear.flops for linear in linears if linear.layer in frozen)
        with_gradient = {linear.layer for linear in linears if linear.input_gradient or linear.trained}
        reference = Rates(full - adapter, attended(layers), 2.0 * head[0].numel())
        return cls(
            policy=Rates(full, attended(layers), head_flops),
            backward=Rates(
                sum(linear.flops * (linear.input_gradient + linear.trained) for linear in linears),
                attended(with_gradient.intersection(layers), 2 * attention),
                sum(2.0 * weight.numel() * (through_head + weight.requires_grad) for weight in head),
            ),
            reference=reference,
            above_trunk=reference._replace(
                token=reference.token - trunk, attended=attended([layer for layer in layers if layer not in frozen])
            ),
        )


class UncountedError(ValueError):
    """The FLOPs of a model are not known; the message names the weight or layer."""


class _Linear(NamedTuple):
    weight: int  # its id
    flops: float  # a token, forward
    trained: bool
    input_gradient: bool  # whether the gradient of its input is needed
    layer: int | None  # the id of its decoder layer


def _probe(policy: Policy | RewardModel) -> tuple[list[_Linear], bool]:
    """Run the decoder. Return the linear layers that it calls, and whether the head's input needs a gradient."""
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

    decoder = decoder_of(policy.base)
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
    """Return a tree of three tokens on the meta device. Its 4-D mask keeps transformers from reading token values."""
    ids, row = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    return Tree(ids, ids, None, mask, row, row, row, num_tokens=3, row_lengths=(3,))


def _check_complete(policy: Policy | RewardModel, linears: list[_Linear]) -> None:
    """Raise UncountedError if the decoder has matrices outside of linear layers, such as fused experts."""
    decoder = decoder_of(policy.base)
    counted = {linear.weight for linear in linears}
    counted |= {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in decoder.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in counted:
            raise UncountedError(f"{name} {tuple(parameter.shape)} is not the weight of a linear layer")


def _layers(policy: Policy | RewardModel) -> list[nn.Module]:
    return list(decoder_layers(decoder_of(policy.base)) or [])


def _head_weights(head: Head | nn.Module) -> Sequence[Tensor]:
    """Return all matrices of the head, the LM head's weight first."""
    if isinstance(head, nn.Module):
        return [p for p in head.parameters() if p.ndim == 2][-1:]
    return [head.weight, *([head.lora.A, head.lora.B] if head.lora is not None else [])]
