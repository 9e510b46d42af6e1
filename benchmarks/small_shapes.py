"""Run every Triton kernel on small, awkward shapes, for ``compute-sanitizer`` (``proof.py``).

A sanitizer makes kernels a hundred times slower, and an access out of bounds needs no large shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs

# Smaller than any tile; a power of two and one column more; several of the widest tile and a tail.
VOCABULARIES = (7, 1025, 9001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS: tuple[dict[str, float], ...] = ({}, {"logit_softcap": 30.0, "logit_scale": 0.5})
WIDTH = 24  # no power of two, but divisible by 8, as 16-bit GEMMs require
LENGTHS = (3, 1, 4, 2, 5, 1, 2, 3)  # two pairs and two groups of two


def calls(device: torch.device) -> Iterator[str]:
    """Run each call and yield its name: forward and backward, plain and full heads, every dtype."""
    for vocab, dtype, head in itertools.product(VOCABULARIES, DTYPES, HEADS):
        rng = torch.Generator(device=device).manual_seed(0)

        def randn(*shape: int, rng: torch.Generator = rng, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=rng, device=device).to(dtype)

        rows = sum(LENGTHS)
        hidden, weight = randn(rows, WIDTH).requires_grad_(), randn(vocab, WIDTH).requires_grad_()
        full: dict[str, Any] = {**head, "bias": randn(vocab).requires_grad_()} if head else {}
        targets = torch.arange(rows) * 7919 % vocab
        targets[::5] = -100
        targets[1] = vocab - 1  # the last column is a target
        bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)])
        for ref_hidden in (None, randn(rows, WIDTH)):
            reference: dict[str, Any] = (
                {"ref_logps": torch.full((len(LENGTHS),), -20.0, device=device)}
                if ref_hidden is None
                else {"ref_hidden": ref_hidden, "ref_lm_head_weight": weight.detach()}
            )
            if ref_hidden is not None and full:
                reference["ref_bias"] = full["bias"].detach()
            # Every estimator and schedule that supports the call.
            options: list[dict[str, Any]] = [{"impl": "triton"}]
            options += [{"impl": "triton-epilogue"}] * (dtype == torch.bfloat16)
            options += [{"impl": "triton", "kl_estimator": "exact"}] * (ref_hidden is not None)
            for option in options:
                fused_hypo_loss(
                    hidden, weight, targets, bounds, num_pairs=2, beta=0.1, kl_coef=0.05, **option, **reference, **full
                ).loss.backward()
        for entropy in (False, True):
            found = token_logprobs(hidden, weight, targets, return_entropy=entropy, impl="triton", **full)
            torch.cat(found if isinstance(found, tuple) else (found,)).sum().backward()
        with torch.no_grad():
            sequence_logprobs(hidden, weight, targets, bounds, impl="triton", **full)
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()
        yield f"V={vocab} {str(dtype).removeprefix('torch.')} {'full head' if full else 'plain head'}"


if __name__ == "__main__":
    print(f"{len(list(calls(torch.device('cuda'))))} heads ran")
