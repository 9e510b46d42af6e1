"""A model that runs trees: hidden states of prompts and branches, under a head that its kind of model has.

Everything is computed inside :meth:`TreeModel.forward`, so that a sharding wrapper's hooks see every use of a
parameter, the head's included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from hypo_train.distributed.fsdp import Spread, is_sharded, local, shard, unsharded, whole
from hypo_train.distributed.vocab_parallel import VocabParts, processes_without_a_part
from hypo_train.model.trunk import decoder_layers, frozen_layers, joined, kept_trunk, replayed_trunk, run_trunk
from hypo_train.optim import Role, parameter_roles
from hypo_train.trees.attention import NAME, KeyValues, Part, decoder_inputs
from hypo_train.trees.tree import Tree

T = TypeVar("T")
H = TypeVar("H")  # what the kind of model has above its hidden states


class ModelError(ValueError):
    """The model cannot be loaded, or cannot be trained exactly here."""


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


class TreeModel(nn.Module, ABC, Generic[H]):
    """A transformers model as a loss sees it: trees in, head-level results out."""

    def __init__(self, model: Any, *, is_peft: bool) -> None:
        super().__init__()
        self.model = model
        self.is_peft = is_peft
        self.why_separate_rows: str | None = None  # None: the model runs trees
        self.vocab_parts: VocabParts | None = None  # embedding and LM head, where no pass puts them together
        # What nothing below is trained of, and other passes can share. LoRA's layers all are.
        self.trunk_layers = [] if is_peft else frozen_layers(self.base.get_decoder())

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if self.is_peft else self.model

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for all of its completions."""
        return self.why_separate_rows is None

    @abstractmethod
    def head(self) -> H:
        """What is above the hidden states, with the live weights; for use inside ``forward``."""

    def shard(self, device: torch.device, *, autocast: bool, vocab_parallel: bool = False) -> None:
        """Spread the first process's weights over all.

        ``vocab_parallel``: embedding and LM head are computed with in parts, see :mod:`.vocab_parallel`.

        Raises:
            ModelError: the model has no list of layers; or no part of its vocabulary for each process.
        """
        layers = decoder_layers(self.base.get_decoder())
        if layers is None:
            raise ModelError(f"fsdp: {type(self.base).__name__} has no list of layers to shard by, leave fsdp out")
        spread = Spread.over_all(device, autocast=autocast)
        if vocab_parallel:
            self.vocab_parts = self._in_parts(spread)
        shard(self, layers, spread)
        # What is trained, and in which dtype, FSDP takes from the first pass: a reference's has its adapter frozen.
        self(None, lambda hidden, head: None)

    def _in_parts(self, spread: Spread) -> VocabParts:
        embedding, head = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        adapted = list(head.lora_B.values()) if hasattr(head, "lora_B") else []
        modules = [getattr(module, "base_layer", module) for module in (embedding, head)]
        size, count = min(module.weight.shape[0] for module in modules), spread.mesh.size()
        if idle := processes_without_a_part(size, count):
            raise ModelError(
                f"vocab_parallel: {idle} of {count} processes would have no part of a vocabulary of {size}, start fewer"
            )
        return VocabParts(modules[0], [modules[1], *adapted], spread)

    def whole_state(self) -> dict[str, Tensor] | None:
        """Weights by the name that the model has for them, put together on the CPU, a tied one once; None: they are not
        sharded."""
        if not is_sharded(self):
            return None
        state = self.model.state_dict()
        once = {local(tensor).data_ptr(): tensor for tensor in state.values()}
        together = {place: whole(tensor.detach()).cpu() for place, tensor in once.items()}
        return {name: together[local(tensor).data_ptr()] for name, tensor in state.items()}

    def inside(self, function: Callable[[], T]) -> T:
        """``function()`` where it may read every weight, sharded or not, and run layers as often as it likes."""
        if not is_sharded(self):
            return function()

        def with_all(hidden: Tensor, head: H) -> T:
            with unsharded(self), nullcontext() if self.vocab_parts is None else self.vocab_parts.together():
                return function()

        found: T = self(None, with_all)
        return found

    def forward(
        self,
        tree: Tree | None,
        function: Callable[[Tensor, H], T],
        *,
        prompts: PromptPass | None = None,
        trunk: Trunk | None = None,
    ) -> T:
        """``function(hidden (T, D), head)`` of the rows that predict the tree's targets.

        What has run already is gone on from: ``prompts`` (:meth:`run_prompts` on the tree's prompts), ``trunk``.
        No tree: no layer runs, and there is no row.
        """
        if tree is None:
            return function(torch.empty(0), self.head())
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

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def parameter_roles(self) -> dict[str, Role]:
        """What each parameter does, as far as an optimizer asks."""
        return parameter_roles(self, getattr(self.base, "score", None) or self.base.get_output_embeddings())

    @abstractmethod
    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Weights that the transformers class of its kind loads with ``from_pretrained(folder)``.

        ``state``: :meth:`whole_state`, which all processes have to ask for.
        """


def _branches(tree: Tree, prompts: PromptPass) -> Part:
    if tree.layout is None:
        raise ValueError("separate rows cannot go on from their prompts")
    return Part(tree.layout, has_prompts=False, prompt=prompts.key_values)


def first_line(error: BaseException) -> str:
    """What went wrong, without the page of advice that libraries add."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # and the next one says it
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__
