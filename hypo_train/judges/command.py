"""One judging: comparisons, their verdicts on disk, and a table on the screen."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hypo_train.config import ConfigError
from hypo_train.judges.cache import AnswerCache
from hypo_train.judges.chat import ChatJudge
from hypo_train.judges.endpoint import ChatEndpoint
from hypo_train.judges.protocol import Comparison, JudgeError, PairwiseJudge, Verdict
from hypo_train.judges.samples import read_comparisons
from hypo_train.judges.settings import ChatSettings, Settings
from hypo_train.judges.win_rate import summary
from hypo_train.utils.records import make_folder, write_csv, write_json_lines

REASONS_SHOWN = 3


def run(settings: Settings) -> int:
    """Judge, write ``verdicts.jsonl``, ``verdicts.csv`` and ``summary.json``, and print the table.

    Returns the exit status: 0, or 1 where comparisons failed, which the same command tries again.
    """
    comparisons = read_comparisons(settings.samples, settings.against, settings.limit)
    judge = _judge(settings)
    conditions = {
        **judge.conditions(),
        "samples": str(settings.samples),
        "against": None if settings.against is None else str(settings.against),
    }
    _refuse_other_verdicts(settings, conditions)
    make_folder(settings.output_dir, "output_dir")
    if settings.chat is not None:
        make_folder(settings.chat.cache.parent, "judge_cache")
    if isinstance(judge, ChatJudge) and settings.chat is not None:
        print(_estimate(judge, settings.chat, comparisons), flush=True)
    verdicts = judge.judge(comparisons)
    found = summary(comparisons, verdicts)
    if found["win_rate"] is None:
        raise JudgeError(f"all {len(verdicts)} comparisons failed: {verdicts[0].details['error']}")
    records = [_record(c, v) for c, v in zip(comparisons, verdicts, strict=True)]
    write_json_lines(settings.output_dir / "verdicts.jsonl", records)
    write_csv(settings.output_dir / "verdicts.csv", records)
    cost = _cost(judge, settings.chat) if isinstance(judge, ChatJudge) and settings.chat is not None else {}
    text = json.dumps({**conditions, "comparisons": len(comparisons), **found, **cost}, indent=2, ensure_ascii=False)
    (settings.output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(_page(settings, conditions, found, cost, verdicts))
    return 1 if found["failed"] else 0


def _judge(settings: Settings) -> PairwiseJudge:
    if settings.chat is not None:
        chat = settings.chat
        endpoint = ChatEndpoint(
            chat.url,
            chat.model,
            temperature=chat.temperature,
            max_tokens=chat.max_tokens,
            api_key=None if chat.api_key_variable is None else os.environ[chat.api_key_variable].strip(),
            timeout=chat.timeout,
            retries=chat.retries,
        )
        return ChatJudge(endpoint, chat.template, AnswerCache(chat.cache), workers=chat.workers)
    from hypo_train.judges.scores import FunctionJudge, RewardModelJudge  # torch, which an endpoint does without

    if settings.function is not None:
        return FunctionJudge(settings.function)
    return RewardModelJudge(str(settings.reward_model), batch_size=settings.batch_size)


def _refuse_other_verdicts(settings: Settings, conditions: dict[str, Any]) -> None:
    """The same judging may go on in its folder; the verdicts of another one stay."""
    path = settings.output_dir / "summary.json"
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in conditions if saved.get(name) != conditions[name]]
    if changed:
        raise ConfigError(
            f"output_dir={str(settings.output_dir)!r} holds verdicts with another {changed[0]} "
            f"({saved.get(changed[0])!r}): choose another --output_dir"
        )


def _record(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    c, v = comparison, verdict
    texts = {"prompt": c.prompt, "completion": c.completion, "other": c.other}
    return {"row": c.row, "sample": c.sample, "outcome": v.outcome, "consistent": v.consistent, **texts, **v.details}


def _estimate(judge: ChatJudge, chat: ChatSettings, comparisons: Sequence[Comparison]) -> str:
    """What is about to be sent and may be paid."""
    messages = judge.unanswered(comparisons)
    line = f"{len(comparisons)} comparisons in both orders: {len(messages)} requests to {judge.endpoint.url}"
    if chat.prices is None:
        return line
    if chat.max_tokens is None:
        return f"{line}; answers without --judge_max_tokens have no upper estimate of their cost"
    # A token is at least a byte of UTF-8; a message has a few more around it.
    tokens_in = sum(len(message.encode("utf-8", "replace")) + 20 for message in messages)
    price_in, price_out = chat.prices
    bound = (tokens_in * price_in + len(messages) * chat.max_tokens * price_out) / 1e6
    return f"{line}, at most {bound:.2f} USD without retries (a token a byte; English has about four bytes a token)"


def _cost(judge: ChatJudge, chat: ChatSettings) -> dict[str, Any]:
    """Of the requests of this run, and what earlier ones spent on the answers that were known."""
    now, before = judge.endpoint.usage, judge.from_cache
    found: dict[str, Any] = {"usage": asdict(now), "usage_from_cache": asdict(before)}
    if chat.prices is not None:
        found |= {"cost_usd": now.cost(chat.prices), "cost_usd_from_cache": before.cost(chat.prices)}
    return found


def _page(
    settings: Settings,
    conditions: dict[str, Any],
    found: dict[str, Any],
    cost: dict[str, Any],
    verdicts: Sequence[Verdict],
) -> str:
    error = "" if found["win_rate_se"] is None else f" ± {found['win_rate_se']:.4f}"
    lines = {
        "judge": " at ".join(str(conditions[name]) for name in ("judge", "judge_url") if name in conditions),
        "samples": str(settings.samples),
        "against": str(settings.against or "the reference responses"),
        "win / tie / loss": f"{found['win']} / {found['tie']} / {found['loss']}",
        "win-rate": f"{found['win_rate']:.4f}{error}   a tie is one half",
        "characters": f"{found['length']:.0f} against {found['length_other']:.0f}",
    }
    if cost:
        lines["inconsistent"] = f"{found['inconsistent']:.1%} of the verdicts changed with the order, and are ties"
        lines["asked now"] = _spent(cost["usage"], cost.get("cost_usd"))
        if cost["usage_from_cache"]["answers"]:
            lines["known before"] = _spent(cost["usage_from_cache"], cost.get("cost_usd_from_cache"))
    if found["failed"]:
        lines["FAILED"] = f"{found['failed']} of {len(verdicts)} comparisons, left out above: {_reasons(verdicts)}"
    width = max(map(len, lines))
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in lines.items()), "", _where(settings)])


def _spent(usage: dict[str, int], cost: float | None) -> str:
    line = f"{usage['answers']} answers: {usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out"
    if usage["uncounted"]:
        line += f"; {usage['uncounted']} came without a count"
    return line if cost is None else f"{line}; {cost:.4f} USD"


def _reasons(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(v.details["error"] for v in verdicts if v.outcome is None)
    return "; ".join(f"{count} with {reason}" for reason, count in counts.most_common(REASONS_SHOWN))


def _where(settings: Settings) -> str:
    return f"written to {settings.output_dir}"
