"""A transformers model that runs trees of prompts and branches, and gives their hidden states to a head.

Everything is computed inside :meth:`TreeModel.forward`, so that FSDP's hooks see every use of a parameter, the head's
included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from hypo_train.distributed.fsdp import Sharding, full_tensor, is_sharded, local, shard, unsharded
from hypo_train.distributed.vocab_parallel import VocabShards, ranks_without_a_shard
from hypo_train.model.router_loss import RouterLogits, concatenated_logits, router_loss, rows_of_tokens
from hypo_train.model.text_parts import decoder_of
from hypo_train.model.trunk import concatenated, decoder_layers, frozen_layers, kept_trunk, replayed_trunk, run_trunk
from hypo_train.model.windows import layer_windows
from hypo_train.optim import Role, parameter_roles
from hypo_train.trees.attention import NAME, KeyValues, Part, decoder_inputs
from hypo_train.trees.tree import Tree

T = TypeVar("T")
H = TypeVar("H")  # the head: an LM head or a score


class ModelError(ValueError):
    """The model cannot be loaded, or cannot be trained exactly here."""


@dataclass(frozen=True)
class PromptPass:
    """A forward pass of a tree's prompts, with gradients, which its branches and its samples continue."""

    hidden: Tensor  # (1, N, D), of at least the P prompts
    key_values: KeyValues
    trunk: Any  # the last frozen layer's output, if layers are frozen
    lengths: tuple[int, ...]  # of the P prompts
    router_logits: RouterLogits = ()  # if the model adds its routers' loss

    def first(self, count: int) -> PromptPass:
        """Return the pass of the first ``count`` prompts; its hidden states, keys and values keep all tokens."""
        return replace(self, lengths=self.lengths[:count])

    def last_hidden(self) -> Tensor:
        """Return the hidden state of each prompt's last token, (P, D)."""
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        return self.hidden[0][ends.to(self.hidden.device, non_blocking=True)]

    def mask(self) -> Tensor:
        """Return a mask (P, L) of the prompts padded on the right: True at tokens, False at padding."""
        mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        return mask.to(self.hidden.device, non_blocking=True)

    def padded_key_values(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of each layer, in order, (P, H_kv, L, D_head) each: one row a prompt."""
        lengths = torch.tensor(self.lengths)
        within = torch.arange(max(self.lengths)).minimum(lengths.unsqueeze(1) - 1)  # padding repeats the last token
        tokens = ((lengths.cumsum(0) - lengths).unsqueeze(1) + within).to(self.hidden.device, non_blocking=True)
        return [
            (keys[0][:, tokens].transpose(0, 1), values[0][:, tokens].transpose(0, 1))
            for _, (keys, values) in sorted(self.key_values.items())
        ]


@dataclass(frozen=True)
class Trunk:
    """The last frozen layer's output: for a tree's tokens, and for its branches alone if those ran alone."""

    tree: Any
    branches: Any = None


class TreeModel(nn.Module, ABC, Generic[H]):
    """A transformers model that runs trees and applies functions to their hidden states and its head."""

    def __init__(self, model: Any, *, is_peft: bool, router_aux_loss_coef: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.is_peft = is_peft
        self.router_aux_loss_coef = router_aux_loss_coef  # weight of the routers' loss; 0: it is not computed
        self.why_separate_rows: str | None = None  # None: the model runs trees
        self.vocab_shards: VocabShards | None = None  # None: the embedding and the LM head are not vocabulary-parallel
        # The frozen layers below every trained one, which policy and reference share. LoRA trains all layers.
        # The routers' loss is one of all layers.
        has_trunk = not is_peft and not router_aux_loss_coef
        self.trunk_layers = frozen_layers(decoder_of(self.base)) if has_trunk else []

    @property
    def base(self) -> Any:
        """Return the transformers model without peft's wrapper."""
        return self.model.get_base_model() if self.is_peft else self.model

    @property
    def windows(self) -> list[int | None] | None:
        """Return each layer's sliding window, None for a layer without one; None if a layer has other attention."""
        try:
            return layer_windows(self.base.config)
        except ValueError:
            return None

    @property
    def shares_prompts(self) -> bool:
        """Return whether a prompt is computed once for all of its completions."""
        return self.why_separate_rows is None

    @abstractmethod
    def head(self) -> H:
        """Return the head with the live weights, for use inside ``forward``."""

    def shard(self, device: torch.device, *, autocast: bool, vocab_parallel: bool = False) -> None:
        """Shard rank 0's weights over all ranks.

        Args:
            vocab_parallel: split embedding and LM head by the vocabulary, see :mod:`.vocab_parallel`.

        Raises:
            ModelError: the model has no list of layers, or the vocabulary is too small for the number of ranks.
        """
        layers = decoder_layers(decoder_of(self.base))
        if layers is None:
            raise ModelError(f"fsdp: {type(self.base).__name__} has no list of layers to shard by, leave fsdp out")
        sharding = Sharding.over_all_ranks(device, autocast=autocast)
        if vocab_parallel:
            self.vocab_shards = self._vocab_shards(sharding)
        shard(self, layers, sharding)
        # FSDP reads at its first pass what is trained and in which dtype. A reference's pass, where the adapter is
        # frozen, must not be the first.
        self(None, lambda hidden, head: None)

    def _vocab_shards(self, sharding: Sharding) -> VocabShards:
        embedding, head = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        adapted = list(head.lora_B.values()) if hasattr(head, "lora_B") else []
        modules = [getattr(module, "base_layer", module) for module in (embedding, head)]
        size, count = min(module.weight.shape[0] for module in modules), sharding.mesh.size()
        if idle := ranks_without_a_shard(size, count):
            raise ModelError(
                f"vocab_parallel: {idle} of {count} processes would have no part of a vocabulary of {size}, start fewer"
            )
        return VocabShards(modules[0], [modules[1], *adapted], sharding)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Gather sharded weights on the CPU, by the model's names for them; None if they are not sharded.

        A tied weight is gathered once.
        """
        if not is_sharded(self):
            return None
        state = self.model.state_dict()
        distinct = {local(tensor).data_ptr(): tensor for tensor in state.values()}
        gathered = {address: full_tensor(tensor.detach()).cpu() for address, tensor in distinct.items()}
        return {name: gathered[local(tensor).data_ptr()] for name, tensor in state.items()}

    def with_full_weights(self, function: Callable[[], T]) -> T:
        """Return ``function()``, called where every weight is full and layers may run any number of times."""
        if not is_sharded(self):
            return function()

        def call(hidden: Tensor, head: H) -> T:
            with unsharded(self), nullcontext() if self.vocab_shards is None else self.vocab_shards.gathered():
                return function()

        result: T = self(None, call)
        return result

    def forward(
        self,
        tree: Tree | None,
        function: Callable[[Tensor, H], T],
        *,
        prompts: PromptPass | None = None,
        trunk: Trunk | None = None,
        with_aux_loss: bool = False,
    ) -> T | tuple[T, Tensor]:
        """Return ``function(hidden, head)``, with the hidden states (T, D) that predict the tree's targets.

        Args:
            tree: None runs no layer: ``hidden`` is then empty.
            prompts: what :meth:`run_prompts` returned for the tree; the pass continues it.
            trunk: what :meth:`run_trunk` returned for the tree; the pass starts above the frozen layers.
            with_aux_loss: also return the load-balancing loss () of the routers, without its coefficient.
        """
        if tree is None:
            return function(torch.empty(0), self.head())
        if prompts is None:
            hidden, router_logits = self._decode(tree, self._whole(tree), trunk and trunk.tree, with_aux_loss)
        else:
            branches, branch_logits = self._decode(
                tree, self._branches(tree, prompts), trunk and trunk.branches, with_aux_loss
            )
            hidden = torch.cat([prompts.hidden, branches], dim=1)
            router_logits = concatenated_logits(prompts.router_logits, branch_logits)
        # Indexing, not index_select: its backward adds a prompt's several gradients in a fixed order on CUDA.
        result = function(hidden.flatten(0, 1)[tree.rows], self.head())
        if not with_aux_loss:
            return result
        return result, router_loss(self.base, router_logits, _rows_of_tokens(tree))

    def run_prompts(self, tree: Tree) -> PromptPass:
        """Run the tree's prompts alone, with gradients, for :meth:`forward` to continue."""
        if tree.layout is None:
            raise ValueError("separate rows have no prompts to run alone")
        key_values: KeyValues = {}
        with kept_trunk(self.trunk_layers) as outputs:
            part = Part(tree.layout, has_branches=False, kept=key_values, windows=self.windows or ())
            hidden, router_logits = self._decode(tree, part, with_router_logits=self.router_aux_loss_coef > 0)
        return PromptPass(hidden, key_values, outputs[0] if outputs else None, tree.layout.prompts, router_logits)

    @torch.no_grad()
    def run_trunk(self, tree: Tree, prompts: PromptPass | None = None) -> Trunk | None:
        """Run the frozen layers below the trained ones, for policy and reference; None if there are none."""
        if not self.trunk_layers:
            return None
        if prompts is None:
            whole = self._whole(tree)
            return Trunk(run_trunk(self.trunk_layers, lambda: self._decode(tree, whole)))
        part = self._branches(tree, prompts)
        branches = run_trunk(self.trunk_layers, lambda: self._decode(tree, part))
        return Trunk(concatenated(prompts.trunk, branches), branches)

    def _decode(
        self, tree: Tree, part: Part | None, trunk: Any = None, with_router_logits: bool = False
    ) -> tuple[Tensor, RouterLogits]:
        """Return final hidden states (R, N, D) of a part of the tree's tokens, or of separate rows if it is None.

        The router logits are empty unless they are asked for.
        """
        device = tree.input_ids.device
        tokens = slice(None)
        if part is None:
            attention = {"attention_mask": tree.attention_mask}
        elif self.base.config._attn_implementation != NAME:  # it would treat the row as one text
            raise ValueError(f"{self.base.config._attn_implementation} attention takes no trees: use separate rows")
        else:
            tokens, attention = part.tokens, decoder_inputs(part, device)
        with replayed_trunk(self.trunk_layers, trunk) if trunk is not None else nullcontext():
            outputs = decoder_of(self.base)(
                input_ids=tree.input_ids[:, tokens],
                position_ids=tree.position_ids[:, tokens],
                use_cache=False,
                **attention,
                **({"output_router_logits": True} if with_router_logits else {}),
            )
        return outputs.last_hidden_state, outputs.router_logits if with_router_logits else ()

    def _whole(self, tree: Tree) -> Part | None:
        return Part(tree.layout, windows=self.windows or ()) if tree.layout else None

    def _branches(self, tree: Tree, prompts: PromptPass) -> Part:
        if tree.layout is None:
            raise ValueError("separate rows cannot continue a pass of their prompts")
        return Part(tree.layout, has_prompts=False, prompt=prompts.key_values, windows=self.windows or ())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def parameter_roles(self) -> dict[str, Role]:
        """Return the role of each parameter, by which optimizers treat it."""
        return parameter_roles(self, getattr(self.base, "score", None) or self.base.get_output_embeddings())

    @abstractmethod
    def save_pretrained(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save weights that the model's transformers class loads with ``from_pretrained(folder)``.

        Args:
            state: what :meth:`full_state_dict` returned; all ranks must have called it.
        """


def _rows_of_tokens(tree: Tree) -> Tensor:
    if tree.layout is not None:
        return rows_of_tokens(tree.layout, tree.input_ids.device)
    assert tree.attention_mask is not None
    return tree.attention_mask.long()


def first_line(error: BaseException) -> str:
    """Return an error's message without the page of advice that libraries add."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # the next line says what is wrong
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__
