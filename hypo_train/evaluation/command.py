"""Evaluate a finished run or a model: write metrics and samples, and print a table."""

from __future__ import annotations

import math
from typing import Any

from hypo_train.evaluation.finished import FinishedRun, prepare_finished
from hypo_train.evaluation.held_out import Evaluation, KLRule, evaluate
from hypo_train.evaluation.settings import EvaluateSettings
from hypo_train.utils.quiet import quiet_libraries
from hypo_train.utils.records import make_folder, write_csv, write_json, write_json_lines


def run(settings: EvaluateSettings) -> int:
    """Evaluate, write ``metrics.json``, ``samples.jsonl`` and ``samples.csv``, and print the metrics.

    Returns the exit status 0.
    """
    quiet_libraries()
    finished = prepare_finished(settings)
    for line in finished.report:
        print(line, flush=True)
    folder = settings.output_dir
    make_folder(folder, "output_dir")
    eos_token_ids = finished.eos_token_ids if settings.kl_mask == "all" else ()
    with finished.accelerator.autocast():
        evaluation = evaluate(finished, KLRule(settings.kl_temperature, eos_token_ids), progress=True)
    conditions = _conditions(settings, finished)
    if evaluation.samples:
        write_json_lines(folder / "samples.jsonl", evaluation.samples)
        write_csv(folder / "samples.csv", evaluation.samples)
    metrics = {name: value if math.isfinite(value) else None for name, value in evaluation.metrics.items()}
    # Written last, so that its existence marks a complete evaluation.
    write_json(folder / "metrics.json", {**conditions, "metrics": metrics})
    print(_page(settings, evaluation))
    return 0


def _conditions(settings: EvaluateSettings, finished: FinishedRun) -> dict[str, Any]:
    """Return the settings that metrics depend on. Compare only evaluations with equal conditions."""
    config = finished.config
    conditions: dict[str, Any] = {
        "model": str(settings.model_dir),
        "reference": settings.reference,
        "dataset_name": config.dataset_name,
        "split": config.dataset_test_split or f"the last {config.num_eval_rows} of {config.dataset_train_split}",
        "rows": len(finished.eval_rows),
    }
    if finished.sampler is None:
        return conditions
    conditions |= {
        "prompts_sampled": min(config.num_eval_prompts, len(finished.eval_rows)),
        "samples_per_prompt": config.num_eval_samples,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "max_new_tokens": finished.max_new_tokens,
        "logps_temperature": settings.training_temperature,
    }
    if finished.has_reference:
        conditions |= {"kl_temperature": settings.kl_temperature, "kl_mask": settings.kl_mask, "beta": config.beta}
        conditions["warnings"] = settings.warnings()
    if finished.reward is not None:
        conditions["reward"] = config.reward or config.reward_model_path
        conditions["missing_eos_penalty"] = config.missing_eos_penalty
    return conditions


def _page(settings: EvaluateSettings, evaluation: Evaluation) -> str:
    """Return the printed table of the metrics, with standard errors if they are known."""
    shown = {name: value for name, value in evaluation.metrics.items() if not name.endswith("_se")}
    width = max(map(len, shown), default=0)
    lines = [""]
    for name, value in shown.items():
        error = evaluation.metrics.get(f"{name}_se", math.nan)
        line = f"{name:<{width}}  {value:10.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        if name == "eval_kl":
            line += f"   nats a sample; kl_temperature={settings.kl_temperature:g}, kl_mask={settings.kl_mask}"
        lines.append(line)
    return "\n".join([*lines, "", f"written to {settings.output_dir}"])
