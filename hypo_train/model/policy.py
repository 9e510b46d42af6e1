"""The policy, its frozen reference and their LM head, in the form that the loss uses.

A reference needs little memory. Under LoRA it is the model with its adapter off. Otherwise it is a frozen copy of the
trained parameters alone, which replaces them for the length of a call.
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
from hypo_train.distributed.exchange import RowExchange
from hypo_train.distributed.fsdp import is_sharded, local, swapped_parameters
from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.tree_model import ModelError, TreeModel, Trunk
from hypo_train.trees.tree import Tree

T = TypeVar("T")


@dataclass(frozen=True)
class Head(LMHead):
    """The model's LM head, and the update that an active adapter makes on it.

    With ``exchange``, its tensors are this rank's ``vocab_shard``, while every rank has hidden states of its own;
    functions of it must then be a :class:`hypo_train.model.head_call.HeadCall`.
    """

    exchange: RowExchange | None = None

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Return the fp32 logits (T, V) of hidden states (T, D), before the temperature."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = (hidden.to(self.weight.dtype) @ self.weight.t()).float()
            if self.lora is not None:
                raw += self.lora.scale * (hidden.float() @ self.lora.A.float().t() @ self.lora.B.float().t())
            return replace(self, temperature=1.0).logits(raw)


# A function of the hidden states (T, D) that predict a tree's targets, and of the LM head.
HeadFunction = Callable[[Tensor, Head], T]


class Policy(TreeModel[Head]):
    """A causal language model, and the reference that its training starts from."""

    def __init__(
        self,
        model: Any,
        *,
        is_peft: bool,
        temperature: float = 1.0,
        has_reference: bool = True,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__(model, is_peft=is_peft, router_aux_loss_coef=router_aux_loss_coef)
        self.temperature = temperature
        # Copies of the trained parameters alone; without an entry for LoRA, whose adapter can be switched off.
        trained = {} if is_peft or not has_reference else self.trained_parameters()
        self.reference_parameters = {name: p.detach().clone() for name, p in trained.items()}
        self._has_reference = has_reference

    def head(self) -> Head:
        """Return the LM head with the live weights, for use inside ``forward``."""
        linear, config = active_module(self.base.get_output_embeddings()), self.base.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        lora = _active_lora(linear) if hasattr(linear, "lora_A") else None
        shards = self.vocab_shards
        if shards is not None and lora is not None:
            lora = lora._replace(B=local(lora.B))
        return Head(
            # An adapted layer's weight is that of its frozen base.
            weight=linear.weight if shards is None else local(linear.weight),
            bias=linear.bias if shards is None or linear.bias is None else local(linear.bias),
            # RecurrentGemma has another name for it.
            logit_softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
            logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
            temperature=self.temperature,
            lora=lora,
            vocab_shard=None if shards is None else shards.shard,
            exchange=None if shards is None else shards.exchange,
        )

    @torch.no_grad()
    def reference(self, tree: Tree, function: HeadFunction[T], *, trunk: Trunk | None = None) -> T:
        """Evaluate ``function`` on the frozen reference model, in eval mode. Arguments are those of ``forward``."""
        if not self._has_reference:
            raise RuntimeError("the reference was dropped, or never kept")
        with eval_mode(self), self.model.disable_adapter() if self.is_peft else nullcontext():
            if is_sharded(self):  # its layers gather their own parameters, whatever functional_call passes
                with self._reference_swapped_in():
                    result: T = self(tree, function, trunk=trunk)
                    return result
            return functional_call(self, self.reference_parameters, (tree, function), {"trunk": trunk})

    @contextmanager
    def _reference_swapped_in(self) -> Iterator[None]:
        """Run a block of a sharded model with the reference's parameters in place of the policy's."""
        parameters = dict(self.named_parameters())
        in_vocab = set() if self.vocab_shards is None else set(self.vocab_shards.parameters)
        layer_copies = {n: p for n, p in self.reference_parameters.items() if parameters[n] not in in_vocab}
        vocab_copies = {parameters[n]: p for n, p in self.reference_parameters.items() if parameters[n] in in_vocab}
        with (
            swapped_parameters(self, layer_copies),
            nullcontext() if self.vocab_shards is None else self.vocab_shards.replaced(vocab_copies),
        ):
            yield

    def reference_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias of the reference's LM head, or None where they are the policy's own.

        Sharded weights are DTensors, or this rank's shard of the vocabulary.
        """
        linear = self.base.get_output_embeddings()
        if (original := getattr(linear, "original_module", None)) is not None:  # peft trains a copy of it
            return original.weight, original.bias
        linear = getattr(linear, "base_layer", linear)
        copies = {id(p): self.reference_parameters.get(name) for name, p in self.named_parameters()}
        weight, bias = copies[id(linear.weight)], copies.get(id(linear.bias))
        if weight is not None and bias is None:  # a frozen bias goes with the copied weight
            bias = linear.bias
        if self.vocab_shards is None:
            return weight, bias
        return None if weight is None else local(weight), None if bias is None else local(bias)

    def shard(self, device: torch.device, *, autocast: bool, vocab_parallel: bool = False) -> None:
        """Shard policy and reference, before training has changed the policy. See ``TreeModel.shard``."""
        super().shard(device, autocast=autocast, vocab_parallel=vocab_parallel)
        trained = self.trained_parameters()
        self.reference_parameters = {name: trained[name].detach().clone() for name in self.reference_parameters}

    def move_reference(self, device: torch.device) -> None:
        """Move the reference's parameters, which no module holds, to ``device``; sharded ones stay."""
        if is_sharded(self):
            return
        self.reference_parameters = {name: p.to(device) for name, p in self.reference_parameters.items()}

    def drop_reference(self) -> None:
        """Free the reference's parameters, when nothing needs them any more."""
        self.reference_parameters = {}
        self._has_reference = False

    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save weights (LoRA: the adapter) that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        # With an adapter on the head, peft would also save the full frozen head and embedding.
        options = {"save_embedding_layers": False} if self.is_peft else {}
        self.model.save_pretrained(folder, state_dict=state, **options)


def active_module(module: Any) -> Any:
    """Return the module that computes: in the place of a ``modules_to_save``, the trained copy or the original."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    names = [name for name in module.active_adapters if name in copies]
    return copies[names[0]] if names and not module.disable_adapters else module.original_module


def _active_lora(layer: Any) -> LoRA | None:
    """Return the active update of peft's ``lora.Linear``. Raise ModelError if it is more than scale·B·A."""
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
