"""What the loop asks of the LM head: functions of a tree's hidden states, for ``Policy`` to call."""

from __future__ import annotations

from torch import Tensor

from hypo_kernels import HypoLoss, fused_hypo_loss, sequence_logprobs, token_logprobs
from hypo_kernels.head import LMHead
from hypo_train.config import Config
from hypo_train.policy import HeadFunction
from hypo_train.tree import Tree


def sequence_logprobs_of(tree: Tree, config: Config) -> HeadFunction[Tensor]:
    """Log-prob of each of the tree's sequences, (S,)."""

    def logprobs(hidden: Tensor, head: LMHead) -> Tensor:
        return sequence_logprobs(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    return logprobs


def preference_loss(tree: Tree, ref_logps: Tensor, num_pairs: int, config: Config) -> HeadFunction[HypoLoss]:
    """The configured preference loss of a :func:`~hypo_train.batch.pair_tree`; ``ref_logps`` is (S,)."""

    def loss(hidden: Tensor, head: LMHead) -> HypoLoss:
        return fused_hypo_loss(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            num_pairs=num_pairs,
            num_generations=max(2, config.num_generations),
            ref_logps=ref_logps,
            beta=config.beta,
            kl_coef=config.kl_coef,
            length_penalty=config.length_penalty,
            preference="ipo" if config.algorithm == "ipo" else "sigmoid",
            label_smoothing=config.label_smoothing,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    return loss


def token_losses(tree: Tree, config: Config) -> HeadFunction[Tensor]:
    """Negative log-prob of each counted token, (T,): SFT's loss is their mean."""

    def losses(hidden: Tensor, head: LMHead) -> Tensor:
        return -token_logprobs(
            hidden,
            head.weight,
            tree.targets,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    return losses
