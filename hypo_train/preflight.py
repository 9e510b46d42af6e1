"""A whole run checked before it starts: settings, data, model and memory, in seconds and without any weights.

Everything is checked by the code that training uses, and what only weights can show is named as not checked. Nothing
is written but what ``datasets`` caches.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hypo_train.config import Config, ConfigError, load_config
from hypo_train.costs.estimate import Conditions, DeviceType, Estimate, SamplerKind, estimate
from hypo_train.costs.memory import GIB
from hypo_train.data.load import KINDS, check_texts
from hypo_train.data.report import DataReport
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.invocation import DryRun
from hypo_train.model.architectures import known_architecture
from hypo_train.model.load import check_causal, eos_token_ids, load_tokenizer, meta_model, outline, read_architecture
from hypo_train.model.miniature import UNKNOWN, Structure, look_at_structure
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import require_quantization
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.optim import require_optimizer
from hypo_train.plan import Plan, Rows, load_plan
from hypo_train.reference_cache import splits_to_precompute
from hypo_train.reward import load_function
from hypo_train.run import generation_config
from hypo_train.state import checkpoint_to_resume, refuse_to_overwrite
from hypo_train.trackers import require_trackers

RECIPES = Path(__file__).parent / "recipes"
DEVICES = (24, 48, 80, 141)  # GiB, of common ones
_LONGEST = "as long as they may be"
FREE = 0.9  # of a device: the rest is for CUDA's context, an allocator's slack and what is not estimated


@dataclass
class Findings:
    """What a dry run has found out."""

    config: Config
    problems: list[str] = field(default_factory=list)  # a run would be refused for them
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A mistake of the user's becomes a problem, and the checks go on."""
        try:
            yield
        except ValueError as error:
            if not isinstance(error, ConfigError) and type(error).__module__.split(".")[0] != "hypo_train":
                raise
            self.problems.append(str(error))

    def page(self) -> str:
        parts = {
            "": ["dry run: nothing was trained or written, and no weights were read"],
            "model": self.model,
            "steps": self.steps,
            "data": self.data,
            "memory": self.memory,
            "warnings": [*self.warnings, *self.config.warnings()],
            "not checked": self.unchecked,
        }
        lines = []
        for title, part in parts.items():
            if part:
                lines += ["", title, *(f"  {line}" for line in part)] if title else part
        return "\n".join(lines)


def check(config: Config, dry_run: DryRun) -> Findings:
    """Everything that can be known of the run beforehand, cheapest first."""
    with _offline_where_unreachable():
        return _checked(config, dry_run)


@contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """Without the Hub its cache serves at once; libraries would ask five times, for half a minute, to say so."""
    host = urlsplit(huggingface_hub.constants.ENDPOINT)
    unreachable = False
    if not getproxies():  # behind which the Hub may well be
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
        except OSError:
            unreachable = True
    settings: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was or unreachable
        yield
    finally:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _checked(config: Config, dry_run: DryRun) -> Findings:
    found = Findings(config)
    with found.collected():
        refuse_to_overwrite(config)
    with found.collected():
        checkpoint_to_resume(config)
    with found.collected():
        require_optimizer(config)
    with found.collected():
        require_quantization(config)
    with found.collected():
        require_trackers(config)
    with found.collected():
        if config.reward is not None:
            load_function(config.reward)
    device = cast(DeviceType, dry_run.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = device == "cuda" if config.bf16 is None else config.bf16
    source = None
    with found.collected():
        source = _Source.find(config, dry_run, found)
    plan = None
    with found.collected():
        plan = _check_data(config, source, found)
    trained, structure = None, UNKNOWN
    if source is not None:
        with found.collected():
            trained = outline(config, source.architecture, device_type=device, autocast=autocast)
        if trained is not None:
            with found.collected():
                structure = look_at_structure(config, source.architecture)
            _describe_model(config, source, trained, structure, found)
    if plan is not None:
        _describe_steps(config, plan, found)
    if trained is not None and source is not None:
        reward_model = None
        with found.collected():
            reward_model = _reward_model(config, source, found)
        if plan is None:
            found.warnings.append(f"without the data, memory is estimated for rows {_LONGEST}")
        shares_prompts = structure.shares_prompts is not False
        conditions = Conditions(device, autocast, shares_prompts, _sampler(config, structure))
        numbers = estimate(plan or _assumed_plan(config), trained, conditions, reward_model=reward_model)
        _describe_memory(config, numbers, device, autocast, found)
    return found


# The model


@dataclass(frozen=True)
class _Source:
    """Where architecture and tokenizer come from."""

    config: Config  # with the model that stands in, where one does
    architecture: Any
    tokenizer: Any  # None: it could not be had
    line: str

    @classmethod
    def find(cls, config: Config, dry_run: DryRun, found: Findings) -> _Source:
        """Raises ModelError where there is no architecture to go by."""
        wanted = config.model_name_or_path
        stand_in = "--dry_run_model NAME says what stands in for it in a dry run"
        makers = list(_makers(wanted, dry_run.recipe))
        made = f" ({makers[0].file} makes it)" if makers else ""
        name = dry_run.model or (makers[-1].start if makers else wanted)
        if _is_missing(name):
            what = "--dry_run_model" if dry_run.model is not None else "model_name_or_path"
            raise ModelError(f"{what}: there is no folder {name!r}" + ("" if dry_run.model else f": {stand_in}"))
        at = config.model_copy(update={"model_name_or_path": name})
        try:
            architecture, origin = _architecture(at)
        except ModelError as error:
            raise (ModelError(f"{error}{made}: {stand_in}") if dry_run.model is None else error) from None
        check_causal(architecture, at)
        line = f"config of {name}: {origin}"
        if name != wanted:
            there = "is there and not looked at" if Path(wanted).expanduser().is_dir() else "is no folder here"
            line = f"{wanted} {there}{made}: {name} stands in for it\n{line}"
        return cls(at, architecture, _tokenizer(at, origin, name != wanted, found), line)


def _architecture(config: Config) -> tuple[Any, str]:
    """The transformers config, and where it is from."""
    name = config.model_name_or_path
    try:
        found = read_architecture(config)
    except ModelError:
        known = None if Path(name).is_dir() else known_architecture(name)
        if known is None:
            raise
        return known, "built in, the Hub was not reached"
    return found, "local folder" if Path(name).expanduser().is_dir() else "the Hub, or its cache"


def _tokenizer(config: Config, origin: str, stands_in: bool, found: Findings) -> Any:
    """None, and a warning, where there is none because of where the dry run is, and not of what the run would load."""
    if origin.startswith("built in"):
        found.warnings.append(
            f"no tokenizer of {config.model_name_or_path}, as the Hub was not reached: lengths are unknown, and rows "
            f"are taken to be {_LONGEST}"
        )
        return None
    try:
        return load_tokenizer(config)
    except ModelError as error:
        if not stands_in:
            raise
        found.warnings.append(f"{error}: lengths are unknown, and rows are taken to be {_LONGEST}")
        return None


def _is_missing(name: str) -> bool:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return looks_local and not Path(name).expanduser().is_dir()


@dataclass(frozen=True)
class _Maker:
    """A recipe whose run makes a model."""

    file: Path
    start: str  # the model that it starts from


def _makers(path: str, recipe: str | None) -> Iterator[_Maker]:
    """The recipes to be run before there is a model at ``path``, the last to be run first: those beside the recipe at
    hand, and our own."""
    beside = sorted(Path(recipe).parent.glob("*.yaml")) if recipe is not None else []
    runs = [(file, config) for file in [*beside, *sorted(RECIPES.rglob("*.yaml"))] if (config := _readable(file))]
    seen: set[str] = set()
    while _is_missing(path) and path not in seen:
        seen.add(path)
        maker = next((run for run in runs if Path(run[1].output_dir) in Path(path).parents), None)
        if maker is None:
            return
        path = maker[1].model_name_or_path
        yield _Maker(maker[0], path)


def _readable(file: Path) -> Config | None:
    """None: no recipe, or one that is only the base of others."""
    try:
        return load_config(["--config", str(file)])
    except ConfigError:
        return None


def _describe_model(
    config: Config, source: _Source, trained: Policy | RewardModel, structure: Structure, found: Findings
) -> None:
    count = sum(p.numel() for p in trained.trained_parameters().values())
    everything = sum(p.numel() for p in trained.parameters()) - (count if config.use_peft else 0)
    layers = source.architecture.get_text_config().num_hidden_layers
    found.model += source.line.split("\n")
    found.model.append(f"{type(trained.base).__name__}, {layers} layers, {everything:,} parameters")
    how = "all"
    if config.use_peft:
        kind = "DoRA" if config.use_dora else "LoRA"
        below = ", over weights of 4 bits" if config.load_in_4bit else ""
        how = f"{kind}, rank {config.lora_r}, on {', '.join(_adapted(trained))}{below}"
    elif config.num_layers_unfrozen is not None:
        how = f"the last {config.num_layers_unfrozen} layers, the final norm and an untied head"
    found.model.append(
        f"training {count:,} {'more' if config.use_peft else 'of them'} ({count / everything:.1%}): {how}"
    )
    if structure.shares_prompts is None:
        found.unchecked.append("whether its completions can share their prompt (taken to)")
    elif structure.shares_prompts:
        found.model.append("completions share their prompt (shown by a miniature of the architecture)")
    else:
        found.model.append(f"each completion is trained on in a row of its own: {structure.why_separate_rows}")
    if structure.why_generate is not None and config.sampler in ("auto", "decode"):
        if config.sampler == "decode":
            found.problems.append(f"sampler=decode: {structure.why_generate}; use sampler: generate")
        found.model.append(f"samples come from transformers' generate: {structure.why_generate}")
    if config.use_liger_kernel:
        found.unchecked.append("whether Liger's kernels serve it (memory is without them)")
    found.unchecked.append("the weights themselves: that they load, and that the loss is exact on them")


def _adapted(trained: Policy | RewardModel) -> list[str]:
    """The names of the modules that have an adapter."""
    return sorted({name.split(".")[-1] for name, module in trained.model.named_modules() if hasattr(module, "lora_A")})


def _sampler(config: Config, structure: Structure) -> SamplerKind | None:
    if config.algorithm == "reward":
        return None
    if config.sampler in ("vllm", "generate"):
        return config.sampler
    return "generate" if structure.decodes is False else "decode"


def _reward_model(config: Config, source: _Source, found: Findings) -> Any:
    """The reward model on the meta device: its own architecture, or the policy's where it is not there yet."""
    if config.reward_model_path is None:
        return None
    path = config.reward_model_path
    if _is_missing(path):
        architecture = source.architecture
        found.model.append(f"reward model {path}: not there yet, counted as one of the policy's architecture")
    else:
        try:
            architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # transformers raises a different class for every way to fail
            if huggingface_hub.constants.HF_HUB_OFFLINE and not Path(path).is_dir():
                found.unchecked.append(f"reward model {path}, nor its memory: the Hub was not reached")
                return None
            raise ModelError(f"cannot read the config of reward_model_path={path!r}: {first_line(error)}") from error
        if (labels := architecture.num_labels) != 1:
            raise ModelError(f"reward_model_path={path!r} gives {labels} labels: a reward model has one")
        found.model.append(f"reward model {path}: {architecture.model_type}")
    return meta_model(AutoModelForSequenceClassification, config, architecture)


# Data and steps


def _check_data(config: Config, source: _Source | None, found: Findings) -> Plan:
    if source is not None and source.tokenizer is not None:
        ends = eos_token_ids(generation_config(source.config), source.tokenizer)
        plan, reports = load_plan(config, source.tokenizer, ends)
    else:
        reports = check_texts(config)
        counts = {name: report.used for name, report in reports.items()}
        plan = Plan(config, _longest_rows(config, counts["train"]), _longest_rows(config, counts.get("eval", 0)))
        found.unchecked.append("tokens of the data, their lengths and what is cut: there is no tokenizer")
    found.data += _lines(reports)
    return plan


def _lines(reports: dict[str, DataReport]) -> list[str]:
    return [f"{split}: {line}" for split, report in reports.items() for line in report.lines()]


def _longest_rows(config: Config, count: int) -> Rows:
    """As many rows of the largest lengths."""
    prompt, completion = (0,) * config.max_prompt_length, (0,) * config.max_completion_length
    kind = KINDS.get(config.algorithm, Pair)
    if kind is Pair:
        return [Pair(0, prompt, completion, completion)] * count
    if kind is Example:
        return [Example(0, prompt, completion)] * count
    return [Prompt(0, prompt)] * count


def _assumed_plan(config: Config) -> Plan:
    """One step of the largest rows, where the data cannot be read."""
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return Plan(config.model_copy(update={"max_steps": 1}), _longest_rows(config, batch_size), [])


def _describe_steps(config: Config, plan: Plan, found: Findings) -> None:
    kind = {"sft": "examples", "rloo": "prompts"}.get(config.algorithm, "pairs")
    epochs = plan.total_steps / plan.steps_per_epoch
    how = f"{config.gradient_accumulation_steps} micro-batches of {config.per_device_train_batch_size}"
    if config.max_tokens_per_micro_batch is not None:
        how = f"micro-batches of up to {config.max_tokens_per_micro_batch:,} tokens"
    elif plan.one_micro_batch:
        how = "one micro-batch"
    found.steps.append(
        f"{config.algorithm}: {plan.total_steps:,} steps of {plan.batch_size} {kind} in {how}, {epochs:.3g} epochs"
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
    rows = plan.largest_micro_batch()
    tokens = sum(plan.train_rows[i].num_tokens + plan.max_sampled for i in rows)
    return f"{len(rows)} rows, {tokens:,} tokens" + (", samples at their longest" if plan.max_sampled else "")


# Memory


def _describe_memory(config: Config, numbers: Estimate, device: DeviceType, autocast: bool, found: Findings) -> None:
    phases = numbers.phases
    compute = "bfloat16" if autocast else "float32"
    found.memory.append(f"GiB on {device}, computing in {compute}, when a step's parts hold most")
    found.memory.append(f"{'':46}" + "".join(f"{name:>11}" for name in phases))
    for part in numbers.components:
        found.memory.append(f"{part.name:46}" + "".join(f"{_gib(getattr(part, name)):>11}" for name in phases))
    found.memory.append(f"{'together':46}" + "".join(f"{_gib(number):>11}" for number in phases.values()))
    found.unchecked.append("memory of evaluations, of an allocator's slack, of CUDA's context and of libraries")
    if config.sampler == "vllm" and config.draws_samples:
        found.unchecked.append("memory of vLLM, which holds its own weights, keys and values")
    needed, room = numbers.least, _room(device)
    if room is None:
        fitting = next((size for size in DEVICES if needed <= FREE * size * GIB), None)
        fits = f"fits a device of {fitting} GiB" if fitting else f"fits no device of {DEVICES[-1]} GiB"
        found.memory.append(f"at least {_gib(needed)} GiB: {fits}, a tenth of it left free")
        room = None if fitting else int(DEVICES[-1] * GIB)
    else:
        found.memory.append(f"at least {_gib(needed)} GiB of the {_gib(room)} that are there")
    if room is not None and needed > FREE * room:
        found.warnings.append(
            f"memory: {_gib(needed)} GiB are more than nine tenths of {_gib(room)}: {_advice(config, numbers)}"
        )


def _gib(number: int) -> str:
    return f"{number / GIB:.2f}" if number else "-"


def _room(device: DeviceType) -> int | None:
    """Bytes of memory, free for the run; None: the device is not here. A CPU's holds this process as well."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - resident


def _advice(config: Config, numbers: Estimate) -> str:
    """What to change, by what takes most."""
    states = sum(max(part[1:]) for part in numbers.components if "weights" in part.name or "AdamW" in part.name)
    advice = []
    if numbers.of("activations").training > numbers.peak / 4:
        if config.per_device_train_batch_size > 1:
            advice.append("a smaller per_device_train_batch_size with more gradient_accumulation_steps")
        if config.gradient_checkpointing in (None, False, "selective"):
            advice.append("gradient_checkpointing: true")
        lower = "a lower " if config.max_tokens_per_micro_batch is not None else ""
        advice.append(f"{lower}max_tokens_per_micro_batch")
    if states > numbers.peak / 2:
        if not config.use_peft:
            advice.append("use_peft: true" + ("" if config.num_layers_unfrozen else " or num_layers_unfrozen"))
        if config.dtype == "float32" and (config.use_peft or config.num_layers_unfrozen):
            advice.append("dtype: bfloat16 with bf16: true for the frozen weights")
    if config.keep_sampling_memory:
        advice.append("keep_sampling_memory: false")
    return "try " + ", ".join(advice or ["shorter sequences"])
