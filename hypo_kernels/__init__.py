"""Fused preference losses, HyPO's among them: hidden states in, loss and gradients out.

``import hypo_kernels`` needs only torch; the first call that runs on CUDA imports Triton.
"""

from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.logprob import sequence_logprobs, token_logprobs
from hypo_kernels.loss import HypoLoss, fused_hypo_loss
from hypo_kernels.objective import Importance
from hypo_kernels.pairs import Groups, Pairs
from hypo_kernels.preference import PreferenceLoss, fused_preference_loss
from hypo_kernels.vocab import VocabShard

__version__ = "0.1.0"
__all__ = [
    "Groups",
    "HypoLoss",
    "Importance",
    "LMHead",
    "LoRA",
    "Pairs",
    "PreferenceLoss",
    "TargetLayout",
    "VocabShard",
    "fused_hypo_loss",
    "fused_preference_loss",
    "sequence_logprobs",
    "token_logprobs",
]
