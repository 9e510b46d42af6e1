"""The rules about settings of a run that depend on each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hypo_train.loss_names import OWN_SETTINGS, settings_of
from hypo_train.utils.flags import shown

if TYPE_CHECKING:
    from hypo_train.config import Config


def conflicts(c: Config) -> list[str]:
    """Return one line for each conflict between fields that are valid alone."""
    no_eval_rows = c.dataset_test_split is None and not c.num_eval_rows
    rules = [
        (
            c.draws_samples and c.num_generations < 2,
            f"num_generations={c.num_generations}: {c.algorithm} compares the samples of a prompt, use at least 2",
        ),
        (
            not c.spec.is_hybrid and c.kl_estimator != "sampled",
            f"kl_estimator={c.kl_estimator} with algorithm={c.algorithm}: only hypo has this estimator, leave it "
            "out (or use algorithm: hypo)",
        ),
        (
            not c.spec.is_hybrid and c.online_fraction != 1,
            f"online_fraction={c.online_fraction:g} with algorithm={c.algorithm}: only hypo has pairs beside its "
            "samples, leave it out (or use algorithm: hypo)",
        ),
        (
            not c.draws_samples and c.rollout_steps > 1,
            f"rollout_steps={c.rollout_steps} with algorithm={c.algorithm}: it draws no samples, leave it out (or use "
            "algorithm: hypo)",
        ),
        (
            c.precompute_ref_log_probs is True and not c.asks_reference_about_pairs,
            f"precompute_ref_log_probs=true with {_loss_words(c)}: its loss uses no reference log-probs of "
            "pairs, leave it out",
        ),
        (
            c.precompute_ref_log_probs is True and c.kl_estimator == "exact",
            "precompute_ref_log_probs=true with kl_estimator=exact: that needs the reference's full distributions in "
            "every step, leave it out (or use kl_estimator: sampled)",
        ),
        (
            c.kl_estimator == "exact" and c.rollout_steps > 1,
            f"rollout_steps={c.rollout_steps} with kl_estimator=exact: only the sampled estimator is corrected for "
            "samples of an earlier policy, use rollout_steps: 1",
        ),
        *_loss_rules(c),
        (
            c.use_peft and c.num_layers_unfrozen is not None,
            f"use_peft=true with num_layers_unfrozen={c.num_layers_unfrozen}: choose one of the two",
        ),
        *(
            (
                c.unfrozen_parameters is not None and getattr(c, name),
                f"unfrozen_parameters with {name}={getattr(c, name)}: choose one of the two",
            )
            for name in ("use_peft", "num_layers_unfrozen")
        ),
        (
            c.lora_modules_to_save is not None and c.vocab_parallel,
            f"vocab_parallel=true with lora_modules_to_save={c.lora_modules_to_save}: it has one copy of embedding and "
            "LM head, and these are two; use fsdp: true alone",
        ),
        *(
            (
                getattr(c, name) and not c.use_peft,
                f"{name}=true without use_peft: it works only with LoRA, set use_peft: true (or leave it out)",
            )
            for name in ("use_rslora", "use_dora", "load_in_4bit")
        ),
        (
            c.load_in_4bit and c.spec.trains_reward_model,
            "load_in_4bit=true with algorithm=reward: a reward model is saved with its adapter merged, and 4-bit "
            "weights would round it; use load_in_4bit: false",
        ),
        (
            c.fsdp and not c.optim.startswith("adamw_torch"),
            f"fsdp=true with optim={c.optim}: it does not support sharded weights, use optim: adamw_torch",
        ),
        (c.fsdp and c.load_in_4bit, "fsdp=true with load_in_4bit=true: 4-bit weights cannot be sharded, choose one"),
        (
            c.fsdp and c.use_peft and c.spec.trains_reward_model,
            "fsdp=true with use_peft=true and algorithm=reward: its adapter could not be merged after training, leave "
            "fsdp out",
        ),
        (c.zero_stage == 3, "zero_stage=3: weights are sharded by PyTorch's FSDP2 here, set fsdp: true instead"),
        (
            c.zero_stage > 0 and c.fsdp,
            f"zero_stage={c.zero_stage} with fsdp=true: both shard the optimizer's state, choose one",
        ),
        (
            c.zero_stage > 0 and not c.optim.startswith("adamw_torch"),
            f"zero_stage={c.zero_stage} with optim={c.optim}: its state needs the tensors' shapes, which ZeRO "
            "flattens; use optim: adamw_torch",
        ),
        (
            c.vocab_parallel and not c.fsdp,
            "vocab_parallel=true without fsdp: it needs sharded weights, set fsdp: true (or leave it out)",
        ),
        (
            c.vocab_parallel and c.spec.trains_reward_model,
            "vocab_parallel=true with algorithm=reward: a reward model has no LM head, leave vocab_parallel out",
        ),
        (
            c.vocab_parallel and c.impl == "reference",
            "vocab_parallel=true with impl=reference: that needs the full vocabulary, use impl: auto",
        ),
        (
            c.dataset_test_split is not None and c.num_eval_rows > 0,
            f"num_eval_rows={c.num_eval_rows} with dataset_test_split={c.dataset_test_split!r}: choose one",
        ),
        (
            c.eval_steps > 0 and no_eval_rows,
            f"eval_steps={c.eval_steps}: nothing to evaluate on, set dataset_test_split or num_eval_rows",
        ),
        (
            c.push_to_hub and c.hub_model_id is None,
            "push_to_hub=true without hub_model_id: name the repository, as in hub_model_id: organisation/name",
        ),
        (c.max_steps == 0, "max_steps=0: use a positive number, or -1 for num_train_epochs"),
        (
            c.spec.learns_from_reward and not c.has_reward,
            "algorithm=rloo without a reward: set reward (a function) or reward_model_path",
        ),
        (
            c.reward is not None and c.reward_model_path is not None,
            f"reward={c.reward!r} with reward_model_path={c.reward_model_path!r}: choose one",
        ),
        (
            c.spec.trains_reward_model and c.has_reward,
            "algorithm=reward learns a reward and needs none: leave reward and reward_model_path out",
        ),
        (
            c.spec.trains_reward_model and bool(c.router_aux_loss_coef),
            f"router_aux_loss_coef={c.router_aux_loss_coef} with algorithm=reward: transformers' classifiers have no "
            "loss of their routers, leave it out",
        ),
        (
            c.missing_eos_penalty > 0 and not c.has_reward,
            f"missing_eos_penalty={c.missing_eos_penalty:g} without a reward to subtract it from: set reward or "
            "reward_model_path",
        ),
        (
            c.reward is not None and not re.fullmatch(r"[\w.]+:\w+", c.reward),
            f"reward={c.reward!r}: write it as package.module:function",
        ),
    ]
    return [problem for broken, problem in [*rules, *_rules_of_best_model(c)] if broken]


def _rules_of_best_model(c: Config) -> list[tuple[bool, str]]:
    """Return the rules of the best checkpoint and early stopping: whether each is broken, and the message."""
    if not c.compares_evaluations:
        return []
    what = "load_best_model_at_end=true" if c.load_best_model_at_end else "early_stopping_patience"
    has_rows = c.dataset_test_split is not None or c.num_eval_rows > 0
    name = c.best_metric
    return [
        (not has_rows, f"{what}: nothing to evaluate on, set dataset_test_split or num_eval_rows"),
        (has_rows and c.eval_steps == 0, f"{what} with eval_steps=0: that evaluates only at the end, set eval_steps"),
        (
            c.load_best_model_at_end and c.eval_steps > 0 and (c.save_steps == 0 or c.save_steps % c.eval_steps > 0),
            f"load_best_model_at_end=true with save_steps={c.save_steps} and eval_steps={c.eval_steps}: every "
            "checkpoint must be evaluated, use a save_steps that is a multiple of eval_steps",
        ),
        (
            name not in c.eval_metrics,
            f"metric_for_best_model={shown(c.metric_for_best_model)}: the evaluations of this run have "
            f"{', '.join(c.eval_metrics)}",
        ),
        (
            name in ("eval_kl", "eval_completions/clipped_ratio") and c.greater_is_better is None,
            f"metric_for_best_model={shown(c.metric_for_best_model)}: by transformers' rule a larger one would be "
            "better, say greater_is_better: false (or true)",
        ),
        (
            c.max_kl_for_best_model is not None and "eval_kl" not in c.eval_metrics,
            f"max_kl_for_best_model={c.max_kl_for_best_model} with algorithm={c.algorithm}: its evaluations have no "
            "eval_kl, leave it out",
        ),
    ]


def _loss_words(c: Config) -> str:
    """Return how messages name the loss of ``c``."""
    return f"loss_type={shown(c.loss_type)}" if c.loss_type else f"algorithm={c.algorithm}"


def _loss_rules(c: Config) -> list[tuple[bool, str]]:
    """Return the rules about the preference losses and their settings."""
    serves = c.spec.row_type == "pair" and c.spec.preference == "sigmoid"
    rules = [
        (
            bool(c.loss_type) and not serves,
            f"loss_type={shown(c.loss_type)} with algorithm={c.algorithm}: only dpo and hypo take it, leave it out",
        ),
        (
            c.loss_weights is not None and len(c.loss_weights) != len(c.loss_types),
            f"loss_weights={shown(c.loss_weights)}: need one weight for each of loss_type={shown(c.loss_types)}",
        ),
        (
            "exo_pair" in c.loss_types and not c.label_smoothing,
            "loss_type=exo_pair divides by label_smoothing: set label_smoothing: 0.001, as its paper does",
        ),
    ]
    if not isinstance(c.spec.preference, str) or (c.loss_type and not serves):
        return rules
    read = settings_of(c.loss_types)
    rules += [
        (
            name not in read and getattr(c, name) != default,
            f"{name}={shown(getattr(c, name))}: {_loss_words(c)} does not read it, leave it out",
        )
        for name, default in OWN_SETTINGS.items()
    ]
    return rules


def settings_without_effect(c: Config) -> list[str]:
    """Return one line for each field that was set but has no effect."""
    draws = "algorithm: hypo or rloo"
    needs = [
        (
            ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
            c.use_peft,
            "use_peft: true",
        ),
        (("bnb_4bit_quant_type", "use_bnb_nested_quant"), c.load_in_4bit, "load_in_4bit: true"),
        (("kl_coef",), c.spec.is_hybrid, "algorithm: hypo"),
        (("num_generations", "length_penalty"), c.draws_samples, draws),
        (("importance_cap",), c.rollout_steps > 1, "rollout_steps above 1"),
        (("warmup_ratio",), c.warmup_steps == 0, "warmup_steps: 0"),
        (
            ("metric_for_best_model", "greater_is_better", "max_kl_for_best_model"),
            c.compares_evaluations,
            "load_best_model_at_end or early_stopping_patience",
        ),
        (("early_stopping_threshold",), c.early_stopping_patience is not None, "early_stopping_patience"),
        (("hub_model_id", "hub_private_repo"), c.push_to_hub, "push_to_hub: true"),
    ]
    return [
        f"{name}={shown(getattr(c, name))} has no effect without {what}"
        for names, has_effect, what in needs
        for name in names
        if not has_effect and getattr(c, name) != type(c).model_fields[name].default
    ]
