"""Settings of axolotl's recipes that TRL does not have too."""

from __future__ import annotations

from hypo_train.other_trainers.advice import not_served, unneeded, use

_LIMITS = "`max_prompt_length` and `max_completion_length`: a prompt keeps its end, a completion its start"

METHOD = (
    not_served(
        "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url "
        "kd_online_topk kd_online_server kd_online_timeout kd_temperature_min diffusion noise_schedule min_mask_ratio "
        "max_mask_ratio num_diffusion_steps importance_weighting mask_token_id mask_token_str generation_interval "
        "generation_steps",
        "distillation and diffusion are",
    ),
    not_served(
        "nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port "
        "nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start "
        "nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns hatchery",
        "environments and remote training are",
    ),
    use(
        "rl",
        "`algorithm`: hypo, dpo, ipo, rloo, reward or sft",
        dpo="use `algorithm: dpo`",
        ipo="use `algorithm: ipo`, with another `beta`: TRL's IPO averages over tokens, this one sums as in its paper",
        grpo="GRPO is not served, use `algorithm: rloo`, or `algorithm: hypo` for pairs and samples",
        kto="KTO is not served, use `algorithm: dpo` on pairs",
        orpo="ORPO is not served, use `algorithm: dpo`",
        simpo="SimPO is not served, use `algorithm: dpo`",
    ),
    use("rl_beta dpo_beta", "`beta`"),
    use("dpo_label_smoothing", "`label_smoothing`"),
    use("dpo_loss_type", "`algorithm`: dpo or ipo", sigmoid="use `algorithm: dpo`", ipo="use `algorithm: ipo`"),
    not_served("dpo_loss_weights dpo_norm_loss dpo_use_weighting", "this variant of DPO's loss is"),
    unneeded(
        "dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep", "the loss has its own kernel and no padding"
    ),
    use("dpo_generate_during_eval", "`num_eval_prompts`: evaluations of hypo and rloo sample in any case"),
    not_served("orpo_alpha kto_desirable_weight kto_undesirable_weight", "the losses of ORPO and KTO are"),
    not_served("process_reward_model", "a reward for each step of an answer is"),
    unneeded("num_labels", "a reward model has one"),
    use("trl", "its keys in lines of their own, such as `beta`, `num_generations` and `max_completion_length`"),
    use("vllm", "`sampler: vllm` for its samples, which needs no settings"),
    not_served("ebft qat quantization", "this block of settings is"),
    not_served("plugins trainer_cls", "code of other trainers is", "leave it out (a loss of your own: `algorithm`)"),
    not_served("use_eaft eaft_alpha eaft_k", "a loss weighted by entropy is"),
    not_served("train_on_inputs", "a loss on prompts is"),
    not_served(
        "use_data_producer async_prefetch prefetch_depth vllm_sync_interval streaming_partial_batch "
        "streaming_min_groups reward_num_workers replay_buffer_size replay_recompute_logps reroll_start_fraction "
        "reroll_max_groups skip_zero_advantage_batches vllm_lora_sync rollout_func",
        "samples drawn beside training are",
        "use `rollout_steps`",
        (1, 1.0, True),
    ),
)

DATA = (
    use(
        "datasets",
        "`dataset_name` for its path, `dataset_train_split` for its split, `dataset_config` for its name and "
        "`column_mapping` for its fields: one data set with the columns prompt, chosen and rejected",
    ),
    use("test_datasets", "`dataset_test_split`, a split of `dataset_name`"),
    not_served("pretraining_dataset text_column_pretraining", "training on text without prompts is"),
    use(
        "val_set_size",
        "`num_eval_rows`, a number of rows and not a share",
        **{"0.0": "`num_eval_rows` is 0, leave it out"},
    ),
    use("sequence_len max_packed_sequence_len", _LIMITS),
    use("max_prompt_len", "`max_prompt_length`"),
    unneeded("eval_sequence_len", "evaluations have the limits of training"),
    unneeded("excess_length_strategy", "prompts keep their end and completions their start; counts are shown"),
    not_served("min_sample_len", "a minimum length is", "drop short rows from the data"),
    unneeded(
        "sample_packing eval_sample_packing sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est pad_to_sequence_len "
        "multipack_real_batches batch_flattening pretrain_multipack_buffer_size pretrain_multipack_attn "
        "pretraining_sample_concatenation total_num_tokens total_supervised_tokens",
        "rows are always packed",
    ),
    unneeded(
        "dataset_prepared_path dataset_processes dataset_keep_in_memory skip_prepare_dataset "
        "num_dataset_shards_to_save is_preprocess preprocess_iterable strict axolotl_config_path",
        "there is nothing to set here",
    ),
    unneeded("dataset_exact_deduplication", "repeated rows are counted and shown, and stay"),
    not_served("dataset_shard_num dataset_shard_idx", "a part of a data set is", "write it to a file of its own"),
    not_served("push_dataset_to_hub", "uploading data is"),
    unneeded("hf_use_auth_token", "huggingface_hub's login is used: hf auth login, or HF_TOKEN"),
    unneeded("shuffle_merged_datasets shuffle_before_merging_datasets", "rows are shuffled by `seed`"),
    not_served("curriculum_sampling", "the order of the file is", "leave it out: rows are shuffled by `seed`"),
    not_served("streaming streaming_multipack_buffer_size", "reading a data set while training is"),
    not_served(
        "chat_template_jinja eot_tokens",
        "another chat template is",
        "write it to chat_template.jinja in a copy of the model's folder",
    ),
    not_served("default_system_message", "a system message for all rows is", "write it in the rows"),
    not_served("use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks", "PoSE is"),
)

MODEL = (
    not_served(
        "base_model_config cls_model_config overrides_of_model_config model_config overrides_of_model_kwargs "
        "model_kwargs model_quantization_config model_quantization_config_kwargs",
        "another configuration of the model is",
        "change config.json in a copy of its folder",
    ),
    not_served(
        "revision_of_model",
        "a revision is",
        "download it (hf download NAME --revision ...) and name the folder in `model_name_or_path`",
    ),
    unneeded(
        "type_of_model model_type tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files "
        "processor_type processor_kwargs is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model experimental_skip_move_to_device low_cpu_mem_usage device device_map max_memory "
        "gpu_memory_limit ddp capabilities env_capabilities",
        "it is found from the model's folder and the machine",
    ),
    unneeded("tokenizer_config", "the model's own tokenizer is used"),
    not_served("tokenizer_use_mistral_common", "mistral-common's tokenizer is"),
    not_served(
        "special_tokens tokens added_tokens_overrides resize_token_embeddings_to_32x mean_resizing_embeddings "
        "shrink_embeddings fix_untrained_tokens",
        "changing the vocabulary is",
        "save a model and tokenizer with these tokens first, and name that folder",
    ),
    not_served("reinit_weights", "training from new weights is"),
    not_served(
        "rope_scaling scaling_softmax scaling_softmax_factor scaling_softmax_bias s2_attention noisy_embedding_alpha "
        "llama4_linearized_experts use_onebitllms",
        "changing the model's function is",
    ),
    use(
        "flash_attention",
        "`attn_implementation: flash_attention_2`, or leave it out: auto computes each prompt once",
        false="`attn_implementation` is auto, leave it out",
    ),
    use("sdp_attention", "`attn_implementation: sdpa`, or leave it out"),
    use("eager_attention", "`attn_implementation: eager`, or leave it out"),
    use("flex_attention", "`attn_implementation: flex_attention`, or leave it out"),
    unneeded(
        "flex_attn_compile_kwargs xformers_attention sage_attention flash_optimum flash_attn_cross_entropy "
        "flash_attn_fuse_mlp flash_attn_rms_norm gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 "
        "sdpa_varlen fused_attn_kernel experts_implementation use_kernels chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel",
        "`attn_implementation` and `use_liger_kernel` choose the model's kernels",
    ),
    use("bfloat16", "`dtype: bfloat16`, which is that of the frozen weights: trained weights are float32"),
    use("float32", "`dtype: float32`, the default"),
    use("float16", "`dtype: bfloat16`, fp16 is not served"),
    not_served("fp8 fp8_enable_fsdp_float8_all_gather fp8_backend", "fp8 is"),
    unneeded(
        "fp32_norms fp32_norm_classes embeddings_skip_upcast peft_autocast_adapter_dtype", "trained weights are float32"
    ),
    use(
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation",
        "`use_liger_kernel: true` for all of them",
    ),
    unneeded(
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling cut_cross_entropy",
        "the loss has its own kernel",
    ),
    unneeded(
        "use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels expert_backend moe_grouped_backend "
        "moe_dequant_chunk_size moe_bnb_fast dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel",
        "the model's own code computes its experts",
    ),
    not_served(
        "dense_mixer nonexpert_quantization dsv4_fp8_nonexpert_mode dsv4_bf16_all dsv4_fp4_grouped_mode "
        "gemma4_fp8_nonexpert gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step",
        "this way to compute or quantise the model is",
    ),
)

ADAPTER = (
    use(
        "adapter",
        "`use_peft: true` for LoRA",
        lora="set `use_peft: true`",
        qlora="set `use_peft: true` and `load_in_4bit: true`",
    ),
    use("lora_target_linear", "`lora_target_modules: all-linear` for true"),
    use("peft_use_dora", "`use_dora`"),
    use("peft_use_rslora", "`use_rslora`"),
    not_served(
        "lora_model_dir",
        "training an adapter further is",
        "merge it first (python -m hypo_train export RUN --output_dir FOLDER --merge) and name that folder",
    ),
    not_served(
        "lora_fan_in_fan_out lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft_layers_pattern "
        "peft_layer_replication peft_init_lora_weights peft_trainable_token_indices peft_ensure_weight_tying peft "
        "loftq_config",
        "this option of peft is",
        neutral=(True,),
    ),
    not_served(
        "loraplus_lr_ratio loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups",
        "a learning rate for a part of the weights is",
        neutral=("1e-06",),
    ),
    not_served(
        "relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers lisa_step_interval "
        "lisa_layers_attribute",
        "ReLoRA and LISA are",
    ),
    unneeded(
        "qlora_sharded_model_loading lora_on_cpu merge_method quantize_moe_experts", "there is nothing to set here"
    ),
    not_served(
        "gptq bnb_config_kwargs",
        "this quantisation is",
        "use `load_in_4bit`, `bnb_4bit_quant_type` and `use_bnb_nested_quant`",
    ),
    not_served("use_mora mora_type mora", "MoRA is", "set `use_peft: true` for LoRA"),
    not_served("llmcompressor recipe save_compressed", "pruning is"),
    use("merge_lora", "python -m hypo_train export RUN --output_dir FOLDER --merge, after training"),
)

OPTIMISATION = (
    not_served("grokfast_alpha grokfast_lamb spectrum_top_fraction spectrum_model_name", "this way to train is"),
    not_served(
        "expert_parallel_size expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
        "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported",
        "splitting experts over devices is",
        neutral=(1,),
    ),
    use("micro_batch_size", "`per_device_train_batch_size`"),
    not_served(
        "adam_epsilon2 adam_beta3 torchdistx_path dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of "
        "qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        "this optimizer is",
        "use `optim`: adamw_torch, adamw_8bit, adafactor or muon",
    ),
    not_served(
        "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor", "this schedule is", "use `lr_scheduler_type`"
    ),
    use(
        "cosine_min_lr_ratio",
        "`lr_scheduler_type: cosine_with_min_lr` with `lr_scheduler_kwargs`: {min_lr_rate: its value}",
    ),
    not_served("selective_checkpointing", "a list of operations to keep is", "use `gradient_checkpointing: selective`"),
    not_served("layer_offloading", "weights in CPU memory are", "use `load_in_4bit` or `fsdp`"),
    unneeded("gc_steps gc_collect_steps", "micro-batches have bounded memory"),
    not_served("torch_compile_options deepcompile", "torch.compile of the model is"),
    unneeded(
        "fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size",
        "`fsdp: true` shards over all processes",
    ),
    not_served(
        "sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func tensor_parallel_size",
        "splitting a row over devices is",
        "leave it out, or split weights with `fsdp` and `vocab_parallel`",
        (1,),
    ),
    not_served(
        "loss_watchdog_threshold loss_watchdog_patience",
        "stopping at a high loss is",
        "leave it out: a loss that is not finite stops a run",
    ),
)

LOGGING = (
    not_served(
        "swanlab_experiment_name swanlab_description swanlab_log_model swanlab_web_host swanlab_api_host "
        "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer",
        "this tracker is",
        "use `report_to`: tensorboard, wandb, trackio or mlflow",
    ),
    unneeded(
        "lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model",
        "run lm-eval on the folder of python -m hypo_train export",
    ),
    use("evals_per_epoch", "`eval_steps`, a number of steps: the steps of an epoch are shown at the start"),
    use("saves_per_epoch", "`save_steps`, a number of steps: the steps of an epoch are shown at the start"),
    use("save_first_step", "`save_steps: 1` for a checkpoint after each step"),
    use(
        "auto_resume_from_checkpoints",
        "`resume_from_checkpoint: auto`",
        false="a run starts anew unless asked, leave it out",
    ),
    use("use_tensorboard", "`report_to: tensorboard` for true (the default), or `report_to: none` for false"),
    use("use_mlflow", "`report_to: mlflow` for true"),
    use("use_trackio", "`report_to: trackio` for true"),
    use("wandb_name mlflow_run_name trackio_run_name", "`run_name`"),
    use("mlflow_experiment_name trackio_project_name", "`project`"),
    unneeded("mlflow_tracking_uri", "mlflow reads MLFLOW_TRACKING_URI from the environment"),
    unneeded("wandb_mode wandb_watch", "wandb reads WANDB_MODE from the environment"),
    not_served("wandb_log_model hf_mlflow_log_artifacts", "sending weights to a tracker is"),
    not_served(
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_otel_metrics otel_metrics_host otel_metrics_port",
        "this tracker is",
        "use `report_to`: tensorboard, wandb, trackio or mlflow",
    ),
    unneeded("include_tkps profiler_steps profiler_steps_start eval_table_size", "speed is in the metrics"),
    unneeded(
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
        "use python -m hypo_train evaluate and judge after training",
    ),
    use("generate_samples num_generation_samples", "`num_eval_prompts` and `num_eval_samples`"),
    use("generation_max_new_tokens eval_max_new_tokens", "`max_new_tokens`, of all samples"),
    unneeded(
        "generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample",
        "evaluations sample as training does: `temperature`, `top_p`, `top_k`",
    ),
    unneeded("dynamic_checkpoint", "SIGTERM saves a checkpoint at any time"),
    unneeded(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        "there is no chat page",
    ),
    unneeded("use_ray ray_run_name ray_num_workers resources_per_worker", "processes are started with torchrun"),
    not_served(
        "freeze_mm_modules image_size image_resize_algorithm role_boundaries",
        "training on images is",
        "leave it out: text alone trains the language model",
    ),
)

TABLE = (*METHOD, *DATA, *MODEL, *ADAPTER, *OPTIMISATION, *LOGGING)
