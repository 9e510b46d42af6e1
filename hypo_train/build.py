"""Everything that a run needs, built and checked before its first step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan, Rows
from hypo_train.distributed.processes import Processes
from hypo_train.distributed.zero import ZeroOptimizer
from hypo_train.metrics.devices import peak_bf16
from hypo_train.metrics.flops import ModelFlops, UncountedError
from hypo_train.metrics.meter import FiniteWatch
from hypo_train.metrics.throughput import Throughput
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.model.load import load_on_meta, load_policy, load_reward_model
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import num_elements
from hypo_train.model.reference_cache import (
    cache_folder,
    pair_reference_logps,
    require_writable,
    splits_to_precompute,
)
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError
from hypo_train.model.weight_digest import initial_weights, weight_hashes
from hypo_train.optim import build_optimizer, build_scheduler
from hypo_train.preflight import Passed, passed
from hypo_train.preflight.consistency import require_same_contents, require_same_settings
from hypo_train.preflight.hub import offline_where_unreachable
from hypo_train.rewards import Reward, load_reward
from hypo_train.sampling import (
    DecodeSampler,
    Distribution,
    GenerateSampler,
    Sampler,
    ShardedSampler,
    VLLMSampler,
    serves,
)
from hypo_train.sampling.rollouts import Rollouts
from hypo_train.trees.pack import Batcher


@dataclass(frozen=True)
class Run:
    """Everything a step needs, built and checked before the first one."""

    plan: Plan
    accelerator: Accelerator
    processes: Processes
    tokenizer: Any
    trained: Policy | RewardModel  # bare, for its parameters
    model: Any  # the same as accelerate or DeepSpeed wraps it, for the forward pass that trains
    batcher: Batcher
    sampler: Sampler | None  # None: a reward model says nothing
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    reward: Reward | None
    notes: list[str]  # what the user should know that only weights have shown
    timer: PhaseTimer
    throughput: Throughput
    finite: FiniteWatch
    origin: dict[str, Any]  # what its checkpoints belong to, beside its settings
    # By split: the reference's log-probs of chosen and rejected, fp32 (rows, 2). ``precompute_ref_logps`` fills it.
    ref_logps: dict[str, Tensor] = field(default_factory=dict)
    data_report: dict[str, list[str]] = field(default_factory=dict)  # what became of the rows of each split

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
        """What is trained, where that is a policy: for sampling and the reference."""
        if not isinstance(self.trained, Policy):
            raise TypeError(f"{type(self.trained).__name__} is no policy")
        return self.trained

    @property
    def train_ref_logps(self) -> Tensor | None:
        """None: asked for in the step."""
        return self.ref_logps.get("train")

    @property
    def eval_ref_logps(self) -> Tensor | None:
        return self.ref_logps.get("eval")

    @property
    def zero(self) -> ZeroOptimizer | None:
        """The optimizer, where DeepSpeed keeps it in parts."""
        return self.optimizer if isinstance(self.optimizer, ZeroOptimizer) else None

    @property
    def has_reference(self) -> bool:
        """Whether the policy is held against a reference."""
        return self.config.has_reference

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def steps_ask_reference(self) -> bool:
        """Whether a training step passes anything through the reference."""
        c = self.config
        return c.has_reference and (c.draws_samples or self.train_ref_logps is None)

    @property
    def shares_trunk(self) -> bool:
        """Whether the frozen layers below the trained ones run once for policy and reference, where both run."""
        shares = self.config.share_trunk and not self.config.fsdp  # a sharded model's layers run all or none
        return shares and self.steps_ask_reference and bool(self.trained.trunk_layers)

    @property
    def prompts_run_first(self) -> bool:
        """Whether sampling goes on from the training pass's own run of the prompts."""
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
            prompts_of=lambda step: [list(plan.train_rows[i].prompt) for i in plan.rows_of_step(step)],
            rank_share=plan.rank_share,
            seed_of=plan.step_seed,
        )


def prepare(config: Config, *, show: Callable[[list[str]], None] | None = None) -> Run:
    """Load and check everything, cheapest first; ``show`` is given the lines of the page before weights are read.

    Raises:
        ValueError: it cannot be run.
    """
    _check_launcher()
    accelerator = build_accelerator(config)
    processes = Processes()
    with processes.report_failures():
        require_same_settings(processes, config, device_type=accelerator.device.type)
        _check_processes(config, processes.world_size)
        # Whoever fails alone, as where a file is missing on one machine, does so before anybody waits for the others.
        with offline_where_unreachable(config):
            loaded = processes.run_on_all(lambda: _loaded(config, accelerator, processes, show))
        _require_same_contents(processes, loaded)
        return _built(config, accelerator, processes, loaded)


@dataclass(frozen=True)
class _Loaded:
    """What a process reads and checks by itself."""

    checked: Passed
    reward: Reward | None
    why_texts: str | None
    trained: Policy | RewardModel
    # Of what the model's own passes show; where weights are to be sharded, on the main process alone, which has them.
    throughput: tuple[Throughput, str | None] | None
    sampler: tuple[Sampler, str | None] | None  # None too: weights are to be sharded


def _loaded(
    config: Config, accelerator: Accelerator, processes: Processes, show: Callable[[list[str]], None] | None
) -> _Loaded:
    autocast = accelerator.mixed_precision == "bf16"
    checked = passed(config, device_type=accelerator.device.type, autocast=autocast, rank_share=processes.rank_share)
    tokenizer, ends = checked.tokenizer, checked.eos_token_ids
    if splits_to_precompute(checked.plan):
        require_writable(cache_folder(config))
    if show is not None and processes.is_main:
        show(checked.findings.page())
    reward, why_texts = load_reward(config, checked.reward_function, tokenizer, ends, accelerator)
    torch.manual_seed(config.seed)  # the first weights of an adapter or a score
    pad = tokenizer.pad_token_id
    trained: Policy | RewardModel
    if config.fsdp and not processes.is_main:
        trained = load_on_meta(config, pad_token_id=pad, device_type=accelerator.device.type, autocast=autocast)
        return _Loaded(checked, reward, why_texts, trained, None, None)
    if config.spec.trains_reward_model:
        trained = load_reward_model(config, pad_token_id=pad, autocast=autocast)
    else:
        trained = load_policy(config, autocast=autocast)
    if config.fsdp:
        return _Loaded(checked, reward, why_texts, trained, _throughput(config, trained, accelerator), None)
    trained.to(accelerator.device)
    throughput = _throughput(config, trained, accelerator)
    sampler = build_sampler(config, trained, ends, pad) if isinstance(trained, Policy) else None
    return _Loaded(checked, reward, why_texts, trained, throughput, sampler)


def _require_same_contents(processes: Processes, loaded: _Loaded) -> None:
    checked = loaded.checked
    ends, pad = checked.eos_token_ids, checked.tokenizer.pad_token_id
    require_same_contents(
        processes,
        checked.plan,
        loaded.trained,
        tokens={"tokens that end": ends, "padding": [pad]},
        reward=loaded.reward,
        reward_function=checked.reward_function,
    )


def _sharded(
    config: Config, accelerator: Accelerator, processes: Processes, loaded: _Loaded
) -> tuple[tuple[Throughput, str | None], tuple[Sampler, str | None] | None]:
    """What its passes show of the model and draws from it, when the main process has given all processes their parts of
    its weights."""
    trained = loaded.trained
    base, counted = trained.base, loaded.throughput
    known = processes.run_on_main(lambda: (counted, trained.why_separate_rows, base.config._attn_implementation))
    counted, trained.why_separate_rows, attention = known
    assert counted is not None
    base.set_attn_implementation(attention)
    autocast = accelerator.mixed_precision == "bf16"
    trained.shard(accelerator.device, autocast=autocast, vocab_parallel=config.vocab_parallel)
    if not isinstance(trained, Policy):
        return counted, None
    ends, pad = loaded.checked.eos_token_ids, loaded.checked.tokenizer.pad_token_id
    return counted, trained.with_full_weights(lambda: build_sampler(config, trained, ends, pad))


def _built(config: Config, accelerator: Accelerator, processes: Processes, loaded: _Loaded) -> Run:
    trained, reward, plan = loaded.trained, loaded.reward, loaded.checked.plan
    tokenizer, total_steps = loaded.checked.tokenizer, plan.total_steps
    shown, drawing = loaded.throughput, loaded.sampler
    if config.fsdp:
        shown, drawing = _sharded(config, accelerator, processes, loaded)
    assert shown is not None
    throughput, why_uncounted = shown
    sampler, why_generate = drawing or (None, None)
    origin = {"rows": plan.rows_hashes, "weights": _digest(weight_hashes(initial_weights(trained)))}
    parameters = trained.trained_parameters()
    optimizer = build_optimizer(
        parameters.items(),
        optim=config.optim,
        roles=trained.parameter_roles,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    scheduler = build_scheduler(
        optimizer, config.lr_scheduler_type, round(config.warmup_ratio * total_steps), total_steps
    )
    model: Any = trained
    if config.zero_stage:
        optimizer = ZeroOptimizer(
            trained,
            optimizer,
            processes,
            stage=config.zero_stage,
            max_grad_norm=config.max_grad_norm,
            autocast=accelerator.mixed_precision == "bf16",
        )
        model = optimizer.engine
    else:
        optimizer = accelerator.prepare_optimizer(optimizer)
        model = trained if config.fsdp else accelerator.prepare_model(trained)
    if isinstance(trained, Policy):
        trained.move_reference(accelerator.device)
    count = sum(p.numel() for p in parameters.values())
    everything = sum(map(num_elements, trained.parameters()))
    notes = [f"training {count:,} of {everything:,} parameters for {total_steps} steps on {accelerator.device}"]
    if trained.why_separate_rows is not None:
        notes.append(f"each completion is trained on in a row of its own: {trained.why_separate_rows}")
    if loaded.why_texts is not None:
        notes.append(f"the reward model reads texts: {loaded.why_texts}")
    if why_generate is not None:
        notes.append(f"samples come from transformers' generate: {why_generate}")
    if why_uncounted is not None:
        notes.append(f"FLOPs are not logged: {why_uncounted}")
    return Run(
        plan=plan,
        accelerator=accelerator,
        processes=processes,
        tokenizer=tokenizer,
        trained=trained,
        model=model,
        batcher=Batcher(tokenizer.pad_token_id, shares_prompts=trained.shares_prompts),
        sampler=sampler,
        optimizer=optimizer,
        scheduler=scheduler,
        reward=reward,
        notes=notes,
        timer=PhaseTimer(accelerator.device),
        throughput=throughput,
        finite=FiniteWatch(accelerator.device),
        origin=origin,
        data_report=loaded.checked.findings.data,
    )


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_processes(config: Config, count: int) -> None:
    if count == 1 and config.fsdp:
        raise ConfigError("fsdp=true in one process: start several, as with torchrun --nproc_per_node 8 -m hypo_train")
    if count == 1 and config.zero_stage:
        raise ConfigError(
            f"zero_stage={config.zero_stage} in one process: start several, as with torchrun --nproc_per_node 8 -m "
            "hypo_train"
        )
    if count > 1 and config.sampler == "vllm":
        raise ConfigError(f"sampler=vllm in {count} processes: it runs in one so far, use sampler: auto")


def _check_launcher() -> None:
    """Before accelerate does what its launcher has asked for."""
    for variable, what in _NOT_OURS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(f"{variable} is set: {what}")


# What accelerate's launcher may have been told to do.
_NOT_OURS = {
    "ACCELERATE_USE_FSDP": "set fsdp: true here, and start with torchrun or accelerate launch --multi_gpu",
    "ACCELERATE_USE_DEEPSPEED": "set zero_stage: 1 or 2 here (fsdp: true for ZeRO-3's sharding), and start with "
    "torchrun or accelerate launch --multi_gpu",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not served, set fsdp: true here and start with torchrun",
}


def build_sampler(config: Config, policy: Policy, ends: Sequence[int], pad_token_id: int) -> tuple[Sampler, str | None]:
    """The configured engine, and why it is not the fast one where that was left to us."""
    why = serves(policy.model) if config.sampler in ("auto", "decode") else None
    if config.sampler == "decode" and why is not None:
        raise ModelError(f"sampler=decode: {why}; use sampler: generate")
    options: dict[str, Any] = {
        "eos_token_ids": ends,
        "pad_token_id": pad_token_id,
        "distribution": Distribution(config.temperature, config.top_k, config.top_p),
        "score": config.rollout_steps > 1,
    }
    if config.sampler == "vllm":
        longest = config.max_prompt_length + (config.max_new_tokens or config.max_completion_length)
        try:
            return VLLMSampler(policy.model, config.model_name_or_path, max_model_len=longest, **options), None
        except (ImportError, ValueError) as error:
            raise ModelError(f"sampler=vllm: {error} (or use sampler: auto)") from error
    engine: Any = GenerateSampler
    if config.sampler != "generate" and why is None:
        engine = DecodeSampler
        if config.fsdp:  # there is nothing to copy from, and no graph to capture, that outlasts a draw
            options |= {"merge_lora": False, "capture": False}
    sampler: Sampler = engine(policy.model, **options)
    return ShardedSampler(sampler, policy) if config.fsdp else sampler, why


def _throughput(
    config: Config, trained: Policy | RewardModel, accelerator: Accelerator
) -> tuple[Throughput, str | None]:
    """What counts the steps' work, and why it counts no FLOPs where it does not."""
    device, peak = accelerator.device, None
    if config.peak_tflops is not None:
        peak = config.peak_tflops * 1e12
    elif device.type == "cuda" and accelerator.mixed_precision == "bf16":
        peak = peak_bf16(torch.cuda.get_device_name(device))
    try:
        own = next(trained.parameters()).device  # what is to be sharded is still on the CPU
        with torch.autocast(own.type, torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
            return Throughput(ModelFlops.of(trained), peak), None
    except UncountedError as error:
        return Throughput(None, peak), str(error)


def precompute_ref_logps(run: Run, *, progress: bool) -> None:
    """Fill ``run.ref_logps`` where computing them once is cheaper, and free reference weights that no step needs.

    Evaluations that sample still need the reference: its weights wait for them on the CPU.
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


def build_accelerator(config: Config) -> Accelerator:
    bf16 = torch.cuda.is_available() if config.bf16 is None else config.bf16
    # Gradients lie in the buckets that DDP exchanges them in, not beside them.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    precision = "bf16" if bf16 else "no"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
