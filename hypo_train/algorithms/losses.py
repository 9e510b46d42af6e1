"""What the loop asks of the LM head: functions of a tree's hidden states, for ``Policy`` to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hypo_kernels import HypoLoss, fused_hypo_loss, sequence_logprobs, token_logprobs
from hypo_train.config import Config
from hypo_train.model.head_call import HeadCall
from hypo_train.model.policy import Head, HeadFunction, Policy
from hypo_train.model.tree_model import Trunk
from hypo_train.trees.tree import Tree


@dataclass(frozen=True)
class Reference:
    """What a loss knows of the frozen reference: log-probs, or hidden states and the head above them."""

    logps: Tensor | None = None  # (S,)
    hidden: Tensor | None = None  # (T, D)
    weight: Tensor | None = None  # (V, D), where the head is trained: the policy's is another
    bias: Tensor | None = None  # (V,), with it


def sequence_logprobs_of(tree: Tree, config: Config) -> HeadFunction[Tensor]:
    """Log-prob of each of the tree's sequences, (S,)."""

    def logprobs(hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        return sequence_logprobs(hidden, head.weight, targets, cu_seqlens, **_options(head, config))

    return HeadCall(logprobs, {"targets": tree.targets, "cu_seqlens": tree.cu_seqlens})


def reference_of(policy: Policy, tree: Tree, config: Config, *, trunk: Trunk | None = None) -> Reference:
    """What the configured loss has to know: the exact KL needs distributions, any other loss log-probs alone."""
    if config.kl_estimator != "exact":
        return Reference(logps=policy.reference(tree, sequence_logprobs_of(tree, config), trunk=trunk))
    hidden = policy.reference(tree, lambda hidden, head: hidden, trunk=trunk)
    weight, bias = policy.reference_head()
    return Reference(hidden=hidden, weight=weight, bias=bias)


def preference_loss(
    tree: Tree,
    reference: Reference,
    num_pairs: int,
    config: Config,
    behavior_logps: Tensor | None = None,
    *,
    share: float = 1.0,
) -> HeadFunction[HypoLoss]:
    """The configured preference loss of a tree of pairs and samples; ``behavior_logps`` (T,) of an earlier policy,
    ``share`` as :class:`HeadCall` has it."""
    return _fused(
        tree,
        config,
        {
            "num_pairs": num_pairs,
            "ref_logps": reference.logps,
            "ref_hidden": reference.hidden,
            "behavior_logps": behavior_logps,
        },
        share,
        ref_lm_head_weight=reference.weight,
        ref_bias=reference.bias,
        kl_coef=config.kl_coef,
        preference="ipo" if config.algorithm == "ipo" else "sigmoid",
        label_smoothing=config.label_smoothing,
        kl_estimator=config.kl_estimator,
    )


def rloo_loss(
    tree: Tree,
    ref_logps: Tensor,
    rewards: Tensor,
    config: Config,
    behavior_logps: Tensor | None = None,
    *,
    share: float = 1.0,
) -> HeadFunction[HypoLoss]:
    """RLHF's loss on a tree of samples: −(reward − beta · KL), by RLOO (Ahmadian et al. 2024).

    ``ref_logps`` and ``rewards`` are (N,) in the order of the samples. With the tilted reference
    ``π_ref(y|x) · exp(r(x, y) / beta)``, whose logarithm needs no normaliser here, a sample's log-ratio times beta is
    ``beta · ρ − r``: the loss is HyPO's online half with λ = beta. The statistics are those of the reference itself.
    """
    tilt = rewards / config.beta
    own = {"num_pairs": 0, "ref_logps": ref_logps + tilt, "behavior_logps": behavior_logps}
    tilted = _fused(tree, config, own, share, kl_coef=config.beta)

    def loss(hidden: Tensor, head: Head) -> HypoLoss:
        out = tilted(hidden, head)
        return out._replace(ref_logps=ref_logps, kl=out.kl + tilt)

    return loss


def _fused(tree: Tree, config: Config, own: Mapping[str, Any], share: float, **terms: Any) -> HeadFunction[HypoLoss]:
    """``fused_hypo_loss`` of a tree with the configured settings and an algorithm's ``terms``, ``own`` those of the
    tree's rows."""

    def loss(hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, **own: Any) -> HypoLoss:
        return fused_hypo_loss(
            hidden,
            head.weight,
            targets,
            cu_seqlens,
            num_generations=max(2, config.num_generations),
            beta=config.beta,
            length_penalty=config.length_penalty,
            importance_cap=config.importance_cap,
            **_options(head, config),
            **own,
            **terms,
        )

    return HeadCall(loss, {"targets": tree.targets, "cu_seqlens": tree.cu_seqlens, **own}, share)


class TokenLosses(NamedTuple):
    """SFT's loss, and what it is the mean of."""

    loss: Tensor  # ()
    of_tokens: Tensor  # (T,), detached


def token_losses(tree: Tree, config: Config, *, share: float = 1.0) -> HeadFunction[TokenLosses]:
    """Negative log-prob of the counted tokens."""

    def losses(hidden: Tensor, head: Head, targets: Tensor) -> TokenLosses:
        found = -token_logprobs(hidden, head.weight, targets, **_options(head, config))
        return TokenLosses(found.mean(), found.detach())

    return HeadCall(losses, {"targets": tree.targets}, share)


def _options(head: Head, config: Config) -> dict[str, Any]:
    """What every function of the head is told of it, beside its weight."""
    return {
        "max_chunk_bytes": config.max_chunk_bytes,
        "impl": config.impl,
        "lora": head.lora,
        "vocab_shard": head.shard,
        **head.constants(),
    }


def bradley_terry_loss(rewards: Tensor) -> Tensor:
    """−log σ(r(x, y⁺) − r(x, y⁻)) of each pair (P,), of rewards (P, 2): chosen, rejected."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
