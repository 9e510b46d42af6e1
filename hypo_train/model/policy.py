"""The policy, its frozen reference and their LM head, as the loss sees them.

The reference costs what it must and no more: LoRA's is the model with its adapter off, any other one a frozen copy
of just the trained parameters, put in their place for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from hypo_kernels.head import LMHead, LoRA
from hypo_train.distributed.exchange import Exchange
from hypo_train.distributed.fsdp import exchanged, is_sharded, local
from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.tree_model import ModelError, TreeModel, Trunk
from hypo_train.trees.tree import Tree

T = TypeVar("T")


@dataclass(frozen=True)
class Head(LMHead):
    """The model's LM head, and the update that an adapter on it makes: none while the adapter is off.

    With ``exchange`` it is this process's ``vocab_shard``, under hidden states of its own: what is asked of it is a
    :class:`hypo_train.model.head_call.HeadCall`.
    """

    exchange: Exchange | None = None

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """fp32 (T, V) of hidden states (T, D), before the temperature."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = (hidden.to(self.weight.dtype) @ self.weight.t()).float()
            if self.lora is not None:
                raw += self.lora.scale * (hidden.float() @ self.lora.A.float().t() @ self.lora.B.float().t())
            return replace(self, temperature=1.0).logits(raw)


# What is asked of the hidden states (T, D) that predict a tree's targets, and of the head above them.
HeadFunction = Callable[[Tensor, Head], T]


class Policy(TreeModel[Head]):
    """A causal language model as the loss sees it, and the reference it started from."""

    def __init__(self, model: Any, *, is_peft: bool, temperature: float = 1.0) -> None:
        super().__init__(model, is_peft=is_peft)
        self.temperature = temperature
        # Copies of the trained parameters alone; without an entry for LoRA, whose adapter can be switched off.
        trained = self.trained_parameters()
        self.reference_parameters = {} if is_peft else {name: p.detach().clone() for name, p in trained.items()}
        self._reference_dropped = False

    def head(self) -> Head:
        """The LM head with the live weights; for use inside ``forward``."""
        linear, config = self.base.get_output_embeddings(), self.base.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        lora = _active_lora(linear) if hasattr(linear, "lora_A") else None
        parts = self.vocab_parts
        if parts is not None and lora is not None:
            lora = lora._replace(B=local(lora.B))
        return Head(
            # An adapted layer's is its frozen base's.
            weight=linear.weight if parts is None else local(linear.weight),
            bias=linear.bias if parts is None or linear.bias is None else local(linear.bias),
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
            temperature=self.temperature,
            lora=lora,
            vocab_shard=None if parts is None else parts.shard,
            exchange=None if parts is None else parts.exchange,
        )

    @torch.no_grad()
    def reference(self, tree: Tree, function: HeadFunction[T], *, trunk: Trunk | None = None) -> T:
        """The same of the reference model: frozen, without dropout."""
        if self._reference_dropped:
            raise RuntimeError("the reference was dropped, and is asked for")
        with eval_mode(self), self.model.disable_adapter() if self.is_peft else nullcontext():
            if is_sharded(self):  # whose layers put their own parameters together, whatever a call is given
                with self._as_the_reference():
                    found: T = self(tree, function, trunk=trunk)
                    return found
            return functional_call(self, self.reference_parameters, (tree, function), {"trunk": trunk})

    @contextmanager
    def _as_the_reference(self) -> Iterator[None]:
        """The sharded model with the reference's parameters in the place of its own."""
        own = dict(self.named_parameters())
        parts = set() if self.vocab_parts is None else set(self.vocab_parts.parameters)
        of_layers = {name: p for name, p in self.reference_parameters.items() if own[name] not in parts}
        of_parts = {own[name]: p for name, p in self.reference_parameters.items() if own[name] in parts}
        with (
            exchanged(self, of_layers),
            nullcontext() if self.vocab_parts is None else self.vocab_parts.replaced(of_parts),
        ):
            yield

    def reference_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the reference's head for a pass of the policy's; None where they are the policy's own.

        Sharded weights are as the process holds them: DTensors, or its part of the vocabulary.
        """
        linear = self.base.get_output_embeddings()
        linear = getattr(linear, "base_layer", linear)
        copies = {id(p): self.reference_parameters.get(name) for name, p in self.named_parameters()}
        weight, bias = copies[id(linear.weight)], copies.get(id(linear.bias))
        if weight is not None and bias is None:  # a frozen one goes with the weight
            bias = linear.bias
        if self.vocab_parts is None:
            return weight, bias
        return None if weight is None else local(weight), None if bias is None else local(bias)

    def shard(self, device: torch.device, *, autocast: bool, vocab_parallel: bool = False) -> None:
        """See ``TreeModel.shard``: the reference's parameters too, which are still those that training starts from."""
        super().shard(device, autocast=autocast, vocab_parallel=vocab_parallel)
        own = self.trained_parameters()
        self.reference_parameters = {name: own[name].detach().clone() for name in self.reference_parameters}

    def reference_to(self, device: torch.device) -> None:
        """Move the reference's parameters, which are no module's own, to ``device``; sharded, they stay."""
        if is_sharded(self):
            return
        self.reference_parameters = {name: p.to(device) for name, p in self.reference_parameters.items()}

    def drop_reference(self) -> None:
        """Free the reference's parameters, when nothing asks for them any more."""
        self.reference_parameters = {}
        self._reference_dropped = True

    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Weights (LoRA: the adapter) that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        # Beside an adapter on the head, peft would save the frozen head and embedding in full.
        options = {"save_embedding_layers": False} if self.is_peft else {}
        self.model.save_pretrained(folder, state_dict=state, **options)


def _active_lora(layer: Any) -> LoRA | None:
    """What peft's ``lora.Linear`` adds to its base now. Raises ModelError where that is more than scale·B·A."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged:
        raise ModelError("LoRA is merged into the LM head, whose reference is gone: call unmerge_adapter()")
    if layer.disable_adapters or not names:
        return None
    name = names[0]
    if len(names) > 1:
        raise ModelError(f"the adapters {names} are active on the LM head: activate one with set_adapter")
    variant = layer.lora_variant.get(name)
    if variant is not None or layer.lora_bias[name]:
        kind = "lora_bias" if variant is None else type(variant).__name__
        raise ModelError(f"LoRA on the LM head is served in its plain form, not with {kind}: leave the head out")
    if dropout := getattr(layer.lora_dropout[name], "p", 0.0):
        raise ModelError(
            f"lora_dropout={dropout:g} is not served on the LM head: use 0, or leave the head out of "
            "lora_target_modules"
        )
    return LoRA(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
