"""Losses and gradients equal those of other libraries."""

import pytest
import torch
from contract import FUSED, random_batch, run_fused

from hypo_kernels import fused_hypo_loss


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_dpo_equals_ligers_fused_linear_dpo_loss(impl: str, with_bias: bool, device: torch.device) -> None:
    """Liger pads: (2P, L, D), chosen then rejected, which is this library's order too."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    batch = random_batch(
        [7] * 6, 67, num_pairs=3, ignored=0.3, with_ref_hidden=True, with_bias=with_bias, device=device
    )
    theirs = batch.to(torch.float32)
    ours = run_fused(batch, impl)
    options = theirs.options
    loss, (chosen_logps, rejected_logps, *_, chosen_rewards, rejected_rewards) = liger.LigerFusedLinearDPOLoss(
        beta=options["beta"], compiled=False
    )(
        theirs.weight,
        theirs.hidden.view(6, 7, 16),
        theirs.targets.view(6, 7).to(device),
        bias=theirs.bias,
        ref_input=options["ref_hidden"].view(6, 7, 16),
        ref_weight=options["ref_lm_head_weight"],
        ref_bias=options.get("ref_bias"),
    )
    loss.backward()
    torch.testing.assert_close(ours["loss"].float(), loss.detach())
    torch.testing.assert_close(ours["logps"].float(), torch.cat([chosen_logps, rejected_logps]).detach())
    for name in ("hidden", "weight", *["bias"] * with_bias):
        torch.testing.assert_close(ours[f"gradient of {name}"].float(), getattr(theirs, name).grad)
    out = fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, impl=impl, **batch.options
    )
    torch.testing.assert_close(out.chosen_rewards, chosen_rewards.detach())
    torch.testing.assert_close(out.rejected_rewards, rejected_rewards.detach())
