"""Write `report.html`, one file about one or several runs.

The file loads nothing from the network and is readable without its script (which shows values under the pointer).
Texts from data, samples and settings are escaped.
"""

from __future__ import annotations

import re
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from hypo_train.config import Config
from hypo_train.report import charts
from hypo_train.report.curves import cost_charts, learning_charts, other_charts, run_colour
from hypo_train.report.runs import RecordedRun, read_runs
from hypo_train.report.series import is_number, last
from hypo_train.report.text import duration, plain, short, visible, with_error
from hypo_train.utils.atomic import write_file
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.safe_print import safe_print

REPORT_FILE = "report.html"
_GENERATOR = 'content="hypo_train report"'  # a file with this text may be replaced by a report
_MISSING = "—"
_MOST_PROMPTS = 24
_NAMES_IN_TITLE = 3
# Metric -> title, by importance: the first columns of the table of evaluations.
_TITLES = {
    "kl": "reverse KL",
    "reward": "reward",
    "rewards/accuracies": "reward accuracy",
    "accuracy": "accuracy",
    "rewards/margins": "reward margin",
    "margin": "margin",
    "loss": "loss",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
    "logps/chosen": "log-prob, chosen",
    "logps/rejected": "log-prob, rejected",
    "rewards/chosen": "reward, chosen",
    "rewards/rejected": "reward, rejected",
}
_HEADLINE = (("kl",), ("reward",), ("rewards/accuracies", "accuracy"), ("loss",))
_ATTEMPT = {"started": "started", "first_step": "from step", "ended": "ended", "seconds": "took"}


@contextmanager
def report_at_the_end(output_dir: Path) -> Iterator[None]:
    """Write ``output_dir/report.html`` when the block ends, with or without an error.

    If the report fails, its error is printed and not raised, so it does not hide an error of the run.
    """
    try:
        yield
    finally:
        try:
            write_report([output_dir], output_dir / REPORT_FILE)
        except Exception as error:
            safe_print(f"the report was not written ({type(error).__name__}: {error})", sys.stderr)


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the report of these runs to ``path``, atomically.

    Raises:
        ConfigError: a folder is not a run, or ``path`` is a file that is not a report.
    """
    runs = read_runs(list(folders))
    _check_output(path)
    content = page(runs)
    try:
        write_file(path, content, shared=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {str(path)!r}: {error.strerror}") from error


def page(runs: Sequence[RecordedRun]) -> str:
    """Return the HTML of a report about ``runs``."""
    several = len(runs) > 1
    names = ", ".join(run.name for run in runs[:_NAMES_IN_TITLE]) + (", …" if len(runs) > _NAMES_IN_TITLE else "")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html.jinja").render(
        title=f"{len(runs)} runs: {names}" if several else names,
        several=several,
        cards=[_card(run, number) for number, run in enumerate(runs)],
        evaluations=_evaluations(runs),
        learning=learning_charts(runs),
        samples=_samples(runs),
        costs=cost_charts(runs),
        settings=_settings(runs),
        environment=_environment(runs),
        others=other_charts(runs),
        picture=charts,
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M UTC}",
    )


def _check_output(path: Path) -> None:
    """Raise ConfigError if ``path`` cannot be written, or is an existing file that is not a report."""
    if path.is_dir():
        raise ConfigError(f"--output {str(path)!r} is a folder: name a file, such as {str(path / REPORT_FILE)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists():
        with path.open("rb") as file:
            if _GENERATOR.encode() not in file.read(4096):
                raise ConfigError(f"--output {str(path)!r} exists and is not a report: name another file")


def _digest(content: str) -> str:
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"


# Cards: the method, the outcome and the main metrics of each run


def _card(run: RecordedRun, number: int) -> dict[str, Any]:
    total = run.total_steps
    progress = [f"step {run.last_step}{f' of {total}' if total else ''}" if run.lines else "no metrics yet"]
    seconds = [attempt["seconds"] for attempt in run.attempts if is_number(attempt.get("seconds"))]
    if seconds:
        attempts = f" in {len(run.attempts)} attempts" if len(run.attempts) > 1 else ""
        more = "more than " if len(seconds) < len(run.attempts) else ""
        progress.append(more + duration(float(sum(seconds))) + attempts)
    elif run.last_written is not None:
        progress.append(f"last line written {run.last_written:%Y-%m-%d %H:%M UTC}")
    if run.best_step is not None:
        progress.append(f"best: step {run.best_step}")
    ending, kind = run.ending, "good" if run.ending == "finished" else "bad"
    if ending is None:
        ending, kind = "no end recorded: it is running, or was killed", "open"
    elif ending == "not finite" and run.not_finite_step is not None:
        ending += f" in step {run.not_finite_step}"
    return {
        "name": run.name,
        "colour": run_colour(number),
        "method": run.method,
        "model": _last_part(run.config.get("model_name_or_path", "?")),
        "dataset": _last_part(run.config.get("dataset_name", "?")),
        "ending": ending,
        "kind": kind,
        "progress": " · ".join(progress),
        "figures": _figures(run),
        "problems": run.problems,
    }


def _last_part(path: Any) -> str:
    """Return the last part of a path, or the last two parts if the last part does not identify it."""
    parts = str(path).rstrip("/").split("/")
    return "/".join(parts[-2 if re.fullmatch(r"final|checkpoint-\d+", parts[-1]) else -1 :])


def _figures(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Return (title, note, value) of the main metrics, from the final model's evaluation, else from training."""
    figures = []
    for names in _HEADLINE:
        sources = [(lines, p + n) for n in names for lines, p in ((run.final_lines, "eval_"), (run.trained, ""))]
        for lines, name in sources:
            value = last(lines, name)
            if value is not None:
                error = last(lines, f"{name}_se")
                note = "in training" if lines is run.trained else ""
                figures.append((_TITLES[names[0]], note, with_error(value, error)))
                break
    speed, memory = last(run.trained, "tokens_per_second"), last(run.trained, "memory/peak_gb")
    if speed is not None:
        figures.append(("tokens a second", "", short(speed)))
    if memory is not None:
        figures.append(("peak memory", "", f"{short(memory)} GiB"))
    return figures


# Tables: {"head": titles, "rows": lists of texts}; the first text of a row is its title


def _evaluations(runs: Sequence[RecordedRun]) -> dict[str, Any] | None:
    """Return a table with the evaluation of each run's final model in training, and its evaluation after training."""
    evaluations: list[tuple[str, str, Mapping[str, Any]]] = []
    for run in runs:
        if run.final_lines:
            evaluations.append((run.name, str(run.final_lines[-1]["step"]), run.final_lines[-1]))
        if run.final_evaluation is not None:
            evaluations.append((f"{run.name}, evaluate", "final", run.final_evaluation))
    if not evaluations:
        return None
    logged = {n.removeprefix("eval_") for *_, metrics in evaluations for n in metrics if n.startswith("eval_")}
    if len({run.algorithm for run in runs}) > 1:
        logged.discard("loss")  # its terms depend on the algorithm
    order = list(_TITLES)
    names = sorted(
        (n for n in logged if not n.endswith("_se")), key=lambda n: (order.index(n) if n in order else len(order), n)
    )
    rows = [[name, step, *(_metric(metrics, n) for n in names)] for name, step, metrics in evaluations]
    return {"head": ["run", "step", *(_TITLES.get(n, n) for n in names)], "rows": rows}


def _metric(metrics: Mapping[str, Any], name: str) -> str:
    value, error = metrics.get(f"eval_{name}"), metrics.get(f"eval_{name}_se")
    return with_error(float(value), float(error) if is_number(error) else None) if is_number(value) else _MISSING


def _settings(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Return a table of settings that differ (between runs; from the defaults for one run), and one of all settings."""
    configs = [run.config for run in runs]
    names = [name for name in Config.model_fields if any(name in config for config in configs)]
    names = list(dict.fromkeys([*names, *(name for config in configs for name in config)]))
    different = [name for name in names if _differs(name, configs)]
    return {"different": _by_run(different, configs, runs), "all": _by_run(names, configs, runs)}


def _differs(name: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    values = [config.get(name, _MISSING) for config in configs]
    if len(values) > 1:
        return any(value != values[0] for value in values)
    field = Config.model_fields.get(name)
    return field is None or field.is_required() or field.default != values[0]


def _environment(runs: Sequence[RecordedRun]) -> dict[str, Any] | None:
    """Return a table of each run's versions and device, and one of the start and end of every attempt."""
    newest = [run.attempts[-1] if run.attempts else {} for run in runs]
    names = dict.fromkeys(name for attempt in newest for name in attempt if name not in (*_ATTEMPT, "total_steps"))
    rows = []
    for run in runs:
        for attempt in run.attempts:
            seconds = attempt.get("seconds")
            texts = {"ended": "not recorded", **{name: str(attempt[name]) for name in _ATTEMPT if attempt.get(name)}}
            texts["first_step"] = str(attempt.get("first_step", _MISSING))
            texts["seconds"] = duration(seconds) if is_number(seconds) else _MISSING
            rows.append([run.name, *(texts.get(name, _MISSING) for name in _ATTEMPT)])
    if not names:
        return None
    return {
        "versions": _by_run(list(names), newest, runs),
        "attempts": {"head": ["run", *_ATTEMPT.values()], "rows": rows},
    }


def _by_run(names: Sequence[str], values: Sequence[Mapping[str, Any]], runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Return a table with a row for each name and a column for each run."""
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    return {"head": head, "rows": [[name, *(_value(v.get(name, _MISSING)) for v in values)] for name in names]}


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, (list, dict)):
        return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return str(value)


# Samples: for each prompt, the response in the data and the samples of every run


def _samples(runs: Sequence[RecordedRun]) -> dict[str, Any] | None:
    """Return the prompts with samples from the most runs, in the order of the data; None without samples."""
    answers: dict[tuple[int | None, str], list[list[dict[str, Any]]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            row = sample.get("row")
            key = (row if isinstance(row, int) else None, str(sample.get("prompt", "")))
            answers.setdefault(key, [[] for _ in runs])[number].append(sample)
    if not answers:
        return None
    keys = sorted(answers, key=lambda key: -sum(map(bool, answers[key])))[:_MOST_PROMPTS]
    steps = [(run.name, run.samples_step) for run in runs if run.samples_step is not None]
    same = len({step for _, step in steps}) == 1
    when = f"step {steps[0][1]}" if same else ", ".join(f"{name}: step {step}" for name, step in steps)
    more = f"; the first {_MOST_PROMPTS} of {len(answers)} prompts" if len(answers) > _MOST_PROMPTS else ""
    return {"when": when + more, "prompts": [_prompt(*key, answers[key], runs) for key in keys]}


def _prompt(
    row: int | None, prompt: str, answers: Sequence[Sequence[Mapping[str, Any]]], runs: Sequence[RecordedRun]
) -> dict[str, Any]:
    references = [s["reference"] for samples in answers for s in samples if isinstance(s.get("reference"), str)]
    boxes = [{"name": "in the data", "colour": None, "figures": "", "text": text} for text in references[:1]]
    for number, (run, samples) in enumerate(zip(runs, answers, strict=True)):
        for sample in samples:
            numbers = {"kl": "KL", "reward": "reward", "length": "tokens"}
            figures = [f"{name} {short(float(sample[n]))}" for n, name in numbers.items() if is_number(sample.get(n))]
            figures += ["cut off"] if sample.get("ended") is False else []
            box = {"name": run.name, "colour": run_colour(number), "figures": " · ".join(figures)}
            boxes.append({**box, "text": sample["completion"]})
    return {"row": row, "prompt": prompt, "answers": boxes}
