"""The policy, its frozen reference and their LM head, as the loss sees them.

All log-probabilities are computed inside :meth:`Policy.forward`, so that a sharding wrapper's hooks see every
use of a parameter, the head's included. The reference costs what it must and no more: LoRA's is the model with
its adapter off, any other one a frozen copy of just the trained parameters, put in their place for a call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_kernels.head import LMHead, LoRA
from hypo_train.tree import Tree

T = TypeVar("T")


class ModelError(ValueError):
    """The model cannot be loaded, or cannot be trained exactly here."""


@dataclass(frozen=True)
class Head(LMHead):
    """The model's LM head, and the update that an adapter on it makes: none while the adapter is off."""

    lora: LoRA | None = None


# What is asked of the hidden states (T, D) that predict a tree's targets, and of the head above them.
HeadFunction = Callable[[Tensor, Head], T]


class Policy(nn.Module):
    """A causal language model as the loss sees it: trees in, head-level results out."""

    def __init__(self, model: Any, *, is_peft: bool, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.is_peft = is_peft
        self.temperature = temperature
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        # Copies of the trained parameters alone; without an entry for LoRA, whose adapter can be switched off.
        self.reference_parameters = {} if is_peft else {name: p.detach().clone() for name, p in trained.items()}
        self._reference_dropped = False

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if self.is_peft else self.model

    def head(self) -> Head:
        """The LM head with the live weights; for use inside ``forward``."""
        linear, config = self.base.get_output_embeddings(), self.base.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        return Head(
            weight=linear.weight,  # an adapted layer's is its frozen base's
            bias=linear.bias,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
            temperature=self.temperature,
            lora=_active_lora(linear) if hasattr(linear, "lora_A") else None,
        )

    def forward(self, tree: Tree, function: HeadFunction[T]) -> T:
        """``function(hidden (T, D), head)`` of the rows that predict the tree's targets."""
        hidden = self.base.get_decoder()(
            input_ids=tree.input_ids,
            position_ids=tree.position_ids,
            attention_mask=self._mask(tree),
            use_cache=False,
        ).last_hidden_state
        # Indexing, not index_select: its backward adds a prompt's several gradients in a fixed order on CUDA.
        return function(hidden.flatten(0, 1)[tree.rows], self.head())

    def _mask(self, tree: Tree) -> Tensor:
        """The prefix mask as the model's attention takes it: eager attention adds it to the scores."""
        if self.base.config._attn_implementation != "eager":
            return tree.attention_mask
        dtype = self.base.get_input_embeddings().weight.dtype
        scores = torch.zeros_like(tree.attention_mask, dtype=dtype)
        return scores.masked_fill(~tree.attention_mask, torch.finfo(dtype).min)

    @torch.no_grad()
    def reference(self, tree: Tree, function: HeadFunction[T]) -> T:
        """The same of the reference model: frozen, without dropout."""
        if self._reference_dropped:
            raise RuntimeError("the reference was dropped, and is asked for")
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with self.model.disable_adapter() if self.is_peft else nullcontext():
                return functional_call(self, self.reference_parameters, (tree, function))
        finally:
            for module, training in modes.items():
                module.training = training

    def reference_to(self, device: torch.device) -> None:
        """Move the reference's parameters, which are no module's own, to ``device``."""
        self.reference_parameters = {name: p.to(device) for name, p in self.reference_parameters.items()}

    def drop_reference(self) -> None:
        """Free the reference's parameters, when nothing asks for them any more."""
        self.reference_parameters = {}
        self._reference_dropped = True

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, folder: Path) -> None:
        """Weights (LoRA: the adapter) that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        # Beside an adapter on the head, peft would save the frozen head and embedding in full.
        self.model.save_pretrained(folder, **({"save_embedding_layers": False} if self.is_peft else {}))


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


def first_line(error: BaseException) -> str:
    """What went wrong, without the page of advice that libraries add."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
