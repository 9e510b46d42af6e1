"""Policies with so few sequences that all can be listed: an expectation is a sum, without sampling noise."""

import itertools

import torch
from torch import Tensor

EOS = 0


def sequences(vocab: int, length: int, *, with_eos: bool) -> list[tuple[int, ...]]:
    """Return every sequence of ``length`` tokens and, with an EOS, every shorter one that ends with it."""
    out = []
    for tokens in itertools.product(range(vocab), repeat=length):
        cut = tokens.index(EOS) + 1 if with_eos and EOS in tokens else length
        if tokens[:cut] not in out:
            out.append(tokens[:cut])
    return out


class Policy:
    """An autoregressive policy over 3 tokens, with separate logits for every prefix."""

    def __init__(self, all_sequences: list[tuple[int, ...]], seed: int) -> None:
        self.sequences = all_sequences
        prefixes = sorted({s[:t] for s in all_sequences for t in range(len(s))})
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        gen = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(prefixes), 3, generator=gen, dtype=torch.float64).requires_grad_()

    def rows(self, sequence: tuple[int, ...]) -> Tensor:
        """Return the logits (length, 3) that each token of ``sequence`` is drawn from."""
        return self.logits[[self.index[sequence[:t]] for t in range(len(sequence))]]

    def logps(self) -> Tensor:
        """Return the log-prob of every sequence."""
        return torch.stack(
            [self.rows(s).log_softmax(-1).gather(1, torch.tensor(s)[:, None]).sum() for s in self.sequences]
        )
