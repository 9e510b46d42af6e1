"""What a step exchanges with other processes, and how long it may take."""

from __future__ import annotations

from hypo_train.costs.communication import Exchange, exchanges
from hypo_train.costs.estimate import Conditions
from hypo_train.costs.memory import readable
from hypo_train.costs.work import work_of
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.plan import Plan
from hypo_train.preflight.findings import Findings


def describe_time(plan: Plan, trained: Policy | RewardModel, conditions: Conditions, found: Findings) -> None:
    work = work_of(plan, conditions)
    count, sharded = plan.share.count, plan.config.fsdp
    exchanged = exchanges(trained, work.passes, count=count, sharded=sharded, autocast=conditions.autocast)
    if exchanged:
        found.time.append(_exchanges(exchanged, count, sharded))


def _exchanges(exchanged: list[Exchange], count: int, sharded: bool) -> str:
    how = "fsdp" if sharded else "DDP"
    names = {"gather": "weights for {}", "scatter": "gradients", "reduce": "gradients"}
    parts = [f"{names[e.kind].format(e.phase)} {readable(round(e.sent(count)))}" for e in exchanged]
    sent = readable(round(sum(e.sent(count) for e in exchanged)))
    return f"each of {count} devices sends {sent} a step ({how}): {', '.join(parts)}"
