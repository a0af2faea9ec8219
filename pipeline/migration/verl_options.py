"""Tables of the options of verl's PPO: new names, defaults, and the reasons why others have none."""

from typing import Any


_ACTOR, _ROLLOUT, _MODEL = (f"actor_rollout_ref.{part}." for part in ("actor", "rollout", "model"))

# Old key -> new key, with the same value.
RENAMED = {
    f"{_MODEL}path": "model_name_or_path",
    f"{_MODEL}trust_remote_code": "trust_remote_code",
    f"{_MODEL}enable_gradient_checkpointing": "gradient_checkpointing",
    f"{_MODEL}use_liger": "use_liger_kernel",
    f"{_ACTOR}optim.lr": "learning_rate",
    f"{_ACTOR}optim.weight_decay": "weight_decay",
    f"{_ACTOR}grad_clip": "max_grad_norm",
    f"{_ACTOR}clip_ratio_c": "dual_clip",
    f"{_ACTOR}entropy_coeff": "entropy_coef",
    f"{_ACTOR}ppo_epochs": "num_iterations",
    f"{_ROLLOUT}temperature": "temperature",
    f"{_ROLLOUT}top_p": "top_p",
    "critic.optim.lr": "value_learning_rate",
    "critic.cliprange_value": "value_clip",
    "algorithm.gamma": "gamma",
    "algorithm.lam": "lam",
    "data.max_response_length": "max_completion_length",
    "data.seed": "seed",
    "data.dataloader_num_workers": "dataloader_num_workers",
    "trainer.experiment_name": "run_name",
    "trainer.default_local_dir": "output_dir",
    "trainer.max_actor_ckpt_to_keep": "save_total_limit",
    "trainer.resume_from_path": "resume_from_checkpoint",
}
_BASE = {
    *(f"{_ACTOR}{key}" for key in ("ppo_mini_batch_size", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu")),
    *(f"{_ACTOR}{key}" for key in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "loss_agg_mode", "use_kl_loss")),
    *(f"{_ACTOR}{key}" for key in ("kl_loss_coef", "kl_loss_type")),
    *(f"{_ACTOR}optim.{key}" for key in ("betas", "lr_warmup_steps", "lr_warmup_steps_ratio", "lr_scheduler_type")),
    *(f"{_ACTOR}optim.{key}" for key in ("warmup_style", "min_lr_ratio")),
    *(f"{_ROLLOUT}{key}" for key in ("n", "name", "top_k", "gpu_memory_utilization", "tensor_model_parallel_size")),
    *(f"{_ROLLOUT}{key}" for key in ("max_model_len", "free_cache_engine")),
    *(f"{_MODEL}{key}" for key in ("lora_rank", "lora_alpha", "target_modules")),
    *(f"data.{key}" for key in ("train_batch_size", "train_files", "val_files")),
    *(f"trainer.{key}" for key in ("nnodes", "n_gpus_per_node", "total_epochs", "total_training_steps", "save_freq")),
    *(f"trainer.{key}" for key in ("test_freq", "logger", "critic_warmup", "project_name")),
    *("algorithm.adv_estimator", "algorithm.use_kl_in_reward", "algorithm.kl_penalty"),
    *(f"algorithm.kl_ctrl.{key}" for key in ("type", "kl_coef", "horizon", "target_kl")),
    *("algorithm.rollout_correction.rollout_is", "algorithm.rollout_correction.rollout_is_threshold"),
    *("reward_model.enable", "reward_model.model.path", "custom_reward_function.path", "custom_reward_function.name"),
}
# Old keys that are read together.
READ = _BASE
COUNTS = (
    *("data.train_batch_size", "trainer.nnodes", "trainer.n_gpus_per_node", "trainer.total_training_steps"),
    *(f"{_ACTOR}{key}" for key in ("ppo_mini_batch_size", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu")),
    *(f"{_ACTOR}ppo_epochs", f"{_ROLLOUT}n", f"{_ACTOR}ulysses_sequence_parallel_size"),
)
NUMBERS = (
    "trainer.total_epochs",
    "trainer.critic_warmup",
    f"{_ACTOR}optim.lr_warmup_steps_ratio",
    "critic.optim.lr",
) + (
    *(f"{_ACTOR}optim.lr", f"{_ACTOR}optim.min_lr_ratio", f"{_MODEL}lora_rank"),
    *(f"{_ACTOR}clip_ratio", f"{_ACTOR}clip_ratio_low", f"{_ACTOR}clip_ratio_high", f"{_ROLLOUT}top_p"),
)
SWITCHES = ("algorithm.use_kl_in_reward", f"{_ACTOR}use_kl_loss", "reward_model.enable")
# Old keys whose value is a list, and how long it is; None is any length.
LISTS: dict[str, int | None] = {f"{_ACTOR}optim.betas": 2} | dict.fromkeys(
    ("data.train_files", "data.val_files", "trainer.logger", f"{_MODEL}target_modules")
)

# verl's defaults that differ from ours, or may differ later.
DEFAULTS: dict[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    f"{_ACTOR}ppo_mini_batch_size": 256,
    f"{_ACTOR}ppo_epochs": 1,
    f"{_ACTOR}clip_ratio": 0.2,
    f"{_ACTOR}clip_ratio_c": 3.0,
    f"{_ACTOR}grad_clip": 1.0,
    f"{_ACTOR}optim.lr": 1e-6,
    f"{_ACTOR}optim.weight_decay": 0.01,
    f"{_ACTOR}optim.betas": [0.9, 0.999],
    f"{_ACTOR}optim.lr_warmup_steps_ratio": 0.0,
    f"{_ACTOR}optim.lr_scheduler_type": "constant",
    f"{_MODEL}enable_gradient_checkpointing": True,
    f"{_ROLLOUT}n": 1,
    f"{_ROLLOUT}temperature": 1.0,
    "critic.optim.lr": 1e-5,
    "critic.cliprange_value": 0.5,
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_epochs": 30,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.logger": ["console", "wandb"],
    "trainer.project_name": "verl_examples",
    "trainer.experiment_name": "gsm8k",
}

# ------------------------------------------------------------------------------------------------ old keys without a new key
_LAUNCH = "it is about how verl divides and runs the models. See the first line, and the files of accelerate_configs."
_ENGINE = "it is about the engine that samples. TRL starts vLLM and sends it the weights; see docs/vllm.md."
_BATCHES = "rows of about the same length share a pass, per_device_train_batch_size at a time. Nothing to do."
_ROWS = "rows have a column `prompt`, a text or a conversation; all others reach the reward functions. See docs/own-data.md."
_CRITIC = (
    "the value is an adapter on the policy's backbone, with the policy's batches, epochs and optimizer. Only its learning "
    "rate (value_learning_rate) and clip range (value_clip) are its own."
)
_IMAGES = "models with pictures are not supported. Use a language model."
_TURNS = "tools and turns with an environment are not supported. A prompt has one completion."
_PROFILER = "verl's profilers have no counterpart. Nothing to do."
_CHECKPOINTS = (
    "checkpoints are written as save_strategy and save_total_limit say; --resume_from_checkpoint auto goes on."
)
_GRPO = "it is about groups of completions of one prompt, which PPO does not compare. Nothing to do."
_REWARD = "the reward model runs in this process, or on a server that reward_models.remote.get_remote asks."
_KINDS = "the loss is PPO's clipped one (vanilla), with epsilon, epsilon_high and dual_clip. Other losses are not supported."
_MTP = "models that predict several tokens at once are trained as any other. Nothing to do."
_OPTIMIZER = "the optimizer is Trainer's AdamW (optim). Nothing to do."
DROPPED = {
    "data.max_prompt_length": "a prompt may have as many tokens as the model's context leaves beside a completion.",
    "data.filter_overlong_prompts": "a prompt that is too long is an error, or is left out with drop_bad_rows.",
    "data.filter_overlong_prompts_workers": "prompts are tokenized at once. Nothing to do.",
    "data.truncation": "a prompt is never cut. One that is too long is an error, or is left out with drop_bad_rows.",
    "data.trust_remote_code": "data sets never run code. Nothing to do.",
    "data.shuffle": "prompts are shuffled in each pass. Nothing to do.",
    **dict.fromkeys(
        ("data.train_max_samples", "data.val_max_samples"), "save the first rows as a file, and name that."
    ),
    "data.val_batch_size": "held-out prompts are completed per_device_eval_batch_size at a time; eval_prompts of them.",
    **dict.fromkeys(
        (f"data.{key}" for key in ("prompt_key", "reward_fn_key", "return_raw_input_ids", "return_raw_chat")), _ROWS
    ),
    **dict.fromkeys(
        (f"data.{key}" for key in ("return_full_prompt", "validation_shuffle", "use_shm", "tokenizer")), _ROWS
    ),
    **dict.fromkeys((f"data.{key}" for key in ("image_key", "video_key", "image_patch_size")), _IMAGES),
    "data.return_multi_modal_inputs": _IMAGES,
    "data.tool_config_path": _TURNS,
    "actor_rollout_ref.hybrid_engine": _LAUNCH,
    "actor_rollout_ref.nccl_timeout": "set ddp_timeout, in seconds.",
    **dict.fromkeys(
        (f"{_ACTOR}{key}" for key in ("use_dynamic_bsz", "ppo_max_token_len_per_gpu", "use_prefix_grouper")), _BATCHES
    ),
    **dict.fromkeys(
        (f"{_ACTOR}{key}" for key in ("strategy", "ulysses_sequence_parallel_size", "use_torch_compile")), _LAUNCH
    ),
    **dict.fromkeys((f"{_ACTOR}{key}" for key in ("use_fused_kernels", "use_remove_padding", "rollout_n")), _LAUNCH),
    **dict.fromkeys(
        (f"{_ACTOR}{key}" for key in ("shuffle", "data_loader_seed")), "minibatches have a new order each epoch."
    ),
    **dict.fromkeys((f"{_ACTOR}{key}" for key in ("tau_pos", "tau_neg", "loss_scale_factor")), _KINDS),
    f"{_ACTOR}freeze_vision_tower": _IMAGES,
    f"{_ACTOR}calculate_entropy": "the entropy is always logged. Nothing to do.",
    **dict.fromkeys(
        (f"{_ACTOR}{key}" for key in ("calculate_sum_pi_squared", "sum_pi_squared_checkpointing")), _KINDS
    ),
    **dict.fromkeys(
        (f"{_ACTOR}{key}" for key in ("entropy_from_logits_with_chunking", "entropy_checkpointing")),
        "logits of a batch are never in memory at once. Nothing to do.",
    ),
    **dict.fromkeys(
        (f"{_ACTOR}optim.{key}" for key in ("optimizer", "optimizer_impl", "override_optimizer_config")), _OPTIMIZER
    ),
    f"{_ACTOR}optim.clip_grad": "max_grad_norm is taken from grad_clip. Nothing to do.",
    f"{_ACTOR}optim.num_cycles": "the cosine has half a period. Nothing to do.",
    f"{_ACTOR}optim.total_training_steps": "verl computed it. Nothing to do.",
    **dict.fromkeys(
        (f"{_MODEL}{key}" for key in ("hf_config_path", "tokenizer_path")),
        "config and tokenizer are those of the model's folder. Put them into a copy of it.",
    ),
    f"{_MODEL}custom_chat_template": "the chat template is the tokenizer's own. Put it into a copy of the model.",
    f"{_MODEL}override_config": "the config is that of the model's folder. Change a copy of it.",
    f"{_MODEL}lora_adapter_path": "name it as sft_adapter: the policy starts from it, and the reference is its start.",
    f"{_MODEL}exclude_modules": "name the modules that are adapted in lora_target_modules.",
    **dict.fromkeys((f"{_MODEL}{key}" for key in ("use_shm", "external_lib", "enable_activation_offload")), _LAUNCH),
    **dict.fromkeys((f"{_MODEL}{key}" for key in ("use_remove_padding", "use_fused_kernels")), _LAUNCH),
    "algorithm.norm_adv_by_std_in_grpo": _GRPO,
    "algorithm.use_pf_ppo": "rollouts are not weighted or filtered by their rewards.",
    "trainer.balance_batch": _BATCHES,
    "trainer.log_val_generations": "sample_updates writes completions of fixed prompts to samples.jsonl and the trackers.",
    "trainer.rollout_data_dir": "log_completions shows completions; sample_updates writes some to samples.jsonl.",
    "trainer.validation_data_dir": "pipeline.evaluation writes samples into its report.",
    "trainer.val_before_train": "set eval_on_start.",
    "trainer.val_only": "run pipeline.evaluation.",
    **dict.fromkeys(
        (f"trainer.{key}" for key in ("esi_redundant_time", "resume_mode", "default_hdfs_dir")), _CHECKPOINTS
    ),
    **dict.fromkeys(
        (f"trainer.{key}" for key in ("del_local_ckpt_after_load", "max_critic_ckpt_to_keep")), _CHECKPOINTS
    ),
    **dict.fromkeys((f"trainer.{key}" for key in ("ray_wait_register_center_timeout", "device")), _LAUNCH),
    "trainer.use_legacy_worker_impl": _LAUNCH,
}
# Patterns of old keys without a new key.
GROUPS = {
    r"actor_rollout_ref\.(actor|ref)\.(fsdp_config|megatron|veomni|veomni_config|router_replay)\.": _LAUNCH,
    r"actor_rollout_ref\.ref\.": "the reference is the policy at its start, an adapter on the same backbone. Nothing to do.",
    r"actor_rollout_ref\.actor\.policy_loss\.": _KINDS,
    r"(actor_rollout_ref\.(actor|rollout)|critic)\.checkpoint\.": _CHECKPOINTS,
    r"(actor_rollout_ref\.\w+|critic|reward_model)\.profiler\.|global_profiler\.": _PROFILER,
    r"actor_rollout_ref\.rollout\.(multi_turn|agent)\.": _TURNS,
    r"actor_rollout_ref\.rollout\.": _ENGINE,
    r"actor_rollout_ref\.model\.(fused_kernel_options|tiled_mlp)\.": _LAUNCH,
    r"actor_rollout_ref\.model\.mtp\.": _MTP,
    r"data\.(custom_cls|sampler|datagen)\.": "rows are read from files and hub data sets. Save them, and name the file.",
    r"data\.apply_chat_template_kwargs": "the tokenizer's chat template is used as it is. Set such defaults in it.",
    r"critic\.": _CRITIC,
    r"reward_manager\.|reward_model\.": _REWARD,
    r"algorithm\.(rollout_correction|pf_ppo)\.": "of these corrections there is rollout_is alone.",
    r"ray_kwargs\.|ray_init\.|transfer_queue\.": "there is no Ray: one accelerate launch runs all roles. Nothing to do.",
}
