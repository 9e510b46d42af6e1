"""Hash the content of a tensor on its device.

The bits are read as integers x of at most 32 bits, in blocks. Each block gives two sums Σ wᵢ·xᵢ mod 2⁶⁴ with fixed
pseudo-random 64-bit weights w; they are exact in any order of summation, so every device gives the same digest. The
digest is the SHA-256 of the length and of all sums in order.

Two blocks that differ by d = 2ᵛ·odd at some position (v ≤ 31) have equal sums for one value mod 2⁶⁴⁻ᵛ of that
position's weight: a chance of at most 2⁻³³ for one sum and 2⁻⁶⁶ for both, whatever the contents are. This protects
against accidents, not against an attacker: the weights are public.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

_BLOCK = 2**14  # integers summed into one pair of sums
_BLOCKS_PER_LAUNCH = 64  # 24 MiB of temporaries
_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16}  # wider elements are read as several 32-bit integers


def tensor_digest(tensor: Tensor) -> str:
    """Return 64 hexadecimal digits that depend on the bits of ``tensor``, but not on its dtype and shape."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGER_DTYPES.get(tensor.element_size(), torch.int32))
    weights = _weights(bits.device)
    full = len(bits) // _BLOCK * _BLOCK
    parts = [part.unflatten(0, (-1, 1, _BLOCK)) for part in bits[:full].split(_BLOCK * _BLOCKS_PER_LAUNCH) if len(part)]
    parts.append(bits[full:].view(1, 1, -1))
    sums = torch.cat([(part.long() * weights[:, : part.shape[-1]]).sum(-1) for part in parts])  # (blocks, 2)
    length = len(bits).to_bytes(8, "little")  # trailing zeros do not change a sum
    return hashlib.sha256(length + sums.cpu().numpy().tobytes()).hexdigest()


@cache
def _weights(device: torch.device) -> Tensor:
    """Return the weights w, (2, _BLOCK) int64, which are equal in every process."""
    stream = hashlib.shake_256(b"hypo_train.fingerprint").digest(2 * _BLOCK * 8)
    return torch.frombuffer(bytearray(stream), dtype=torch.int64).view(2, _BLOCK).to(device)
