"""The inputs of a preference loss, pairs and groups of samples, and its derivatives by their log-probs.

A chunk of the LM head holds whole pairs and whole groups. So a loss that reads no other pair than its own is finished
while the chunk's logits are in memory; autograd runs on these small tensors alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NOTHING: Mapping[str, Tensor] = {}


class Pairs(NamedTuple):
    """P preference pairs: every tensor is (P,), in fp32 (fp64 for fp64 inputs); log-probs are sums over tokens."""

    chosen_logps: Tensor  # log π(y⁺|x)
    rejected_logps: Tensor  # log π(y⁻|x)
    ref_chosen_logps: Tensor  # log π_ref(y⁺|x); 0 if the call has no reference
    ref_rejected_logps: Tensor  # log π_ref(y⁻|x)
    chosen_lengths: Tensor  # number of counted tokens, in the dtype of the log-probs
    rejected_lengths: Tensor
    num_pairs: int  # pairs of the whole batch, of which these may be a part
    num_chosen_tokens: int  # counted tokens of all chosen responses of the whole batch
    tensors: Mapping[str, Tensor] = NOTHING  # the caller's ``pair_tensors``

    @property
    def chosen_ratios(self) -> Tensor:
        """ρ(x, y⁺) = log π(y⁺|x) − log π_ref(y⁺|x), (P,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_ratios(self) -> Tensor:
        """ρ(x, y⁻) = log π(y⁻|x) − log π_ref(y⁻|x), (P,)."""
        return self.rejected_logps - self.ref_rejected_logps

    def part(self, pairs: slice) -> Pairs:
        """Return some of these pairs. The numbers of the whole batch stay."""
        return self._replace(
            chosen_logps=self.chosen_logps[pairs],
            rejected_logps=self.rejected_logps[pairs],
            ref_chosen_logps=self.ref_chosen_logps[pairs],
            ref_rejected_logps=self.ref_rejected_logps[pairs],
            chosen_lengths=self.chosen_lengths[pairs],
            rejected_lengths=self.rejected_lengths[pairs],
            tensors={name: x[pairs] for name, x in self.tensors.items()},
        )


class Groups(NamedTuple):
    """G groups of k online samples, one group a prompt: every tensor is (G, k); log-probs are sums over tokens."""

    logps: Tensor  # log π(y|x)
    ref_logps: Tensor  # log π_ref(y|x)
    lengths: Tensor  # number of counted tokens, in the dtype of the log-probs
    tensors: Mapping[str, Tensor] = NOTHING  # the caller's ``sample_tensors``


class PairLoss(Protocol):
    """A loss of preference pairs. A plain function is one; a frozen dataclass is one with parameters.

    Two attributes are optional. ``needs_reference = False`` says that the loss reads no reference log-prob.
    ``batch_statistics(pairs)`` returns constants (P,) by name, computed without gradients from **all** pairs of the
    batch; they are added to ``pairs.tensors``. If the batch does not fit into one chunk, this costs one more pass over
    the logits (2 NVD). ``beta`` scales the rewards that are reported (1 without it).
    """

    def __call__(self, pairs: Pairs, /) -> Tensor:
        """Return the loss of each pair, (P,), differentiable by the policy's log-probs.

        A pair's loss must depend on no other pair: pairs are computed in chunks. Write it in plain torch.
        """
        ...


GroupLoss = Callable[[Groups], Tensor]
"""Returns the loss of each group, (G,), differentiable by ``logps``. To make the gradient another one than that of the
value, as a policy gradient is, return ``value.detach() + surrogate - surrogate.detach()``."""


class PairTerms(NamedTuple):
    """The losses of pairs and their derivatives, (P,) each."""

    losses: Tensor
    by_chosen: Tensor
    by_rejected: Tensor


def pair_terms(loss: PairLoss, pairs: Pairs) -> PairTerms:
    """Return the losses of ``pairs`` and their derivatives by the policy's log-probs, by ``closed_form`` or autograd.

    ``pairs.tensors["weights"]``, if there, multiplies them.

    Raises:
        ValueError: ``loss`` returns another shape than (P,), or does not depend on the log-probs.
    """
    closed_form = getattr(loss, "closed_form", None)
    if closed_form is not None:
        terms = PairTerms(*closed_form(pairs))
    else:
        losses, (by_chosen, by_rejected) = _with_derivatives(
            lambda chosen, rejected: loss(pairs._replace(chosen_logps=chosen, rejected_logps=rejected)),
            (pairs.chosen_logps, pairs.rejected_logps),
            describe(loss),
        )
        terms = PairTerms(losses, by_chosen, by_rejected)
    weights = pairs.tensors.get("weights")
    return terms if weights is None else PairTerms(*(weights * x for x in terms))


def group_terms(loss: GroupLoss, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the losses (G,) of ``groups`` and their derivatives (G, k) by the policy's log-probs.

    Raises:
        ValueError: ``loss`` returns another shape than (G,), or does not depend on the log-probs.
    """
    losses, (by_logps,) = _with_derivatives(
        lambda logps: loss(groups._replace(logps=logps)), (groups.logps,), describe(loss)
    )
    return losses, by_logps


def _with_derivatives(
    function: Callable[..., Tensor], logps: tuple[Tensor, ...], name: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    # The operator for torch.compile runs below autograd; these small tensors need it all the same.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        leaves = tuple(x.detach().requires_grad_() for x in logps)
        losses = function(*leaves)
        shape = logps[0].shape[:1]
        if not isinstance(losses, Tensor) or losses.shape != shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"{name} returned {got}: must return one loss each, a tensor of shape {tuple(shape)}")
        if not losses.requires_grad:
            raise ValueError(f"{name} returned losses that do not depend on the policy's log-probs")
        derivatives = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in logps)
    return losses.detach(), tuple(
        zero if x is None else x.to(zero.dtype) for x, zero in zip(derivatives, zeros, strict=True)
    )


def describe(loss: Any) -> str:
    """Return a loss's name for messages."""
    return f"loss={getattr(loss, '__name__', None) or repr(loss)}"


_CLOSED: weakref.WeakSet[Any] = weakref.WeakSet()


def check_closed(loss: PairLoss, pairs: Pairs) -> None:
    """Raise ValueError if a pair's loss or derivatives depend on the other pairs. Checked once for each loss.

    Takes up to four of the call's pairs, with log-probs around their reference, on the CPU: the losses of the first
    half must be the same without the second half. Waits for the device once.
    """
    if getattr(loss, "is_closed", False) or any(known is loss for known in _CLOSED):
        return
    probe = _probe(pairs)
    whole = pair_terms(loss, probe)
    half = pair_terms(loss, probe.part(slice(0, 2)))
    for of_whole, of_half in zip(whole, half, strict=True):
        if not torch.allclose(of_whole[:2], of_half, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise ValueError(
                f"{describe(loss)}: the loss of a pair changes with the other pairs of the batch, which are computed "
                "in other chunks. Give it a method batch_statistics(pairs) for what it needs of the whole batch, "
                "without gradients; a loss that needs gradients through other pairs (such as TRL's 'aot', which sorts "
                "them) has no fused form"
            )
    try:
        _CLOSED.add(loss)
    except TypeError:  # an object that cannot be referenced weakly is checked at every call
        return


def _probe(pairs: Pairs) -> Pairs:
    """Return four pairs in fp64 on the CPU: the first ones of ``pairs``, repeated, with other log-probs."""
    gen = torch.Generator().manual_seed(0)
    index = torch.arange(4) % len(pairs.chosen_logps)

    def take(x: Tensor) -> Tensor:
        taken = x[: int(index.max()) + 1].detach().cpu()[index]
        return taken.double() if taken.is_floating_point() else taken

    def log_probs(around: Tensor | float) -> Tensor:
        return around + torch.randn(4, generator=gen, dtype=torch.float64)

    ref_chosen, ref_rejected = log_probs(-20.0), log_probs(-20.0)
    return Pairs(
        chosen_logps=log_probs(ref_chosen),
        rejected_logps=log_probs(ref_rejected),
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_lengths=torch.tensor([7.0, 5.0, 9.0, 3.0], dtype=torch.float64),
        rejected_lengths=torch.tensor([4.0, 8.0, 6.0, 2.0], dtype=torch.float64),
        num_pairs=pairs.num_pairs,
        num_chosen_tokens=pairs.num_chosen_tokens,
        tensors={name: take(x) for name, x in pairs.tensors.items()},
    )
