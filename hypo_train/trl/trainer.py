"""``HyPOTrainer``: TRL's ``DPOTrainer`` whose step is this project's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id, use_adapter

from hypo_kernels import HypoLoss
from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.config import ConfigError
from hypo_train.data.online import num_online, online_first
from hypo_train.data.plan import SEEDS_PER_RUN
from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import make_exact, make_repeatable
from hypo_train.model.policy import Policy
from hypo_train.model.positions import LongestRow, check_positions
from hypo_train.model.router_loss import has_router_loss
from hypo_train.model.source import eos_token_ids
from hypo_train.sampling import Distribution, Sampler, Samples
from hypo_train.sampling.registry import SamplerSettings, candidates, choose_sampler
from hypo_train.trees.pack import Batcher
from hypo_train.trees.tree import Tree
from hypo_train.trl.config import HyPOConfig
from hypo_train.trl.rows import (
    longest_lengths,
    pairs_of_batch,
    refuse_empty_prompts,
    refuse_no_rows,
    reordered,
    shown_name,
)
from hypo_train.trl.step_choice import arguments_of_trls_step, check_step, options_of_trls_step

logger = logging.get_logger(__name__)


class HyPOTrainer(trl.DPOTrainer):
    """``DPOTrainer`` that trains HyPO (arXiv 2406.01462); with ``kl_coef=0`` its loss and gradients are DPO's.

    The arguments are those of ``DPOTrainer``; ``args`` is a :class:`HyPOConfig`.

    Raises:
        ConfigError: ``args`` of another class, or something that cannot be trained with a KL: images, several
            processes, adapters other than LoRA.
        DataError: a prompt has no tokens.
        ModelError: the fused loss cannot reproduce the model's own logits.
    """

    args: HyPOConfig
    model: Any
    _tag_names = ["trl", "dpo", "hypo"]  # noqa: RUF012
    _name = "HyPO"
    _paper = {  # noqa: RUF012
        "title": "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        "id": "2406.01462",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: HyPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = HyPOConfig(f"{name.split('/')[-1]}-HyPO")
        if not isinstance(args, HyPOConfig):
            raise ConfigError(f"args is a {type(args).__name__}: use HyPOConfig, which has all fields of DPOConfig")
        arguments = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "quantization_config": quantization_config,
            "peft_config": peft_config,
        }
        obstacles = [*options_of_trls_step(args), *arguments_of_trls_step(model, args, arguments)]
        self.why_trls_step = check_step(args, obstacles)
        """The options for which TRL's own step computes the loss; None if this project's step does."""
        if self.why_trls_step is not None:
            logger.warning("TRL's own step computes the loss, because of: %s", self.why_trls_step)
        _refuse_missing_reference(model, ref_model, args, peft_config)
        for entry in candidates(args.sampler) if args.kl_coef else ():
            entry.require_package()
        refuse_no_rows(train_dataset, "train_dataset has no rows: pass some with prompt, chosen and rejected")
        self._settings = args.loss_settings()
        self._is_ready = False
        super().__init__(model, ref_model, args, **arguments)
        self._prepare_step()

    def _prepare_step(self) -> None:
        """Make the models exact, and a sampler. TRL computes reference log-probs before its ``__init__`` ends."""
        if self._is_ready:
            return
        self._is_ready = True
        unwrapped = self.accelerator.unwrap_model(self.model)
        self._longest_row = self._find_longest_row()
        if self.why_trls_step is not None:
            models: list[Any] = [unwrapped] if self.ref_model is None else [unwrapped, self.ref_model]
            for model in models:
                check_positions(model.get_base_model() if is_peft_model(model) else model, self._longest_row)
                make_repeatable(model, disable_dropout=self.args.disable_dropout)
            return
        is_peft = is_peft_model(unwrapped)
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
        )
        self._drawn_at, self._batches = -1, -1  # the step of the last batch, and its number in that step
        self._num_online_samples = 0
        if self._settings.draws_samples:
            self.sampler = self._new_sampler()

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
        rows = [longest_lengths(dataset, self.args.max_length) for dataset in (self.train_dataset, *held_out.values())]
        pair = max((pair for pair, _ in rows), default=0)
        sample = max((prompt for _, prompt in rows), default=0) + new
        if max(pair, sample) == math.inf:
            return LongestRow(None, "max_length=None")
        if sample > pair:
            return LongestRow(int(sample), "a prompt + max_new_tokens")
        return LongestRow(int(pair), f"max_length={self.args.max_length}")

    def _new_sampler(self) -> Sampler:
        entry, _ = choose_sampler(self.args.sampler, self._policy.model)
        longest = self.args.max_length
        settings = SamplerSettings(
            eos_token_ids=eos_token_ids(self._policy.base.generation_config, self._tokenizer),
            pad_token_id=self._tokenizer.pad_token_id,
            distribution=Distribution(self._settings.temperature),
            model_name_or_path=get_config_model_id(self._policy.base.config),
            max_model_len=None if longest is None else longest + self.args.max_new_tokens,
        )
        return entry.build(self._policy.model, settings)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenise a data set as ``DPOTrainer`` does. Raise DataError if no row is left, or a prompt has no tokens."""
        tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        refuse_no_rows(
            tokenised, f"no prompt of {shown_name(dataset_name)} is shorter than max_length={args.max_length}"
        )
        refuse_empty_prompts(tokenised, dataset_name)
        return tokenised

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        """Return the mean loss () of P pairs; ``inputs`` has (2 P, L) token ids, all chosen first."""
        if self.why_trls_step is not None:
            return super()._compute_loss(model, inputs, return_outputs)
        inputs, num_online = self._online_first(inputs)
        pairs, settings = pairs_of_batch(inputs), self._settings
        prompts = [list(pair.prompt) for pair in pairs[:num_online]]
        with self.accelerator.autocast():
            samples = self._samples(prompts) if prompts else None
            completions = samples.completions() if samples else []
            tree = self._batcher.pairs(pairs, completions, settings.num_generations).to(self.accelerator.device)
            reference = Reference(logps=self._ref_logps(inputs, tree, prompts, completions))
            share = self.args.online_fraction if self.model.training else 1.0
            weight = len(prompts) / (share * len(pairs))
            call = preference_loss_call(tree, reference, len(pairs), settings, online_weight=weight)
            if self.aux_loss_enabled:
                out, aux_loss = self._policy(tree, call, with_aux_loss=True)
                loss = out.loss + self.router_aux_loss_coef * aux_loss
            else:
                out, aux_loss = self._policy(tree, call), None
                loss = out.loss
        self._add_metrics(inputs, out, samples, aux_loss)
        if not return_outputs:
            return loss
        with torch.no_grad():  # logits, for compute_metrics and predict
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return loss, outputs

    def _online_first(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the batch with the pairs first whose prompts get samples, and the number of these pairs.

        The choice and the samples depend on the seed, the step and the batch's number in the step, so a resumed run has
        the same. An evaluation samples from all prompts.
        """
        if not self._settings.draws_samples:
            return inputs, 0
        step = self.state.global_step if self.model.training else -2
        if step != self._drawn_at:
            self._drawn_at, self._batches = step, -1
        self._batches += 1
        num_pairs, args = len(inputs["input_ids"]) // 2, self.args
        if not self.model.training:
            return inputs, num_pairs
        batch = step * args.gradient_accumulation_steps + self._batches
        online = num_online(args.online_fraction, batch * args.per_device_train_batch_size, num_pairs, args.seed)
        return reordered(inputs, online_first(list(range(num_pairs)), online, batch, args.seed)), online

    def _samples(self, prompts: list[list[int]]) -> Samples:
        """Sample ``num_generations`` completions of each prompt from the live weights."""
        step, seed = self._drawn_at, self._batches
        if step >= 0:
            self.sampler.weights_changed(step)
            seed += (self.args.seed + 1) * SEEDS_PER_RUN + step * self.args.gradient_accumulation_steps
        n, longest = self._settings.num_generations, self.args.max_new_tokens
        samples = self.sampler.sample(prompts, n, longest, seed=seed)
        self.sampler.release()
        return samples

    def _ref_logps(
        self, inputs: dict[str, Tensor], tree: Tree, prompts: list[list[int]], completions: list[list[int]]
    ) -> Tensor:
        """Return the reference's log-probs (S,) of a tree of pairs and samples."""
        if not self.precompute_ref_logps:
            return self._sequence_ref_logps(tree)
        of_pairs = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        if not completions:
            return of_pairs
        samples = self._batcher.samples(prompts, completions).to(self.accelerator.device)
        return torch.cat([of_pairs, self._sequence_ref_logps(samples)])

    @torch.no_grad()
    def _sequence_ref_logps(self, tree: Tree) -> Tensor:
        """Return log-probs (S,) of ``ref_model``, of the adapter that was loaded, or of the base model."""
        model = self._policy.model
        adapter: Any = nullcontext()
        if self._reference is self._policy and self._policy.is_peft:
            adapter = use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)
        with adapter, eval_mode(self._reference):
            return self._reference(tree, sequence_logprobs_call(tree, self._settings))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """Return the reference's log-probs (P,) of chosen and of rejected, as training computes them."""
        self._prepare_step()
        if self.why_trls_step is not None:
            with eval_mode(model):
                return super().compute_ref_log_probs(model, inputs)
        tree = self._batcher.pairs(pairs_of_batch(inputs), []).to(self.accelerator.device)
        with self.accelerator.autocast():
            return self._sequence_ref_logps(tree).chunk(2)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Precompute as ``DPOTrainer`` does, with a cache key that has every setting that the log-probs depend on."""
        args, model_hash = self.args, self._precompute_model_hash
        settings = (args.temperature, args.ld_alpha, args.max_length, args.truncation_mode)
        self._precompute_model_hash = Hasher.hash((model_hash, settings))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = model_hash

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
            self._num_online_samples += len(samples.ended) if mode == "train" else 0
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
        if self._num_online_samples:
            self._metrics[mode]["num_online_samples"] = [self._num_online_samples]

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
        base = self.accelerator.unwrap_model(self.model)
        if not is_peft_model(base):
            saved = type(base).from_pretrained(resume_from_checkpoint, dtype=base.dtype)
            base.load_state_dict(saved.state_dict())


def _refuse_missing_reference(model: Any, ref_model: Any, args: HyPOConfig, peft_config: Any) -> None:
    """Raise ConfigError if samples would need a reference model that precomputing its log-probs frees."""
    has_reference = ref_model is not None or peft_config is not None or hasattr(model, "peft_config")
    if args.kl_coef and args.precompute_ref_log_probs and not has_reference:
        raise ConfigError(
            "HyPOConfig: precompute_ref_log_probs=True: samples ask the reference model at every step, use False, or "
            "pass ref_model or peft_config"
        )
