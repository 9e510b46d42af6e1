"""Settings of transformers' TrainingArguments, of TRL's configurations and of alignment-handbook's recipes."""

from __future__ import annotations

from hypo_train.other_trainers.advice import not_served, unneeded, use

_SEQUENCE = "`max_prompt_length` and `max_completion_length`: a prompt keeps its end, a completion its start"
_REFERENCE = "the reference is the model that training starts from"
_VLLM = "`sampler: vllm` runs its engine in this process, which needs no settings"

DATA = (
    use("dataset_mixer", "`dataset_name`: one data set, as a name or a file; join several into one file before"),
    use(
        "dataset_mixture",
        "`dataset_name`, `dataset_config` and `dataset_train_split` for its one data set (join several into one file "
        "before), and `num_eval_rows` for its test_split_size",
    ),
    use("dataset_splits", "`dataset_train_split` and `dataset_test_split`, one name each"),
    use("dataset_configs", "`dataset_config`, one name"),
    not_served(
        "dataset_text_field text_column",
        "text without prompts is",
        "write the columns prompt and completion (rename others with `column_mapping`)",
    ),
    use("max_length max_seq_length max_source_length block_size", _SEQUENCE),
    use("max_target_length response_length", "`max_completion_length`"),
    unneeded("truncation_mode truncation_side", "prompts keep their end and completions their start"),
    unneeded(
        "dataset_num_proc preprocessing_num_workers dataset_batch_size num_of_sequences chars_per_token "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name "
        "dataset_kwargs ignore_data_skip accelerator_config dispatch_batches split_batches label_pad_token_id "
        "padding_value pad_to_multiple_of is_encoder_decoder average_tokens_across_devices full_determinism",
        "there is nothing to set here",
    ),
    unneeded("packing packing_strategy eval_packing padding_free pretokenized", "rows are always packed"),
    unneeded("pad_token", "rows are packed and not padded"),
    not_served("eos_token", "another EOS token is", "set it in the tokenizer's own files"),
    not_served(
        "chat_template chat_template_path",
        "another chat template is",
        "write it to chat_template.jinja in a copy of the model's folder",
    ),
    not_served("chat_template_kwargs", "a template's keyword arguments are", "set their defaults in the template"),
    not_served("auto_insert_empty_system_msg", "an added system message is", "write it in the rows"),
    not_served("dataset_streaming", "reading a data set while training is", "name a part of it: it is read whole"),
    not_served("completion_only_loss", "a loss on prompts is", neutral=(True,)),
    not_served(
        "assistant_only_loss",
        "the loss on every turn of the assistant is",
        "write one row for each turn: the last turn is the completion",
    ),
    not_served(
        "shuffle_dataset", "an order that is not shuffled is", "leave it out: rows are shuffled by `seed`", (True,)
    ),
    use("train_sampling_strategy", "`group_by_length: true` for group_by_length, else leave it out: rows are shuffled"),
    use("data_seed", "`seed`, which sets the data order too"),
    not_served("tools", "tools for all rows are", "write them in each row's column tools"),
    unneeded("sanity_check", "`max_steps` ends a run early"),
)

MODEL = (
    use(
        "torch_dtype",
        "`dtype`, which is that of the frozen weights: trained weights are float32",
        auto="trained weights are float32 and `bf16` says how they compute, leave it out",
    ),
    not_served(
        "model_revision model_code_revision revision",
        "a revision is",
        "download it (hf download NAME --revision ...) and name the folder in `model_name_or_path`",
        ("main",),
    ),
    use("use_flash_attention_2", "`attn_implementation: flash_attention_2` for true, or leave it out"),
    not_served("model_init_kwargs", "arguments of from_pretrained are", "use `dtype` and `attn_implementation`"),
    unneeded("ref_model_init_kwargs force_use_ref_model model_adapter_name ref_adapter_name", _REFERENCE),
    unneeded("base_model_attribute_name ignore_bias_buffers use_cache", "there is nothing to set here"),
    use("sft_model_path", "`model_name_or_path`"),
    use("reward_model", "`reward_model_path`", true="use `algorithm: reward`"),
    unneeded("disable_dropout", "the model's dropout is always off"),
    unneeded("task_type lora_task_type", "`algorithm` says what is trained"),
    not_served(
        "lora_target_parameters", "LoRA on parameters that are no module's weight is", "use `lora_target_modules`"
    ),
    use("load_in_8bit", "`load_in_4bit`, 8 bits are not served", false="8 bits are off here too, leave it out"),
    unneeded("bnb_4bit_quant_storage", "4-bit weights cannot be sharded here"),
    unneeded("bnb_4bit_compute_dtype", "`bf16` says how 4-bit weights compute"),
    use("bnb_4bit_use_double_quant", "`use_bnb_nested_quant`"),
    use("quantization_config", "`load_in_4bit`, `bnb_4bit_quant_type` and `use_bnb_nested_quant`"),
    use("peft_config", "`use_peft` and the lora_ fields"),
    use("modules_to_save", "`lora_modules_to_save`"),
    not_served(
        "bias lora_bias exclude_modules fan_in_fan_out init_lora_weights layers_to_transform layers_pattern "
        "layer_replication rank_pattern alpha_pattern target_parameters trainable_token_indices ensure_weight_tying",
        "this option of peft is",
        neutral=(True,),
    ),
    unneeded("cast_lm_head_to_fp32", "log-probs are computed in float32"),
)

PREFERENCE_LOSS = (
    use("rpo_alpha", "`loss_type: [sigmoid, sft]` with `loss_weights: [1, rpo_alpha]`"),
    not_served(
        "ld_alpha use_weighting desirable_weight undesirable_weight prompt_sample_size min_density_ratio "
        "max_density_ratio center_rewards_coefficient",
        "this variant of the loss is",
    ),
    not_served(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        "a reference model that follows the policy is",
        "leave it out: the reference stays the model that training starts from",
    ),
    unneeded("precompute_ref_batch_size", "the reference's batches are those of training"),
    use("use_liger", "`use_liger_kernel` for the layers; the loss has its own kernel"),
    unneeded("use_liger_loss use_logits_to_keep use_num_logits_to_keep", "the loss never holds all logits"),
    use("generate_during_eval", "`num_eval_prompts`: evaluations of hypo and rloo sample in any case"),
)

ONLINE = (
    use(
        "steps_per_generation",
        "`rollout_steps`, which counts optimizer steps: divide by `gradient_accumulation_steps`",
    ),
    use("generation_batch_size", "`rollout_steps`, the number of optimizer steps that one draw of samples serves"),
    not_served(
        "num_iterations num_ppo_epochs ppo_epochs",
        "training several times on a draw of samples is",
        "leave it out (`rollout_steps` draws the samples of several steps at once)",
        (1,),
    ),
    use("rloo_k", "`num_generations`"),
    use("num_generations_eval", "`num_eval_samples`, samples for each held-out prompt"),
    use("init_kl_coef", "`beta` with `algorithm: rloo`, `kl_coef` with `algorithm: hypo`"),
    use("non_eos_penalty penalty_reward_value", "`missing_eos_penalty`, a positive number that is subtracted"),
    use("reward_funcs", "`reward`: one function, package.module:function"),
    not_served("reward_weights", "a weighted sum of rewards is", "sum them in the `reward` function"),
    use("total_episodes", "`max_steps`, or `num_train_epochs`: samples drawn are rows times `num_generations`"),
    use("mini_batch_size local_mini_batch_size", "`per_device_train_batch_size`, which counts prompts"),
    unneeded(
        "num_mini_batches local_batch_size num_total_batches local_rollout_forward_batch_size forward_batch_size "
        "world_size backward_batch_size global_batch_size global_backward_batch_size",
        "sizes follow from `per_device_train_batch_size` and `gradient_accumulation_steps`",
    ),
    not_served("stop_token stop_token_id", "another end of a sample is", "samples end at EOS, leave it out", ("eos",)),
    not_served(
        "epsilon epsilon_high delta cliprange cliprange_value",
        "a clipped policy ratio is",
        "leave it out; with `rollout_steps` above 1 token weights are cut at `importance_cap`",
    ),
    not_served(
        "min_p repetition_penalty generation_kwargs",
        "this way to sample is",
        "leave it out: samples must follow the policy for the KL to be right",
        (1, 1.0),
    ),
    not_served(
        "scale_rewards normalize_advantages normalize_advantage normalize_reward whiten_rewards reward_clip_range "
        "use_score_scaling use_score_norm score_clip multi_objective_aggregation",
        "rewards that are scaled or clipped are",
        "leave it out: rloo uses them as they are (scale them in the `reward` function)",
    ),
    not_served(
        "mask_truncated_completions importance_sampling_level off_policy_mask_threshold use_bias_correction_kl "
        "top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta "
        "entropy_target sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg max_tool_calling_iterations vf_coef gamma lam adap_kl_ctrl kl_penalty target target_kl "
        "horizon ratio_threshold token_level_kl mixture_coef lmbda seq_kd teacher_model_name_or_path "
        "teacher_model_init_kwargs judge is_peft_model",
        "this option of GRPO, PPO or distillation is",
        "leave it out (sampling algorithms here: hypo and rloo)",
    ),
    unneeded("ds3_gather_for_generation cache_implementation optimize_cuda_cache optimize_device_cache", "not needed"),
    not_served(
        "use_transformers_paged use_transformers_continuous_batching transformers_continuous_batching_config",
        "transformers' continuous batching is",
        "leave it out, or choose another `sampler`",
    ),
    use("use_vllm", "`sampler: vllm`", false="`sampler` is auto, which is not vllm, leave it out"),
    unneeded(
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port "
        "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_max_model_len "
        "vllm_tensor_parallel_size vllm_device vllm_dtype vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
        _VLLM,
    ),
    use("vllm_importance_sampling_cap", "`importance_cap`, which corrects for samples of earlier steps"),
    not_served("vllm_structured_outputs_regex vllm_guided_decoding_regex", "sampling under a grammar is"),
    unneeded(
        "predict_with_generate sortish_sampler generation_max_length generation_num_beams generation_config "
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo "
        "wandb_log_unique_prompts num_sample_generations",
        "the samples of every evaluation are in the run's folder",
    ),
)

OPTIMISATION = (
    use("adafactor", "`optim: adafactor` for true"),
    not_served("optim_args optim_target_modules", "an optimizer's extra arguments are", "use the adam_ fields"),
    not_served(
        "label_smoothing_factor", "smoothing of SFT's targets is", "leave it out (labels of pairs: `label_smoothing`)"
    ),
    use(
        "tf32", "`bf16: true` for speed: matrix products in float32 are exact", false="it is off here too, leave it out"
    ),
    use(
        "fp16 half_precision_backend fp16_opt_level fp16_backend",
        "`bf16: true`, fp16 is not served",
        false="fp16 is off here too, leave it out",
    ),
    unneeded("bf16_full_eval fp16_full_eval", "evaluations compute as training does"),
    use("gradient_checkpointing_kwargs gradient_checkpointing_use_reentrant", "`gradient_checkpointing` alone"),
    use("activation_checkpointing", "`gradient_checkpointing`: true, false or selective"),
    use("activation_checkpointing_kwargs", "`gradient_checkpointing` alone"),
    not_served("activation_offloading", "activations in CPU memory are", "use `gradient_checkpointing: true`"),
    not_served("torch_compile torch_compile_backend torch_compile_mode torchdynamo", "torch.compile of the model is"),
    unneeded("liger_kernel_config", "`use_liger_kernel` sets all of its kernels"),
    not_served("neftune_noise_alpha", "noise on embeddings (NEFTune) is"),
    not_served(
        "auto_find_batch_size",
        "a batch size found by running out of memory is",
        "use `max_tokens_per_micro_batch`, and --dry-run for an estimate",
    ),
    unneeded("torch_empty_cache_steps", "micro-batches have bounded memory"),
    use("per_gpu_train_batch_size", "`per_device_train_batch_size`"),
    use("per_gpu_eval_batch_size", "`per_device_eval_batch_size`"),
)

DEVICES = (
    use("fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap", "`fsdp: true` alone"),
    use("deepspeed", "`zero_stage`: 1 or 2, or `fsdp: true` for ZeRO 3"),
    unneeded("parallelism_config mp_parameters sharded_ddp", "`fsdp` and `vocab_parallel` shard weights"),
    unneeded(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "local_rank ray_scope tpu_num_cores tpu_metrics_debug use_mps_device use_ipex jit_mode_eval past_index",
        "there is nothing to set here",
    ),
    unneeded("use_cpu no_cuda", "the GPU is used if there is one (CUDA_VISIBLE_DEVICES= hides it)"),
)

LOGGING = (
    use("logging_strategy", "`logging_steps`, a number of steps", steps="`logging_steps` alone says it, leave it out"),
    unneeded(
        "logging_first_step logging_nan_inf_filter log_on_each_node log_level log_level_replica disable_tqdm debug "
        "skip_memory_metrics include_num_input_tokens_seen include_tokens_per_second verbose exp_name "
        "task_name restore_callback_states_from_checkpoint enable_jit_checkpoint",
        "there is nothing to set here",
    ),
    unneeded("logging_dir", "it is a folder in `output_dir`"),
    use("log_with", "`report_to`"),
    use("tracker_project_name wandb_project", "`project`"),
    use("wandb_run_name", "`run_name`"),
    unneeded(
        "wandb_entity wandb_run_group wandb_run_id wandb_tags",
        "wandb reads WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_RUN_ID and WANDB_TAGS from the environment",
    ),
    unneeded(
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
        "trackio reads TRACKIO_SPACE_ID from the environment",
    ),
    use(
        "eval_strategy evaluation_strategy do_eval evaluate_during_training",
        "`eval_steps`, a number of steps",
        no="`eval_steps` is 0 unless you set it, and only the end is evaluated, leave it out",
        steps="`eval_steps` alone says it, leave it out",
        true="`eval_steps` alone says it, leave it out",
        false="without `dataset_test_split` and `num_eval_rows` nothing is evaluated, leave it out",
    ),
    use("eval_on_start", "`eval_steps`: above 0 the start is evaluated too"),
    not_served("eval_delay", "a later first evaluation is"),
    unneeded(
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps prediction_loss_only batch_eval_metrics "
        "include_for_metrics include_inputs_for_metrics do_train do_predict compare_steps",
        "there is nothing to set here",
    ),
    use(
        "save_strategy",
        "`save_steps`, a number of steps",
        steps="`save_steps` alone says it, leave it out",
        best="use `load_best_model_at_end: true` with `save_steps` and `eval_steps`",
        no="use `save_steps: 0`",
        false="use `save_steps: 0`",
        epoch="use `save_steps`, a number of steps: the steps of an epoch are shown at the start",
    ),
    unneeded("save_only_model", "checkpoints hold all that resuming needs"),
    unneeded("save_on_each_node save_safetensors", "rank 0 writes safetensors"),
    unneeded("overwrite_output_dir", "a run is never overwritten (name a new `output_dir`)"),
    use("exp", "`run_name`"),
)

HUB = (
    unneeded(
        "hub_token push_to_hub_token hf_token", "no token belongs in a file: log in with hf auth login, or set HF_TOKEN"
    ),
    use("push_to_hub_model_id", "`hub_model_id`"),
    use("push_to_hub_organization", "`hub_model_id`, organisation/name"),
    unneeded("hub_strategy hub_always_push push_to_hub_if_best_kwargs", "the final model is pushed once, at the end"),
    not_served(
        "hub_revision hub_model_revision push_to_hub_revision",
        "a branch of the repository is",
        "leave it out: main is pushed",
        ("main",),
    ),
)

TABLE = (*DATA, *MODEL, *PREFERENCE_LOSS, *ONLINE, *OPTIMISATION, *DEVICES, *LOGGING, *HUB)
