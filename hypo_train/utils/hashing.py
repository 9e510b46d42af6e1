"""A tensor's content as a short string, computed where the tensor lies.

The bits are read as integers x of at most 32 bits, in blocks. A block gives two sums Σ wᵢ·xᵢ mod 2⁶⁴ with fixed
pseudo-random 64-bit weights w, exact in any order and so the same on every device; SHA-256 of the length and of
all sums, in order, is the fingerprint. Where two blocks differ by d = 2ᵛ·odd at some place, v ≤ 31, their sums
agree for one value mod 2⁶⁴⁻ᵛ of that place's weight: a chance of at most 2⁻³³ a sum and 2⁻⁶⁶ for both, whatever
the two contents are. That is against chance: the weights are public, and who may write a model can make two alike.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

_BLOCK = 2**14  # integers summed into one pair of sums
_AT_ONCE = 64  # blocks in one launch: 24 MiB of temporaries
_INTEGERS = {1: torch.uint8, 2: torch.int16}  # wider elements are read as several of 32 bits


def fingerprint(tensor: Tensor) -> str:
    """64 hexadecimal digits of the content of ``tensor``: its bits in order, not its dtype or shape."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS.get(tensor.element_size(), torch.int32))
    weights = _weights(bits.device)
    whole = len(bits) // _BLOCK * _BLOCK
    parts = [part.unflatten(0, (-1, 1, _BLOCK)) for part in bits[:whole].split(_BLOCK * _AT_ONCE) if len(part)]
    parts.append(bits[whole:].view(1, 1, -1))
    sums = torch.cat([(part.long() * weights[:, : part.shape[-1]]).sum(-1) for part in parts])  # (blocks, 2)
    length = len(bits).to_bytes(8, "little")  # zeros at the end add nothing to a sum
    return hashlib.sha256(length + sums.cpu().numpy().tobytes()).hexdigest()


@cache
def _weights(device: torch.device) -> Tensor:
    """(2, _BLOCK) int64, the same in every process."""
    stream = hashlib.shake_256(b"hypo_train.fingerprint").digest(2 * _BLOCK * 8)
    return torch.frombuffer(bytearray(stream), dtype=torch.int64).view(2, _BLOCK).to(device)
