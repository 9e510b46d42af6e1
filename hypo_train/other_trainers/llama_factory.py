"""Settings of LLaMA-Factory's recipes that TRL does not have too."""

from __future__ import annotations

from hypo_train.other_trainers.advice import not_served, unneeded, use

METHOD = (
    use(
        "stage",
        "`algorithm`: hypo, dpo, ipo, rloo, reward or sft",
        dpo="use `algorithm: dpo`",
        sft="use `algorithm: sft`",
        rm="use `algorithm: reward`",
        ppo="PPO is not served, use `algorithm: rloo`",
        kto="KTO is not served, use `algorithm: dpo` on pairs",
        pt="training on text without prompts is not served, use `algorithm: sft` on prompts and completions",
    ),
    use("pref_beta", "`beta`"),
    use(
        "pref_loss",
        "`algorithm`: hypo, dpo or ipo; other losses are not served",
        sigmoid="use `algorithm: dpo`",
        ipo="use `algorithm: ipo`, with another `beta`: TRL's IPO averages over tokens, this one sums as in its paper",
    ),
    not_served("pref_ftx", "an SFT term beside the preference loss is"),
    not_served("pref_bco_weight kto_chosen_weight kto_rejected_weight", "this variant of the loss is"),
    not_served("ppo_buffer_size ppo_score_norm ppo_target ppo_whiten_rewards", "PPO is", "use `algorithm: rloo`"),
    unneeded("ref_model_adapters ref_model_quantization_bit", "the reference is the model that training starts from"),
    not_served(
        "reward_model_adapters reward_model_quantization_bit reward_model_type",
        "a reward model with an adapter is",
        "merge it first and name its folder in `reward_model_path`",
        ("full",),
    ),
    not_served("use_dft_loss use_asft_loss asft_alpha use_eaft_loss", "a weighted SFT loss is"),
)

DATA = (
    use("eval_dataset", "`dataset_test_split`, a split of `dataset_name`"),
    unneeded("dataset_dir media_dir", "`dataset_name` is a path or a Hub name, and dataset_info.json is not read"),
    unneeded("template", "the tokenizer's own chat template is used"),
    use("cutoff_len", "`max_prompt_length` and `max_completion_length`, one limit for each part"),
    use("val_size", "`num_eval_rows`, a number of rows and not a share"),
    use("max_samples", "`max_steps`, or a file with fewer rows"),
    not_served("train_on_prompt", "a loss on prompts is"),
    unneeded(
        "mask_history",
        "only the last turn is trained on",
    ),
    not_served(
        "buffer_size mix_strategy interleave_probs eval_on_each_dataset",
        "a mixture of data sets is",
        "join them into one file before",
        ("concat", 16384),
    ),
    unneeded(
        "overwrite_cache preprocessing_batch_size tokenized_path data_shared_file_system ignore_pad_token_for_loss "
        "split_special_tokens",
        "there is nothing to set here",
    ),
    unneeded("neat_packing block_diag_attn", "rows are always packed, and do not see each other"),
    not_served(
        "tool_format default_system enable_thinking preserve_thinking",
        "this option of a template is",
        "write the turns in the rows as they should be rendered",
        (True,),
    ),
    not_served("disable_shuffling", "the order of the file is", "leave it out: rows are shuffled by `seed`"),
)

MODEL = (
    not_served(
        "adapter_name_or_path adapter_folder",
        "training an adapter further is",
        "merge it first (python -m hypo_train export RUN --output_dir FOLDER --merge) and name that folder",
    ),
    unneeded("cache_dir", "HF_HOME sets the Hub's cache"),
    unneeded(
        "use_fast_tokenizer offload_folder use_kv_cache use_v1_kernels infer_backend infer_dtype print_param_status "
        "compute_dtype model_max_length quantization_device_map plot_loss compute_accuracy "
        "include_effective_tokens_per_second",
        "there is nothing to set here",
    ),
    not_served(
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens",
        "changing the vocabulary is",
        "save a model and tokenizer with these tokens first, and name that folder",
        ("noise_init",),
    ),
    use(
        "flash_attn",
        "`attn_implementation`: sdpa, flash_attention_2 or auto",
        fa2="use `attn_implementation: flash_attention_2`, or leave it out: auto computes each prompt once",
        sdpa="use `attn_implementation: sdpa`, or leave it out",
        auto="`attn_implementation` is auto, leave it out",
        disabled="use `attn_implementation: eager`",
    ),
    not_served("shift_attn mixture_of_depths", "changing the model's function is"),
    use("enable_liger_kernel", "`use_liger_kernel`, for the layers: the loss has its own kernel"),
    unneeded("use_unsloth use_unsloth_gc", "this project has its own kernels"),
    use("moe_aux_loss_coef", "`router_aux_loss_coef`"),
    use("disable_gradient_checkpointing", "`gradient_checkpointing: false` for true"),
    use("use_reentrant_gc", "`gradient_checkpointing` alone"),
    unneeded("upcast_layernorm upcast_lmhead_output", "trained weights and log-probs are float32"),
    not_served("train_from_scratch", "training from new weights is"),
    unneeded(
        "hf_hub_token ms_hub_token om_hub_token",
        "no token belongs in a file: log in with hf auth login, or set HF_TOKEN",
    ),
    not_served(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels image_min_pixels "
        "image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen "
        "use_audio_in_video audio_sampling_rate",
        "training on images is",
        "leave it out: text alone trains the language model",
        (True,),
    ),
)

ADAPTER = (
    use(
        "finetuning_type",
        "`use_peft: true` for LoRA",
        lora="set `use_peft: true`",
        full="all weights are trained by default, leave it out",
        freeze="use `num_layers_unfrozen`",
        oft="OFT is not served, set `use_peft: true` for LoRA",
    ),
    use(
        "lora_target",
        "`lora_target_modules`, a list, or all-linear for all",
        all="use `lora_target_modules: all-linear`",
    ),
    use("freeze_trainable_layers", "`num_layers_unfrozen`, the last layers"),
    use(
        "freeze_trainable_modules freeze_extra_modules",
        "`unfrozen_parameters`, regular expressions of names",
    ),
    use("additional_target", "`lora_modules_to_save`, a list"),
    use("quantization_bit", "`load_in_4bit: true` for 4 bits, with `use_peft: true`; others are not served"),
    use("quantization_type", "`bnb_4bit_quant_type`"),
    use("double_quantization", "`use_bnb_nested_quant`, which is false by default"),
    use(
        "quantization_method",
        "`load_in_4bit: true`, which is bitsandbytes",
        bnb="`load_in_4bit` is bitsandbytes, leave it out",
    ),
    not_served(
        "pissa_init pissa_iter pissa_convert create_new_adapter oft_rank oft_block_size oft_target module_dropout",
        "this adapter is",
        "set `use_peft: true` for LoRA",
    ),
    not_served("use_llama_pro", "training blocks that were added is", "use `num_layers_unfrozen`"),
)

OPTIMISATION = (
    use("pure_bf16", "`dtype: bfloat16` for frozen weights; trained weights are float32"),
    use("use_muon", "`optim: muon` for true"),
    not_served(
        "use_adam_mini use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
        "galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode "
        "badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose",
        "this optimizer is",
        "use `optim`: adamw_torch, adamw_8bit, adafactor or muon",
    ),
    not_served(
        "use_mca use_megatron_bridge megatron_bridge_args use_hyper_parallel hyper_parallel_args "
        "hyper_parallel_cp_size use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size",
        "another engine of training is",
        "use `fsdp` or `zero_stage`",
        (1,),
    ),
)

LOGGING = (
    use("early_stopping_steps", "`early_stopping_patience`, a number of evaluations without a better metric"),
    not_served(
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
        "this tracker is",
        "use `report_to`: tensorboard, wandb, trackio or mlflow",
    ),
    unneeded("ray_init_kwargs master_addr master_port", "processes are started with torchrun"),
    unneeded(
        "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
        "times of each phase are in the metrics",
    ),
    unneeded(
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format",
        "python -m hypo_train export writes a finished run",
    ),
    use("export_hub_model_id", "`push_to_hub: true` and `hub_model_id`"),
    unneeded("do_sample num_beams skip_special_tokens eval_num_beams", "samples are drawn from the policy"),
    unneeded(
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        "`sampler` chooses the engine, which needs no settings",
    ),
)

TABLE = (*METHOD, *DATA, *MODEL, *ADAPTER, *OPTIMISATION, *LOGGING)
