"""The policy, its frozen reference and their LM head, as the loss sees them.

All log-probabilities are computed inside :meth:`Policy.forward`, so that a sharding wrapper's hooks see every
use of a parameter, the head's included. The reference costs what it must and no more: LoRA's is the model with
its adapter off, any other one a frozen copy of just the trained parameters, put in their place for a call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_kernels.head import LMHead, LoRA
from hypo_train.model.mode import eval_mode
from hypo_train.model.trunk import frozen_layers, joined, kept_trunk, replayed_trunk, run_trunk
from hypo_train.trees.attention import NAME, KeyValues, Part, decoder_inputs
from hypo_train.trees.tree import Tree

T = TypeVar("T")


class ModelError(ValueError):
    """The model cannot be loaded, or cannot be trained exactly here."""


@dataclass(frozen=True)
class Head(LMHead):
    """The model's LM head, and the update that an adapter on it makes: none while the adapter is off."""

    lora: LoRA | None = None

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """fp32 (T, V) of hidden states (T, D), before the temperature."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = (hidden.to(self.weight.dtype) @ self.weight.t()).float()
            if self.lora is not None:
                raw += self.lora.scale * (hidden.float() @ self.lora.A.float().t() @ self.lora.B.float().t())
            return replace(self, temperature=1.0).logits(raw)


# What is asked of the hidden states (T, D) that predict a tree's targets, and of the head above them.
HeadFunction = Callable[[Tensor, Head], T]


@dataclass(frozen=True)
class PromptPass:
    """A tree's prompts, run through the policy with gradients: what its branches and its samples go on from."""

    hidden: Tensor  # (1, N, D)
    key_values: KeyValues
    trunk: Any  # the last frozen layer's output, where layers are frozen
    lengths: tuple[int, ...]  # of the P prompts

    def last_hidden(self) -> Tensor:
        """(P, D) of each prompt's last token."""
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        return self.hidden[0][ends.to(self.hidden.device, non_blocking=True)]

    def mask(self) -> Tensor:
        """bool (P, L), True at a prompt's own tokens, which come first in its row."""
        mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        return mask.to(self.hidden.device, non_blocking=True)

    def padded_key_values(self) -> list[tuple[Tensor, Tensor]]:
        """A layer's keys and values, (P, H_kv, L, D_head) each, a row a prompt; layers in their order."""
        lengths = torch.tensor(self.lengths)
        within = torch.arange(max(self.lengths)).minimum(lengths.unsqueeze(1) - 1)  # padding repeats the last token
        place = ((lengths.cumsum(0) - lengths).unsqueeze(1) + within).to(self.hidden.device, non_blocking=True)
        return [
            (keys[0][:, place].transpose(0, 1), values[0][:, place].transpose(0, 1))
            for _, (keys, values) in sorted(self.key_values.items())
        ]


@dataclass(frozen=True)
class Trunk:
    """The last frozen layer's output: for the whole tree, and for its branches where those ran alone."""

    whole: Any
    branches: Any = None


class Policy(nn.Module):
    """A causal language model as the loss sees it: trees in, head-level results out."""

    def __init__(self, model: Any, *, is_peft: bool, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.is_peft = is_peft
        self.temperature = temperature
        self.why_separate_rows: str | None = None  # None: the model trains on trees
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        # What the reference shares with the policy and runs once for both. LoRA's reference shares no layer's output.
        self.trunk_layers = [] if is_peft else frozen_layers(self.base.get_decoder())
        # Copies of the trained parameters alone; without an entry for LoRA, whose adapter can be switched off.
        self.reference_parameters = {} if is_peft else {name: p.detach().clone() for name, p in trained.items()}
        self._reference_dropped = False

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if self.is_peft else self.model

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all of its completions."""
        return self.why_separate_rows is None

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

    def forward(
        self,
        tree: Tree,
        function: HeadFunction[T],
        *,
        prompts: PromptPass | None = None,
        trunk: Trunk | None = None,
    ) -> T:
        """``function(hidden (T, D), head)`` of the rows that predict the tree's targets.

        What has run already is gone on from: ``prompts`` (:meth:`run_prompts` on the tree's prompts), ``trunk``.
        """
        if prompts is None:
            hidden = self._decode(tree, Part(tree.layout) if tree.layout else None, trunk and trunk.whole)
        else:
            branches = self._decode(tree, _branches(tree, prompts), trunk and trunk.branches)
            hidden = torch.cat([prompts.hidden, branches], dim=1)
        # Indexing, not index_select: its backward adds a prompt's several gradients in a fixed order on CUDA.
        return function(hidden.flatten(0, 1)[tree.rows], self.head())

    def run_prompts(self, tree: Tree) -> PromptPass:
        """The tree's prompts alone, with gradients, for :meth:`forward` to go on from."""
        if tree.layout is None:
            raise ValueError("separate rows have no prompts to run alone")
        kept: KeyValues = {}
        with kept_trunk(self.trunk_layers) as outputs:
            hidden = self._decode(tree, Part(tree.layout, has_branches=False, kept=kept))
        return PromptPass(hidden, kept, outputs[0] if outputs else None, tree.layout.prompts)

    @torch.no_grad()
    def run_trunk(self, tree: Tree, prompts: PromptPass | None = None) -> Trunk | None:
        """The frozen layers below the trained ones on the tree, for policy and reference; None if there are none."""
        if not self.trunk_layers:
            return None
        if prompts is None:
            part = Part(tree.layout) if tree.layout else None
            return Trunk(run_trunk(self.trunk_layers, lambda: self._decode(tree, part)))
        part = _branches(tree, prompts)
        branches = run_trunk(self.trunk_layers, lambda: self._decode(tree, part))
        return Trunk(joined(prompts.trunk, branches), branches)

    def _decode(self, tree: Tree, part: Part | None, trunk: Any = None) -> Tensor:
        """(R, N, D) final hidden states of a part of the tree's tokens (None: of separate rows)."""
        device = tree.input_ids.device
        which = slice(None)
        if part is None:
            attention = {"attention_mask": tree.attention_mask}
        elif self.base.config._attn_implementation != NAME:  # which would attend to the row as to one text
            raise ValueError(f"{self.base.config._attn_implementation} attention takes no trees: use separate rows")
        else:
            which, attention = part.tokens, decoder_inputs(part, device)
        with replayed_trunk(self.trunk_layers, trunk) if trunk is not None else nullcontext():
            return self.base.get_decoder()(
                input_ids=tree.input_ids[:, which],
                position_ids=tree.position_ids[:, which],
                use_cache=False,
                **attention,
            ).last_hidden_state

    @torch.no_grad()
    def reference(self, tree: Tree, function: HeadFunction[T], *, trunk: Trunk | None = None) -> T:
        """The same of the reference model: frozen, without dropout."""
        if self._reference_dropped:
            raise RuntimeError("the reference was dropped, and is asked for")
        with eval_mode(self), self.model.disable_adapter() if self.is_peft else nullcontext():
            return functional_call(self, self.reference_parameters, (tree, function), {"trunk": trunk})

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


def _branches(tree: Tree, prompts: PromptPass) -> Part:
    if tree.layout is None:
        raise ValueError("separate rows cannot go on from their prompts")
    return Part(tree.layout, has_prompts=False, prompt=prompts.key_values)


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
