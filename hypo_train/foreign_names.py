"""Names of settings in other trainers, and what to write here instead where the nearest name would mislead."""

from __future__ import annotations

_SEQUENCES = "use max_prompt_length and max_completion_length"
_NO_REFERENCE = "the reference is the model that training starts from, leave it out"
_NOT_NEEDED = "there is nothing to set here, leave it out"

FOREIGN_NAMES = {
    "batch_size": "use per_device_train_batch_size",
    "beta_kl": "use kl_coef",
    "data_path": "use dataset_name",
    "dataloader_num_workers": _NOT_NEEDED,
    "dataset_num_proc": _NOT_NEEDED,
    "deepspeed": "use zero_stage: 1 or 2, or fsdp: true",
    "disable_dropout": "the model's dropout is always off, leave it out",
    "epochs": "use num_train_epochs",
    "eval_strategy": "use eval_steps, a number of steps",
    "evaluation_strategy": "use eval_steps, a number of steps",
    "fp16": "use bf16: true, fp16 is not served",
    "gradient_checkpointing_kwargs": "use gradient_checkpointing alone",
    "hub_model_id": "nothing is uploaded, leave it out",
    "lambda": "use kl_coef",
    "load_in_8bit": "use load_in_4bit, 8 bits are not served",
    "logging_dir": "it is a folder in output_dir, leave it out",
    "loss_type": "use algorithm: hypo, dpo or ipo",
    "lr": "use learning_rate",
    "max_length": _SEQUENCES,
    "max_seq_len": _SEQUENCES,
    "max_seq_length": _SEQUENCES,
    "micro_batch_size": "use per_device_train_batch_size",
    "num_epochs": "use num_train_epochs",
    "packing": "rows are always packed, leave it out",
    "padding_free": "rows are always packed, leave it out",
    "per_device_batch_size": "use per_device_train_batch_size",
    "push_to_hub": "nothing is uploaded, leave it out",
    "ref_model": _NO_REFERENCE,
    "ref_model_name_or_path": _NO_REFERENCE,
    "reference_model": _NO_REFERENCE,
    "remove_unused_columns": _NOT_NEEDED,
    "save_strategy": "use save_steps, a number of steps",
    "tensorboard": "use report_to: [tensorboard] for true (the default), or report_to: none for false",
    "tokenizer": "the model's own tokenizer is used, leave it out",
    "tokenizer_name_or_path": "the model's own tokenizer is used, leave it out",
    "train_batch_size": "use per_device_train_batch_size",
    "truncation_mode": "prompts keep their end and completions their start, leave it out",
    "use_lora": "use use_peft",
    "use_vllm": "use sampler: vllm",
    "warmup_steps": "use warmup_ratio, a share of the steps",
}
