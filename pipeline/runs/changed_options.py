"""Compare the options of a run with those of the checkpoint that it resumes from.

The table says of every option of every stage that trains what a change does: it takes effect from the checkpoint on, and the
run says so; it is refused by name; or it changes nothing that is trained. Trainer alone would restore the old learning rate,
schedule and options of Adam from the checkpoint, and say nothing.
"""

import json
import math
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from pipeline.runs.manifest import ORDER, read_manifest


# The learning rate at a step depends on these.
SCHEDULE = frozenset(
    "learning_rate value_learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio".split()
    + "max_steps num_train_epochs".split()
)
# `pipeline.runs.resumed_options` replaces what the checkpoint's optimizer and scheduler have of these.
OPTIMIZER = SCHEDULE | {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# A change takes effect from the checkpoint on: the trainer reads the option as it goes, or is made with it.
APPLIED = f"""
    {" ".join(sorted(OPTIMIZER))}
    max_grad_norm label_smoothing_factor average_tokens_across_devices neftune_noise_alpha bf16 fp16 tf32 bf16_full_eval
    fp16_full_eval full_determinism use_cpu use_cache gradient_checkpointing gradient_checkpointing_kwargs
    activation_offloading torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
    attn_implementation cast_lm_head_to_fp32 pad_to_multiple_of disable_dropout dropout label_names
    remove_unused_columns

    eval_dataset_name dataset_eval_split eval_strategy eval_steps eval_delay eval_on_start eval_prompts eval_packing
    num_generations_eval load_best_model_at_end metric_for_best_model greater_is_better sample_updates sample_prompts judge
    sft_completions

    reward_funcs reward_weights normalize_scores reward_clip_range missing_eos_penalty whiten_rewards scale_rewards
    multi_objective_aggregation center_rewards_coefficient use_agreement reward_combination reward_std_coef

    temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs cache_implementation
    max_completion_length max_tool_calling_iterations use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged
    use_vllm vllm_mode vllm_model_impl vllm_max_model_length vllm_importance_sampling_correction
    vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap vllm_structured_outputs_regex

    beta kl_estimator kl_target kl_horizon gamma lam value_lam vf_coef value_clip critic_warmup_updates max_approx_kl
    entropy_coef ptx_coef epsilon epsilon_high dual_clip delta normalize_advantages mask_truncated_completions loss_type
    loss_weights importance_sampling_level top_entropy_quantile use_adaptive_entropy entropy_coef_min entropy_coef_max
    entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl sapo_temperature_neg
    sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg router_aux_loss_coef
    ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting discopop_tau
    precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
"""
# Of these, an update that has begun still needs the old ones: its completions were sampled and measured with them.
OF_ROLLOUT = frozenset({"temperature", "use_vllm", "vllm_importance_sampling_correction"})
# A change is refused: why, and of which options.
REFUSED = {
    # Adafactor's or SGD's state is not AdamW's, and amsgrad adds to AdamW's.
    "the optimizer's state is of another kind": "optim optim_args optim_target_modules",
    # `lora_alpha` scales what was trained, so the model would jump. `lora_dropout` is ignored where one was saved before.
    "it changes the adapter that the checkpoint has trained": """
        lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type
        use_rslora use_dora lora_top_layers lora_embeddings
    """,
    "it changes the frozen weights that the adapter was trained on": """
        dtype model_init_kwargs load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant
        bnb_4bit_quant_storage
    """,
    "it changes the shape of the model": "model_type vocab_size n_positions n_layer n_embd n_head",
    "it changes which weights train": "critic",
    "it describes the beginning of a run": "value_init start_from_sft",
    "it changes the rows that are trained on, or their order": """
        max_length truncation_mode shuffle_dataset packing packing_strategy padding_free dataset_text_field
        dataset_kwargs completion_only_loss assistant_only_loss use_margin max_pairs ptx_max_length
        chat_template_path eos_token length_column_name auto_find_batch_size accelerator_config
        ignore_data_skip dataloader_drop_last dataloader_in_order
    """,
}
# Compared in another way: the options of `ORDER` by `check_checkpoint`, and those that name models, adapters and data by their
# contents (`pipeline.runs.resumed_options`), since a folder may have been moved. A launch is compared by its kind.
COMPARED = f"""
    {" ".join(ORDER)} generation_batch_size
    model_name_or_path model_revision sft_adapter reward_adapter pad_token
    dataset_name datasets dataset_train_split drop_bad_rows ptx_dataset_name ptx_dataset_split
    fsdp fsdp_config deepspeed parallelism_config
"""
# A change needs no word: what is logged, saved, uploaded or checked, and how fast.
HARMLESS = """
    output_dir backbone_dir logging_dir run_name project report_to trackio_space_id trackio_bucket_id trackio_static_space_id
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    disable_tqdm include_num_input_tokens_seen log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo debug skip_memory_metrics

    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision resume_from_checkpoint
    restore_callback_states_from_checkpoint do_train do_eval do_predict local_rank

    per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics precompute_ref_batch_size

    num_members min_kept min_reward_accuracy trust_remote_code use_peft dataset_num_proc torch_empty_cache_steps
    activation_checkpointing activation_checkpointing_kwargs ds3_gather_for_generation dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_tensor_parallel_size
"""
TABLE: dict[str, str | None] = {
    **dict.fromkeys(APPLIED.split(), "applied"),
    **{name: reason for reason, names in REFUSED.items() for name in names.split()},
    **dict.fromkeys([*COMPARED.split(), *HARMLESS.split()], None),
    # An option that means something else in one of the dataclasses.
    "RewardModelArguments.sft_adapter": "applied",  # its completions are scored after training
    "RewardModelArguments.loss_type": "scores mean something else under it",  # DPO's and GRPO's is of another kind
    "RewardModelConfig.use_peft": "it changes which weights train",
    "PPOConfig.disable_dropout": "it changes which layers of the value train",  # PPO shares layers only without dropout
}
UNKNOWN = "this release does not know what a change of it does"  # an option of a later release of TRL or transformers


def effect(owner: str, name: str) -> str | None:
    """Return what a change of an option of the dataclass `owner` does: `applied`, the reason to refuse it, or None."""
    return TABLE.get(f"{owner}.{name}", TABLE.get(name, UNKNOWN))


def options_of(*parts: Any) -> dict[str, dict[str, Any]]:
    """Return the options that are compared on resume as JSON values, by the name of their dataclass.

    Call this before a trainer is made: trainers change some of their options.
    """
    return {
        type(part).__name__: {
            option.name: _as_json(getattr(part, option.name))
            for option in fields(part)
            if effect(type(part).__name__, option.name) is not None
        }
        for part in parts
    }


def _as_json(value: Any) -> Any:
    def plain(entry: Any) -> Any:
        if isinstance(entry, Enum):
            return entry.value
        if isinstance(entry, (set, frozenset)):
            return sorted(entry)
        return entry.to_dict() if hasattr(entry, "to_dict") else str(entry)

    # Strict JSON has no NaN and no infinity: they become text.
    return json.loads(json.dumps(value, default=plain), parse_constant=str)


def changed_options(
    checkpoint: str | Path,
    args: TrainingArguments,
    options: dict[str, dict[str, Any]],
    manifest: dict[str, Any] | None = None,
) -> dict[str, tuple[Any, Any]] | None:
    """Return the options that have changed since a checkpoint and take effect: the old and the new value of each.

    None means that the checkpoint's release did not record its options. `manifest` is read if it is not given.

    Args:
        args: the training arguments, whose class says which stage this is.
        options: those of this run, from `options_of`.

    Raises:
        ValueError: an option has changed that cannot change on resume, or the checkpoint is another stage's.
    """
    manifest = manifest or read_manifest(Path(checkpoint)) or {}
    before = manifest.get("options")
    if before is None:
        return None
    stage = type(args).__name__
    if stage not in before:
        raise ValueError(
            f"{checkpoint}: written by another stage, with the options of {', '.join(before)}, and this one has {stage}. Name "
            f"a checkpoint of this stage, or another output_dir."
        )
    applied, refused = {}, []
    for owner, ours in options.items():
        theirs = before.get(owner, {})
        for name in ours.keys() & theirs.keys():
            then, now = theirs[name], ours[name]
            if then == now:
                continue
            reason = effect(owner, name)
            if name in OF_ROLLOUT and (steps := _steps_to_wait(manifest)):
                reason = (
                    f"the checkpoint lies within an update, whose completions were made with the old value; at a step that "
                    f"{steps} divides it can change"
                )
            elif owner == "GRPOConfig" and name == "beta" and not (then and now):
                reason = "without beta GRPO has no reference"
            elif name == "value_learning_rate" and None in (then, now):
                reason = "the optimizer keeps the value's weights apart only if it is set"
            if reason == "applied":
                applied[name] = then, now
            else:
                refused.append(f"{name}={shown(now)} instead of {shown(then)} ({reason})")
    if refused:
        raise ValueError(
            f"{checkpoint}: this cannot change on resume: {'; '.join(sorted(refused))}. Set it as it was, or start a new run."
        )
    return dict(sorted(applied.items()))


def _steps_to_wait(manifest: dict[str, Any]) -> int:
    """Return the number of optimizer steps of an update if a checkpoint lies within one, or else 0."""
    order = manifest["order"]
    passes = (order.get("steps_per_generation") or 1) * (order.get("num_iterations") or 1)
    steps = passes // math.gcd(passes, order["gradient_accumulation_steps"])
    return steps if manifest["step"] % steps else 0


def shown(value: Any) -> str:
    """Return a value as messages show it."""
    text = "unset" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
