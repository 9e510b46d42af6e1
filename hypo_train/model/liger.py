"""Use Liger's Triton kernels for RMSNorm, RoPE and SwiGLU. Liger's loss is not used."""

from __future__ import annotations

from typing import Any

import torch

from hypo_train.model.tree_model import ModelError


def use_layer_kernels(model: Any) -> None:
    """Move a transformers model to the GPU and replace its layers' code by Liger's kernels, which run only there.

    Norms and MLPs are changed in ``model`` alone; Liger replaces RoPE for every model of its architecture in the
    process. Parameters and the forward of the language model, whose logits a check compares, stay as they are.

    Raises:
        ModelError: liger-kernel is not installed, there is no GPU, or Liger does not know the architecture.
    """
    kind = model.config.model_type
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ModelError(
            f"use_liger_kernel=true: cannot import Liger ({error}): pip install 'hypo-kernels[liger]', or leave it out"
        ) from error
    if not torch.cuda.is_available():
        raise ModelError("use_liger_kernel=true: Liger's kernels need a GPU, and there is none: leave it out")
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself would only log a line
        raise ModelError(f"use_liger_kernel=true: Liger has no kernels for {kind} models: leave it out")
    model.cuda()
    # All layers that Liger has for the architecture. A layer that it lacks would raise if it was named.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
