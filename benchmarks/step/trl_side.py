"""TRL's trainers: DPO, and HyPO built from RLOO and DPO with little glue.

HyPO's KL term is RLOO with no reward and ``beta`` = ``kl_coef``: RLOO takes ``beta`` times the summed log-ratio off
the reward and compares a prompt's samples with each other. The preference term is DPO's own trainer, on the same
model, reference and optimizer; both trainers' gradients add up before the one optimizer step.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.step.cases import Case
from benchmarks.step.contender import LEARNING_RATE, Contender
from benchmarks.step.material import SEED, Ids, Material
from benchmarks.step.ours import BETA, KL_COEF, config
from benchmarks.step.phases import Hook, timed_phases
from benchmarks.step.variants import Variant
from hypo_train.model.load import load_policy


class HyPOTrainer(RLOOTrainer):
    """HyPO on TRL: RLOO's backward pass on the samples, then DPO's on the pairs, then one optimizer step."""

    def pair_with(self, dpo: DPOTrainer) -> None:
        self.dpo = dpo
        self.pairs = itertools.cycle(list(dpo.get_train_dataloader()))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        kl = super().training_step(model, inputs, num_items_in_batch)
        self.dpo.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps
        return kl + self.dpo.training_step(model, next(self.pairs), num_items_in_batch)


class _Trl(Contender):
    """Runs a TRL trainer as its ``train`` does, without callbacks and logs."""

    trainer: Any
    hooks: list[Hook]
    dpo: DPOTrainer  # the trainer of the pairs
    num_batches: int  # micro-batches per optimizer step

    def start(self) -> None:
        args = self.trainer.args
        if args.gradient_checkpointing:  # ``train`` enables it, not the constructor
            self.trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        loader = self.trainer.get_train_dataloader()
        self.model, loader = self.trainer._prepare_for_training(1_000_000, loader, None)
        self.batches = list(itertools.islice(loader, self.num_batches))
        self.optimizer = self.trainer.optimizer
        self.trainer.current_gradient_accumulation_steps = self.num_batches
        self.hooks = [
            *(Hook("backward", accelerator, "backward") for accelerator in self._accelerators()),
            Hook("optimizer", self.trainer.accelerator, "clip_grad_norm_"),
            Hook("optimizer", self.optimizer, "step"),
        ]
        if self.trainer.ref_model is not None:
            self.hooks.append(Hook("reference", self.trainer.ref_model, "forward"))

    def step(self) -> float | None:
        trainer = self.trainer
        loss = torch.zeros((), device=trainer.accelerator.device)
        for batch in self.batches:
            loss += trainer.training_step(self.model, batch)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return float(loss) if self.dpo is trainer else None

    def timed_step(self) -> dict[str, float]:
        with timed_phases(self.hooks, self.trainer.accelerator.device) as seconds:
            self.step()
        return seconds

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.trainer.model.named_parameters())

    def references(self) -> dict[str, Tensor]:
        reference = self.trainer.ref_model
        return {} if reference is None else dict(reference.named_parameters())

    def seen_pairs(self) -> set[tuple[Ids, Ids, Ids]]:
        seen = set()
        for batch in self.dpo.get_train_dataloader():
            rows = [_prompt_and_completion(batch, row) for row in range(len(batch["input_ids"]))]
            half = len(rows) // 2
            for (prompt, chosen), (again, rejected) in zip(rows[:half], rows[half:], strict=True):
                seen.add((prompt if prompt == again else (), chosen, rejected))
        return seen

    def _accelerators(self) -> list[Any]:
        return [self.trainer.accelerator]


class TrlDPO(_Trl):
    def __init__(self, variant: Variant, material: Material, output_dir: Path) -> None:
        super().__init__(material)
        case = material.case
        self.trainer = self.dpo = DPOTrainer(
            model=_policy(variant, material, output_dir),
            args=_dpo_config(case, output_dir, variant.settings),
            train_dataset=datasets.Dataset.from_list(material.rows),
            processing_class=_tokenizer(material),
            peft_config=_lora(case),
        )
        self.num_batches = case.pairs // case.micro_pairs
        self.start()


class TrlHyPO(_Trl):
    trainer: HyPOTrainer

    def __init__(self, variant: Variant, material: Material, output_dir: Path) -> None:
        super().__init__(material)
        case = material.case
        self.num_batches = case.pairs // case.micro_pairs
        rows = datasets.Dataset.from_list(material.rows)
        self.trainer = HyPOTrainer(
            model=_policy(variant, material, output_dir),
            reward_funcs=_no_reward,
            args=_rloo_config(case, output_dir, variant.settings),
            train_dataset=rows.select_columns("prompt"),
            processing_class=_tokenizer(material),
            peft_config=_lora(case),
        )
        model: Any = self.trainer.model
        self.dpo = DPOTrainer(
            model=model,
            ref_model=self.trainer.ref_model,
            args=_dpo_config(case, output_dir, variant.settings),
            train_dataset=rows,
            processing_class=_tokenizer(material),
        )
        if case.tuning == "LoRA":  # DPOTrainer mistakes the new adapter for a trained one and keeps a copy as reference
            model.delete_adapter("ref")
        self.trainer.pair_with(self.dpo)
        self.trainer.eos_token_ids = [-1]  # no token ends a sample
        self._sample = self.trainer._generate_single_turn
        vars(self.trainer)["_generate_single_turn"] = self._tapped
        self.start()
        self.hooks.append(Hook("sample", self.trainer, "_generate_single_turn"))

    def _tapped(self, prompts: list[list[int]], *args: Any) -> list[list[int]]:
        completions = self._sample(prompts, *args) if self.tap.given is None else self.tap.answer(prompts)
        self.tap.note(prompts, completions)
        return completions

    def _accelerators(self) -> list[Any]:
        return [self.trainer.accelerator, self.dpo.accelerator]


def _no_reward(completions: list[str], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def _policy(variant: Variant, material: Material, output_dir: Path) -> Any:
    """Return the model with the dtypes and frozen weights that this project uses; TRL adds the rest."""
    if variant.side == "unsloth":
        return _unsloth_policy(material)
    ours = config(Variant(variant.name, "ours", variant.algorithm), material, output_dir)
    plain = ours.model_copy(update={"use_peft": False, "gradient_checkpointing": False})
    return load_policy(plain, autocast=material.case.autocast).model


def _unsloth_policy(material: Material) -> Any:
    """Return unsloth's model with all weights trained."""
    fast: Any = importlib.import_module("unsloth").FastLanguageModel
    model, _ = fast.from_pretrained(
        str(material.folder),
        max_seq_length=material.case.prompt.high + material.case.response.high,
        dtype=torch.float32,
        load_in_4bit=False,
        full_finetuning=True,
        use_gradient_checkpointing=False,  # DPOConfig's setting decides
    )
    return model


def _arguments(case: Case, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": SEED,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": case.pairs // case.micro_pairs,
        "bf16": case.autocast,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dpo_config(case: Case, output_dir: Path, settings: Any) -> DPOConfig:
    arguments = {
        **_arguments(case, output_dir),
        "per_device_train_batch_size": case.micro_pairs,
        "beta": BETA,
        "max_length": None,  # nothing is truncated
    }
    return DPOConfig(**{**arguments, **settings})


def _rloo_config(case: Case, output_dir: Path, settings: Any) -> RLOOConfig:
    arguments = {
        **_arguments(case, output_dir),
        "per_device_train_batch_size": case.micro_pairs * case.num_generations,  # it counts samples
        "beta": KL_COEF,
        "num_generations": case.num_generations,
        "max_completion_length": case.new_tokens,
        "generation_kwargs": {"eos_token_id": None},
    }
    of_samples = {key: value for key, value in settings.items() if key != "precompute_ref_log_probs"}  # DPO's alone
    return RLOOConfig(**{**arguments, **of_samples})


def _lora(case: Case) -> LoraConfig | None:
    if case.tuning != "LoRA":
        return None
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _tokenizer(material: Material) -> Any:
    return AutoTokenizer.from_pretrained(material.folder)


def _prompt_and_completion(batch: dict[str, Tensor], row: int) -> tuple[Ids, Ids]:
    ids, seen, counted = (batch[key][row] for key in ("input_ids", "attention_mask", "completion_mask"))
    return _ids(ids[(seen == 1) & (counted == 0)]), _ids(ids[counted == 1])


def _ids(values: Tensor) -> Ids:
    found: Sequence[int] = values.tolist()
    return tuple(found)
