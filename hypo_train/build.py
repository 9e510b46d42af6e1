"""Build a run: its models with their weights, its sampler, optimizer and schedule.

Inputs are not checked here: :mod:`hypo_train.prepare` loads them, checks them, and then builds the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from hypo_train.config import Config
from hypo_train.data.plan import Plan, Rows
from hypo_train.distributed.processes import Processes
from hypo_train.distributed.zero import ZeroOptimizer
from hypo_train.inputs import Inputs
from hypo_train.metrics.devices import peak_bf16
from hypo_train.metrics.flops import ModelFlops, UncountedError
from hypo_train.metrics.meter import FiniteWatch
from hypo_train.metrics.throughput import Throughput
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.model.load import load_on_meta, load_policy, load_reward_model
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import num_elements
from hypo_train.model.reference_cache import cache_folder, pair_reference_logps, splits_to_precompute
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.weight_digest import initial_weights, weight_hashes
from hypo_train.optim import build_optimizer, build_scheduler
from hypo_train.precision import computes_in_bf16
from hypo_train.rewards import Reward, load_reward
from hypo_train.sampling import Distribution, Sampler, ShardedSampler
from hypo_train.sampling.registry import SamplerSettings, choose_sampler
from hypo_train.sampling.rollouts import Rollouts
from hypo_train.trees.pack import Batcher


@dataclass(frozen=True)
class Run:
    """The objects that a training step needs."""

    plan: Plan  # the configuration, and the rows of each step
    accelerator: Accelerator
    processes: Processes
    tokenizer: Any
    trained: Policy | RewardModel  # not wrapped, for access to its parameters
    model: Any  # ``trained`` as wrapped by accelerate or DeepSpeed, for training forward passes
    batcher: Batcher
    sampler: Sampler | None  # None for a reward model
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reward: Reward | None
    notes: list[str]  # facts for the user that are known only after loading the weights
    timer: PhaseTimer
    throughput: Throughput
    finite: FiniteWatch
    origin: dict[str, Any]  # hashes of the rows and the initial weights, for checkpoints
    data_report: dict[str, list[str]]  # split -> lines about its rows
    # Split -> the reference's log-probs of chosen and rejected, fp32 (rows, 2). ``precompute_ref_logps`` fills it.
    ref_logps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def eval_rows(self) -> Rows:
        return self.plan.eval_rows

    @property
    def max_new_tokens(self) -> int:
        return self.plan.max_new_tokens

    @property
    def policy(self) -> Policy:
        """The trained policy. Raises TypeError if the run trains a reward model."""
        if not isinstance(self.trained, Policy):
            raise TypeError(f"{type(self.trained).__name__} is no policy")
        return self.trained

    @property
    def train_ref_logps(self) -> Tensor | None:
        """The reference's log-probs of the training pairs; None if each step computes them."""
        return self.ref_logps.get("train")

    @property
    def eval_ref_logps(self) -> Tensor | None:
        """The reference's log-probs of the evaluation pairs; None if each evaluation computes them."""
        return self.ref_logps.get("eval")

    @property
    def zero(self) -> ZeroOptimizer | None:
        """The optimizer if DeepSpeed's ZeRO shards it, else None."""
        return self.optimizer if isinstance(self.optimizer, ZeroOptimizer) else None

    @property
    def has_reference(self) -> bool:
        """True if the loss compares the policy with a reference model."""
        return self.config.has_reference

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps_ask_reference(self) -> bool:
        """True if training steps run the reference model."""
        return self.has_reference and (self.config.draws_samples or self.train_ref_logps is None)

    @property
    def shares_trunk(self) -> bool:
        """True if one pass of the frozen layers below the trained ones serves both policy and reference."""
        can_share = self.config.share_trunk and not self.config.fsdp  # FSDP gathers layers only for full passes
        return can_share and self.steps_ask_reference and bool(self.trained.trunk_layers)

    @property
    def prompts_run_first(self) -> bool:
        """True if the sampler uses keys and values of the training pass over the prompts."""
        if self.sampler is None or not self.plan.may_run_prompts_first:
            return False
        return self.policy.shares_prompts and self.sampler.takes_prompt_kv

    @cached_property
    def rollouts(self) -> Rollouts:
        """The samples of each step."""
        assert self.sampler is not None
        plan = self.plan
        return Rollouts(
            self.sampler,
            num_steps=self.config.rollout_steps,
            total_steps=plan.total_steps,
            num_generations=self.config.num_generations,
            max_new_tokens=plan.max_new_tokens,
            prompts_of=lambda step: [list(row.prompt) for row in plan.online_rows(step)],
            rank_share=plan.rank_share,
            seed_of=plan.step_seed,
        )


def build_accelerator(config: Config) -> Accelerator:
    """Return accelerate's Accelerator for the run, with its device, mixed precision and DDP options."""
    # With gradients as views of DDP's buckets, they are in memory once.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if computes_in_bf16(config, device_type) else "no"
    return Accelerator(mixed_precision=precision, cpu=device_type == "cpu", kwargs_handlers=[ddp])


@dataclass
class Models:
    """The trained model and the reward of one process, with explanations for the user."""

    trained: Policy | RewardModel
    reward: Reward | None
    why_reward_reads_texts: str | None
    flops: ModelFlops | None = None
    why_uncounted: str | None = None


def load_models(inputs: Inputs, accelerator: Accelerator, *, is_main: bool) -> Models:
    """Load the reward and the trained model, onto the device unless it will be sharded.

    With ``fsdp``, only the main process reads the weights; the others create the model on the meta device.

    Raises:
        ModelError: a model cannot be loaded, or its loss would not be exact.
    """
    config, source = inputs.config, inputs.source
    assert source is not None
    tokenizer, autocast = source.tokenizer, accelerator.mixed_precision == "bf16"
    pad = tokenizer.pad_token_id
    reward = load_reward(config, inputs.reward_function, tokenizer, source.eos_token_ids, accelerator)
    torch.manual_seed(config.seed)  # for the initial weights of an adapter or a score head
    if config.fsdp and not is_main:
        device_type = accelerator.device.type
        return Models(load_on_meta(config, pad_token_id=pad, device_type=device_type, autocast=autocast), *reward)
    trained: Policy | RewardModel
    if config.spec.trains_reward_model:
        trained = load_reward_model(config, pad_token_id=pad, autocast=autocast)
    else:
        trained = load_policy(config, autocast=autocast)
    if not config.fsdp:
        trained.to(accelerator.device)
    models = Models(trained, *reward)
    device = next(trained.parameters()).device
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            models.flops = ModelFlops.of(trained)
    except UncountedError as error:
        models.why_uncounted = str(error)
    return models


def shard(models: Models, config: Config, accelerator: Accelerator, processes: Processes) -> None:
    """Distribute the weights, and the facts about the model, from the main process to all processes."""
    trained = models.trained
    models.flops, models.why_uncounted, trained.why_separate_rows, attention = processes.run_on_main(
        lambda: (
            models.flops,
            models.why_uncounted,
            trained.why_separate_rows,
            trained.base.config._attn_implementation,
        )
    )
    trained.base.set_attn_implementation(attention)
    autocast = accelerator.mixed_precision == "bf16"
    trained.shard(accelerator.device, autocast=autocast, vocab_parallel=config.vocab_parallel)


def build_sampler(config: Config, policy: Policy, ends: Sequence[int], pad_token_id: int) -> tuple[Sampler, str | None]:
    """Return the configured sampler and, if ``sampler: auto`` chose ``generate``, the reason.

    Args:
        ends: tokens that end a completion.

    Raises:
        ConfigError: the configured sampler does not exist or does not support the model.
    """
    entry, reason = choose_sampler(config.sampler, policy.model)
    settings = SamplerSettings(
        eos_token_ids=ends,
        pad_token_id=pad_token_id,
        distribution=Distribution(config.temperature, config.top_k, config.top_p),
        score=config.rollout_steps > 1,
        is_sharded=config.fsdp,
        model_name_or_path=config.model_name_or_path,
        max_model_len=config.max_prompt_length + (config.max_new_tokens or config.max_completion_length),
    )
    sampler = entry.build(policy.model, settings)
    return ShardedSampler(sampler, policy) if config.fsdp else sampler, reason


def build_throughput(config: Config, flops: ModelFlops | None, accelerator: Accelerator) -> Throughput:
    """Return the counter of tokens and FLOPs, with the peak of the device if it is known."""
    device, peak = accelerator.device, None
    if config.peak_tflops is not None:
        peak = config.peak_tflops * 1e12
    elif device.type == "cuda" and accelerator.mixed_precision == "bf16":
        peak = peak_bf16(torch.cuda.get_device_name(device))
    return Throughput(flops, peak)


def build_run(inputs: Inputs, models: Models, accelerator: Accelerator, processes: Processes) -> Run:
    """Shard the trained model if configured, add its sampler, optimizer and schedule, and return the run.

    Raises:
        ModelError: the configured sampler does not support the model.
    """
    config, source, plan, trained = inputs.config, inputs.source, inputs.plan, models.trained
    assert source is not None
    pad = source.tokenizer.pad_token_id
    if config.fsdp:
        shard(models, config, accelerator, processes)
    sampler, why_generate = None, None
    if isinstance(policy := trained, Policy):

        def build() -> tuple[Sampler, str | None]:
            return build_sampler(config, policy, source.eos_token_ids, pad)

        sampler, why_generate = processes.run_on_all(
            lambda: policy.with_full_weights(build) if config.fsdp else build()
        )
    weights = json.dumps(weight_hashes(initial_weights(trained)), sort_keys=True).encode()
    optimizer, scheduler, model = _build_optimizer(config, trained, plan.total_steps, accelerator, processes)
    if isinstance(trained, Policy):
        trained.move_reference(accelerator.device)
    return Run(
        plan=plan,
        accelerator=accelerator,
        processes=processes,
        tokenizer=source.tokenizer,
        trained=trained,
        model=model,
        batcher=Batcher(pad, shares_prompts=trained.shares_prompts),
        sampler=sampler,
        optimizer=optimizer,
        scheduler=scheduler,
        reward=models.reward,
        notes=_notes(models, plan, accelerator.device, why_generate),
        timer=PhaseTimer(accelerator.device),
        throughput=build_throughput(config, models.flops, accelerator),
        finite=FiniteWatch(accelerator.device),
        origin={"rows": plan.rows_hashes, "weights": hashlib.sha256(weights).hexdigest()},
        data_report=inputs.data_report,
    )


def _build_optimizer(
    config: Config, trained: Policy | RewardModel, total_steps: int, accelerator: Accelerator, processes: Processes
) -> tuple[Any, torch.optim.lr_scheduler.LRScheduler, Any]:
    """Return the optimizer, the scheduler, and the model wrapped by DDP or DeepSpeed."""
    optimizer: Any = build_optimizer(
        trained.trained_parameters().items(),
        optim=config.optim,
        roles=trained.parameter_roles,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    warmup_steps = config.num_warmup_steps(total_steps)
    scheduler = build_scheduler(
        optimizer, config.lr_scheduler_type, warmup_steps, total_steps, config.lr_scheduler_kwargs
    )
    if config.zero_stage:
        optimizer = ZeroOptimizer(
            trained,
            optimizer,
            processes,
            stage=config.zero_stage,
            max_grad_norm=config.max_grad_norm,
            autocast=accelerator.mixed_precision == "bf16",
        )
        return optimizer, scheduler, optimizer.engine
    optimizer = accelerator.prepare_optimizer(optimizer)
    return optimizer, scheduler, trained if config.fsdp else accelerator.prepare_model(trained)


def _notes(models: Models, plan: Plan, device: torch.device, why_generate: str | None) -> list[str]:
    trained = models.trained
    count = sum(p.numel() for p in trained.trained_parameters().values())
    total = sum(map(num_elements, trained.parameters()))
    reasons = {
        "each completion is trained on in a row of its own": trained.why_separate_rows,
        "the reward model reads texts": models.why_reward_reads_texts,
        "samples come from transformers' generate": why_generate,
        "FLOPs are not logged": models.why_uncounted,
    }
    return [
        f"training {count:,} of {total:,} parameters for {plan.total_steps} steps on {device}",
        *(f"{consequence}: {reason}" for consequence, reason in reasons.items() if reason is not None),
    ]


def precompute_ref_logps(run: Run, *, progress: bool) -> None:
    """Precompute ``run.ref_logps`` if that is cheaper, and free reference weights that no step needs.

    If only evaluations need the reference, its weights are moved to the CPU until then.
    """
    config, device = run.config, run.accelerator.device
    if not isinstance(run.trained, Policy):
        return
    splits: dict[str, Any] = {"train": run.plan.train_rows, "eval": run.plan.eval_rows}
    to_precompute = splits_to_precompute(run.plan)
    for split in [name for name in splits if name in to_precompute]:
        run.ref_logps[split] = pair_reference_logps(
            run.policy,
            splits[split],
            config,
            batcher=run.batcher,
            device=device,
            processes=run.processes,
            autocast=run.accelerator.mixed_precision == "bf16",
            folder=cache_folder(config),
            split=split,
            progress=progress,
        )
    if not config.has_reference or not (run.steps_ask_reference or run.eval_rows):
        run.policy.drop_reference()
    elif not run.steps_ask_reference:
        run.policy.move_reference(torch.device("cpu"))
