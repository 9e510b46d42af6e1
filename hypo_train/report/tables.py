"""The page's tables: evaluations, settings, environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hypo_train.config import Config
from hypo_train.report.html import Html, element, foreign, join
from hypo_train.report.numbers import duration, with_error
from hypo_train.report.runs import RecordedRun, evaluation_afterwards
from hypo_train.report.series import is_number

_FIRST = (
    "kl",
    "reward",
    "rewards/accuracies",
    "accuracy",
    "rewards/margins",
    "margin",
    "loss",
    "completions/mean_length",
    "completions/clipped_ratio",
)
_NAMES = {
    "kl": "reverse KL",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward, chosen",
    "rewards/rejected": "reward, rejected",
    "logps/chosen": "log-prob, chosen",
    "logps/rejected": "log-prob, rejected",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
}
_OF_ATTEMPTS = ("started", "first_step", "total_steps", "ended", "seconds")
_MISSING = "—"


def evaluations(runs: Sequence[RecordedRun]) -> Html | None:
    """A row for each run's last evaluation in training, and for one made of it afterwards; errors beside means."""
    rows = [row for run in runs for row in _evaluations(run)]
    if not rows:
        return None
    names = [n.removeprefix("eval_") for _, _, metrics in rows for n in metrics if n.startswith("eval_")]
    metrics = sorted({n for n in names if not n.endswith("_se")}, key=lambda n: (_place(n), n))
    head = [element("th", title, scope="col") for title in ["run", "step", *(_NAMES.get(n, n) for n in metrics)]]
    body = [
        element("tr", element("th", name, scope="row"), element("td", step), *(_metric(found, n) for n in metrics))
        for name, step, found in rows
    ]
    return _table(head, body)


def settings(runs: Sequence[RecordedRun]) -> Html:
    """What sets the runs apart first (or one run from the defaults), then everything."""
    names = [name for name in Config.model_fields if any(name in run.config for run in runs)]
    names += [name for run in runs for name in run.config if name not in names]
    names = list(dict.fromkeys(names))
    apart = [name for name in names if _sets_apart(name, runs)]
    title = "Where the runs differ" if len(runs) > 1 else "What differs from the defaults"
    first = _by_run(apart, [run.config for run in runs], runs) if apart else element("p", "Nothing.")
    every = element("details", element("summary", "Every setting"), _by_run(names, [r.config for r in runs], runs))
    return join([element("h3", title), first, every if names else None])


def environments(runs: Sequence[RecordedRun]) -> Html | None:
    """Versions and devices of each run's last attempt, and every attempt's start and end."""
    last = [run.attempts[-1] if run.attempts else {} for run in runs]
    names = list(dict.fromkeys(name for attempt in last for name in attempt if name not in _OF_ATTEMPTS))
    if not names:
        return None
    found = [
        element("h3", "Versions and device"),
        _by_run(names, last, runs),
        element("h3", "Attempts"),
        _attempts(runs),
    ]
    return join(found)


def attempt_seconds(run: RecordedRun) -> float | None:
    """All attempts that have ended; None: none has."""
    known = [attempt["seconds"] for attempt in run.attempts if is_number(attempt.get("seconds"))]
    return float(sum(known)) if known else None


def _evaluations(run: RecordedRun) -> list[tuple[Html, str, Mapping[str, Any]]]:
    rows: list[tuple[Html, str, Mapping[str, Any]]] = []
    if run.evaluated:
        last = run.evaluated[-1]
        rows.append((foreign(run.name), str(last["step"]), last))
    afterwards = evaluation_afterwards(run)
    if afterwards is not None:
        rows.append((join([foreign(run.name), ", evaluate"]), "final", afterwards["metrics"]))
    return rows


def _metric(found: Mapping[str, Any], name: str) -> Html:
    value, error = found.get(f"eval_{name}"), found.get(f"eval_{name}_se")
    if not is_number(value):
        return element("td", _MISSING)
    return element("td", with_error(float(value), float(error) if is_number(error) else None))


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _sets_apart(name: str, runs: Sequence[RecordedRun]) -> bool:
    values = [run.config.get(name, _MISSING) for run in runs]
    if len(runs) > 1:
        return any(value != values[0] for value in values)
    field = Config.model_fields.get(name)
    return field is None or field.is_required() or field.default != values[0]


def _by_run(names: Sequence[str], values: Sequence[Mapping[str, Any]], runs: Sequence[RecordedRun]) -> Html:
    """A row a name, a column a run."""
    head = [element("th", "", scope="col"), *(element("th", foreign(run.name), scope="col") for run in runs)]
    body = [
        element("tr", element("th", foreign(name), scope="row"), *(element("td", _value(v, name)) for v in values))
        for name in names
    ]
    return _table(head if len(runs) > 1 else [], body)


def _value(values: Mapping[str, Any], name: str) -> Html:
    if name not in values:
        return element("span", _MISSING)
    value = values[name]
    if value is None or isinstance(value, bool):
        return element("span", "none" if value is None else str(value).lower())
    if isinstance(value, (list, dict)):
        value = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return foreign(value)


def _attempts(runs: Sequence[RecordedRun]) -> Html:
    titles = ("run", "started", "from step", "ended", "took")
    body = [
        element(
            "tr",
            element("th", foreign(run.name), scope="row"),
            element("td", attempt.get("started", _MISSING)),
            element("td", attempt.get("first_step", _MISSING)),
            element("td", attempt.get("ended") or "not recorded"),
            element("td", duration(attempt["seconds"]) if is_number(attempt.get("seconds")) else _MISSING),
        )
        for run in runs
        for attempt in run.attempts
    ]
    return _table([element("th", title, scope="col") for title in titles], body)


def _table(head: Sequence[Html], body: Sequence[Html]) -> Html:
    """It scrolls inside itself where it is wider than the page."""
    parts = [element("thead", element("tr", *head)) if head else None, element("tbody", *body)]
    return element("div", element("table", *parts), class_="scrolls", tabindex="0", role="region", aria_label="table")
