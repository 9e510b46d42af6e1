"""A loss or gradient that is not finite stops the run before anything is saved, and leaves its rows to be looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypo_train.interrupt import NotFiniteError
from hypo_train.journal.records import write_json_lines
from hypo_train.run import Run
from hypo_train.saving.checkpoint import latest_checkpoint


def stop_if_not_finite(run: Run) -> None:
    """Raise NotFiniteError if a step so far had a loss or gradient that is not finite, on any process; the host waits
    for the device.

    The step's rows are in ``not-finite-step-N.jsonl`` then. No checkpoint is of that step or a later one, so that a
    run that goes on from the newest comes to it again, with the same rows and samples.
    """
    steps = [step for step in run.processes.gather(run.finite.first_bad()) if step is not None]
    if steps:
        raise_not_finite(run, min(steps))


def raise_not_finite(run: Run, step: int) -> None:
    """Keep the rows of ``step``, counted from 0, and raise NotFiniteError."""
    path = run.output_dir / f"not-finite-step-{step + 1}.jsonl"
    kept = f"its rows are in {path}"
    try:
        write_json_lines(path, [_record(run, run.train_rows[i]) for i in run.rows_of_step(step)])
    except OSError as error:  # on a full disk; that the numbers have run away is the worse news
        kept = f"its rows could not be kept ({error})"
    raise NotFiniteError(f"step {step + 1}: the loss or its gradient is not finite; {kept}. {_advice(run)}")


def _advice(run: Run) -> str:
    folder = latest_checkpoint(run.output_dir)
    before = (
        "There is no checkpoint yet: started again, the run comes to it with the same rows and samples"
        if folder is None
        else f"{folder} is from before it: with --resume_from_checkpoint auto the run comes to it again, with the same "
        "rows and samples"
    )
    return (
        f"{before}. A lower learning_rate, a longer warm-up or a lower max_grad_norm often helps, in a new run in "
        "another output_dir"
    )


def _record(run: Run, row: Any) -> dict[str, Any]:
    """The row's number in its split, its token ids and their texts."""
    fields = dataclasses.asdict(row)
    ids = {name: list(value) for name, value in fields.items() if name != "row"}
    texts = {name: run.tokenizer.decode(value) for name, value in ids.items()}
    return {"row": fields["row"], **texts, "ids": ids}
