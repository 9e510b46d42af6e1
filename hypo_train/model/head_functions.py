"""Functions of a tree's hidden states and the LM head that several algorithms use.

Each returns a :class:`HeadCall`, which a policy or its reference model evaluates inside its forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hypo_kernels import HypoLoss, LMHead, fused_preference_loss, sequence_logprobs
from hypo_train.config import Config
from hypo_train.model.head_call import HeadCall
from hypo_train.model.policy import Head
from hypo_train.trees.tree import Tree


def sequence_logprobs_call(tree: Tree, config: Config) -> HeadCall[Tensor]:
    """Return the call that computes the log-prob of each of the tree's sequences, (S,)."""

    def logprobs(hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        return sequence_logprobs(hidden, head.weight, targets, cu_seqlens, **head_options(head, config))

    return HeadCall(logprobs, {"targets": tree.targets, "cu_seqlens": tree.cu_seqlens})


def fused_loss_call(
    tree: Tree, config: Config, rows: Mapping[str, Any], loss_weight: float, **terms: Any
) -> HeadCall[HypoLoss]:
    """Return the call of ``fused_preference_loss`` on a tree.

    Args:
        tree: its sequences are the loss's, in the loss's order.
        config: gives the settings that all algorithms share.
        rows: arguments of the loss that belong to this rank's rows.
        loss_weight: the factor that the caller multiplies the loss with before ``backward``.
        terms: arguments of the loss that an algorithm sets.
    """

    def loss(hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, **rows: Any) -> HypoLoss:
        options = head_options(head, config)
        settings = {name: options.pop(name) for name in ("max_chunk_bytes", "impl")}
        return fused_preference_loss(
            hidden,
            LMHead.of(head.weight, **options),
            targets,
            cu_seqlens,
            num_generations=max(2, config.num_generations),
            length_penalty=config.length_penalty,
            importance_cap=config.importance_cap,
            **settings,
            **rows,
            **terms,
        )

    return HeadCall(loss, {"targets": tree.targets, "cu_seqlens": tree.cu_seqlens, **rows}, loss_weight)


def head_options(head: Head, config: Config) -> dict[str, Any]:
    """Return the keyword arguments that describe ``head`` to a function of ``hypo_kernels``."""
    return {
        "max_chunk_bytes": config.max_chunk_bytes,
        "impl": config.impl,
        "lora": head.lora,
        "vocab_shard": head.vocab_shard,
        **head.constants(),
    }
