"""Short names of settings that many scripts and trainers use."""

from __future__ import annotations

from hypo_train.other_trainers.advice import not_served, unneeded, use

TABLE = (
    use("batch_size train_batch_size per_device_batch_size", "`per_device_train_batch_size`"),
    use("eval_batch_size", "`per_device_eval_batch_size`"),
    use("beta_kl lambda kl_weight kl_lambda", "`kl_coef`"),
    use("data_path data_files train_file", "`dataset_name`"),
    use("validation_file eval_file test_file", "`dataset_test_split`, a split of `dataset_name`"),
    use("epochs num_epochs", "`num_train_epochs`"),
    use("lr", "`learning_rate`"),
    use("steps train_steps num_steps", "`max_steps`"),
    use("warmup num_warmup_steps", "`warmup_steps`"),
    use("dataset_path", "`dataset_name`"),
    unneeded("wandb_api_key", "no key belongs in a file: log in with wandb login, or set WANDB_API_KEY"),
    use("scheduler lr_scheduler schedule", "`lr_scheduler_type`"),
    use("optimizer", "`optim`"),
    use("grad_accum accumulation_steps", "`gradient_accumulation_steps`"),
    use("grad_clip gradient_clipping clip_grad_norm max_norm", "`max_grad_norm`"),
    use("lora use_lora", "`use_peft: true`"),
    use("lora_rank rank r", "`lora_r`"),
    use("target_modules", "`lora_target_modules`"),
    use("model model_name base_model model_id", "`model_name_or_path`"),
    use("dataset data", "`dataset_name`"),
    use("output output_path save_dir", "`output_dir`"),
    use("use_flash_attention", "`attn_implementation: flash_attention_2`, or leave it out"),
    use("tensorboard", "`report_to`: [tensorboard] for true (the default), or `report_to: none` for false"),
    use("wandb use_wandb", "`report_to: wandb` for true"),
    unneeded(
        "ref_model ref_model_name_or_path reference_model", "the reference is the model that training starts from"
    ),
    unneeded("tokenizer tokenizer_name tokenizer_name_or_path", "the model's own tokenizer is used"),
    use("max_seq_len", "`max_prompt_length` and `max_completion_length`, one limit for each part"),
    not_served("reference_free", "a loss without a reference model is"),
)
