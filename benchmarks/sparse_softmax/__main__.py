"""Measure what a backward pass saves that leaves out tiles of the softmax below bf16's resolution, and its error.

    python -m benchmarks.sparse_softmax --model models/SmolLM2-135M-Instruct

Prints the tables of docs/below_the_floor.md: the share of tiles that must be kept, the gradients' error, and the time
of the two products.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.measure import Step, interleaved, median, spread
from benchmarks.sparse_softmax import products, tiles
from benchmarks.sparse_softmax.errors import errors
from benchmarks.sparse_softmax.rows import ROOT, Rows, Text, load

ROW_BLOCKS = (64, 128)
VOCAB_BLOCKS = (128, 256, 512)
RULES = {"each row": True, "on average": False}
CPU = torch.device("cpu")


def gradients(rows: Rows, order: Tensor) -> Tensor:
    """Return ``onehot − p``, (N, V) fp32, with the vocabulary in ``order``."""
    probs = (rows.hidden @ rows.weight[order].t()).softmax(-1)
    return tiles.unit_gradients(probs, order.argsort()[rows.targets])


def shares(text: Text) -> Iterator[tuple[str, ...]]:
    """Yield the share of tiles that must be kept, for each order and size of tiles."""
    columns = [(rule, row_block) for rule in RULES for row_block in ROW_BLOCKS]
    yield "vocabulary", "block", *(f"{row_block} rows, {rule}" for rule, row_block in columns)
    for name, order in text.orders().items():
        grad = gradients(text.rows, order)
        for vocab_block in VOCAB_BLOCKS:
            mass = tiles.block_mass(grad, vocab_block)
            kept = [tiles.kept_tiles(mass, row_block, each_row=RULES[rule]) for rule, row_block in columns]
            yield name, str(vocab_block), *(f"{keep.float().mean():.1%}" for keep in kept)


def shares_by_entropy(text: Text) -> Iterator[tuple[str, ...]]:
    """Yield the share of kept tiles of 128 x 128 in each quarter of the rows, sorted by their softmax's entropy."""
    entropy = torch.distributions.Categorical(probs=text.rows.probs()).entropy()
    by_entropy = entropy.argsort()
    quarters = entropy[by_entropy].view(4, -1)
    yield "vocabulary", "rule", *(f"{q[0]:.2f} to {q[-1]:.2f} nats" for q in quarters)
    for name, order in text.orders().items():
        grad = gradients(text.rows, order)
        mass = tiles.block_mass(grad, 128)[by_entropy]
        for rule, each_row in RULES.items():
            keep = tiles.kept_tiles(mass, 128, each_row=each_row)
            yield name, rule, *(f"{quarter:.1%}" for quarter in keep.float().view(4, -1).mean(1))
        alone = tiles.kept_tiles(mass, 1, each_row=True).float().view(4, -1).mean(1)
        yield name, "each row alone, 1 x 128", *(f"{quarter:.1%}" for quarter in alone)
    entries = tiles.kept_tiles(grad[by_entropy[::8]].abs(), 1, each_row=True).float().view(4, -1).mean(1)
    yield "any", "single entries, 1 x 1", *(f"{quarter:.1%}" for quarter in entries)


def times(text: Text, rule: str, row_counts: tuple[int, ...], rounds: int) -> Iterator[tuple[str, ...]]:
    """Yield the time of the two products, dense and sparse in turns, with the vocabulary by mean probability."""
    yield "rows", "tiles kept", "dense ms", "IQR", "runs of tiles", "copied tiles", "choosing the tiles"
    order = text.orders()["by mean probability"]
    weight = text.rows.weight[order]
    for count in row_counts:
        rows = text.rows.first(count)
        grad = gradients(rows, order)

        def choose(grad: Tensor = grad) -> Tensor:
            return tiles.kept_tiles(tiles.block_mass(grad, 128), 128, each_row=RULES[rule])

        keep = choose()
        inputs = grad, weight, rows.hidden
        steps: dict[str, Step] = {
            "dense": partial(products.dense, *inputs),
            "runs": partial(products.sparse, *inputs, keep),
            "copies": partial(products.gathered, *inputs, keep),
            "choose": choose,
        }
        found = interleaved(
            steps, CPU, before=lambda: None, seconds=0, min_rounds=rounds, max_rounds=rounds, warm_up_rounds=1
        )
        seconds = {name: samples[0] for name, samples in found.items()}
        ratios = {
            name: median([a / b for a, b in zip(samples, seconds["dense"], strict=True)])
            for name, samples in seconds.items()
        }
        yield (
            str(count),
            f"{keep.float().mean():.1%}",
            f"{median(seconds['dense']) * 1e3:.0f}",
            f"{spread(seconds['dense']) * 1e3:.0f}",
            *(f"x {ratios[name]:.2f}" for name in ("runs", "copies", "choose")),
        )


def error_table(text: Text) -> Iterator[tuple[str, ...]]:
    """Yield the errors of the gradients for tiles of 128 x 128, with the vocabulary by mean probability."""
    measures = "dX max", "dW max", "dX norm", "dW norm"
    yield "logit gradients", "tiles kept", "mass left out", *measures, "tokens without gradient"
    order = text.orders()["by mean probability"]
    grad = gradients(text.rows, order)
    mass = tiles.block_mass(grad, 128)
    keeps = {f"{rule}, bf16": tiles.kept_tiles(mass, 128, each_row=each_row) for rule, each_row in RULES.items()}
    larger = 4 * tiles.AVERAGE_ROUNDING
    keeps["each row, four budgets, bf16"] = tiles.kept_tiles(mass, 128, each_row=True, budget=larger)
    keeps["no probability above 2^-12, bf16"] = tiles.tiles_of_likely_tokens(grad, 128, 128, 2.0**-12)
    del grad
    for name, e in errors(text.rows, order, keeps).items():
        kept = keeps[name].float().mean().item() if name in keeps else 1.0
        parts = (f"{x:.1e}" for x in (e.mass, e.hidden_max, e.weight_max, e.hidden_norm, e.weight_norm))
        yield name, f"{kept:.1%}", *parts, f"{e.dropped_tokens:.1%}"


def rounding(text: Text) -> float:
    """Return what rounding the logit gradients to bf16 takes, as a share of ``Σ|g|``."""
    grad = gradients(text.rows.first(1024), torch.arange(len(text.rows.weight)))
    return ((grad.bfloat16().float() - grad).abs().sum() / grad.abs().sum()).item()


def show(title: str, table: Iterator[tuple[str, ...]]) -> None:
    """Print a table in Markdown, row by row."""
    print(f"\n**{title}**\n")
    for i, cells in enumerate(table):
        print(f"| {' | '.join(cells)} |", flush=True)
        if i == 0:
            print("|---" * len(cells) + "|")


@torch.no_grad()
def main() -> None:
    title = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_softmax", description=title)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", help="a model folder")
    parser.add_argument("--rows", type=int, default=4096, help="a multiple of 1024, at most 4096 with the shipped text")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    args = parser.parse_args()
    if args.rows % 1024 or args.rows <= 0:
        parser.error(f"--rows is {args.rows}: give a multiple of 1024")
    text = load(args.model, args.rows)
    print(f"{report.hardware(CPU)}; {report.state(CPU)}; torch {torch.__version__}")
    average = rounding(text)
    print(f"bf16 takes {average:.2e} of Σ|g|; the budget is {tiles.AVERAGE_ROUNDING:.2e}")
    show("Tiles that must be kept", shares(text))
    show("Tiles that must be kept, by the rows' entropy", shares_by_entropy(text))
    show("Error against float64", error_table(text))
    counts = tuple(count for count in (1024, 2048) if count <= args.rows)
    for rule in RULES:
        show(f"Time of the two products, {rule}", times(text, rule, counts, args.rounds))


if __name__ == "__main__":
    main()
