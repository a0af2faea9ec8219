"""Tables of OpenRLHF's options: new names, defaults, reasons, and the names of releases before 0.10.2.

The module is longer than others, because OpenRLHF has 160 options, most of them under two names.
"""

from typing import Any


_ADAM = {"adam.lr": "learning_rate", "adam.eps": "adam_epsilon", "adam.weight_decay": "weight_decay"}
_ADAM |= {"max_norm": "max_grad_norm", "lr_warmup_ratio": "warmup_steps"}
_BOTH = {
    "ds.attn_implementation": "attn_implementation",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.dropout": "lora_dropout",
    "eval.dataset": "eval_dataset_name",
    "eval.split": "dataset_eval_split",
    "data.dataloader_num_workers": "dataloader_num_workers",
    "train.seed": "seed",
    "train.full_determinism_enable": "full_determinism",
    "ckpt.output_dir": "output_dir",
    "ckpt.max_num": "save_total_limit",
    "logger.wandb.run_name": "run_name",
    "ds.use_liger_kernel": "use_liger_kernel",
}
# Old key -> new key, with the same value.
RENAMED: dict[str, dict[str, str]] = {
    "ppo": _BOTH
    | {f"actor.{key}": ours for key, ours in _ADAM.items()}
    | {
        "actor.model_name_or_path": "model_name_or_path",
        "actor.gradient_checkpointing_enable": "gradient_checkpointing",
        "data.prompt_dataset": "dataset_name",
        "data.prompt_split": "dataset_train_split",
        "rollout.n_samples_per_prompt": "num_generations",
        "rollout.temperature": "temperature",
        "rollout.top_p": "top_p",
        "train.num_episodes": "num_train_epochs",
        "train.max_epochs": "num_iterations",
        "algo.kl.init_coef": "beta",
        "actor.eps_clip": "epsilon",
        "actor.dual_clip": "dual_clip",
        "critic.value_clip": "value_clip",
        "algo.advantage.lambd": "lam",
        "algo.advantage.gamma": "gamma",
        "actor.entropy_coef": "entropy_coef",
        "critic.adam.lr": "value_learning_rate",
        "reward.clip_range": "reward_clip_range",
        "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
        "vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
        "vllm.enable_sleep": "vllm_enable_sleep_mode",
        "pretrain_data": "ptx_dataset_name",
        "pretrain_split": "ptx_dataset_split",
    },
    "reward": _BOTH
    | _ADAM
    | {
        "model.model_name_or_path": "model_name_or_path",
        "model.gradient_checkpointing_enable": "gradient_checkpointing",
        "model.margin_loss_enable": "use_margin",
        "data.dataset": "dataset_name",
        "data.dataset_split": "dataset_train_split",
        "data.max_len": "max_length",
        "train.max_epochs": "num_train_epochs",
        "logger.logging_steps": "logging_steps",
    },
}

_READ = {
    *("train.batch_size", "train.micro_batch_size", "ds.param_dtype", "ds.lora.rank", "ds.lora.alpha"),
    *("ds.lora.target_modules", "ckpt.save_steps", "eval.steps", "logger.wandb.key", "logger.tensorboard_dir"),
}
_OPTIMIZER = ("adam.betas", "lr_scheduler", "min_lr_ratio", "optim")
# Old keys that are read together.
READ: dict[str, set[str]] = {
    "ppo": _READ
    | {f"actor.{key}" for key in _OPTIMIZER}
    | {
        *(
            "actor.num_nodes",
            "actor.num_gpus_per_node",
            "rollout.batch_size",
            "logger.logging_steps",
            "generate_max_len",
        ),
        *(
            "prompt_max_len",
            "rollout.max_new_tokens",
            "data.max_len",
            "critic.freezing_steps",
            "actor.eps_clip_low_high",
        ),
        *(
            "algo.advantage.estimator",
            "train.agent_func_path",
            "algo.kl.estimator",
            "algo.kl.target",
            "algo.kl.horizon",
        ),
        *("algo.kl.use_loss", "reward.remote_url", "reward.model_name_or_path", "reward.overlong_buffer_len"),
        *("reward.overlong_penalty_factor", "vllm.num_engines", "train.colocate_all", "ptx_coef"),
        *(f"algo.advantage.is_correction_{what}" for what in ("enable", "threshold", "type")),
    },
    "reward": _READ | {*_OPTIMIZER, "model.loss_type", "data.chosen_key", "data.rejected_key", "data.prompt_key"},
}
COUNTS = (
    *("train.batch_size", "train.micro_batch_size", "rollout.batch_size", "rollout.n_samples_per_prompt"),
    *("train.max_epochs", "actor.num_nodes", "actor.num_gpus_per_node", "data.max_len", "rollout.max_new_tokens"),
    *("generate_max_len", "ds.ring_attn_size", "ds.tensor_parallel_size"),
)
NUMBERS: tuple[str, ...] = (
    "actor.adam.lr",
    "critic.adam.lr",
    "adam.lr",
    "ds.zero_stage",
    "ds.lora.rank",
    "vllm.num_engines",
)
NUMBERS += ("algo.kl.target", "reward.overlong_buffer_len")
# Old keys whose value is a list, and how long it is; None is any length.
LISTS = {f"{prefix}adam.betas": 2 for prefix in ("", "actor.", "critic.")} | {"actor.eps_clip_low_high": 2} | {
    "algo.advantage.is_correction_threshold": 2,
    "algo.dynamic_filtering_range": 2,
    "reward.clip_range": 2,
    "ds.lora.target_modules": None,
    "reward.remote_url": None,
}  # fmt: skip

# OpenRLHF's defaults that differ from ours, or may differ later.
_ADAM_DEFAULTS = {"adam.betas": [0.9, 0.95], "adam.eps": 1e-8, "adam.weight_decay": 0.0, "max_norm": 1.0}
_ADAM_DEFAULTS |= {"lr_scheduler": "cosine_with_min_lr", "lr_warmup_ratio": 0.03, "min_lr_ratio": 0.1}
_DEFAULTS: dict[str, Any] = {
    "train.batch_size": 128,
    "train.micro_batch_size": 1,
    "train.max_epochs": 1,
    "train.seed": 42,
}
_DEFAULTS |= {"ckpt.output_dir": "./ckpt", "ckpt.save_steps": -1, "ds.param_dtype": "bf16", "logger.logging_steps": 1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": _DEFAULTS
    | {f"actor.{key}": value for key, value in _ADAM_DEFAULTS.items()}
    | {
        "actor.num_nodes": 1,
        "actor.num_gpus_per_node": 8,
        "rollout.batch_size": 1024,
        "rollout.n_samples_per_prompt": 1,
        "rollout.temperature": 1.0,
        "train.num_episodes": 1,
        "data.max_len": 2048,
        "actor.adam.lr": 1e-6,
        "critic.adam.lr": 9e-6,
        "algo.kl.init_coef": 0.01,
        "actor.eps_clip": 0.2,
        "critic.value_clip": 0.5,
        "algo.advantage.lambd": 1,
        "algo.advantage.gamma": 1,
        "reward.clip_range": [-10, 10],
    },
    "reward": _DEFAULTS | _ADAM_DEFAULTS | {"adam.lr": 9e-6, "data.max_len": 512},
}
# Defaults of the releases before 0.10.2, where they differ.
FLAT_DEFAULTS: dict[str, dict[str, Any]] = {"ppo": {"train.micro_batch_size": 4}, "reward": {}}

# ------------------------------------------------------------------------------------------------ old keys without a new key
_GROUPS = "one launch runs all roles on one backbone: no GPUs are divided among them. Nothing to do."
_LAUNCH = "it is about the launch: see the first line, and set it in that file or in the DeepSpeed file that it names."
_PARALLEL = "a sequence and a layer are not divided over GPUs. Take shorter sequences, or shard with ZeRO-3."
_ASYNC = "sampling and training take turns. Nothing to do."
_BATCHES = "sequences are not packed: rows of about the same length share a pass. Nothing to do."
_CHECKPOINTS = (
    "checkpoints are written as save_strategy and save_total_limit say; --resume_from_checkpoint auto goes on."
)
_ROWS = (
    "rows have the columns `prompt` (PPO) or `chosen` and `rejected`, text or conversations, and the tokenizer's own chat "
    "template writes conversations. Rename the columns; others reach the reward functions. See docs/own-data.md."
)
_MIXTURE = "PPO reads one data set, and the reward stage several with weights (`datasets`). See docs/own-data.md."
_CRITIC = "policy and value share one optimizer and one schedule. Only the learning rate is the value's own."
_IMAGES = "models with pictures are not supported. Use a language model."
_TRACKER = "set it in the environment of the tracker (WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY)."
_VLLM = "TRL runs vLLM and sends it the weights. Nothing to do; see docs/vllm.md."
_MAX = "every row is read. To read fewer, save the first rows as a file and name it in dataset_name."
_GRPO = "it is about groups of completions of one prompt, which PPO does not compare. Nothing to do."
_MUON_OPTIONS = ("lr", "momentum", "ns_steps", "nesterov", "no_nesterov")
_MUON = "Muon is not among Trainer's optimizers. Nothing to do."
_EMA = "no moving average of the weights is kept. Nothing to do."
_EXPERTS = "the load-balancing loss of experts is not supported, and the experts' kernel is transformers' choice."
_DROPPED = {
    **dict.fromkeys(("local_rank", "ds.zero_stage", "ds.adam_offload", "ds.zpg", "ds.overlap_comm"), _LAUNCH),
    **dict.fromkeys(("ds.grad_accum_dtype", "ds.deepcompile", "ds.enable_sleep"), _LAUNCH),
    **dict.fromkeys(("ds.tensor_parallel_size", "ds.ring_attn_size", "ds.ring_attn_head_stride"), _PARALLEL),
    **dict.fromkeys(("ds.packing_samples", "train.dynamic_batch_enable", "rollout.max_tokens_per_gpu"), _BATCHES),
    **dict.fromkeys(("train.max_tokens_per_gpu", "rollout.micro_batch_size"), _BATCHES),
    **dict.fromkeys(
        ("ckpt.path", "ckpt.save_hf", "ckpt.disable_ds", "ckpt.max_mem", "ckpt.load_enable"), _CHECKPOINTS
    ),
    **dict.fromkeys(("ds.use_universal_ckpt",), _CHECKPOINTS),
    **dict.fromkeys(("data.input_key", "data.label_key", "data.input_template", "data.apply_chat_template"), _ROWS),
    "data.tokenizer_chat_template": "every stage uses the tokenizer's own chat template. Set it in a copy of the model.",
    **dict.fromkeys(("data.prompt_probs", "data.dataset_probs"), _MIXTURE),
    "data.max_samples": _MAX,
    "data.disable_fast_tokenizer": "transformers 5 has fast tokenizers alone. Nothing to do.",
    "ds.value_head_prefix": "the head of a reward model must be called score, as transformers' own.",
    "ds.experts_implementation": _EXPERTS,
    **dict.fromkeys((f"logger.wandb.{name}" for name in ("org", "group", "project")), _TRACKER),
    "disable_trace_cache": _LAUNCH,
    "torch_compile": "models are not compiled. Nothing to do.",
    "use_ms": "models and data come from the Hugging Face hub or a folder. Download them from ModelScope first.",
}
_REENTRANT = "activation checkpointing is never reentrant here. Nothing to do."
DROPPED: dict[str, dict[str, str]] = {
    "ppo": _DROPPED
    | {
        f"{name}.{size}": _GROUPS
        for name in ("ref", "reward", "critic")
        for size in ("num_nodes", "num_gpus_per_node")
    }
    | dict.fromkeys(("train.colocate_actor_ref", "train.colocate_critic_reward", "ref.offload"), _GROUPS)
    | dict.fromkeys(("reward.offload", "ref_reward_offload", "actor_init_on_gpu"), _GROUPS)
    | dict.fromkeys(("train.async_enable", "train.async_queue_size", "train.partial_rollout_enable"), _ASYNC)
    | dict.fromkeys(("rollout.vllm_generate_batch_size", "vllm.sync_backend", "vllm.sync_with_ray"), _VLLM)
    | dict.fromkeys(("vllm.enable_prefix_caching", "vllm.enforce_eager"), _VLLM)
    | dict.fromkeys(("train.enable_ema", "train.ema_beta"), _EMA)
    | dict.fromkeys(("data.image_key", "data.max_images_per_prompt", "actor.freeze_visual_encoder"), _IMAGES)
    | dict.fromkeys(("algo.dynamic_filtering_enable", "algo.dynamic_filtering_range"), _GRPO)
    | {
        f"critic.{key}": _CRITIC
        for key in (*_OPTIMIZER, "adam.eps", "adam.weight_decay", "lr_warmup_ratio", "max_norm")
    }
    | {f"{role}.muon.{key}": _MUON for role in ("actor", "critic") for key in _MUON_OPTIONS}
    | {
        "actor.gradient_checkpointing_reentrant": _REENTRANT,
        "actor.aux_loss_coef": _EXPERTS,
        "actor.policy_loss_type": "the ratio is that of each token (ppo). Sequence-level ratios (gspo) are not supported.",
        "algo.advantage.no_std_norm": "advantages are whitened, mean and deviation, or left as they are "
        "(normalize_advantages: false).",
        "critic.model_name_or_path": "the value is an adapter on the backbone. It starts from the reward adapter, or from the "
        "policy (value_init).",
        "critic.save_value_network": "the value adapter is always saved, in `value/` of output_dir. Nothing to do.",
        "reward.normalize_enable": "OpenRLHF took mean and deviation from the reward model's config. A reward adapter is "
        "scaled on completions of the SFT policy (normalize_scores); a model in reward_funcs is not: give it a weight in "
        "reward_weights.",
        "reward.stop_properly_penalty_coef": "`missing_eos_penalty` is subtracted from the score of a completion that did not "
        "end. It is neither a factor nor a fixed score. Set it in the unit of your scores.",
        "eval.temperature": "held-out prompts are completed at `temperature`, as in training.",
        "eval.n_samples_per_prompt": "a held-out prompt has one completion. Nothing to do.",
        "ckpt.best_metric_key": "set load_best_model_at_end and metric_for_best_model: score.",
        "pretrain_data_probs": "the texts of PTX are one data set. Join them in one file.",
        "perf": "OpenRLHF's measure of its own speed. Nothing to do.",
    },
    "reward": _DROPPED
    | {f"muon.{key}": _MUON for key in _MUON_OPTIONS}
    | {
        "model.gradient_checkpointing_reentrant": _REENTRANT,
        "model.aux_loss_coef": _EXPERTS,
        "model.compute_fp32_loss_enable": "the head and the loss are float32 always. Nothing to do.",
    },
}

# ------------------------------------------------------------------------------------------------ names before 0.10.2
# The value of an option that had none.
FLAGS = {"bf16": "bf16", "flash_attn": "flash_attention_2", "use_kl_estimator_k3": "k3"}
_FLAT = {
    "attn_implementation": "ds.attn_implementation",
    "flash_attn": "ds.attn_implementation",
    "load_in_4bit": "ds.load_in_4bit",
    **{f"lora_{name}": f"ds.lora.{name}" for name in ("rank", "alpha", "dropout")},
    "target_modules": "ds.lora.target_modules",
    "param_dtype": "ds.param_dtype",
    "data_type": "ds.param_dtype",
    "bf16": "ds.param_dtype",
    **{
        name: f"ds.{name}"
        for name in ("zero_stage", "zpg", "adam_offload", "overlap_comm", "grad_accum_dtype", "deepcompile")
        + ("packing_samples", "ring_attn_size", "use_liger_kernel", "value_head_prefix")
    },
    "ring_head_stride": "ds.ring_attn_head_stride",
    "ds_tensor_parallel_size": "ds.tensor_parallel_size",
    "use_ds_universal_ckpt": "ds.use_universal_ckpt",
    "deepspeed_enable_sleep": "ds.enable_sleep",
    "eval_dataset": "eval.dataset",
    "eval_split": "eval.split",
    "eval_steps": "eval.steps",
    "save_steps": "ckpt.save_steps",
    "logging_steps": "logger.logging_steps",
    "save_path": "ckpt.output_dir",
    "ckpt_path": "ckpt.path",
    "save_hf_ckpt": "ckpt.save_hf",
    "disable_ds_ckpt": "ckpt.disable_ds",
    "max_ckpt_num": "ckpt.max_num",
    "max_ckpt_mem": "ckpt.max_mem",
    "load_checkpoint": "ckpt.load_enable",
    "train_batch_size": "train.batch_size",
    "micro_train_batch_size": "train.micro_batch_size",
    "max_epochs": "train.max_epochs",
    "seed": "train.seed",
    "full_determinism": "train.full_determinism_enable",
    **{name: f"data.{name}" for name in ("max_len", "max_samples", "input_template", "apply_chat_template")},
    **{name: f"data.{name}" for name in ("disable_fast_tokenizer", "dataloader_num_workers")},
    "use_wandb": "logger.wandb.key",
    **{f"wandb_{name}": f"logger.wandb.{name}" for name in ("org", "group", "project", "run_name")},
    "use_tensorboard": "logger.tensorboard_dir",
}
_FLAT_POLICY = {
    "gradient_checkpointing": "gradient_checkpointing_enable",
    "gradient_checkpointing_use_reentrant": "gradient_checkpointing_reentrant",
    "aux_loss_coef": "aux_loss_coef",
    "pretrain": "model_name_or_path",
}
_FLAT_ADAM = {"max_norm": "max_norm", "l2": "adam.weight_decay", "adam_betas": "adam.betas"}
_FLAT_ADAM |= {name: name for name in ("lr_scheduler", "lr_warmup_ratio")}
FLAT: dict[str, dict[str, str]] = {
    "ppo": _FLAT
    | {flat: f"actor.{key}" for flat, key in {**_FLAT_POLICY, **_FLAT_ADAM}.items()}
    | {
        f"{role}_{size}": f"{role}.{size}"
        for role in ("ref", "reward", "critic", "actor")
        for size in ("num_nodes", "num_gpus_per_node")
    }
    | {
        f"vllm_{name}": f"vllm.{name}"
        for name in (
            "num_engines",
            "tensor_parallel_size",
            "sync_backend",
            "sync_with_ray",
            "enable_sleep",
            "gpu_memory_utilization",
        )
    }
    | {
        "colocate_actor_ref": "train.colocate_actor_ref",
        "colocate_critic_reward": "train.colocate_critic_reward",
        "colocate_all_models": "train.colocate_all",
        "enable_prefix_caching": "vllm.enable_prefix_caching",
        "enforce_eager": "vllm.enforce_eager",
        "enable_vllm_is_correction": "algo.advantage.is_correction_enable",
        "vllm_is_truncated_threshold": "algo.advantage.is_correction_threshold",
        "vllm_is_correction_type": "algo.advantage.is_correction_type",
        "async_train": "train.async_enable",
        "async_queue_size": "train.async_queue_size",
        "partial_rollout": "train.partial_rollout_enable",
        "best_metric_key": "ckpt.best_metric_key",
        "enable_ema": "train.enable_ema",
        "ema_beta": "train.ema_beta",
        "use_dynamic_batch": "train.dynamic_batch_enable",
        "rollout_max_tokens_per_gpu": "rollout.max_tokens_per_gpu",
        "train_max_tokens_per_gpu": "train.max_tokens_per_gpu",
        "num_episodes": "train.num_episodes",
        "rollout_batch_size": "rollout.batch_size",
        "vllm_generate_batch_size": "rollout.vllm_generate_batch_size",
        "micro_rollout_batch_size": "rollout.micro_batch_size",
        **{name: f"rollout.{name}" for name in ("max_new_tokens", "top_p", "temperature", "n_samples_per_prompt")},
        **{name: f"actor.{name}" for name in ("eps_clip", "eps_clip_low_high", "dual_clip", "policy_loss_type")},
        "entropy_loss_coef": "actor.entropy_coef",
        "value_clip": "critic.value_clip",
        "freezing_actor_steps": "critic.freezing_steps",
        "save_value_network": "critic.save_value_network",
        "critic_pretrain": "critic.model_name_or_path",
        "actor_learning_rate": "actor.adam.lr",
        "critic_learning_rate": "critic.adam.lr",
        "lambd": "algo.advantage.lambd",
        "gamma": "algo.advantage.gamma",
        "advantage_estimator": "algo.advantage.estimator",
        "no_advantage_std_norm": "algo.advantage.no_std_norm",
        "dynamic_filtering": "algo.dynamic_filtering_enable",
        "dynamic_filtering_reward_range": "algo.dynamic_filtering_range",
        "init_kl_coef": "algo.kl.init_coef",
        "kl_target": "algo.kl.target",
        "kl_horizon": "algo.kl.horizon",
        "kl_estimator": "algo.kl.estimator",
        "use_kl_estimator_k3": "algo.kl.estimator",
        "use_kl_loss": "algo.kl.use_loss",
        "reward_pretrain": "reward.model_name_or_path",
        "remote_rm_url": "reward.remote_url",
        "normalize_reward": "reward.normalize_enable",
        "reward_clip_range": "reward.clip_range",
        **{name: f"reward.{name}" for name in ("overlong_buffer_len", "overlong_penalty_factor")},
        "stop_properly_penalty_coef": "reward.stop_properly_penalty_coef",
        "agent_func_path": "train.agent_func_path",
        "prompt_data": "data.prompt_dataset",
        "prompt_data_probs": "data.prompt_probs",
        **{name: f"data.{name}" for name in ("prompt_split", "input_key", "label_key", "image_key")},
        "max_images_per_prompt": "data.max_images_per_prompt",
        "freeze_visual_encoder": "actor.freeze_visual_encoder",
        "eval_temperature": "eval.temperature",
        "eval_n_samples_per_prompt": "eval.n_samples_per_prompt",
    },
    "reward": _FLAT
    | {flat: f"model.{key}" for flat, key in _FLAT_POLICY.items()}
    | _FLAT_ADAM
    | {
        "learning_rate": "adam.lr",
        "compute_fp32_loss": "model.compute_fp32_loss_enable",
        "margin_loss": "model.margin_loss_enable",
        "loss": "model.loss_type",
        "dataset": "data.dataset",
        "dataset_probs": "data.dataset_probs",
        "dataset_split": "data.dataset_split",
        "train_split": "data.dataset_split",
        **{name: f"data.{name}" for name in ("prompt_key", "chosen_key", "rejected_key", "tokenizer_chat_template")},
    },
}
