"""Fused losses for Hybrid Preference Optimization: hidden states in, loss and gradients out.

``import hypo_kernels`` needs torch alone; Triton is imported by the first call that runs on CUDA.
"""

from hypo_kernels.head import LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.logprob import sequence_logprobs, token_logprobs
from hypo_kernels.loss import HypoLoss, fused_hypo_loss
from hypo_kernels.objective import Importance
from hypo_kernels.vocab import VocabShard

__version__ = "0.1.0"
__all__ = [
    "HypoLoss",
    "Importance",
    "LoRA",
    "TargetLayout",
    "VocabShard",
    "fused_hypo_loss",
    "sequence_logprobs",
    "token_logprobs",
]
