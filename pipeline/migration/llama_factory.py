"""Convert a YAML of LLaMA-Factory, of stage rm or ppo, to a recipe for pipeline.reward or pipeline.ppo.

Names, defaults and what they do were read in LLaMA-Factory 0.9.6.dev0 of August 2026. Its PPO is that of TRL 0.9, whose
settings it leaves at their defaults.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from data.cells import shorten
from pipeline.migration.llama_factory_options import DROPPED, GROUPS, READ
from pipeline.migration.recipe import Recipe, check_known, check_numbers, check_sizes, check_switches
from pipeline.rl.config import UNSUPPORTED


STAGES = {"rm": "reward", "ppo": "ppo"}
# Commands for its other stages.
OTHERS = {"sft": "pipeline.sft", "dpo": "pipeline.dpo", "pt": "pipeline.sft, which reads plain texts too"}
TRAINER = {field.name for field in fields(TrainingArguments)}
KEPT = {*TRAINER, "model_name_or_path", "model_revision", "trust_remote_code", "lora_dropout", "use_rslora"}
STEPS = ("logging_steps", "save_steps", "warmup_steps")  # PPO counted updates with them; ours counts optimizer steps
ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "ppo_buffer_size",
    "ppo_epochs",
    "lora_rank",
) + (*("max_new_tokens", "cutoff_len"),)
NUMBERS = ("learning_rate", "num_train_epochs", "warmup_ratio", "ppo_target", "top_p", "top_k", "temperature", *STEPS)
SWITCHES = ("ppo_score_norm", "ppo_whiten_rewards", "disable_gradient_checkpointing", "bf16", "pure_bf16")
LISTS = dict.fromkeys(("report_to", "dataset", "eval_dataset", "lora_target", "adapter_name_or_path", "reward_model"))

# Defaults that differ from ours, or may differ later; of stage ppo also those of TRL 0.9, under LLaMA-Factory's names.
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "lora_rank": 8,
    "finetuning_type": "lora",
    "disable_gradient_checkpointing": False,
    "cutoff_len": 2048,
    "save_steps": 500,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "reward": _DEFAULTS,
    "ppo": _DEFAULTS
    | {"ppo_buffer_size": 1, "ppo_epochs": 4, "ppo_target": 6.0, "max_new_tokens": 1024, "temperature": 0.95}
    | {"top_p": 0.7, "top_k": 50, "logging_steps": 500},
}
# What LLaMA-Factory's PPO leaves to TRL 0.9.
TRL = {"beta": 0.2, "kl_estimator": "k1", "kl_horizon": 10000.0, "epsilon": 0.2, "gamma": 1.0, "lam": 0.95}
TRL |= {"vf_coef": 0.1, "value_clip": 0.2}


def reason_of(key: str) -> str | None:
    """Return the reason why a key has no counterpart, or None if it is not known to have none."""
    return DROPPED.get(key) or next((why for pattern, why in GROUPS.items() if re.match(pattern, key)), None)


def migrate(given: dict[str, Any]) -> str:
    """Return a recipe, in YAML, from the keys and values of a LLaMA-Factory YAML.

    Raises:
        ValueError: the stage is neither rm nor ppo; LLaMA-Factory has no such key; or a number is none.
    """
    given = {key: value for key, value in given.items() if value is not None}
    named = given.get("stage", "sft")
    if named not in STAGES:
        other = OTHERS.get(str(named))
        remedy = f"For this stage see {other}. " if other else ""
        raise ValueError(f"stage={shorten(named)} is not converted. {remedy}Give the YAML of stage rm or ppo.")
    stage = STAGES[named]
    tables = {*KEPT, *READ}
    unknown = {key: value for key, value in given.items() if key not in tables and reason_of(key) is None}
    check_known(unknown, {*tables, *DROPPED}, "LLaMA-Factory has no such key")
    check_numbers(given, COUNTS, NUMBERS)
    check_switches(given, SWITCHES)
    check_sizes({key: value for key, value in given.items() if key in READ}, LISTS)
    recipe = Recipe(
        given, DEFAULTS[stage], whose="LLaMA-Factory", source=f"a YAML of LLaMA-Factory, stage {named}", stage=stage
    )
    for key, value in recipe.old.items():
        if why := reason_of(key):
            recipe.notes[key] = why
        elif value and stage == "ppo" and key in UNSUPPORTED:
            recipe.notes[key] = "PPO does not support it."
        elif key in KEPT and key not in READ:
            recipe.set(key, value, old_key=key)
    recipe.note(f"pipeline.{stage}, as the first line says.", "stage")
    _model(recipe)
    _rows(recipe)
    (_ppo if stage == "ppo" else _reward)(recipe)
    return recipe.text()


def _names(value: Any) -> list[str]:
    """Return the names in a list, or in a text with commas."""
    found = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in found if str(name).strip()]


def _model(recipe: Recipe) -> None:
    """Set adapter, precision and attention."""
    old, kind = recipe.old, recipe.old["finetuning_type"]
    rank = old["lora_rank"]
    modules = _names(old.get("lora_target", "all"))
    if kind == "lora":
        recipe.set("lora_r", rank, old_key="lora_rank")
        recipe.set("lora_alpha", old.get("lora_alpha", 2 * rank), old_key="lora_alpha")
        recipe.set("lora_target_modules", "all-linear" if modules == ["all"] else modules, old_key="lora_target")
        recipe.note("LoRA, as here. Nothing to do.", "finetuning_type")
    else:
        recipe.note(
            "only LoRA adapters train. The values above are a start.", "lora_rank", "lora_alpha", "lora_target"
        )
        recipe.set("lora_r", 16, "TO DO: only LoRA adapters train here", old_key="finetuning_type")
        recipe.set("lora_alpha", 32)
        recipe.set("lora_target_modules", "all-linear")
        if kind == "full":
            recipe.remark("learning_rate", "this was for all weights; LoRA usually wants 10 to 100 times as much")
    if old.get("bf16") or old.get("pure_bf16"):
        key = "bf16" if old.get("bf16") else "pure_bf16"
        recipe.set("dtype", "bfloat16", "the frozen backbone's", old_key=key)
        recipe.set("bf16", True, old_key=key)
    else:
        recipe.set("bf16", False, old_key="bf16")
        recipe.note("float32: bf16 is false. Nothing to do.", "pure_bf16")
    recipe.set(
        "gradient_checkpointing", not old["disable_gradient_checkpointing"], old_key="disable_gradient_checkpointing"
    )
    attention = old.get("flash_attn", "auto")
    if attention in ATTENTION:
        recipe.set("attn_implementation", ATTENTION[attention], str(attention), old_key="flash_attn")
    else:
        recipe.note("transformers chooses. Nothing to do.", "flash_attn")
    bits = old.get("quantization_bit")
    if bits == 4:
        recipe.set("load_in_4bit", True, "needs the extra [quantization]", old_key="quantization_bit")
        recipe.set("use_bnb_nested_quant", old.get("double_quantization", True), old_key="double_quantization")
        recipe.set("bnb_4bit_quant_type", old.get("quantization_type", "nf4"), old_key="quantization_type")
    else:
        recipe.note("the backbone is loaded in 4 bits (load_in_4bit) or in its dtype.", "quantization_bit")
        recipe.note("it is about 4 bits. Nothing to do.", "double_quantization", "quantization_type")
    if "warmup_ratio" in recipe.given:
        recipe.set("warmup_steps", old["warmup_ratio"], "a share of the run", old_key="warmup_ratio")


def _rows(recipe: Recipe) -> None:
    """Set the data sets, which LLaMA-Factory names in a registry of its own."""
    old, given = recipe.old, recipe.given
    for key, ours in (("dataset", "dataset_name"), ("eval_dataset", "eval_dataset_name")):
        if key in given:
            names = _names(old[key])
            remark = f"TO DO: the file or hub id that dataset_info.json has for {', '.join(names)}"
            recipe.set(
                ours, names[0], remark, *(["one file with the rows of all"] if len(names) > 1 else []), old_key=key
            )
    recipe.to_do("dataset_name", "human_ratings", "yours; this is the embedded default")
    recipe.to_do("model_name_or_path", "data/backbone", "yours; this is the embedded default")
    recipe.note(
        "no rows are split off. Save some as a file of their own, and name it in eval_dataset_name.", "val_size"
    )


def _ppo(recipe: Recipe) -> None:
    old, given = recipe.old, recipe.given
    piece, accumulation, buffer = (
        int(old[key]) for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size")
    )
    words = f"rollouts of {piece * accumulation * buffer} / {piece}; {accumulation} x {buffer}"
    recipe.set("steps_per_generation", accumulation * buffer, words, old_key="ppo_buffer_size")
    recipe.set("num_iterations", int(old["ppo_epochs"]), old_key="ppo_epochs")
    steps = buffer * int(old["ppo_epochs"])
    for key in STEPS:
        if old.get(key, 0) >= 1:
            remark = f"{old[key]:g} x {steps} optimizer steps an update"
            recipe.set(key, int(old[key]) * steps, remark, old_key=key)
    if old.get("max_steps", -1) > 0:
        updates = int(old["max_steps"])
        recipe.set("max_steps", updates * steps, f"{updates} updates x {steps} optimizer steps", old_key="max_steps")
    for key, value in TRL.items():
        recipe.set(key, value, "TRL 0.9's default, which LLaMA-Factory leaves")
    recipe.set("kl_target", old["ppo_target"], "nats a sequence", old_key="ppo_target")
    recipe.set("whiten_rewards", old.get("ppo_whiten_rewards", False), old_key="ppo_whiten_rewards")
    recipe.note(
        "scores are neither divided by their running deviation nor shifted by their running mean. normalize_scores scales a "
        "reward adapter once, on completions of the SFT policy.",
        "ppo_score_norm",
    )
    recipe.set("max_completion_length", int(old["max_new_tokens"]), old_key="max_new_tokens")
    recipe.set(
        "temperature", old["temperature"], "TRL 0.9 left it out of the log-probabilities", old_key="temperature"
    )
    for key, whole in (("top_p", 1), ("top_k", 0)):
        better = [] if old[key] == whole else [f"PPO learns from the whole distribution: {whole} is better"]
        recipe.set(key, old[key], *better, old_key=key)
    recipe.note("a prompt must leave room for a completion in the model's context.", "cutoff_len")
    adapters = _names(old.get("adapter_name_or_path"))
    if adapters:
        several = [] if len(adapters) == 1 else ["merge the others into the model first (pipeline.merge)"]
        recipe.set("sft_adapter", adapters[-1], *several, old_key="adapter_name_or_path")
    _rewards(recipe)
    recipe.note("the reference is the policy at its start. Nothing to do.", "ref_model", "ref_model_adapters")
    if given.get("eval_dataset") or given.get("val_size"):
        recipe.set("eval_strategy", "no", "LLaMA-Factory's PPO evaluated nothing")


def _rewards(recipe: Recipe) -> None:
    kind = recipe.old.get("reward_model_type", "lora")
    if kind == "api":
        recipe.note(
            "LLaMA-Factory's protocol (`messages`, `scores`) is not spoken. Ask the server in a function of your own, as "
            "examples/async_reward.py does, and name it in reward_funcs.",
            *("reward_model", "reward_model_type"),
        )
        recipe.to_do("reward_funcs", ["my_rewards.ask"], "a function that asks your server")
        return
    trained = (
        "TO DO: train it anew with pipeline.reward on the same pairs; LLaMA-Factory's value head is of another form"
    )
    recipe.set("reward_adapter", "./runs/reward", trained, old_key="reward_model")
    recipe.note("a reward model is an adapter on the policy's backbone (reward_adapter).", "reward_model_type")
    recipe.note("name the one adapter in reward_adapter.", "reward_model_adapters")


def _reward(recipe: Recipe) -> None:
    old = recipe.old
    recipe.set("max_length", int(old["cutoff_len"]), "a longer pair is left out, not cut", old_key="cutoff_len")
    recipe.set("loss_type", "bradley_terry", "-log sigmoid of the difference")
    if "adapter_name_or_path" in recipe.given:
        recipe.set("sft_adapter", _names(old["adapter_name_or_path"])[-1], old_key="adapter_name_or_path")
        recipe.set("start_from_sft", True, "LLaMA-Factory trained the adapter on", old_key="adapter_name_or_path")
    if recipe.given.get("eval_dataset") is None and "eval_strategy" in recipe.lines:
        recipe.to_do("eval_dataset_name", "human_ratings", "held-out pairs; this is the embedded default")
    of_ppo: Mapping[str, Any] = {key: None for key in READ if key.startswith(("ppo_", "reward_model", "ref_model"))}
    sampling = ("max_new_tokens", "temperature", "top_p", "top_k")
    recipe.note("it is about PPO. Nothing to do.", *of_ppo, *sampling)
