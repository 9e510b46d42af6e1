"""What the policies said, side by side: a prompt once, below it the data's response and each run's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypo_train.report.charts import run_colour
from hypo_train.report.html import Html, element, foreign, join
from hypo_train.report.numbers import short
from hypo_train.report.runs import RecordedRun
from hypo_train.report.series import is_number

MOST_PROMPTS = 24
OPEN_PROMPTS = 4
LONGEST = 4000  # characters of a text

# What has to be the same for two samples to answer the same question.
Asked = tuple[Any, Any]


def samples(runs: Sequence[RecordedRun]) -> Html | None:
    """The prompts that most runs answered, in the data's order; None: no run has samples."""
    answers = [_by_prompt(run) for run in runs]
    if not any(answers):
        return None
    prompts = list(dict.fromkeys(asked for by_prompt in answers for asked in by_prompt))
    prompts.sort(key=lambda asked: -sum(asked in by_prompt for by_prompt in answers))
    shown = [_prompt(runs, [by_prompt.get(asked, []) for by_prompt in answers]) for asked in prompts[:MOST_PROMPTS]]
    more = element(
        "details", element("summary", f"{len(shown) - OPEN_PROMPTS} more prompts"), *shown[OPEN_PROMPTS:]
    ) if len(shown) > OPEN_PROMPTS else None  # fmt: skip
    return join([_note(runs, len(prompts)), *shown[:OPEN_PROMPTS], more])


def _by_prompt(run: RecordedRun) -> dict[Asked, list[dict[str, Any]]]:
    found: dict[Asked, list[dict[str, Any]]] = {}
    for sample in run.samples[1] if run.samples else []:
        row = sample.get("row")
        found.setdefault((row if isinstance(row, int) else None, str(sample.get("prompt", ""))), []).append(sample)
    return found


def _note(runs: Sequence[RecordedRun], prompts: int) -> Html:
    steps = [(run.name, run.samples[0]) for run in runs if run.samples]
    one = f"step {steps[0][1]}" if len({step for _, step in steps}) == 1 else None
    when = one or ", ".join(f"{name}: step {step}" for name, step in steps)
    shown = "" if prompts <= MOST_PROMPTS else f"; the first {MOST_PROMPTS} of {prompts} prompts"
    return element("p", f"Of the last evaluation ({when}){shown}. All are in each run's samples/.", class_="note")


def _prompt(runs: Sequence[RecordedRun], answers: Sequence[Sequence[Mapping[str, Any]]]) -> Html:
    asked = next(answer[0] for answer in answers if answer)
    reference = next(
        (s["reference"] for answer in answers for s in answer if isinstance(s.get("reference"), str)), None
    )
    boxes = [] if reference is None else [_box(element("span", "in the data", class_="who"), reference, None)]
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        who = [element("span", class_=f"swatch {run_colour(number)}"), foreign(run.name)]
        boxes += [_box(element("span", *who, class_="who"), sample["completion"], sample) for sample in answer]
    return element(
        "article",
        element("h3", f"Row {asked['row']}") if isinstance(asked.get("row"), int) else None,
        _text(str(asked.get("prompt", "")), "prompt"),
        element("div", *boxes, class_="answers"),
    )


def _box(who: Html, completion: str, sample: Mapping[str, Any] | None) -> Html:
    """``sample``: None of the data's own response, of which there are no figures."""
    figures = _figures(sample) if sample else None
    return element("div", element("header", who, figures), _text(completion, "said"), class_="answer")


def _figures(sample: Mapping[str, Any]) -> Html:
    numbers = [f"{name} {short(float(sample[key]))}" for key, name in _FIGURES if is_number(sample.get(key))]
    if sample.get("ended") is False:
        numbers.append("cut off")
    return element("span", " · ".join(numbers), class_="figures")


_FIGURES = (("kl", "KL"), ("reward", "reward"), ("length", "tokens"))


def _text(content: str, kind: str) -> Html:
    left_out = len(content) - LONGEST
    end = element("span", f" … {left_out:,} more characters", class_="note") if left_out > 0 else None
    if not content:
        return element("p", "(empty)", class_="note")
    return element("div", content[:LONGEST], end, class_=f"text {kind}", dir="auto", tabindex="0")
