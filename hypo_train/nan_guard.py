"""Stop a run at NaN or infinity before it is saved, and keep the rows of the step that produced it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from hypo_train.build import Run
from hypo_train.checkpoint.files import latest_checkpoint
from hypo_train.distributed.fsdp import local
from hypo_train.utils.errors import NotFiniteError
from hypo_train.utils.records import write_json_lines

Samples = Sequence[Sequence[Sequence[int]]]  # token ids of each sample of each row


def stop_if_not_finite(run: Run, last: int, *, saves: bool) -> None:
    """Raise NotFiniteError if a step up to ``last`` (counted from 0) had NaN or infinity in its loss or gradient.

    Every process calls this; the host waits for the device. The rows and samples of the step are written to
    ``not-finite-step-N.jsonl``. No checkpoint holds that step or a later one, so a resumed run repeats it with the same
    rows and samples.

    Args:
        saves: check the trained weights too, because the update of step ``last`` has not entered any loss yet.
    """
    steps = [step for step in run.processes.gather(run.finite.first_bad()) if step is not None]
    if steps:
        raise_not_finite(run, min(steps), _gather_samples(run, min(steps)))
    if saves and not all(run.processes.gather(_weights_are_finite(run))):
        raise_not_finite(run, last, _gather_samples(run, last), "the weights after its update are not finite")
    if run.config.draws_samples:
        run.rollouts.forget()


def raise_not_finite(
    run: Run, step: int, samples: Samples | None = None, problem: str = "the loss or its gradient is not finite"
) -> None:
    """Write the rows of ``step`` (counted from 0) to a file and raise NotFiniteError.

    ``samples``: those of all processes; None writes this process's samples if the run has one process.
    """
    path = run.output_dir / f"not-finite-step-{step + 1}.jsonl"
    rows = [run.plan.train_rows[i] for i in run.plan.rows_of_step(step)]
    if samples is None:
        samples = _local_samples(run, step) if run.processes.world_size == 1 else []
    where = f"its rows are in {path}"
    try:
        write_json_lines(path, [_record(run, *pair) for pair in zip_longest(rows, samples, fillvalue=())])
    except OSError as error:  # a full disk must not hide the NotFiniteError
        where = f"its rows could not be written ({error})"
    raise NotFiniteError(f"step {step + 1}: {problem}; {where}. {_advice(run)}")


@torch.no_grad()
def _weights_are_finite(run: Run) -> bool:
    finite = [local(p).isfinite().all() for p in run.trained.trained_parameters().values()]
    return not finite or bool(torch.stack(finite).all())


def _advice(run: Run) -> str:
    folder = latest_checkpoint(run.output_dir)
    if folder is None:
        replay = "There is no checkpoint yet: the same run, started again, repeats that step"
    else:
        replay = f"{folder} was saved before that step: --resume repeats it"
    return (
        f"{replay} with the same rows and samples; add --logging_steps 1 to see the steps before it. In a new run, a "
        "lower learning_rate, a longer warm-up or a lower max_grad_norm often helps"
    )


def _gather_samples(run: Run, step: int) -> Samples:
    """Return the samples of all processes in the order of the step's rows; every process calls this."""
    parts = run.processes.gather(_local_samples(run, step))
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]


def _local_samples(run: Run, step: int) -> Samples:
    return run.rollouts.recent(step) if run.config.draws_samples else []


def _record(run: Run, row: Any, samples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the row's number in its split, its texts, its token ids, and its samples if it has any."""
    fields = dataclasses.asdict(row)
    ids: dict[str, Any] = {name: list(value) for name, value in fields.items() if name != "row"}
    texts: dict[str, Any] = {name: run.tokenizer.decode(value) for name, value in ids.items()}
    if samples:
        ids["samples"] = [list(sample) for sample in samples]
        texts["samples"] = [run.tokenizer.decode(sample) for sample in ids["samples"]]
    return {"row": fields["row"], **texts, "ids": ids}
