"""Judge comparisons: write the verdicts, and print a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypo_train.judges.chat import ChatJudge
from hypo_train.judges.samples import read_comparisons
from hypo_train.judges.settings import JudgeSettings
from hypo_train.judges.verdicts import Comparison, JudgeError, PairwiseJudge, Verdict, summary
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.records import make_folder, write_csv, write_json, write_json_lines

REASONS_SHOWN = 3


def run(settings: JudgeSettings) -> int:
    """Judge, write ``verdicts.jsonl``, ``verdicts.csv`` and ``summary.json``, and print the table.

    Returns the exit status: 0, or 1 if comparisons failed. The same command tries them again.
    """
    comparisons = read_comparisons(settings.samples, settings.against, settings.num_comparisons)
    judge = _judge(settings)
    conditions = {
        **judge.conditions(),
        "samples": str(settings.samples),
        "against": None if settings.against is None else str(settings.against),
    }
    folder = settings.folder
    _refuse_other_verdicts(settings, conditions)
    make_folder(folder, "output_dir")
    if isinstance(judge, ChatJudge):
        make_folder(settings.cache.parent, "judge_cache")
        print(judge.estimate(comparisons), flush=True)
    verdicts = judge.judge(comparisons)
    result = summary(comparisons, verdicts)
    if result["win_rate"] is None:
        raise JudgeError(f"all {len(verdicts)} comparisons failed: {verdicts[0].details['error']}")
    records = [_record(c, v) for c, v in zip(comparisons, verdicts, strict=True)]
    write_json_lines(folder / "verdicts.jsonl", records)
    write_csv(folder / "verdicts.csv", records)
    cost = judge.cost() if isinstance(judge, ChatJudge) else {}
    write_json(folder / "summary.json", {**conditions, "comparisons": len(comparisons), **result, **cost})
    print(_page(settings, conditions, result, cost, verdicts))
    return 1 if result["failed"] else 0


def _judge(settings: JudgeSettings) -> PairwiseJudge:
    if settings.judge_url is not None:
        return ChatJudge(settings)
    # These import torch, which a judge behind an endpoint does not need.
    from hypo_train.judges.scores import FunctionJudge, RewardModelJudge
    from hypo_train.utils.quiet import quiet_libraries

    if settings.judge is not None:
        return FunctionJudge(settings.judge)
    quiet_libraries()
    return RewardModelJudge(str(settings.judge_model), batch_size=settings.judge_batch_size)


def _refuse_other_verdicts(settings: JudgeSettings, conditions: dict[str, Any]) -> None:
    """Raise ConfigError if the folder holds verdicts under other conditions. Under equal conditions it resumes them."""
    path = settings.folder / "summary.json"
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in conditions if saved.get(name) != conditions[name]]
    if changed:
        raise ConfigError(
            f"output_dir={str(settings.folder)!r} holds verdicts with another {changed[0]} "
            f"({saved.get(changed[0])!r}): choose another --output_dir"
        )


def _record(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    c, v = comparison, verdict
    texts = {"prompt": c.prompt, "completion": c.completion, "other": c.other}
    return {"row": c.row, "sample": c.sample, "outcome": v.outcome, "consistent": v.consistent, **texts, **v.details}


def _page(
    settings: JudgeSettings,
    conditions: dict[str, Any],
    result: dict[str, Any],
    cost: dict[str, Any],
    verdicts: Sequence[Verdict],
) -> str:
    """Return the printed table."""
    error = "" if result["win_rate_se"] is None else f" ± {result['win_rate_se']:.4f}"
    lines = {
        "judge": " at ".join(str(conditions[name]) for name in ("judge", "judge_url") if name in conditions),
        "samples": str(settings.samples),
        "against": str(settings.against or "the reference responses"),
        "win / tie / loss": f"{result['win']} / {result['tie']} / {result['loss']}",
        "win-rate": f"{result['win_rate']:.4f}{error}   a tie is one half",
        "characters": f"{result['length']:.0f} against {result['length_other']:.0f}",
    }
    if cost:
        lines["inconsistent"] = f"{result['inconsistent']:.1%} of the verdicts changed with the order, and are ties"
        lines["asked now"] = _describe_usage(cost["usage"], cost.get("cost_usd"))
        if cost["usage_from_cache"]["answers"]:
            lines["known before"] = _describe_usage(cost["usage_from_cache"], cost.get("cost_usd_from_cache"))
    if result["failed"]:
        lines["FAILED"] = f"{result['failed']} of {len(verdicts)} comparisons, left out above: {_reasons(verdicts)}"
    width = max(map(len, lines))
    table = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    return "\n".join(["", *table, "", f"written to {settings.folder}"])


def _describe_usage(usage: dict[str, int], cost: float | None) -> str:
    line = f"{usage['answers']} answers: {usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out"
    if usage["uncounted"]:
        line += f"; {usage['uncounted']} came without a count"
    return line if cost is None else f"{line}; {cost:.4f} USD"


def _reasons(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(v.details["error"] for v in verdicts if v.outcome is None)
    return "; ".join(f"{count} with {reason}" for reason, count in counts.most_common(REASONS_SHOWN))
