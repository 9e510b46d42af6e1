"""How far gradients are from float64 when logit gradients are rounded to bf16, and when tiles of them are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sparse_softmax import products, tiles
from benchmarks.sparse_softmax.rows import Rows

CHUNK = 512  # rows of float64 logits at a time
EXACT, DENSE = "float64", "dense, bf16"


@dataclass(frozen=True)
class Error:
    """The errors of one variant. The products are float64: this is the error of the logit gradients alone."""

    hidden_max: float  # max |error| / max |truth|, which the contract of the tests and bench_loss.py bound
    weight_max: float
    hidden_norm: float  # ‖error‖ / ‖truth‖
    weight_norm: float
    dropped_tokens: float  # share of the vocabulary whose whole row of the weight's gradient is left out
    mass: float  # share of Σ|g| that is left out


def errors(rows: Rows, order: Tensor, keeps: Mapping[str, Tensor]) -> dict[str, Error]:
    """Return the error of dense bf16 logit gradients, and of those with only the tiles of each of ``keeps``.

    ``order`` (V,) sorts the vocabulary. Each of ``keeps`` is (blocks of rows, blocks of vocabulary) bool.
    """
    weight = rows.weight[order].double()
    rank = order.argsort()
    names = [EXACT, DENSE, *keeps]
    grad_hidden: dict[str, list[Tensor]] = {name: [] for name in names}
    grad_weight = {name: torch.zeros_like(weight) for name in names}
    left_out = dict.fromkeys(names, 0.0)
    total = 0.0
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        hidden = rows.hidden[chunk].double()
        exact = tiles.unit_gradients((hidden @ weight.t()).softmax(-1), rank[rows.targets[chunk]])
        exact *= rows.signs[chunk, None]
        rounded = exact.bfloat16().double()
        total += exact.abs().sum().item()
        for name in names:
            grad = exact if name == EXACT else rounded
            if name in keeps:
                blocks = len(rows) // len(keeps[name])
                grad = tiles.apply(keeps[name][start // blocks : (start + CHUNK) // blocks], rounded)
                left_out[name] += (rounded - grad).abs().sum().item()
            of_hidden, of_weight = products.dense(grad, weight, hidden)
            grad_hidden[name].append(of_hidden)
            grad_weight[name] += of_weight
    truth = torch.cat(grad_hidden[EXACT]), grad_weight[EXACT]
    found = {}
    for name in names[1:]:
        off_hidden, off_weight = torch.cat(grad_hidden[name]) - truth[0], grad_weight[name] - truth[1]
        found[name] = Error(
            hidden_max=(off_hidden.abs().max() / truth[0].abs().max()).item(),
            weight_max=(off_weight.abs().max() / truth[1].abs().max()).item(),
            hidden_norm=(off_hidden.norm() / truth[0].norm()).item(),
            weight_norm=(off_weight.norm() / truth[1].norm()).item(),
            dropped_tokens=(grad_weight[name] == 0).all(1).double().mean().item(),
            mass=left_out[name] / total,
        )
    return found
