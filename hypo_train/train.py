"""The training loop, read top to bottom: prepare, step, log, evaluate, save.

A step is ``batch → sample → tree → log-probs of the reference → loss of the policy → backward → clip → step``.
Everything random in a step is a function of (seed, step), and so is its batch: a resumed run needs no state
but the weights, the optimizer's and the step's number.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hypo_train.log import RunLog
from torch import Tensor
from transformers import GenerationConfig

from hypo_kernels import HypoLoss, fused_hypo_loss, token_logprobs
from hypo_kernels.head import LMHead
from hypo_train.batch import example_tree, pair_tree
from hypo_train.checkpoint import checkpoint_folder, latest_checkpoint, load_checkpoint, prune, save_checkpoint
from hypo_train.config import Config, ConfigError
from hypo_train.data import Example, Pair, batch_indices, load_examples, load_pairs
from hypo_train.evaluate import Evaluation, RewardFunction, evaluate, load_reward, logprobs_of
from hypo_train.metrics import Meter, add_loss
from hypo_train.model import Policy, eos_token_ids, load_policy, load_tokenizer
from hypo_train.optim import build_optimizer, build_scheduler
from hypo_train.sampler import GenerateSampler, Sampler

# A run's steps draw from seeds of their own, above the small ones that evaluations use.
SEEDS_PER_RUN = 2**31


@dataclass(frozen=True)
class Run:
    """Everything a step needs, built and checked before the first one."""

    config: Config
    accelerator: Accelerator
    tokenizer: Any
    policy: Policy  # bare, for parameters, sampling and the reference
    model: Any  # the policy as accelerate wraps it, for the forward pass that trains
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    train_rows: Sequence[Pair] | Sequence[Example]
    eval_rows: Sequence[Pair] | Sequence[Example]
    reward: RewardFunction | None
    total_steps: int
    report: list[str]  # what the user should know about the data, the model and the settings

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps_per_epoch(self) -> float:
        return len(self.train_rows) / self.batch_size

    @property
    def batch_size(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps


@dataclass(frozen=True)
class Result:
    """Where the final model is, and the last evaluation (None without held-out rows)."""

    model_dir: Path
    evaluation: Evaluation | None


def train(config: Config, *, progress: bool = True) -> Result:
    """Run ``config`` from its data to a saved model. Raises ValueError, before any training, if it cannot."""
    _refuse_to_overwrite(config)
    run, meter = prepare(config), Meter()
    first_step = _resume(run, meter)
    log = RunLog(
        run.output_dir,
        run.total_steps,
        tensorboard=config.tensorboard,
        resume_step=first_step,
        progress=progress,
    )
    with log:
        for line in run.report:
            log.message(line)
        (run.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        evaluation = _train_from(run, log, meter, first_step)
    return Result(_save_model(run), evaluation)


def prepare(config: Config) -> Run:
    """Load and check everything, cheapest first: configuration, data, then the model."""
    reward = load_reward(config.reward)
    accelerator = _accelerator(config)
    tokenizer = load_tokenizer(config)
    ends = eos_token_ids(_generation_config(config), tokenizer)
    load = load_examples if config.algorithm == "sft" else load_pairs
    train_rows, eval_rows, reports = load(config, tokenizer, ends)
    total_steps = _total_steps(config, len(train_rows))
    torch.manual_seed(config.seed)  # the adapter's first weights
    policy = load_policy(config, autocast=accelerator.mixed_precision == "bf16").to(accelerator.device)
    parameters = policy.trained_parameters()
    optimizer = build_optimizer(
        parameters.items(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    scheduler = build_scheduler(
        optimizer, config.lr_scheduler_type, round(config.warmup_ratio * total_steps), total_steps
    )
    model, optimizer = accelerator.prepare(policy, optimizer)
    policy.reference_to(accelerator.device)
    sampler = GenerateSampler(
        policy.model,
        eos_token_ids=ends,
        pad_token_id=tokenizer.pad_token_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    trained = sum(p.numel() for p in parameters.values())
    everything = sum(p.numel() for p in policy.parameters())
    report = [f"{split}: {line}" for split, part in reports.items() for line in part.lines()]
    report.append(f"training {trained:,} of {everything:,} parameters for {total_steps} steps on {accelerator.device}")
    report += [f"warning: {line}" for line in config.warnings()]
    return Run(
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        model=model,
        sampler=sampler,
        optimizer=optimizer,
        scheduler=scheduler,
        train_rows=train_rows,
        eval_rows=eval_rows,
        reward=reward,
        total_steps=total_steps,
        report=report,
    )


def _train_from(run: Run, log: RunLog, meter: Meter, first_step: int) -> Evaluation | None:
    """Steps ``first_step`` to the end; the last evaluation."""
    config = run.config
    evaluation = None
    run.model.train()
    tokens, since = 0, time.perf_counter()
    if first_step == 0 and config.eval_steps:
        evaluation = _evaluate(run, log, 0)
    for step in range(first_step, run.total_steps):
        tokens += train_step(run, step, meter)
        done = step + 1
        log.advance(done)
        last = done == run.total_steps
        if last or done % config.logging_steps == 0:
            means = meter.read()
            elapsed = time.perf_counter() - since
            means |= {
                "learning_rate": run.scheduler.get_last_lr()[0],
                "epoch": done / run.steps_per_epoch,
                "tokens_per_second": tokens / elapsed,
            }
            log.log(done, means)
            tokens, since = 0, time.perf_counter()
        if last or (config.eval_steps and done % config.eval_steps == 0):
            evaluation = _evaluate(run, log, done)
            since = time.perf_counter()
        if last or (config.save_steps and done % config.save_steps == 0):
            _save(run, meter, done)
    return evaluation


def train_step(run: Run, step: int, meter: Meter) -> int:
    """One optimizer step; its statistics go to ``meter``. Returns the tokens that went through the model."""
    config = run.config
    torch.manual_seed(_step_seed(config, step))
    rows = [run.train_rows[i] for i in batch_indices(len(run.train_rows), run.batch_size, step, config.seed)]
    completions = _sample(run, rows, step) if config.algorithm == "hypo" else []
    k = len(completions) // len(rows)
    size = config.per_device_train_batch_size
    tokens = 0
    for start in range(0, len(rows), size):
        micro = rows[start : start + size]
        # One draw serves the whole step: the weights do not move between its micro-batches.
        drawn = completions[start * k : (start + len(micro)) * k]
        loss, seen = _sft_loss(run, micro, meter) if config.algorithm == "sft" else _loss(run, micro, drawn, meter)
        run.accelerator.backward(loss * (len(micro) / len(rows)))
        tokens += seen
    if config.max_grad_norm > 0:
        norm = run.accelerator.clip_grad_norm_(run.policy.trained_parameters().values(), config.max_grad_norm)
        meter.add("grad_norm", norm)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.sampler.weights_changed(step + 1)
    return tokens


def _sample(run: Run, rows: Sequence[Any], step: int) -> list[list[int]]:
    """``num_generations`` completions of each row's prompt, from the weights as they are."""
    config = run.config
    with run.accelerator.autocast():
        samples = run.sampler.sample(
            [list(row.prompt) for row in rows],
            config.num_generations,
            config.max_new_tokens or config.max_completion_length,
            seed=_step_seed(config, step),
        )
    return samples.completions()


def _loss(run: Run, pairs: Sequence[Pair], completions: Sequence[list[int]], meter: Meter) -> tuple[Tensor, int]:
    """The preference loss of a micro-batch, and its tokens."""
    config = run.config
    tree = pair_tree(pairs, completions, run.tokenizer.pad_token_id).to(run.accelerator.device)
    with run.accelerator.autocast():
        ref_logps = run.policy.reference(tree, logprobs_of(tree, config))

    def loss(hidden: Tensor, head: LMHead) -> HypoLoss:
        return fused_hypo_loss(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            num_pairs=len(pairs),
            num_generations=config.num_generations,
            ref_logps=ref_logps,
            beta=config.beta,
            kl_coef=config.kl_coef,
            length_penalty=config.length_penalty,
            preference="ipo" if config.algorithm == "ipo" else "sigmoid",
            label_smoothing=config.label_smoothing,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    out = run.model(tree, loss)
    add_loss(meter, out)
    return out.loss, tree.num_tokens


def _sft_loss(run: Run, examples: Sequence[Example], meter: Meter) -> tuple[Tensor, int]:
    """Mean negative log-prob of the completions' tokens, and the micro-batch's tokens."""
    tree = example_tree(examples, run.tokenizer.pad_token_id).to(run.accelerator.device)

    def losses(hidden: Tensor, head: LMHead) -> Tensor:
        return -token_logprobs(
            hidden,
            head.weight,
            tree.targets,
            max_chunk_bytes=run.config.max_chunk_bytes,
            impl=run.config.impl,
            **head.constants(),
        )

    tokens = run.model(tree, losses)
    meter.add("loss", tokens)
    return tokens.mean(), tree.num_tokens


def _evaluate(run: Run, log: RunLog, step: int) -> Evaluation | None:
    if not run.eval_rows:
        return None
    with run.accelerator.autocast():
        evaluation = evaluate(
            run.policy,
            run.sampler,
            run.eval_rows,
            run.config,
            run.tokenizer,
            run.accelerator.device,
            run.reward,
        )
    log.log(step, evaluation.metrics)
    folder = run.output_dir / "samples"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples]
    (folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
    return evaluation


def _save(run: Run, meter: Meter, step: int) -> None:
    save_checkpoint(
        checkpoint_folder(run.output_dir, step),
        step=step,
        model_state=run.policy.trained_parameters(),
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra={"config": run.config.model_dump(), "meter": meter.state()},
    )
    prune(run.output_dir, run.config.save_total_limit)


def _refuse_to_overwrite(config: Config) -> None:
    """A used output_dir is continued or left alone, never started over in silence."""
    if config.resume_from_checkpoint is None and (Path(config.output_dir) / "metrics.jsonl").exists():
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds a run: choose another folder, or continue that run "
            "with resume_from_checkpoint: auto"
        )


def _resume(run: Run, meter: Meter) -> int:
    """Put weights, optimizer, schedule and meter back to a checkpoint's; the step to go on from, or 0."""
    wanted = run.config.resume_from_checkpoint
    if wanted is None:
        return 0
    folder = latest_checkpoint(run.output_dir) if wanted == "auto" else Path(wanted)
    if folder is None:
        run.report.append(f"no checkpoint in {run.output_dir}: starting from the beginning")
        return 0
    if not folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint={wanted!r}: there is no such folder")
    checkpoint = load_checkpoint(folder, optimizer=run.optimizer, scheduler=run.scheduler, verify=wanted != "auto")
    _check_same_run(run.config, checkpoint.extra["config"], folder)
    parameters = run.policy.trained_parameters()
    with torch.no_grad():
        for name, saved in checkpoint.model_state.items():
            parameters[name].copy_(saved)
    meter.load(checkpoint.extra["meter"])
    run.sampler.weights_changed(checkpoint.step)
    run.report.append(f"continuing from {folder}, step {checkpoint.step}")
    return checkpoint.step


# What may change between a run and its continuation without changing what the steps compute.
FREE_TO_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "tensorboard",
    "eval_steps",
    "num_eval_prompts",
    "num_eval_samples",
    "per_device_eval_batch_size",
    "reward",
}


def _check_same_run(config: Config, saved: dict[str, Any], folder: Path) -> None:
    now = config.model_dump()
    changed = [
        f"{name} was {saved.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in FREE_TO_CHANGE and saved.get(name) != value
    ]
    if changed:
        raise ConfigError(f"{folder} is of another run: {'; '.join(changed)}")


def _save_model(run: Run) -> Path:
    """The final model and its tokenizer, complete or not there at all."""
    folder, unfinished = run.output_dir / "final", run.output_dir / "final.tmp"
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    run.policy.save_pretrained(unfinished)
    run.tokenizer.save_pretrained(unfinished)
    return unfinished.rename(folder)


def _step_seed(config: Config, step: int) -> int:
    return (config.seed + 1) * SEEDS_PER_RUN + step


def _generation_config(config: Config) -> GenerationConfig | None:
    """The checkpoint's own, for its list of end tokens; many have none."""
    try:
        return GenerationConfig.from_pretrained(config.model_name_or_path)
    except OSError:
        return None


def _accelerator(config: Config) -> Accelerator:
    bf16 = torch.cuda.is_available() if config.bf16 is None else config.bf16
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes > 1:
        raise ConfigError(f"started as {accelerator.num_processes} processes: training runs on one device so far")
    return accelerator


def _total_steps(config: Config, num_rows: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(1, round(config.num_train_epochs * max(1, num_rows // batch_size)))
