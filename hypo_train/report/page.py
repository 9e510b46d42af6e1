"""`report.html`: one file with everything of one run or several that a person wants to see.

It needs nothing but itself: no network, no script to be read (a script adds values under the pointer), no trust in what
the data, the samples or the settings say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from hypo_train.report import tables
from hypo_train.report.charts import run_colour
from hypo_train.report.curves import Charts
from hypo_train.report.html import GENERATOR, Html, data, document, element, foreign, join
from hypo_train.report.numbers import duration, short, with_error
from hypo_train.report.runs import RecordedRun, read_runs
from hypo_train.report.samples import samples
from hypo_train.report.series import is_number, last
from hypo_train.utils.atomic import write_file
from hypo_train.utils.errors import ConfigError

REPORT_FILE = "report.html"
_NAMED = 3  # runs in the title
_ALGORITHMS = {"hypo": "HyPO", "dpo": "DPO", "ipo": "IPO", "rloo": "RLOO", "reward": "Reward model", "sft": "SFT"}


def write_report(folders: Sequence[Path], path: Path) -> None:
    """The report of these runs, all of it or what was there before.

    Raises:
        ConfigError: a folder is no run, or ``path`` is a file that is no report.
    """
    runs = read_runs(list(folders))
    _require_report(path)
    content = page(runs)
    try:
        write_file(path, content, shared=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {str(path)!r}: {error.strerror}") from error


def page(runs: Sequence[RecordedRun]) -> str:
    """The HTML of a report."""
    charts = Charts(runs)
    sections = [
        ("Last evaluation", tables.evaluations(runs)),
        ("Curves", charts.learning()),
        ("Samples", samples(runs)),
        ("Time and memory", charts.costs()),
        ("Settings", tables.settings(runs)),
        ("Environment", tables.environments(runs)),
        ("Other metrics", _folded("Every metric without a curve above", charts.others())),
    ]
    kept = [(title, content) for title, content in sections if content is not None]
    body = join(
        [
            element("header", foreign(_title(runs), "h1"), _contents([title for title, _ in kept]), class_="top"),
            element("main", _headline(runs), *(_section(title, content) for title, content in kept)),
            element("footer", f"Written {_now()} by python -m hypo_train report. It loads nothing from anywhere."),
            data("hover-data", charts.hover),
        ]
    )
    resources = files("hypo_train.report")
    style, script = ((resources / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return document(_title(runs), body, style=style, script=script)


def _require_report(path: Path) -> None:
    """Whatever else a path names is not written over."""
    if path.is_dir():
        raise ConfigError(f"--output {str(path)!r} is a folder: name a file, such as {str(path / REPORT_FILE)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists():
        with path.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(4096):
                raise ConfigError(f"--output {str(path)!r} exists and is no report: name another file")


def _title(runs: Sequence[RecordedRun]) -> str:
    names = [run.name for run in runs]
    more = ", …" if len(names) > _NAMED else ""  # each has a card below
    return names[0] if len(names) == 1 else f"{len(names)} runs: {', '.join(names[:_NAMED])}{more}"


def _contents(titles: Sequence[str]) -> Html:
    return element("nav", *(element("a", title, href=f"#{_anchor(title)}") for title in titles))


def _section(title: str, content: Html) -> Html:
    return element("section", element("h2", title), content, id=_anchor(title))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _folded(title: str, content: Html | None) -> Html | None:
    return None if content is None else element("details", element("summary", title), content)


def _headline(runs: Sequence[RecordedRun]) -> Html:
    """What was trained, how it ended, what came out: a card a run."""
    return element("div", *(_card(number, run, len(runs) > 1) for number, run in enumerate(runs)), class_="cards")


def _card(number: int, run: RecordedRun, among_others: bool) -> Html:
    name = (
        element("h2", element("span", class_=f"swatch {run_colour(number)}"), foreign(run.name))
        if among_others
        else None
    )
    trained = [
        _ALGORITHMS.get(str(run.config.get("algorithm")), "A run"),
        " of ",
        _end(run.config, "model_name_or_path"),
    ]
    trained += [" on ", _end(run.config, "dataset_name")]
    return element(
        "div",
        name,
        element("p", *trained, class_="trained"),
        element("p", _state(run), " ", _progress(run)),
        _figures(run),
        *(element("p", problem, class_="problem") for problem in run.problems),
        class_="card",
    )


def _end(config: dict[str, Any], field: str) -> Html:
    """A path's last part; the whole of it is in the settings."""
    parts = str(config.get(field, "?")).rstrip("/").split("/")
    named = -2 if re.fullmatch(r"final|checkpoint-\d+", parts[-1]) else -1  # of which run, then
    return foreign("/".join(parts[named:]))


def _state(run: RecordedRun) -> Html:
    if run.ending is None:
        return element("strong", "no end recorded: it is running, or was killed", class_="state open")
    kind = "good" if run.ending == "finished" else "bad"
    step = f" in step {run.not_finite_step}" if run.ending == "not finite" and run.not_finite_step else ""
    return element("strong", run.ending + step, class_=f"state {kind}")


def _progress(run: RecordedRun) -> Html:
    """Steps, time and the newest line's."""
    total = run.total_steps
    parts = (
        [f"step {run.last_step} of {total}" if total else f"step {run.last_step}"] if run.lines else ["no metrics yet"]
    )
    seconds = tables.attempt_seconds(run)
    if seconds is not None:
        killed = any(not is_number(attempt.get("seconds")) for attempt in run.attempts)
        attempts = f" in {len(run.attempts)} attempts" if len(run.attempts) > 1 else ""
        parts.append(("more than " if killed else "") + duration(seconds) + attempts)
    elif run.last_written is not None:
        parts.append(f"last line written {run.last_written:%Y-%m-%d %H:%M UTC}")
    return join(["· ", " · ".join(parts)])


def _figures(run: RecordedRun) -> Html | None:
    """The numbers that a run is judged by, of the last evaluation, or else of the last line of training."""
    found = []
    for title, names in _HEADLINE:
        for name in names:
            of_evaluation = last(run.evaluated, f"eval_{name}")
            value = of_evaluation if of_evaluation is not None else last(run.trained, name)
            if value is None:
                continue
            lines, key = (run.evaluated, f"eval_{name}") if of_evaluation is not None else (run.trained, name)
            error = last(lines, f"{key}_se")
            note = None if of_evaluation is not None else element("small", " in training")
            figure = with_error(float(value), float(error) if is_number(error) else None)
            found.append(element("div", element("dt", title, note), element("dd", figure)))
            break
    speed, memory = last(run.trained, "tokens_per_second"), last(run.trained, "memory/peak_gb")
    if speed is not None:
        found.append(element("div", element("dt", "tokens a second"), element("dd", short(speed))))
    if memory is not None:
        found.append(element("div", element("dt", "peak memory"), element("dd", f"{short(memory)} GiB")))
    return element("dl", *found) if found else None


_HEADLINE = (
    ("reverse KL", ("kl",)),
    ("reward", ("reward",)),
    ("reward accuracy", ("rewards/accuracies", "accuracy")),
    ("loss", ("loss",)),
)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
