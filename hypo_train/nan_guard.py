"""Numbers that are not finite stop a run before anything is saved, and leave the step that made them to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from hypo_train.build import Run
from hypo_train.checkpoint.files import latest_checkpoint
from hypo_train.distributed.fsdp import local
from hypo_train.utils.records import write_json_lines
from hypo_train.utils.signals import NotFiniteError

Samples = Sequence[Sequence[Sequence[int]]]  # token ids of each sample of each row


def stop_if_not_finite(run: Run, last: int, *, saves: bool) -> None:
    """Raise NotFiniteError if a step up to ``last``, counted from 0, had a loss or gradient that is not finite, on any
    process; the host waits for the device. ``saves``: or if ``last`` has left such weights, which no later step shows.

    The step's rows and their samples are in ``not-finite-step-N.jsonl`` then. No checkpoint is of that step or a later
    one, so that a run that goes on from the newest comes to it again, with the same rows and samples.
    """
    steps = [step for step in run.processes.gather(run.finite.first_bad()) if step is not None]
    if steps:
        raise_not_finite(run, min(steps), _samples(run, min(steps)))
    if saves and not all(run.processes.gather(_weights_are_finite(run))):
        raise_not_finite(run, last, _samples(run, last), what="the weights after its update are not finite")
    if run.config.draws_samples:
        run.rollouts.forget()


def raise_not_finite(
    run: Run, step: int, samples: Samples | None = None, what: str = "the loss or its gradient is not finite"
) -> None:
    """Keep the rows of ``step``, counted from 0, with their samples where these are known, and raise NotFiniteError."""
    path = run.output_dir / f"not-finite-step-{step + 1}.jsonl"
    rows = [run.plan.train_rows[i] for i in run.plan.rows_of_step(step)]
    if samples is None:
        samples = _own_samples(run, step) if run.processes.count == 1 else []
    kept = f"its rows are in {path}"
    try:
        write_json_lines(path, [_record(run, *both) for both in zip_longest(rows, samples, fillvalue=())])
    except OSError as error:  # on a full disk; that the numbers have run away is the worse news
        kept = f"its rows could not be kept ({error})"
    raise NotFiniteError(f"step {step + 1}: {what}; {kept}. {_advice(run)}")


@torch.no_grad()
def _weights_are_finite(run: Run) -> bool:
    """Of this process's parts of what is trained."""
    found = [local(p).isfinite().all() for p in run.trained.trained_parameters().values()]
    return not found or bool(torch.stack(found).all())


def _advice(run: Run) -> str:
    folder = latest_checkpoint(run.output_dir)
    if folder is None:
        replay = "There is no checkpoint yet: the same run, started anew, comes to that step"
    else:
        replay = f"{folder} is from before it: --resume comes to that step"
    return (
        f"{replay} again, with the same rows and samples; --logging_steps 1 shows what leads to it. In another run a "
        "lower learning_rate, a longer warm-up or a lower max_grad_norm often helps"
    )


def _samples(run: Run, step: int) -> Samples:
    """What all processes sampled in ``step``, row by row; every process calls it."""
    parts = run.processes.gather(_own_samples(run, step))
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]


def _own_samples(run: Run, step: int) -> Samples:
    return run.rollouts.recent(step) if run.config.draws_samples else []


def _record(run: Run, row: Any, samples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The row's number in its split, its token ids and their texts; its samples', where it has any."""
    fields = dataclasses.asdict(row)
    ids: dict[str, Any] = {name: list(value) for name, value in fields.items() if name != "row"}
    texts: dict[str, Any] = {name: run.tokenizer.decode(value) for name, value in ids.items()}
    if samples:
        ids["samples"] = [list(sample) for sample in samples]
        texts["samples"] = [run.tokenizer.decode(sample) for sample in ids["samples"]]
    return {"row": fields["row"], **texts, "ids": ids}
