"""Convert a PPOConfig of old TRL to a recipe for pipeline.ppo.

Keys are those of TRL up to 0.11 (`ppo_epochs`, `init_kl_coef`) or of 0.12 to 1.12 (`num_ppo_epochs`, `kl_coef`; PPOv2Config
too).

The module is longer than others, because half of it are tables of TRL's options.
"""

import math
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from pipeline.migration.recipe import Recipe, check_known, check_numbers, check_switches
from pipeline.rl.config import UNSUPPORTED


OLD, NEW = "0.11", "1.12"
WORDS = {OLD: "TRL up to 0.11", NEW: "TRL 0.12 to 1.12"}

# ------------------------------------------------------------------------------------------------ old keys with a new key
_BOTH = {
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "vf_coef": "vf_coef",
    "gamma": "gamma",
    "lam": "lam",
    "whiten_rewards": "whiten_rewards",
    "exp_name": "run_name",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "dataset_test_split": "dataset_eval_split",
}
# Old key -> new key, with the same value.
RENAMED: dict[str, dict[str, str]] = {
    OLD: _BOTH
    | {
        "model_name": "model_name_or_path",
        "query_dataset": "dataset_name",
        "ppo_epochs": "num_iterations",
        "init_kl_coef": "beta",
        "log_with": "report_to",
    },
    NEW: _BOTH
    | {
        "sft_model_path": "model_name_or_path",
        "reward_model_path": "reward_adapter",
        "num_ppo_epochs": "num_iterations",
        "kl_coef": "beta",
        "kl_estimator": "kl_estimator",
        "response_length": "max_completion_length",
        "temperature": "temperature",
        "missing_eos_penalty": "missing_eos_penalty",
        "ds3_gather_for_generation": "ds3_gather_for_generation",
    },
}

# Old keys that `_sizes_old`, `_sizes_new`, `_rest_old` and `_rest_new` read together.
COUNTED = {
    OLD: {
        *("batch_size", "mini_batch_size", "forward_batch_size", "gradient_accumulation_steps", "steps", "world_size"),
        *("adap_kl_ctrl", "target", "horizon", "kl_penalty", "early_stopping", "target_kl", "score_clip"),
        "max_grad_norm",
    },
    NEW: {
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "world_size"),
        *("total_episodes", "num_train_epochs", "model_name_or_path", "max_grad_norm"),
    },
}

# Keys of TRL's model and script arguments, and of transformers' TrainingArguments, that mean the same here.
KEPT = {field.name for field in fields(TrainingArguments)} | {
    *("trust_remote_code", "model_name_or_path", "model_revision", "dtype", "attn_implementation"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora"),
    *("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
    *("dataset_name", "dataset_train_split", "env"),
}

# TRL's trainer counted updates with these keys; ours counts optimizer steps. Fractions of the run do not change.
STEPS = ("logging_steps", "save_steps", "eval_steps", "warmup_steps")

# TRL's defaults that differ from ours, or may differ later.
_DEFAULTS = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95}
_DEFAULTS |= {"whiten_rewards": False, "gradient_accumulation_steps": 1}
DEFAULTS: dict[str, dict[str, Any]] = {
    OLD: _DEFAULTS
    | {
        "model_name": "gpt2",
        "steps": 20000,
        "learning_rate": 1.41e-5,
        "adap_kl_ctrl": True,
        "init_kl_coef": 0.2,
        "target": 6.0,
        "horizon": 10000.0,
        "kl_penalty": "kl",
        "batch_size": 128,
        "mini_batch_size": 128,
        "ppo_epochs": 4,
        "ratio_threshold": 10.0,
        "lr_scheduler_type": "constant",
        "seed": 0,
    },
    NEW: _DEFAULTS
    | {
        "sft_model_path": "EleutherAI/pythia-160m",
        "reward_model_path": "EleutherAI/pythia-160m",
        "per_device_train_batch_size": 8,
        "num_mini_batches": 1,
        "num_train_epochs": 3.0,
        "num_ppo_epochs": 4,
        "response_length": 53,
        "temperature": 0.7,
        "learning_rate": 3e-6,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "stop_token": None,
        "gradient_checkpointing": True,
        "logging_steps": 10,
        "save_steps": 500,
    },
}

# ------------------------------------------------------------------------------------------------ old keys without a new key
_COMPUTED = "TRL computed it and ignored the given value. Nothing to do."
_PREPROCESSING = "prompts are tokenized when they are sampled. Nothing to do."
_TRACKER = "set it in the environment of the tracker (WANDB_PROJECT and the like), or in `accelerate config`."
_BEST = "pushing only the best model is not supported. Set `push_to_hub` and `hub_model_id`."
_NEVER_READ = "TRL never read it. Nothing to do."

# Old key -> the reason why there is no such key, and what to do.
_DROPPED = {
    "resume_from_checkpoint": "a checkpoint of TRL's PPO cannot be resumed here. Start a new run.",
    "dataset_num_proc": _PREPROCESSING,
    "dataset_config": "dataset configurations are not supported. Save the rows as .jsonl or .parquet and name that file.",
    "dataset_streaming": "rows are not streamed. Nothing to do.",
    "ignore_bias_buffers": _NEVER_READ,
    "gradient_checkpointing_use_reentrant": _NEVER_READ,
    "use_peft": "every role is a LoRA adapter; see lora_r, lora_alpha, lora_target_modules.",
    "use_dora": "adapters are plain LoRA, or rank-stabilised LoRA with use_rslora.",
    "lora_task_type": "the roles have their own task types. Nothing to do.",
    "lora_modules_to_save": "only the adapters of the backbone are trained. Nothing to do.",
    "lora_target_parameters": "adapters are set by module. Name the modules in lora_target_modules.",
    "load_in_8bit": "the backbone is loaded in 4 bits (`load_in_4bit`) or in its `dtype`.",
    "bnb_4bit_quant_storage": "it is only for sharding, but a 4-bit backbone cannot be sharded. Nothing to do.",
}
# TrainingArguments of transformers 4 that transformers 5 no longer has.
_DROPPED |= dict.fromkeys(
    (
        *("adafactor", "dispatch_batches", "fp16_backend", "fp16_opt_level", "fsdp_min_num_params"),
        *("fsdp_transformer_layer_cls_to_wrap", "group_by_length", "half_precision_backend", "jit_mode_eval"),
        *("include_inputs_for_metrics", "include_tokens_per_second", "logging_dir", "mp_parameters", "no_cuda"),
        *("overwrite_output_dir", "past_index", "per_gpu_eval_batch_size", "per_gpu_train_batch_size"),
        *("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "ray_scope"),
        *("save_safetensors", "split_batches", "torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex"),
        *("use_legacy_prediction_loop", "use_mps_device"),
    ),
    "transformers 5 has no such argument. See its migration guide.",
)
DROPPED = {
    OLD: _DROPPED
    | {
        "max_steps": "TRL's PPO had no such key then. It used `steps`.",
        "task_name": "a label for trackers only. Put it into `run_name`.",
        "reward_model": "a label for trackers only: the scores came from your own loop. Train a reward adapter with "
        "pipeline.reward and name it in `reward_adapter`, or name your function in `reward_funcs`.",
        "tracker_kwargs": _TRACKER,
        "accelerator_kwargs": _TRACKER,
        "project_kwargs": _TRACKER,
        "tracker_project_name": _TRACKER,
        "push_to_hub_if_best_kwargs": _BEST,
        "optimize_cuda_cache": "TRL emptied the device's cache in every step. Set `torch_empty_cache_steps`.",
        "optimize_device_cache": "TRL emptied the device's cache in every step. Set `torch_empty_cache_steps`.",
        "compare_steps": _BEST,
        "ratio_threshold": "TRL left out minibatches with a larger mean ratio. Set `max_approx_kl`; it ends an update before.",
        "use_score_scaling": "scores are not divided by their running deviation. Scale the reward function, weigh it "
        "with `reward_weights`, or set `reward_clip_range`.",
        "use_score_norm": "scores are not shifted by their running mean: the value function learns it. Nothing to do.",
        "is_encoder_decoder": "encoder-decoder models are not supported. Use a decoder-only model.",
        "is_peft_model": "every role is a LoRA adapter; see lora_r, lora_alpha, lora_target_modules.",
        "backward_batch_size": _COMPUTED,
        "global_backward_batch_size": _COMPUTED,
        "global_batch_size": _COMPUTED,
        "use_seq2seq": "encoder-decoder models are not supported. Use a decoder-only model.",
    },
    NEW: _DROPPED
    | {
        "local_rollout_forward_batch_size": "completions are sampled all at once and scored "
        "`per_device_train_batch_size` at a time. If memory is short, lower it and raise `steps_per_generation`.",
        "num_sample_generations": "TRL completed evaluation rows this many times in a run. `sample_updates` completes fixed "
        "prompts every so many updates, and pipeline.evaluation compares the models afterwards.",
        "stop_token": "a completion always ends with the tokenizer's end-of-text token, as with 'eos'. Without this key, "
        "TRL sampled on to response_length.",
        "stop_token_id": "a completion ends with the tokenizer's end-of-text token. Make this token its eos_token.",
        "num_total_batches": _COMPUTED,
        "micro_batch_size": _COMPUTED,
        "local_batch_size": _COMPUTED,
        "batch_size": _COMPUTED,
        "local_mini_batch_size": _COMPUTED,
        "mini_batch_size": _COMPUTED,
        "max_steps": "TRL's PPO never read it: it counted total_episodes or num_train_epochs.",
        "model_adapter_name": "the roles name their adapters; the policy starts from `sft_adapter`.",
        "ref_adapter_name": "the roles name their adapters; the reference is the policy at its start.",
    },
}

# Old keys that count something, and old keys that are other numbers that this module reads.
COUNTS = (
    *("batch_size", "mini_batch_size", "forward_batch_size", "gradient_accumulation_steps", "steps", "world_size"),
    *("per_device_train_batch_size", "num_mini_batches", "total_episodes", "ppo_epochs", "num_ppo_epochs"),
)
NUMBERS = ("num_train_epochs", "target", "horizon", "target_kl", "score_clip", "max_grad_norm", *STEPS, "warmup_ratio")


# ------------------------------------------------------------------------------------------------ keys that are read together
def _exact(number: int, divisor: int, names: str, divisor_names: str) -> int:
    if number % divisor:
        raise ValueError(
            f"{names} = {number} is not a multiple of {divisor_names} = {divisor}. TRL refused it too. Change one of them."
        )
    return number // divisor


def _sizes_old(recipe: Recipe) -> int:
    """Set the sizes of an old recipe, and return its optimizer steps an update.

    Each process has `batch_size` completions, cut into pieces of `mini_batch_size`.
    """
    old = recipe.old
    piece_key = "forward_batch_size" if "forward_batch_size" in old else "mini_batch_size"
    rows, piece, accumulation, epochs = (
        old[key] for key in ("batch_size", piece_key, "gradient_accumulation_steps", "ppo_epochs")
    )
    minibatch = f"{piece_key} x gradient_accumulation_steps"
    minibatches = _exact(rows, piece * accumulation, "batch_size", minibatch)
    recipe.set("per_device_train_batch_size", piece, old_key=piece_key)
    recipe.set("gradient_accumulation_steps", accumulation, old_key="gradient_accumulation_steps")
    recipe.set("steps_per_generation", rows // piece, f"{rows} / {piece}", old_key="batch_size")
    updates = math.ceil(old["steps"] / rows)
    recipe.set(
        "max_steps",
        updates * epochs * minibatches,
        f"{updates} updates of {rows} completions x {epochs} epochs x {minibatches} minibatches",
        "your own loop over the data loader made one update a batch: count its batches",
        old_key="steps",
    )
    if piece_key == "forward_batch_size" and "mini_batch_size" in recipe.given:
        recipe.notes["mini_batch_size"] = "forward_batch_size took its place."
    if "world_size" in recipe.given:
        recipe.notes["world_size"] = _COMPUTED
    return epochs * minibatches


def _sizes_new(recipe: Recipe) -> int:
    """Set the sizes of a newer recipe, and return its optimizer steps an update.

    A minibatch is cut into equal pieces, as large as possible but not larger than those of TRL.
    """
    old = recipe.old
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    piece, accumulation, minibatches = (old[name] for name in names)
    epochs, processes = old["num_ppo_epochs"], old.get("world_size", 1)
    rows = piece * accumulation
    minibatch = _exact(rows, minibatches, " x ".join(names[:2]), names[2])
    ours = next(size for size in range(min(piece, minibatch), 0, -1) if minibatch % size == 0)
    recipe.set(names[0], ours, *([f"{piece} before"] if ours != piece else []), old_key=names[0])
    recipe.set(names[1], minibatch // ours, f"minibatches of {minibatch} / {ours}", old_key=names[1])
    recipe.set("steps_per_generation", rows // ours, f"rollouts of {rows} / {ours}", old_key=names[2])
    updates_of = f"updates of {rows * processes} completions x {epochs} epochs x {minibatches} minibatches"
    if "total_episodes" in recipe.given:
        updates = math.ceil(old["total_episodes"] / (rows * processes))
        recipe.set("max_steps", updates * epochs * minibatches, f"{updates} {updates_of}", old_key="total_episodes")
        if "num_train_epochs" in recipe.given:
            recipe.notes["num_train_epochs"] = "TRL did not read it when total_episodes was set."
    else:
        recipe.set("num_train_epochs", old["num_train_epochs"], "passes over the prompts", old_key="num_train_epochs")
    if "world_size" in recipe.given:
        recipe.notes["world_size"] = f"max_steps is computed for {processes} processes. Launch as many."
    taken = minibatches * math.ceil(minibatch / piece) / accumulation
    if taken != minibatches:
        recipe.notes[names[2]] = (
            f"the recipe makes {minibatches} optimizer steps an epoch, as documented. TRL 1.12 made one in "
            f"{accumulation} backward passes, for any num_mini_batches: about {taken:g} an epoch."
        )
    return epochs * minibatches


def _rest_old(recipe: Recipe) -> None:
    """Set KL control, early stop, bounds of score and gradient, and settings that old TRL had in code, not in its config."""
    old = recipe.old
    adaptive, stops = old["adap_kl_ctrl"], old.get("early_stopping", False)
    if not adaptive and "adap_kl_ctrl" in recipe.given:
        recipe.notes["adap_kl_ctrl"] = "beta is fixed while kl_target is unset. Nothing to do."
    if adaptive:
        if "adap_kl_ctrl" in recipe.given:
            recipe.notes["adap_kl_ctrl"] = "beta is adapted if kl_target is set, as it is here."
        recipe.set("kl_target", old["target"], "nats a sequence", old_key="target")
        recipe.set("kl_horizon", old["horizon"], "sequences", old_key="horizon")
    if old["kl_penalty"] == "kl":
        recipe.set("kl_estimator", "k1", old_key="kl_penalty")
    else:
        recipe.notes["kl_penalty"] = (
            "`kl_estimator` is k1, the difference of log-probabilities, or k3, which is never negative and is the nearest "
            "to this. It keeps its default."
        )
    if stops:
        recipe.set(
            "max_approx_kl",
            round(1.5 * old.get("target_kl", 1.0), 10),
            "1.5 x target_kl",
            "TRL compared the mean log-ratio of the last minibatch, we compare half its mean square",
            old_key="early_stopping",
        )
    if "score_clip" in old:
        recipe.set("reward_clip_range", [-old["score_clip"], old["score_clip"]], old_key="score_clip")
    recipe.set("max_grad_norm", old.get("max_grad_norm", 0.0), "0 clips nothing", old_key="max_grad_norm")
    for switch, on, keys in (
        ("adap_kl_ctrl", adaptive, ("target", "horizon")),
        ("early_stopping", stops, ("early_stopping", "target_kl")),
    ):
        for key in keys:
            if not on and key in recipe.given:
                recipe.notes[key] = f"TRL used it only with {switch}. Nothing to do."
    recipe.set("reward_adapter", "./runs/reward", "TO DO: yours, or reward_funcs; the scores came from your own loop")
    recipe.set("max_completion_length", 256, "TO DO: max_new_tokens of your generation arguments")
    recipe.set("temperature", 1.0, "TO DO: of your generation arguments; TRL left it out of the log-probabilities")


def _rest_new(recipe: Recipe) -> None:
    """Set the sources of policy and reward, and the bound of the gradient."""
    given = recipe.given
    if "model_name_or_path" in given and "sft_model_path" in given:
        recipe.notes["model_name_or_path"] = (
            "TRL read only the tokenizer from it. Here the tokenizer is that of the backbone."
        )
    elif "model_name_or_path" in given:
        recipe.set("model_name_or_path", given["model_name_or_path"])
    recipe.remark("reward_adapter", "TO DO: a LoRA adapter on this backbone, from pipeline.reward, not a whole model")
    recipe.set("max_grad_norm", 0.0, "TRL's PPO clipped no gradient; 1.0 is a good start")
    if "stop_token_id" in given and "stop_token" not in given:
        del recipe.notes["stop_token"]
    if "max_grad_norm" in given:
        recipe.notes["max_grad_norm"] = "TRL's PPO never read it, so it is 0.0 above. Set it if you want it."


# ------------------------------------------------------------------------------------------------ from old to new
def known_keys(dialect: str) -> set[str]:
    """Return all keys of this dialect that can be converted."""
    return {*RENAMED[dialect], *COUNTED[dialect], *DROPPED[dialect], *KEPT}


def dialect_of(given: dict) -> str:
    """Return the dialect of the keys: `OLD` or `NEW`.

    Raises:
        ValueError: a key belongs to neither dialect; or there are keys of both.
    """
    check_known(given, known_keys(OLD) | known_keys(NEW), "no PPOConfig of TRL had it")
    only_old = [key for key in given if key not in known_keys(NEW)]
    counted = COUNTED[NEW] - COUNTED[OLD] - {"model_name_or_path"}
    only_new = [key for key in given if key not in known_keys(OLD) or key in counted]
    if only_old and only_new:
        raise ValueError(
            f"{only_old[0]!r} is a key of TRL up to 0.11, {only_new[0]!r} of 0.12 to 1.12. Give the keys of one config."
        )
    # Later versions of TRL computed these sizes.
    sizes = not only_new and ("batch_size" in given or "mini_batch_size" in given)
    return OLD if only_old or sizes else NEW


def migrate(given: dict) -> str:
    """Return a recipe for pipeline.ppo, in YAML, from the keys and values of an old PPOConfig.

    Raises:
        ValueError: no old config had a key; keys belong to two configs; a number is none; or sizes do not divide.
    """
    dialect = dialect_of(given)
    given = {key: value for key, value in given.items() if value is not None}
    check_numbers(given, COUNTS, NUMBERS)
    check_switches(given, ("adap_kl_ctrl", "early_stopping"))
    given |= {key: int(given[key]) for key in COUNTS if key in given}  # 8.0 is 8
    recipe = Recipe(given, DEFAULTS[dialect], whose="TRL", source=f"a PPOConfig of {WORDS[dialect]}")
    steps_an_update = (_sizes_old if dialect == OLD else _sizes_new)(recipe)
    recipe.set("dataset_name", "human_ratings", "TO DO: your prompts; this is the embedded default")
    came_from: dict[str, str] = {}
    for key, value in recipe.old.items():
        ours = RENAMED[dialect].get(key, key)
        if key in COUNTED[dialect]:
            continue
        if key in DROPPED[dialect]:
            recipe.notes[key] = DROPPED[dialect][key]
            continue
        if value and key.replace("activation", "gradient") in UNSUPPORTED:
            recipe.notes[key] = "PPO does not support it."
            continue
        if key in recipe.given and came_from.setdefault(ours, key) != key:
            raise ValueError(f"{came_from[ours]!r} and {key!r} are both {ours} here. Keep one of them.")
        if ours in STEPS and value >= 1:
            remark = f"{value:g} x {steps_an_update} optimizer steps an update"
            recipe.set(ours, int(value) * steps_an_update, remark, old_key=key)
        else:
            recipe.set(ours, value, old_key=key)
    (_rest_old if dialect == OLD else _rest_new)(recipe)
    if not recipe.given.get("use_peft"):
        recipe.remark("learning_rate", "this was for all weights; LoRA usually wants 10 to 100 times as much")
    return recipe.text()
