"""HyPO for users of TRL: ``HyPOTrainer`` is a ``DPOTrainer`` with this project's loss and sampler.

    from hypo_train.trl import HyPOConfig, HyPOTrainer

    trainer = HyPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=HyPOConfig("out", kl_coef=1e-3), train_dataset=dataset)
    trainer.train()

Data sets, models, adapters, checkpoints, callbacks and loggers are TRL's. The trainer replaces the part of a step
between the batch and its loss: it samples from the live weights, computes each prompt once for its pair and samples
where the model's attention supports that, and computes loss and gradients from hidden states.

The metrics are TRL's without the four that need logits (entropy, logits/chosen, logits/rejected, mean_token_accuracy).
Three are new: ``kl``, the reverse KL of a whole sample to the reference model, ``completions/mean_length`` and
``completions/clipped_ratio``.

TRL's trainers send a telemetry message to Hugging Face when they are created; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.config import Config, ConfigError, checked
from hypo_train.data.errors import DataError
from hypo_train.data.plan import SEEDS_PER_RUN
from hypo_train.data.rows import Pair
from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import make_exact
from hypo_train.model.policy import Policy
from hypo_train.model.positions import LongestRow
from hypo_train.model.router_loss import has_router_loss
from hypo_train.model.source import eos_token_ids
from hypo_train.sampling import Distribution, Sampler, Samples
from hypo_train.sampling.registry import AUTO, SamplerSettings, choose_sampler
from hypo_train.trees.pack import Batcher
from hypo_train.trees.tree import Tree

_NEEDS = "hypo_train.trl needs TRL: pip install 'trl>=1.16'"
try:
    import trl
    from datasets import Dataset
    from pyarrow import compute
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise ImportError(_NEEDS) from error
if Version(trl.__version__) < Version("1.16"):
    raise ImportError(f"{_NEEDS} (found {trl.__version__})")


@dataclass
class HyPOConfig(trl.DPOConfig):
    """``DPOConfig`` with the settings of HyPO.

    Raises:
        ConfigError: a value is out of range, or an option of DPO is set that HyPO's loss does not have.
    """

    kl_coef: float = field(
        default=1e-4,
        metadata={"help": "Weight of the reverse KL to the reference model, a sum over completion tokens; 0 is DPO."},
    )
    num_generations: int = field(
        default=2, metadata={"help": "Samples for each prompt; each is a baseline for the others, so at least 2."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum number of tokens of a sample, with EOS."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of policy and reference model, in sampling and in every log-prob of the loss."},
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Added to a sample's log-ratio for each of its tokens."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_options(self)
        self.loss_settings()

    def loss_settings(self) -> Config:
        """Return these settings as a ``Config`` of ``hypo_train``."""
        return checked(
            {
                "algorithm": "hypo" if self.kl_coef else "dpo",
                "model_name_or_path": "the trainer's",
                "dataset_name": "the trainer's",
                "beta": self.beta,
                "kl_coef": self.kl_coef,
                "num_generations": self.num_generations,
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "length_penalty": self.length_penalty,
            }
        )


def _refuse_options(args: HyPOConfig) -> None:
    """Raise ConfigError for options that would have no effect."""
    rules = [
        (args.loss_type != ["sigmoid"], "loss_type", "HyPO's preference term is DPO's, use 'sigmoid'"),
        (args.loss_weights not in (None, [1.0]), "loss_weights", "there is one loss, leave it out"),
        (args.label_smoothing != 0, "label_smoothing", "the sigmoid loss of TRL has none, use 0"),
        (args.f_divergence_type != "reverse_kl", "f_divergence_type", "use 'reverse_kl'"),
        (args.ld_alpha is not None, "ld_alpha", "all tokens count alike, use None"),
        (args.use_weighting, "use_weighting", "pairs count alike, use False"),
        (args.sync_ref_model, "sync_ref_model", "the reference stays as it is, use False"),
        (args.truncation_mode != "keep_start", "truncation_mode", "pairs share their prompt, use 'keep_start'"),
        (args.precompute_ref_log_probs, "precompute_ref_log_probs", "samples ask the reference anyway, use False"),
        (bool(args.neftune_noise_alpha), "neftune_noise_alpha", "samples are of the policy without noise, use None"),
        (args.use_liger_kernel, "use_liger_kernel", 'use model_init_kwargs={"use_kernels": True}'),
    ]
    problems = [f"{name}={getattr(args, name)!r}: {fix}" for broken, name, fix in rules if broken]
    if problems:
        raise ConfigError("HyPOConfig: " + "; ".join(problems))


class HyPOTrainer(trl.DPOTrainer):
    """``DPOTrainer`` that trains HyPO (arXiv 2406.01462); with ``kl_coef=0`` its loss and gradients are DPO's.

    The arguments are those of ``DPOTrainer``; ``args`` is a :class:`HyPOConfig`. It runs in one process.

    Raises:
        ConfigError: ``args`` of another class, ``compute_metrics``, images, several processes.
        DataError: a prompt has no tokens.
        ModelError: the fused loss cannot reproduce the model's own logits.
    """

    args: HyPOConfig
    model: Any
    _tag_names = ["trl", "hypo"]  # noqa: RUF012
    _name = "HyPO"
    _paper = {  # noqa: RUF012
        "title": "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        "id": "2406.01462",
    }

    def __init__(self, model: Any, ref_model: Any = None, args: HyPOConfig | None = None, **options: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = HyPOConfig(f"{name.split('/')[-1]}-HyPO")
        _refuse_arguments(args, options)
        super().__init__(model, ref_model, args, **options)
        if self.accelerator.num_processes > 1:
            raise ConfigError(f"started as {self.accelerator.num_processes} processes: HyPOTrainer runs on one so far")
        _refuse_empty_prompts(self.train_dataset)
        self._settings = args.loss_settings()
        unwrapped = self.accelerator.unwrap_model(self.model)
        is_peft = hasattr(unwrapped, "peft_config")
        self._longest_row = self._find_longest_row()
        if not has_router_loss(unwrapped.get_base_model() if is_peft else unwrapped):
            self.aux_loss_enabled = False
        coef = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
        self._policy = self._exact_policy(unwrapped, is_peft=is_peft, router_aux_loss_coef=coef)
        self._reference = self._policy
        if self.ref_model is not None:
            # Without accelerate's autocast around its forward pass: the check of exactness needs fp32.
            plain = self.accelerator.unwrap_model(self.ref_model, keep_fp32_wrapper=False).requires_grad_(False)
            self._reference = self._exact_policy(plain, is_peft=False)
        policies = (self._policy, self._reference)
        self._batcher = Batcher(
            self._tokenizer.pad_token_id,
            shares_prompts=all(policy.shares_prompts for policy in policies),
            window=min((policy.window for policy in policies if policy.window is not None), default=None),
        )
        self.sampler = self._new_sampler()
        self._drawn_at, self._draws = -1, 0  # the step of the last draw, and the number of draws in that step

    def _exact_policy(self, model: Any, *, is_peft: bool, router_aux_loss_coef: float = 0.0) -> Policy:
        """Make a policy without a reference, which TRL keeps."""
        return make_exact(
            model,
            lambda model: Policy(
                model,
                is_peft=is_peft,
                temperature=self.args.temperature,
                has_reference=False,
                router_aux_loss_coef=router_aux_loss_coef,
            ),
            longest=self._longest_row,
            disable_dropout=self.args.disable_dropout,
        )

    def _find_longest_row(self) -> LongestRow:
        """Return the longest row of the data sets, or the longest sample of one of their prompts."""
        new = self.args.max_new_tokens if self._settings.draws_samples else 0
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        rows = [_lengths(dataset, self.args.max_length) for dataset in (self.train_dataset, *held_out.values())]
        pair = max((pair for pair, _ in rows), default=0)
        sample = max((prompt for _, prompt in rows), default=0) + new
        if max(pair, sample) == math.inf:
            return LongestRow(None, "max_length=None")
        if sample > pair:
            return LongestRow(int(sample), "a prompt + max_new_tokens")
        return LongestRow(int(pair), f"max_length={self.args.max_length}")

    def _new_sampler(self) -> Sampler:
        entry, _ = choose_sampler(AUTO, self._policy.model)
        settings = SamplerSettings(
            eos_token_ids=eos_token_ids(self._policy.base.generation_config, self._tokenizer),
            pad_token_id=self._tokenizer.pad_token_id,
            distribution=Distribution(self._settings.temperature),
        )
        return entry.build(self._policy.model, settings)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        """Return the mean loss () of P pairs; ``inputs`` has (2 P, L) token ids, all chosen first."""
        pairs = _pairs(inputs)
        with self.accelerator.autocast():
            samples = self._samples([list(pair.prompt) for pair in pairs]) if self._settings.draws_samples else None
            completions = samples.completions() if samples else []
            tree = self._batcher.pairs(pairs, completions).to(self.accelerator.device)
            reference = Reference(logps=self._ref_logps(tree))
            call = preference_loss_call(tree, reference, len(pairs), self._settings)
            if not self.aux_loss_enabled:
                out, aux_loss = self._policy(tree, call), None
            else:
                out, aux_loss = self._policy(tree, call, with_aux_loss=True)
        self._add_metrics(inputs, out, samples, aux_loss)
        return out.loss if aux_loss is None else out.loss + self.router_aux_loss_coef * aux_loss

    def _samples(self, prompts: list[list[int]]) -> Samples:
        """Sample ``num_generations`` completions of each prompt from the live weights.

        The samples depend on the seed, the step and the batch's number in the step, so a resumed run draws the same.
        """
        step = self.state.global_step if self.model.training else -2
        if step != self._drawn_at:
            self._drawn_at, self._draws = step, 0
        if step >= 0:
            self.sampler.weights_changed(step)
        seed = self._draws
        if step >= 0:
            seed += (self.args.seed + 1) * SEEDS_PER_RUN + step * self.args.gradient_accumulation_steps
        self._draws += 1
        n, longest = self._settings.num_generations, self.args.max_new_tokens
        samples = self.sampler.sample(prompts, n, longest, seed=seed)
        self.sampler.release()
        return samples

    @torch.no_grad()
    def _ref_logps(self, tree: Tree) -> Tensor:
        """Return log-probs (S,) of ``ref_model``, of the adapter that was loaded, or of the base model."""
        model = self._policy.model
        adapter: Any = nullcontext()
        if self._reference is self._policy:
            adapter = use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)
        with adapter, eval_mode(self._reference):
            return self._reference(tree, sequence_logprobs_call(tree, self._settings))

    def _add_metrics(
        self, inputs: dict[str, Tensor], out: HypoLoss, samples: Samples | None, aux_loss: Tensor | None
    ) -> None:
        mode, pairs = "train" if self.model.training else "eval", len(out.chosen_rewards)
        found = {
            "rewards/chosen": out.chosen_rewards.mean(),
            "rewards/rejected": out.rejected_rewards.mean(),
            "rewards/accuracies": (out.margins > 0).float().mean(),
            "rewards/margins": out.margins.mean(),
            "logps/chosen": out.logps[:pairs].mean(),
            "logps/rejected": out.logps[pairs : 2 * pairs].mean(),
        }
        if samples is not None:
            found["kl"] = out.kl.mean()
            found["completions/mean_length"] = samples.mask.sum(1).float().mean()
            found["completions/clipped_ratio"] = (~samples.ended).float().mean()
        if aux_loss is not None:
            found["aux_loss"] = aux_loss
        found["num_tokens"] = inputs["attention_mask"].sum()
        values = torch.stack([value.detach().double() for value in found.values()]).tolist()  # one read of the device
        if mode == "train":
            self._total_train_tokens += int(values[-1])
        for name, value in zip(list(found)[:-1], values, strict=False):
            self._metrics[mode][name].append(value)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate as ``DPOTrainer`` does, with the same random numbers for the samples every time."""
        self._drawn_at = -1
        metrics: dict[str, float] = super().evaluate(*args, **options)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load all weights of a checkpoint.

        transformers skips weights that it saves under another name, such as the LM head of GPT-NeoX.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._policy.is_peft:
            base = self._policy.base
            saved = type(base).from_pretrained(resume_from_checkpoint, dtype=base.dtype)
            base.load_state_dict(saved.state_dict())


def _refuse_arguments(args: Any, options: dict[str, Any]) -> None:
    if not isinstance(args, HyPOConfig):
        raise ConfigError(f"args is a {type(args).__name__}: use HyPOConfig, which has all fields of DPOConfig")
    if options.get("compute_metrics") is not None:
        raise ConfigError("compute_metrics: there are no logits to give it, leave it out")
    processing_class = options.get("processing_class")
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ConfigError(f"processing_class is a {type(processing_class).__name__}: HyPOTrainer takes a tokenizer")
    dataset = options.get("train_dataset")
    columns: Sequence[str] = getattr(dataset, "column_names", None) or ()
    if {"image", "images"} & set(columns):
        raise ConfigError("train_dataset has images: HyPOTrainer trains on text")


def _refuse_empty_prompts(dataset: Any) -> None:
    """Raise DataError for a prompt without tokens: its only token may merge with the completion."""
    prompts = dataset["prompt_ids"] if isinstance(dataset, Dataset) else ()  # an iterable data set has no length
    empty = next((row for row, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise DataError(
            f"row {empty} of train_dataset has an empty prompt once it is tokenised: give it text that ends where a "
            "token ends (a space, a line break), or a chat template"
        )


def _lengths(dataset: Any, max_length: int | None) -> tuple[float, float]:
    """Return the tokens of a data set's longest prompt with a completion, and of its longest prompt."""
    limit = math.inf if max_length is None else max_length
    if dataset is None:
        return 0, 0
    if not isinstance(dataset, Dataset):  # an iterable data set is not read in advance
        return limit, limit
    pair = prompt = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        prompts, chosen, rejected = (
            compute.list_value_length(batch[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        longest = compute.add(prompts, compute.max_element_wise(chosen, rejected))
        pair = max(pair, compute.max(longest).as_py())
        prompt = max(prompt, compute.max(prompts).as_py())
    return min(pair, limit), min(prompt, limit)


def _pairs(inputs: dict[str, Tensor]) -> list[Pair]:
    """Return the token ids of a batch; the device is read once."""
    rows = torch.stack([inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")], dim=-1).tolist()
    prompts, completions = [], []
    for row in rows:
        prompts.append(tuple(token for token, seen, counted in row if seen and not counted))
        completions.append(tuple(token for token, _, counted in row if counted))
    half = len(rows) // 2
    return [Pair(i, prompts[i], completions[i], completions[half + i]) for i in range(half)]
