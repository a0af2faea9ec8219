"""Tables of LLaMA-Factory's options: those that are read together, and the reasons why others have no counterpart."""

# Keys that `pipeline.migration.llama_factory` reads together.
READ = {
    *("stage", "finetuning_type", "lora_rank", "lora_alpha", "lora_target", "bf16", "pure_bf16", "flash_attn"),
    *(
        "disable_gradient_checkpointing",
        "quantization_bit",
        "double_quantization",
        "quantization_type",
        "warmup_ratio",
    ),
    *("dataset", "eval_dataset", "val_size", "cutoff_len", "adapter_name_or_path", "ppo_buffer_size", "ppo_epochs"),
    *("ppo_target", "ppo_score_norm", "ppo_whiten_rewards", "max_new_tokens", "temperature", "top_p", "top_k"),
    *("reward_model", "reward_model_adapters", "reward_model_type", "ref_model", "ref_model_adapters"),
}

_TEMPLATE = "texts are written with the tokenizer's own chat template. Change it in a copy of the model."
_REGISTRY = (
    "there is no registry of data sets: name a file, a folder or a hub id in dataset_name. See docs/own-data.md."
)
_TOKENS = "rows are tokenized by each run, all at once. Nothing to do."
_MIXTURE = "the reward stage reads several data sets with weights (`datasets`), PPO one. See docs/own-data.md."
_LOSS = "it is about another stage or loss. Nothing to do."
_LORA = "adapters are plain LoRA, or rank-stabilised LoRA with use_rslora."
_TUNING = "only LoRA adapters on a frozen backbone train. lora_top_layers adapts the top layers alone."
_OPTIMIZER = "the optimizer is Trainer's (optim), such as AdamW."
_LAUNCH = (
    "it is about the launch: one accelerate launch with a file of accelerate_configs. See docs/many-processes.md."
)
_KERNEL = "the model is transformers' own, with its own attention (attn_implementation). Nothing to do."
_IMAGES = "models with pictures, video or sound are not supported. Use a language model."
_AFTER = "it is about serving or exporting. See docs/after-training.md."
_TRACKER = "name the tracker in report_to, and set its environment."
_VOCABULARY = "the tokenizer is used as it is, and its vocabulary is not changed. Change a copy of the model."
_ROPE = "the context is the model's own. Change its config in a copy of the model."
_PRECISION = "the backbone keeps its dtype, and what trains is float32. Nothing to do."
_GENERATION = "completions are drawn from the policy that learns, one token after the other. Leave it unset."
_RUN = "a stage has one job, and its folder is never written over by a run of another kind. Nothing to do."
_OLD = "transformers 5 has no such argument. See its migration guide."

# Key -> the reason why there is no such key, and what to do.
DROPPED = {
    "template": _TEMPLATE,
    **dict.fromkeys(("tool_format", "default_system", "enable_thinking", "preserve_thinking"), _TEMPLATE),
    **dict.fromkeys(("dataset_dir", "media_dir"), _REGISTRY),
    "max_samples": "every row is read. To read fewer, save the first rows as a file and name it in dataset_name.",
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_batch_size", "preprocessing_num_workers", "tokenized_path"), _TOKENS
    ),
    **dict.fromkeys(("streaming", "buffer_size", "data_shared_file_system"), _TOKENS),
    **dict.fromkeys(("mix_strategy", "interleave_probs"), _MIXTURE),
    **dict.fromkeys(("train_on_prompt", "mask_history", "ignore_pad_token_for_loss", "compute_accuracy"), _LOSS),
    **dict.fromkeys(("packing", "neat_packing"), "rows of about the same length share a pass; they are not packed."),
    "eval_on_each_dataset": "pipeline.reward_eval takes several data sets, and reports each.",
    "eval_num_beams": _GENERATION,
    "additional_target": "only LoRA weights and the heads are trained and saved. Name the modules in lora_target.",
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_lr_embedding", "use_dora", "create_new_adapter"), _LORA),
    **dict.fromkeys(("use_llama_pro", "module_dropout", "mixture_of_depths", "train_from_scratch"), _TUNING),
    **dict.fromkeys(("use_adam_mini", "use_muon"), _OPTIMIZER),
    **dict.fromkeys(("use_mca", "use_megatron_bridge", "megatron_bridge_args", "low_cpu_mem_usage"), _LAUNCH),
    **dict.fromkeys(("device_map", "offload_folder", "ddp_find_unused_parameters"), _LAUNCH),
    **dict.fromkeys(("shift_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels"), _KERNEL),
    **dict.fromkeys(("use_kv_cache", "block_diag_attn"), _KERNEL),
    "moe_aux_loss_coef": "the load-balancing loss of experts is not supported. Nothing to do.",
    "use_reentrant_gc": "activation checkpointing is never reentrant here. Nothing to do.",
    **dict.fromkeys(("upcast_layernorm", "upcast_lmhead_output", "infer_dtype", "compute_dtype"), _PRECISION),
    "cache_dir": "set HF_HOME in the environment.",
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token"), "log in with `hf auth login`."),
    **dict.fromkeys(("use_fast_tokenizer", "resize_vocab", "split_special_tokens", "add_tokens"), _VOCABULARY),
    **dict.fromkeys(("add_special_tokens", "new_special_tokens_config", "init_special_tokens"), _VOCABULARY),
    **dict.fromkeys(("rope_scaling", "model_max_length"), _ROPE),
    "adapter_folder": "name the whole path in adapter_name_or_path.",
    "print_param_status": _RUN,
    **dict.fromkeys(("quantization_method", "quantization_device_map"), "4 bits are bitsandbytes' (load_in_4bit)."),
    **dict.fromkeys(("do_sample", "num_beams", "repetition_penalty", "length_penalty"), _GENERATION),
    "max_length": "max_new_tokens takes its place.",
    "skip_special_tokens": "reward functions get texts without special tokens. Nothing to do.",
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "predict_with_generate", "overwrite_output_dir"), _RUN),
    "plot_loss": "the log is in metrics.json; pipeline.evaluation draws PPO's curves.",
    "disable_shuffling": "rows are shuffled in each pass. Set train_sampling_strategy for the reward stage.",
    "early_stopping_steps": "set load_best_model_at_end and metric_for_best_model.",
    "include_effective_tokens_per_second": "seconds and tokens are in the log. Nothing to do.",
    "resume_from_checkpoint": "a checkpoint of LLaMA-Factory cannot be resumed here. Start a new run.",
    "neftune_noise_alpha": _LOSS,
    "ld_alpha": _LOSS,
    "dpo_label_smoothing": _LOSS,
    "infer_backend": _AFTER,
    "gradient_checkpointing": "disable_gradient_checkpointing decides. Nothing to do.",
    **dict.fromkeys(("logging_dir", "save_safetensors", "group_by_length", "include_num_input_tokens_seen"), _OLD),
    **dict.fromkeys(
        ("generation_max_length", "generation_num_beams", "sortish_sampler", "generation_config"), _GENERATION
    ),
}
# Patterns of keys without a new key.
GROUPS = {
    r"(pref|kto|simpo|use_dft|use_asft|asft|use_eaft|eaft)_": _LOSS,
    r"(freeze|oft)_": _TUNING,
    r"pissa_": _LORA,
    r"(use_)?(galore|apollo|badam)(_|$)": _OPTIMIZER,
    r"(use_)?swanlab(_|$)": _TRACKER,
    r"(use_)?(hyper_parallel|ray|kt)(_|$)": _LAUNCH,
    r"master_(addr|port)$": _LAUNCH,
    r"(image|video|audio)_|use_audio_in_video$|crop_to_patches$": _IMAGES,
    r"(export|vllm|sglang)_": _AFTER,
    r"fp8(_|$)": _PRECISION,
    r"(enable_torch_)?profiler(_|$)|profile_modules$": "torch's profiler is not started. Nothing to do.",
    r"(ref|reward)_model_quantization_bit$": "every role runs on the one backbone. Nothing to do.",
}
