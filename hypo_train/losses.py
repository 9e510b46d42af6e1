"""What the loop asks of the LM head: functions of a tree's hidden states, for ``Policy`` to call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypo_kernels import HypoLoss, fused_hypo_loss, sequence_logprobs, token_logprobs
from hypo_train.config import Config
from hypo_train.model.policy import Head, HeadFunction
from hypo_train.trees.tree import Tree


@dataclass(frozen=True)
class Reference:
    """What a loss knows of the frozen reference: log-probs, or hidden states and the head above them."""

    logps: Tensor | None = None  # (S,)
    hidden: Tensor | None = None  # (T, D)
    weight: Tensor | None = None  # (V, D), its own: where the head is trained, the policy's is another
    bias: Tensor | None = None  # (V,)


def sequence_logprobs_of(tree: Tree, config: Config) -> HeadFunction[Tensor]:
    """Log-prob of each of the tree's sequences, (S,)."""

    def logprobs(hidden: Tensor, head: Head) -> Tensor:
        return sequence_logprobs(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            lora=head.lora,
            **head.constants(),
        )

    return logprobs


def reference_of(tree: Tree, config: Config) -> HeadFunction[Reference]:
    """What the configured loss has to know: the exact KL needs distributions, any other loss log-probs alone."""
    logprobs = sequence_logprobs_of(tree, config)

    def reference(hidden: Tensor, head: Head) -> Reference:
        if config.kl_estimator == "exact":
            return Reference(hidden=hidden, weight=head.weight, bias=head.bias)
        return Reference(logps=logprobs(hidden, head))

    return reference


def preference_loss(
    tree: Tree, reference: Reference, num_pairs: int, config: Config, behavior_logps: Tensor | None = None
) -> HeadFunction[HypoLoss]:
    """The configured preference loss of a tree of pairs and samples; ``behavior_logps`` (T,) of an earlier policy."""

    def loss(hidden: Tensor, head: Head) -> HypoLoss:
        return fused_hypo_loss(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            num_pairs=num_pairs,
            num_generations=max(2, config.num_generations),
            ref_logps=reference.logps,
            ref_hidden=reference.hidden,
            ref_lm_head_weight=reference.weight,
            ref_bias=reference.bias,
            beta=config.beta,
            kl_coef=config.kl_coef,
            length_penalty=config.length_penalty,
            preference="ipo" if config.algorithm == "ipo" else "sigmoid",
            label_smoothing=config.label_smoothing,
            kl_estimator=config.kl_estimator,
            behavior_logps=behavior_logps,
            importance_cap=config.importance_cap,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            lora=head.lora,
            **head.constants(),
        )

    return loss


def token_losses(tree: Tree, config: Config) -> HeadFunction[Tensor]:
    """Negative log-prob of each counted token, (T,): SFT's loss is their mean."""

    def losses(hidden: Tensor, head: Head) -> Tensor:
        return -token_logprobs(
            hidden,
            head.weight,
            tree.targets,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            lora=head.lora,
            **head.constants(),
        )

    return losses
