"""The rows of a run, and the steps that it makes of them."""

from __future__ import annotations

from hypo_train.config import Config
from hypo_train.data.load import ROW_TYPES, check_texts
from hypo_train.data.plan import Plan, Rows, load_plan
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.model.reference_cache import splits_to_precompute
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.source import Source
from hypo_train.utils.rank_share import RankShare


def check_data(config: Config, source: Source | None, found: Findings, rank_share: RankShare) -> Plan:
    """Rows as token ids; rows of the largest lengths where there is no tokenizer. Raises ``DataError``."""
    if source is not None and source.tokenizer is not None:
        plan, reports = load_plan(config, source.tokenizer, source.eos_token_ids, rank_share)
        _check_vocabulary(source, plan)
    else:
        reports = check_texts(config)
        counts = {name: report.used for name, report in reports.items()}
        rows = [_longest_rows(config, counts.get(split, 0)) for split in ("train", "eval")]
        plan = Plan(config, rows[0], rows[1], rank_share=rank_share)
        found.unchecked.append("tokens of the data, their lengths and what is cut: there is no tokenizer")
    for split, report in reports.items():
        found.data[split] = report.lines()
        found.warnings += [f"{split}: {line}" for line in report.warnings()]
    return plan


def _check_vocabulary(source: Source, plan: Plan) -> None:
    """Raise ModelError for token ids of rows or padding that the model has no embedding of."""
    tokenizer, size = source.tokenizer, getattr(source.architecture.get_text_config(), "vocab_size", None)
    if size is None or len(tokenizer) <= size:
        return
    texts = [ids for row in [*plan.train_rows, *plan.eval_rows] for ids in vars(row).values() if isinstance(ids, tuple)]
    largest = max(tokenizer.pad_token_id, *map(max, texts))
    if largest >= size:
        token, name = tokenizer.convert_ids_to_tokens(largest), source.config.model_name_or_path
        raise ModelError(
            f"model_name_or_path={name!r}: the model knows {size} tokens, and its tokenizer has {len(tokenizer)}, of "
            f"which {token!r} ({largest}) is needed: use the tokenizer that the model was trained with, or save the "
            "model after resize_token_embeddings"
        )


def _longest_rows(config: Config, count: int) -> Rows:
    """As many rows of the largest lengths."""
    prompt, completion = (0,) * config.max_prompt_length, (0,) * config.max_completion_length
    kind = ROW_TYPES[config.spec.row_type]
    if kind is Pair:
        return [Pair(0, prompt, completion, completion)] * count
    if kind is Example:
        return [Example(0, prompt, completion)] * count
    return [Prompt(0, prompt)] * count


def assumed_plan(config: Config, rank_share: RankShare) -> Plan:
    """One step of the largest rows, where the data cannot be read."""
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * rank_share.world_size
    return Plan(
        config.model_copy(update={"max_steps": 1}), _longest_rows(config, batch_size), [], rank_share=rank_share
    )


def describe_steps(config: Config, plan: Plan, found: Findings) -> None:
    kind = config.spec.row_noun
    epochs = plan.total_steps / plan.steps_per_epoch
    how = f"{config.gradient_accumulation_steps} micro-batches of {config.per_device_train_batch_size}"
    if config.max_tokens_per_micro_batch is not None:
        how = f"micro-batches of up to {config.max_tokens_per_micro_batch:,} tokens"
    elif plan.one_micro_batch:
        how = "one micro-batch"
    everywhere = f" on {plan.world_size} processes, each" if plan.world_size > 1 else ""
    found.steps.append(
        f"{config.algorithm}: {plan.total_steps:,} steps of {plan.batch_size} {kind}{everywhere} in {how}, "
        f"{epochs:.3g} epochs"
    )
    rate = f"{config.lr_scheduler_type}, warm-up {round(config.warmup_ratio * plan.total_steps)} steps"
    found.steps.append(f"{config.optim}, learning rate {config.learning_rate:g} ({rate})")
    if config.draws_samples:
        found.steps.append(f"{config.num_generations} samples of each prompt, of up to {plan.max_new_tokens} tokens")
    if plan.batch_size > len(plan.train_rows):
        found.warnings.append(f"a step has room for {plan.batch_size} {kind}, and there are {len(plan.train_rows)}")
    if known := splits_to_precompute(plan):
        found.steps.append(f"the reference's log-probs of {' and '.join(sorted(known))} pairs are computed beforehand")
    found.steps.append(f"largest micro-batch: {_size(plan)}")
    found.steps.append(f"output in {config.output_dir}")


def _size(plan: Plan) -> str:
    rows = plan.largest_micro_batch
    tokens = sum(plan.train_rows[i].num_tokens + plan.max_sampled for i in rows)
    return f"{len(rows)} rows, {tokens:,} tokens" + (", samples at their longest" if plan.max_sampled else "")
