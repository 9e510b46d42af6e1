"""The flat, frozen ``Config`` of a run, read from a YAML file and command-line flags.

``load_config`` reports all problems of a file and a command line in one ``ConfigError``. Nothing heavy is imported
here, so that it does so at once. Fields that TRL has too have TRL's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hypo_train.algorithms.registry import ALGORITHMS, Algorithm, check_algorithm_name, find_algorithm, is_built_in
from hypo_train.config_rules import conflicts, settings_without_effect
from hypo_train.loss_names import LOSS_NAMES, NOT_FUSED
from hypo_train.sampling.registry import check_sampler_name
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Settings,
    Text,
    check_repository_name,
    explain,
    nearest,
    read_flags,
    read_values,
    shown,
    shown_name,
    validated,
    why_unusable,
)
from hypo_train.utils.paths import usable_path
from hypo_train.utils.yaml_file import read_mapping

BelowOne = Annotated[float, Field(ge=0, lt=1)]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LossType = Annotated[Text, Field(examples=["sigmoid", "ipo", "simpo", "..."])]
ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Config(Settings):
    """All settings of a run. The docstring below a field is its ``--help`` text."""

    source: ClassVar[str] = "the configuration"
    how_to_set: ClassVar[str] = "set it in the file or with --{}"
    more_flags: ClassVar[list[str]] = ["config"]
    short_flags: ClassVar[dict[str, str]] = {"resume": "resume_from_checkpoint"}
    bare_flags: ClassVar[dict[str, str]] = {"resume_from_checkpoint": "auto"}
    not_a_bool: ClassVar[dict[str, str]] = {
        "report_to": "none logs to metrics.jsonl only",
        "resume_from_checkpoint": "auto resumes from the newest checkpoint; leave it out to start a new run",
    }
    groups: ClassVar[dict[str, str]] = {
        "algorithm": "run",
        "model_name_or_path": "model",
        "dataset_name": "data",
        "beta": "objective",
        "sampler": "sampling",
        "optim": "optimisation",
        "eval_steps": "evaluation",
        "logging_steps": "logging and saving",
    }

    algorithm: Annotated[Text, Field(examples=[*ALGORITHMS, "package.module:object"])] = "hypo"
    """Algorithm to train with: hypo is DPO plus the online reverse KL, dpo and ipo are these losses alone, rloo
    maximises a reward minus beta times the KL, reward trains a reward model on preferences, and sft is
    supervised fine-tuning. "package.module:object" names your own algorithm (docs: Extending)."""
    output_dir: PathText = "runs/hypo"
    """Folder for metrics, checkpoints and the final model; created if it does not exist."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the data order, new weights, dropout and sampling."""
    resume_from_checkpoint: PathText | None = None
    """Checkpoint folder to continue from, or "auto" for the newest complete one in output_dir."""

    model_name_or_path: PathText
    """Causal language model to train, which is also the reference model: a Hub name or a local folder."""
    trust_remote_code: bool = False
    """Allow a model or tokenizer to run Python code from its repository."""
    attn_implementation: Text = "auto"
    """Attention backend. auto computes each prompt once for all its completions, where the model's attention supports
    it. A name that transformers knows (sdpa, eager, flash_attention_2) trains on separate rows with that backend."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. Trained weights are always float32, because bfloat16 would round most updates of
    1e-6 to nothing."""
    bf16: bool | None = None
    """Compute under bfloat16 autocast; none means yes on CUDA and no elsewhere. On a CPU, only AMX multiplies bfloat16
    faster than float32."""
    gradient_checkpointing: bool | Literal["selective"] | None = None
    """Recompute activations in the backward pass. true keeps only each layer's input and costs one more forward pass.
    selective also keeps the results of matrix products and attention and costs a few percent. none means false,
    except on a CPU for models of 10 million parameters or more whose layers are not fused: selective."""
    use_liger_kernel: bool = False
    """Use Liger's kernels for the model's RMSNorm, RoPE and SwiGLU; needs liger-kernel and a GPU. The loss is not
    affected."""
    use_peft: bool = False
    """Train a LoRA adapter. The reference model is the same model with the adapter disabled."""
    lora_r: PositiveInt = 16
    """Rank of the LoRA adapter."""
    lora_alpha: PositiveInt = 32
    """LoRA scale: the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: BelowOne = 0.0
    """Dropout on the input of the LoRA layers; must be 0 if the LM head has LoRA."""
    lora_target_modules: list[str] | Text | None = None
    """Modules that get LoRA: a list of names (the LM head may be one), one regular expression, or "all-linear", which
    leaves the LM head out; none means peft's default for the architecture."""
    lora_modules_to_save: list[str] | None = None
    """Modules that are trained whole beside LoRA and saved with it, such as embed_tokens and lm_head for new tokens.
    The reference model has the original ones."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: multiply the update by lora_alpha / sqrt(lora_r) instead."""
    use_dora: bool = False
    """DoRA: train a magnitude for each row of an adapted weight as well. Not on the LM head."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen weights of all linear layers except the LM head in 4 bits; needs use_peft and
    bitsandbytes. The reference model is the quantised model."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit format: nf4 has quantiles of a normal distribution, fp4 is floating point."""
    use_bnb_nested_quant: bool = False
    """Also quantise the scales of the 4-bit blocks, which saves 0.4 bits a weight."""
    num_layers_unfrozen: PositiveInt | None = None
    """Train only this many last decoder layers, the final norm and an LM head that is not tied; none trains all."""
    unfrozen_parameters: list[str] | None = None
    """Train only the parameters whose names begin with a match of one of these regular expressions, such as
    lm_head or model.layers.[0-3].mlp; none trains all."""
    fsdp: bool = False
    """Shard weights, gradients and the optimizer's state over the processes with PyTorch's FSDP2, for models that do
    not fit one device. Without it every process holds all of them (DDP)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed's ZeRO; needs deepspeed. 1 shards the optimizer's state, 2 also the gradients; every process holds all
    weights. 0 is off. Instead of 3, which also shards the weights, use fsdp."""
    vocab_parallel: bool = False
    """With fsdp: each process keeps one part of the vocabulary of embedding and LM head, and computes it for the rows
    of all processes. Processes exchange hidden states; they never gather these two weights or their gradients."""
    share_trunk: bool = True
    """With num_layers_unfrozen: run the frozen layers once for both policy and reference model."""
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Implementation of the loss; auto means Triton on CUDA and blockwise torch on a CPU."""
    max_chunk_bytes: PositiveInt | None = None
    """Bound on the temporary memory of one loss call, in bytes. The default is 1 GiB, and on CUDA 1/28 of the device's
    memory if that is more."""

    dataset_name: PathText
    """Training data: a Hub name, a .jsonl, .json, .parquet, .arrow, .csv or .tsv file, a folder of such files, or a
    folder that save_to_disk wrote. Text files may be compressed (.gz, .bz2, .xz, .zst)."""
    dataset_format: Literal["preferences", "tldr"] = "preferences"
    """Format of the rows. preferences: columns prompt (optional), chosen and rejected, as text or chat messages; sft
    also takes completion, or messages. tldr: the original fields of OpenAI's summarize-from-feedback, either posts
    with a summary (subreddit, title, post, summary) or comparisons of two summaries (info, summaries, choice)."""
    column_mapping: dict[Text, Text | None] | None = None
    """New names for columns, {their name: our name}, as in {question: prompt}. null leaves a column out, so that no
    check asks about it. On the command line: question=prompt id=null."""
    dataset_config: Text | None = None
    """Configuration of the Hub data set, if it has several."""
    dataset_train_split: Text = "train"
    """Split to train on; a single file has the split "train"."""
    dataset_test_split: Text | None = None
    """Split to evaluate on; none means the last num_eval_rows rows of the training split."""
    num_eval_rows: NonNegativeInt = 0
    """Rows held out from the end of the training split when dataset_test_split is none."""
    template_date: Text | None = None
    """Date that the chat template writes, as 2026-11-30, for templates that ask for it (Llama 3.2, gpt-oss). none means
    the day the run begins; a resumed run and evaluations of a run keep its date."""
    max_prompt_length: PositiveInt = 512
    """Maximum number of tokens of a prompt; a longer prompt keeps its BOS and its end. With dataset_format: tldr the
    post is cut instead, at a line break if possible."""
    max_completion_length: Annotated[int, Field(ge=2, lt=2**63)] = 512
    """Maximum number of tokens of a completion, with EOS; a longer completion keeps its start and its EOS."""
    precompute_ref_log_probs: bool | None = None
    """Compute the reference model's log-probs of the pairs once, before the first step, and keep them on disk for
    other runs; none means yes if that costs no more than computing them in the steps."""
    ref_logps_cache_dir: PathText | None = None
    """Folder for the reference model's log-probs; none means hypo_train/reference_logps in $XDG_CACHE_HOME or
    ~/.cache."""

    beta: PositiveFloat = 0.1
    """Beta of DPO and IPO, and rloo's weight of the reverse KL. A larger value keeps the policy nearer to the reference
    model."""
    router_aux_loss_coef: NonNegativeFloat | None = None
    """Weight of the load-balancing loss of a mixture of experts' routers. none means as the model's config asks: its
    router_aux_loss_coef if it has output_router_logits: true, else 0. Not for reward models."""
    loss_type: Annotated[list[LossType], Field(min_length=1)] | None = None
    """Preference loss of dpo and hypo by TRL's name, or a list of losses to add. none means sigmoid, which is DPO. ipo
    is TRL's form, a mean over tokens; ipo_sum is the paper's, as algorithm: ipo. With simpo, cpo, orpo and sft,
    algorithm: dpo runs no reference model. algorithm: hypo adds its online KL to any of them."""
    loss_weights: list[NonNegativeFloat] | None = None
    """Weight of each loss of loss_type; none means 1 for each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed probability that a preference label is wrong, for loss_type sigmoid (conservative DPO), robust, exo_pair,
    simpo and cpo."""
    f_divergence_type: Annotated[FDivergence, Field(examples=["reverse_kl", "forward_kl", "..."])] = "reverse_kl"
    """Divergence of f-DPO: reverse_kl, forward_kl, js_divergence or alpha_divergence. For losses of a difference of
    log-ratios: sigmoid, hinge, ipo, exo_pair, robust, discopop, sigmoid_norm."""
    f_alpha_divergence_coef: float = 0.5
    """Coefficient of f_divergence_type: alpha_divergence."""
    discopop_tau: PositiveFloat = 0.05
    """Temperature of the blend of loss_type: discopop."""
    simpo_gamma: NonNegativeFloat = 0.5
    """Target margin of loss_type: simpo."""
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of the chosen responses' negative log-likelihood in loss_type: cpo."""
    dpop_lambda: NonNegativeFloat = 50.0
    """Weight of a fall of the chosen likelihood in loss_type: dpo_positive."""
    kl_coef: NonNegativeFloat = 1e-4
    """Weight λ of the reverse KL to the reference model, which is a sum over completion tokens in nats; hypo only."""
    kl_estimator: Literal["sampled", "exact"] = "sampled"
    """Estimator of the reverse KL on a sample: its own log-ratio (sampled), or the KL between the full next-token
    distributions at its positions (exact), which has less noise and needs the reference's logits; hypo only."""
    num_generations: PositiveInt = 2
    """Samples for each prompt; each is a baseline for the others, so hypo and rloo need at least 2."""
    online_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a step's prompts that get samples, chosen at random; hypo only. The KL term stays unbiased: it is the
    sum over these prompts divided by their expected number. A value below 1 makes steps cheaper; below 1 / (rows of a
    step), some steps have no samples, and the KL is held less well."""
    length_penalty: NonNegativeFloat = 0.0
    """Added to a sample's log-ratio for each of its tokens, so that length has a cost too; hypo and rloo."""

    reward: Text | None = None
    """Reward function, "package.module:function", called with the texts (prompt, completion). rloo learns from it, and
    evaluations of every algorithm report it. If it uses the global generators of Python, NumPy or torch, its random
    numbers depend only on the seed and the step, so a resumed run draws the same ones."""
    reward_model_path: PathText | None = None
    """Reward model instead of a function: a Hub name or a local folder of a sequence classifier with one label. It
    reads the policy's token ids if both have the same tokenizer, as after algorithm: reward, and texts otherwise."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the reward of a sample that does not end within max_new_tokens."""

    sampler: Text = "auto"
    """Engine that draws the samples. decode is this project's own and generate that of transformers; both use the live
    weights, and vllm a copy that is updated. auto means decode if it supports the model, else generate.
    "package.module:object" names your own sampler (docs: Extending)."""
    reuse_prompt_kv: bool = True
    """Sample from the keys and values that the training pass computes for the prompts, so that no prompt is computed
    twice; used where a step has one micro-batch."""
    keep_sampling_memory: bool = False
    """Keep the sampler's CUDA graphs, KV buffers and copies of weights between steps: faster, if the memory is
    enough."""
    rollout_steps: PositiveInt = 1
    """Number of optimizer steps that use one draw of samples. Above 1, later steps learn from samples of an earlier
    policy, corrected by truncated importance weights. hypo and rloo."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight of a token; used with rollout_steps above 1."""
    temperature: PositiveFloat = 1.0
    """Temperature of policy and reference model, in sampling and in every log-prob of the loss."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 means all. Truncation biases the KL."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this total probability; 1 means all. Truncation biases the KL."""
    max_new_tokens: PositiveInt | None = None
    """Maximum number of tokens of a sample, with EOS; none means max_completion_length."""

    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "muon"] = "adamw_torch"
    """Optimizer. adamw_torch is AdamW, fused on CUDA; adamw_torch_fused is fused on a CPU too. adamw_8bit holds its
    moments in 8 bits, those of embeddings in 32, and needs bitsandbytes. adafactor has no momentum and factored second
    moments. muon orthogonalises the updates of matrices and uses AdamW for embeddings, LM head, norms and biases."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so it uses the same values."""
    lr_scheduler_type: Annotated[ScheduleName, Field(examples=["cosine", "linear", "constant", "..."])] = "cosine"
    """Schedule of the learning rate after the warm-up, by transformers' names: cosine, linear, constant (with the
    warm-up, as constant_with_warmup), cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr,
    cosine_warmup_with_min_lr or warmup_stable_decay."""
    lr_scheduler_kwargs: dict[Text, int | float | str] | None = None
    """Arguments of the schedule, as of transformers' function, such as {min_lr_rate: 0.1} of cosine_with_min_lr or
    {num_decay_steps: 100} of warmup_stable_decay. On the command line: min_lr_rate=0.1."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the steps in which the learning rate rises linearly from zero."""
    warmup_steps: NonNegativeFloat = 0
    """Number of these steps, or below 1 their fraction, rounded up. A value above 0 overrides warmup_ratio."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; applies to matrices only."""
    adam_beta1: BelowOne = 0.9
    """AdamW's decay of the mean gradient; adafactor does not use it."""
    adam_beta2: BelowOne = 0.999
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: Annotated[float, Field(ge=1e-37)] = 1e-8
    """Added to AdamW's denominator; a value below 1e-37 would be 0 in fp32."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum global norm of the gradient; 0 means no clipping."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=-1, lt=2**63)] = -1
    """Number of optimizer steps; a positive value overrides num_train_epochs."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows (pairs, examples or prompts) of one micro-batch on one device."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of one optimizer step."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Split a step's rows into micro-batches of at most this many tokens, samples included, so that memory has a bound
    that does not depend on the lengths. The step still has per_device_train_batch_size *
    gradient_accumulation_steps rows. none splits it by rows."""
    dataloader_drop_last: bool = False
    """Leave out the rows that do not fill the last step of an epoch. Without it that step has fewer rows, and its loss
    is their mean."""
    group_by_length: bool = False
    """Put rows of similar length into one step: less padding, less random batches. The micro-batches within a step are
    ordered by length in any case."""

    eval_steps: NonNegativeInt = 0
    """Steps between two evaluations; 0 means only at the end."""
    load_best_model_at_end: bool = False
    """Save the best checkpoint as the final model instead of the last weights. It is kept whatever save_total_limit
    is; save_steps must be a multiple of eval_steps."""
    metric_for_best_model: Text | None = None
    """Metric of the evaluations that says which checkpoint is the best, with or without eval_; none means eval_loss."""
    greater_is_better: bool | None = None
    """Whether a larger metric is better; none means yes, unless the metric's name ends in loss."""
    max_kl_for_best_model: PositiveFloat | None = None
    """Only evaluations with an eval_kl of at most this many nats count for the best checkpoint and early stopping."""
    early_stopping_patience: PositiveInt | None = None
    """End the training after this many evaluations in a row without a better metric_for_best_model."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """Smallest improvement of the metric that counts for early stopping."""
    num_eval_prompts: PositiveInt = 128
    """Number of held-out prompts to sample from, for the reverse KL."""
    num_eval_samples: PositiveInt = 1
    """Samples for each of these prompts."""
    per_device_eval_batch_size: PositiveInt = 16
    """Rows or prompts in one evaluation batch on one device."""

    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics."""
    peak_tflops: PositiveFloat | None = None
    """Peak speed of the device in 10^12 FLOP a second, for the logged mfu; none means the data sheet's figure for bf16
    on a known GPU, and no mfu elsewhere."""
    save_steps: NonNegativeInt = 500
    """Steps between two checkpoints; 0 means only at the end."""
    save_total_limit: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(default=["tensorboard"])
    """Trackers that get the metrics besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, or none. Only the
    trackers that you name send anything anywhere."""
    run_name: Text | None = None
    """Name of the run in wandb, trackio and mlflow; none means the last part of output_dir."""
    project: Text = "hypo_train"
    """Project of the run in wandb and trackio, experiment in mlflow."""
    push_to_hub: bool = False
    """Upload the final model, with tokenizer and model card, to the Hugging Face Hub at the end of training, with the
    login of hf auth login or HF_TOKEN. The repository is created before training."""
    hub_model_id: Text | None = None
    """Repository to upload to: organisation/name, or a name in your own account."""
    hub_private_repo: bool | None = None
    """Create the repository as a private one; none means as the account's settings say."""

    @classmethod
    def advice_on(cls, name: str, value: Any) -> str | None:
        from hypo_train.other_trainers import advice_on  # hundreds of names, which only a mistake needs

        return advice_on(name, value)

    @classmethod
    def advice_on_value(cls, name: str, value: Any) -> str | None:
        from hypo_train.other_trainers import advice_on_value

        return advice_on_value(name, value)

    @property
    def spec(self) -> Algorithm:
        """The registry entry of the algorithm."""
        return find_algorithm(self.algorithm)

    @property
    def draws_samples(self) -> bool:
        """True if a step samples from the policy."""
        return self.spec.draws_samples

    @property
    def loss_types(self) -> list[str]:
        """The names of the preference losses that are added."""
        return list(self.loss_type or ["ipo_sum" if self.spec.preference == "ipo" else "sigmoid"])

    @property
    def has_reference(self) -> bool:
        """True if the loss compares the policy with a reference model."""
        return self.spec.has_reference and (self.draws_samples or self.asks_reference_about_pairs)

    @property
    def asks_reference_about_pairs(self) -> bool:
        """True if the loss uses the reference model's log-probs of the pairs."""
        reads = callable(self.spec.preference) or any(LOSS_NAMES[name].needs_reference for name in self.loss_types)
        return self.spec.asks_reference_about_pairs and reads

    @property
    def trains_part(self) -> bool:
        """True if the settings leave some of the model's weights frozen."""
        return self.use_peft or self.num_layers_unfrozen is not None or self.unfrozen_parameters is not None

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the number of steps in which the learning rate rises."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(self.warmup_steps * total_steps) or round(self.warmup_ratio * total_steps)

    @property
    def compares_evaluations(self) -> bool:
        """True if the run looks for its best checkpoint, or may end early."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def best_metric(self) -> str:
        """The metric that says which evaluation is the best, as it is logged."""
        return f"eval_{(self.metric_for_best_model or 'eval_loss').removeprefix('eval_')}"

    @property
    def best_is_greatest(self) -> bool:
        """True if a larger value of the metric is better."""
        return not self.best_metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better

    @property
    def eval_metrics(self) -> list[str]:
        """The names of the metrics of an evaluation, as they are logged."""
        spec, names = self.spec, list[str]()
        if spec.trains_reward_model:
            names = ["loss", "accuracy", "margin", "mean_reward"]
        elif spec.row_type == "example":
            names = ["loss"]
        elif spec.row_type == "pair":
            names = ["loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))]
            names += ["logps/chosen", "logps/rejected"]
        if not spec.trains_reward_model:
            names += ["kl"] * self.has_reference + ["reward"] * self.has_reward
            names += ["completions/mean_length", "completions/clipped_ratio"]
        return [f"eval_{name}" for name in names]

    @property
    def has_reward(self) -> bool:
        return self.reward is not None or self.reward_model_path is not None

    @field_validator("loss_type", "loss_weights", mode="before")
    @classmethod
    def _one_loss_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int, float)) else value

    @field_validator("loss_type")
    @classmethod
    def _known_losses(cls, names: list[str] | None) -> list[str] | None:
        for name in names or ():
            if name in NOT_FUSED:
                raise ValueError(f"{name!r} sorts the whole batch and has no fused form: use TRL's DPOTrainer")
            if name not in LOSS_NAMES:
                raise ValueError(f"{name!r}: should be one of {', '.join(LOSS_NAMES)}")
        return names

    @field_validator("hub_model_id")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        check_repository_name(value)
        return value

    @field_validator("algorithm")
    @classmethod
    def _algorithm_is_registered(cls, value: str) -> str:
        check_algorithm_name(value)
        return value

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_date(cls, value: Any) -> str | None:
        try:
            return None if value is None else date.fromisoformat(str(value)).isoformat()  # YAML may have read a date
        except ValueError:
            raise ValueError("should be a date as 2026-11-30") from None

    @field_validator("sampler")
    @classmethod
    def _sampler_has_a_name(cls, value: str) -> str:
        check_sampler_name(value)
        return value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _modules_are_a_list_or_a_pattern(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value.strip()):
            return re.split(r"\s*,\s*", value.strip())
        if value in ("all", ["all"]):
            raise ValueError("should be all-linear, or names of modules")
        return "all-linear" if value == ["all-linear"] else value

    @field_validator("lr_scheduler_kwargs", mode="before")
    @classmethod
    def _texts_of_numbers_are_numbers(cls, value: Any) -> Any:
        # The command line gives texts, and YAML reads 1e-5 as one.
        return {name: _number(item) for name, item in value.items()} if isinstance(value, dict) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none_is_a_list(cls, value: Any) -> Any:
        if value is None or value in ("none", ["none"]):
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("lora_modules_to_save", "unfrozen_parameters", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or None

    @field_validator("unfrozen_parameters")
    @classmethod
    def _are_patterns(cls, value: list[str] | None) -> list[str] | None:
        for pattern in value or ():
            if re.search(r"\[\d*:\d*\]$", pattern):
                raise ValueError(f"{pattern}: parts of a matrix cannot be trained alone, leave the range out")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern} is no regular expression: {error}") from None
        return value

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("should name each tracker once")
        return value

    @field_validator("column_mapping", mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, dict):
            raise ValueError("should be {their name: our name}, on the command line question=prompt id=null")
        return value

    @field_validator("column_mapping")
    @classmethod
    def _one_column_for_each_name(cls, value: dict[str, str | None] | None) -> dict[str, str | None] | None:
        names = [new for new in (value or {}).values() if new is not None]
        if repeated := sorted({new for new in names if names.count(new) > 1}):
            raise ValueError(f"should rename one column to {repeated[0]!r}, not several: join their texts in the data")
        return value

    @model_validator(mode="after")
    def _no_conflicts(self) -> Config:
        # Reading a configuration imports no code that it names: prepare and preflight call require_no_conflicts.
        if is_built_in(self.algorithm) and (problems := conflicts(self)):
            raise ValueError("\n".join(problems))
        return self

    def require_no_conflicts(self) -> None:
        """Raise ConfigError if an algorithm from outside cannot be imported, or does not fit the other settings."""
        if problems := conflicts(self):
            raise ConfigError("; ".join(problems))

    def warnings(self) -> list[str]:
        """Return one line for each setting that is allowed but probably a mistake."""
        lines = []
        if self.draws_samples and (self.top_k, self.top_p) != (0, 1.0):
            lines.append(
                f"top_k={self.top_k}, top_p={self.top_p:g}: truncated samples do not follow the policy, so the KL "
                "is biased (use 0, 1)"
            )
        return lines + settings_without_effect(self)

    def to_yaml(self) -> str:
        """Return all fields as a YAML mapping, from which ``load_config`` reads an equal ``Config``."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _number(value: Any) -> Any:
    """Return the number that the text ``value`` is, or ``value`` itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value) if isinstance(value, str) else value
    return value


def load_config(argv: Sequence[str]) -> Config:
    """Return the configuration from the arguments ``argv``, without the program's name.

    Flags override the file of ``--config``, which overrides its ``base``.

    Raises:
        ConfigError: lists every problem of the file and the flags.
    """
    problems: list[str] = []
    _, flags = read_flags(Config, argv, problems)
    files = flags.pop("config", None)
    values: dict[str, Any] = {}
    if files is not None:
        if len(files) != 1:
            raise ConfigError("--config needs one file, as in --config recipe.yaml")
        values = _read_recipe(require_usable(files[0], f"--config {shown_name(files[0])}"), problems)
    return validated(Config, values | read_values(Config, flags, problems), problems)


def checked(values: dict[str, Any]) -> Config:
    """Return the ``Config`` of these values. Raises ConfigError, which lists every problem on one line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(Config, error))) from None


def require_trust(saved: Config, *, given: bool, where: Path) -> None:
    """Raise ConfigError if the run ``saved`` needs ``trust_remote_code`` and the user has not ``given`` it.

    The files of a run may come from somebody else, so they alone must not make this process run remote code.
    """
    if saved.trust_remote_code and not given:
        raise ConfigError(
            f"{where} is of a run with trust_remote_code: true, for code of {shown(saved.model_name_or_path)}: add "
            "--trust_remote_code if you have read that code and trust it"
        )


def require_usable(path: str, where: str) -> str:
    """Return ``path`` with ``~`` replaced. Raises ConfigError, which begins with ``where``, for an unusable path."""
    try:
        return usable_path(path)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_recipe(path: str, problems: list[str], heirs: Sequence[str] = ()) -> dict[str, Any]:
    """Return the known keys of a flat YAML mapping. They override those of the recipe in its ``base``, if there is one.

    ``heirs``: the recipes that this one is the base of, starting with that of the command line.
    """
    where = f"base {shown_name(path)} of {heirs[-1]}" if heirs else f"--config {shown_name(path)}"
    values, repeated = read_mapping(path, where)
    problems += [f"{shown_name(key)} is given more than once in {path}" for key in repeated]
    problems += [
        f"unknown key {shown(key)} in {path}{nearest(Config, str(key), value, also=['base'])}"
        for key, value in values.items()
        if key not in Config.model_fields and key != "base"
    ]
    settings = {key: value for key, value in values.items() if key in Config.model_fields}
    return _read_base(values["base"], problems, [*heirs, path]) | settings if "base" in values else settings


def _read_base(base: Any, problems: list[str], heirs: Sequence[str]) -> dict[str, Any]:
    """Return the values of the recipe ``base``, a path relative to the folder of the last recipe in ``heirs``."""
    if not isinstance(base, str) or not base or why_unusable(base):
        raise ConfigError(f"base={shown(base)} in {heirs[-1]}: should be the path of a recipe, relative to this one")
    path = Path(heirs[-1]).parent / require_usable(base, f"base={shown(base)} in {heirs[-1]}")
    if path.resolve() in [Path(heir).resolve() for heir in heirs]:
        raise ConfigError(
            f"base={shown(base)} in {heirs[-1]}: a recipe cannot be its own base: {' -> '.join([*heirs, base])}"
        )
    return _read_recipe(str(path), problems, heirs)
