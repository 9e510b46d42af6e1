"""Describe the steps of a run, and check that the model has an embedding for each token of the rows."""

from __future__ import annotations

from hypo_train.config import Config
from hypo_train.data.plan import Plan
from hypo_train.inputs import Source
from hypo_train.model.reference_cache import splits_to_precompute
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight.findings import Findings


def check_vocabulary(source: Source, plan: Plan) -> None:
    """Raise ModelError if the model has no embedding for a token of the rows or for the pad token."""
    tokenizer, size = source.tokenizer, getattr(source.architecture.get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values())  # not the number of tokens: ids may have gaps
    if size is None or highest < size:
        return
    texts = [ids for row in [*plan.train_rows, *plan.eval_rows] for ids in vars(row).values() if isinstance(ids, tuple)]
    largest = max(tokenizer.pad_token_id, *map(max, texts))
    if largest >= size:
        token, name = tokenizer.convert_ids_to_tokens(largest), source.config.model_name_or_path
        raise ModelError(
            f"model_name_or_path={name!r}: the model knows {size} tokens, and its tokenizer has ids up to {highest}, "
            f"of which {token!r} ({largest}) is needed: use the tokenizer that the model was trained with, or save the "
            "model after resize_token_embeddings"
        )


def describe_steps(config: Config, plan: Plan, findings: Findings) -> None:
    """Put the lines on the steps of a run on the page."""
    kind = config.spec.row_noun
    epochs = plan.total_steps / plan.steps_per_epoch
    how = f"{config.gradient_accumulation_steps} micro-batches of {config.per_device_train_batch_size}"
    if config.max_tokens_per_micro_batch is not None:
        how = f"micro-batches of up to {config.max_tokens_per_micro_batch:,} tokens"
    elif plan.one_micro_batch:
        how = "one micro-batch"
    processes = f" on {plan.world_size} processes, each" if plan.world_size > 1 else ""
    steps = f"{plan.total_steps:,} step{'s' * (plan.total_steps > 1)} of {plan.batch_size} {kind}"
    findings.steps.append(
        f"{config.algorithm}: {steps}{processes} in {how}, {epochs:.3g} epoch{'s' * (epochs != 1)}{_last_step(plan)}"
    )
    rate = f"{config.lr_scheduler_type}, warm-up {config.num_warmup_steps(plan.total_steps)} steps"
    findings.steps.append(f"{config.optim}, learning rate {config.learning_rate:g} ({rate})")
    if config.draws_samples:
        findings.steps.append(_samples(plan))
        if not any(map(plan.num_online, range(plan.total_steps))):
            findings.warnings.append(
                f"no prompt of this run gets samples: online_fraction={config.online_fraction:g} of the "
                f"{plan.total_steps:,} steps' rows is less than one, use a larger one"
            )
    if plan.batch_size > len(plan.train_rows):
        findings.warnings.append(
            f"a step trains on up to {plan.batch_size} {kind}, but the data has only {len(plan.train_rows)}"
        )
    if plan.rows_per_epoch < len(plan.train_rows):
        findings.warnings.append(_left_out(plan))
    if splits := splits_to_precompute(plan):
        findings.steps.append(
            f"the reference's log-probs of {' and '.join(sorted(splits))} pairs are computed beforehand"
        )
    findings.steps.append(f"largest micro-batch: {_size(plan)}")
    findings.steps.append(f"output in {config.output_dir}")


def _samples(plan: Plan) -> str:
    """Return a line on the samples of a step."""
    config, lengths = plan.config, f"of up to {plan.max_new_tokens} tokens"
    if config.online_fraction == 1:
        return f"{config.num_generations} samples of each prompt, {lengths}"
    online = f"{config.online_fraction * plan.batch_size:.3g} of {plan.batch_size} prompts a step"
    return f"{config.num_generations} samples of {online} (online_fraction={config.online_fraction:g}), {lengths}"


def _last_step(plan: Plan) -> str:
    """Return how many rows the last step of an epoch has, if they are fewer than those of the others."""
    rest = plan.rows_per_epoch % plan.batch_size
    return f"; the last step of an epoch has {rest}" if rest and plan.steps_per_epoch > 1 else ""


def _left_out(plan: Plan) -> str:
    """Return a warning about the rows that fill no step."""
    count, kind = len(plan.train_rows) - plan.rows_per_epoch, plan.config.spec.row_noun
    why = (
        "dataloader_drop_last=true"
        if plan.config.dataloader_drop_last
        else f"each of {plan.world_size} processes needs one"
    )
    return f"{count} of {len(plan.train_rows)} {kind} fill no step and are left out of each epoch ({why})"


def _size(plan: Plan) -> str:
    largest = plan.largest_micro_batch
    samples = ", with samples of the maximal length" if plan.max_sampled else ""
    return f"{len(largest.rows)} rows, {largest.tokens:,} tokens{samples}"
