"""A world so small that every sequence there is can be listed: an expectation is a sum, without sampling noise."""

import itertools

import torch
from torch import Tensor

EOS = 0


def sequences(vocab: int, length: int, *, with_eos: bool) -> list[tuple[int, ...]]:
    """Every sequence of ``length`` tokens; with an EOS, the shorter ones that it ends too."""
    out = []
    for tokens in itertools.product(range(vocab), repeat=length):
        cut = tokens.index(EOS) + 1 if with_eos and EOS in tokens else length
        if tokens[:cut] not in out:
            out.append(tokens[:cut])
    return out


class Policy:
    """An autoregressive policy over 3 tokens with logits of its own after every prefix."""

    def __init__(self, all_sequences: list[tuple[int, ...]], seed: int) -> None:
        self.sequences = all_sequences
        prefixes = sorted({s[:t] for s in all_sequences for t in range(len(s))})
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        gen = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(prefixes), 3, generator=gen, dtype=torch.float64).requires_grad_()

    def rows(self, sequence: tuple[int, ...]) -> Tensor:
        """(length, 3) the logits that each of its tokens is drawn from."""
        return self.logits[[self.index[sequence[:t]] for t in range(len(sequence))]]

    def logps(self) -> Tensor:
        """(number of sequences,)"""
        return torch.stack(
            [self.rows(s).log_softmax(-1).gather(1, torch.tensor(s)[:, None]).sum() for s in self.sequences]
        )
