"""Convert a config of verl's PPO (main_ppo), as Hydra overrides or YAML, to a recipe for pipeline.ppo.

Names, defaults and what they do were read in verl 0.8.0.dev of January 2026. verl trains no reward models.
"""

import re
from collections.abc import Mapping
from typing import Any

from data.cells import shorten
from pipeline.migration.recipe import Recipe, check_known, check_numbers, check_sizes, check_switches, set_sizes
from pipeline.migration.verl_options import COUNTS, DEFAULTS, DROPPED, GROUPS, LISTS, NUMBERS, READ, RENAMED, SWITCHES


MODULES = ("verl.trainer.main_ppo",)
BASELINES = {"grpo": "grpo", "grpo_passk": "grpo"}
ESTIMATORS = {"kl": "k1", "k1": "k1", "low_var_kl": "k3", "k3": "k3"}
CORRECTIONS = {"token": "token_truncate", "sequence": "sequence_truncate"}
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}." for part in ("actor", "rollout", "model"))
ALL_WEIGHTS = "this was for all weights; LoRA usually wants 10 to 100 times as much"


def reason_of(key: str) -> str | None:
    """Return the reason why a key has no counterpart, or None if it is not known to have none."""
    return DROPPED.get(key) or next((why for pattern, why in GROUPS.items() if re.match(pattern, key)), None)


def migrate(given: dict[str, Any]) -> str:
    """Return a recipe for pipeline.ppo, in YAML, from options of verl with dots in their names.

    Hydra's own keys (`defaults`, `_target_`), and values that refer to another key (`${...}`), are left out.

    Raises:
        ValueError: verl has no such option; a number is none; sizes do not divide; or the run is no PPO.
    """
    given = {
        key: value
        for key, value in given.items()
        if value not in (None, "???")
        and not re.search(r"\b_target_$", key)
        and "${" not in str(value)
        and key != "defaults"
        and not key.startswith("hydra.")
    }
    tables = {*RENAMED, *READ}
    unknown = {key: value for key, value in given.items() if key not in tables and reason_of(key) is None}
    check_known(unknown, {*tables, *DROPPED}, "the PPO of verl has no such option")
    check_numbers(given, COUNTS, NUMBERS)
    check_sizes({key: value for key, value in given.items() if key in tables}, LISTS)
    check_switches(given, SWITCHES)
    old = DEFAULTS | given
    estimator = old["algorithm.adv_estimator"]
    if estimator != "gae":
        command = BASELINES.get(str(estimator), "rloo")
        raise ValueError(
            f"algorithm.adv_estimator={shorten(estimator)} has no critic, so it is not PPO. See pipeline.{command} and "
            f"pipeline/recipes/baselines/{command}.yaml, or set gae."
        )
    processes = old["trainer.nnodes"] * old["trainer.n_gpus_per_node"]
    processes //= given.get(f"{ACTOR}ulysses_sequence_parallel_size", 1)
    launch = f"--config_file accelerate_configs/fsdp2.yaml --num_processes {max(processes, 1)}"
    recipe = Recipe(given, DEFAULTS, whose="verl", source="a run of verl's main_ppo", launch=launch)
    dropped = {key: why for key in given if key not in tables and (why := reason_of(key))}
    recipe.take(RENAMED, dropped)
    recipe.note("PPO, as here. Nothing to do.", "algorithm.adv_estimator")
    steps = _sizes(recipe, max(processes, 1))
    _length(recipe, steps)
    _adapter(recipe)
    _optimizer(recipe)
    _losses(recipe)
    _kl(recipe)
    _rewards(recipe)
    _sampler(recipe)
    _rows(recipe)
    return recipe.text()


def _sizes(recipe: Recipe, processes: int) -> int:
    """Set the sizes, and return the optimizer steps of an update. verl counts prompts; each has `rollout.n` completions."""
    old, samples = recipe.old, recipe.old[f"{ROLLOUT}n"]
    pieces = (f"{ACTOR}ppo_micro_batch_size_per_gpu", f"{ACTOR}ppo_micro_batch_size")
    keys = (
        "data.train_batch_size",
        f"{ACTOR}ppo_mini_batch_size",
        next((key for key in pieces if key in old), pieces[0]),
    )
    rows, minibatch = (int(old[key]) * samples for key in keys[:2])
    piece = int(old.get(keys[2], minibatch // processes or 1))
    minibatches = set_sizes(recipe, rows, minibatch, piece, processes, keys)
    if keys[2] not in recipe.given:
        value, _ = recipe.lines["per_device_train_batch_size"]
        recipe.set(
            "per_device_train_batch_size", value, "TO DO: the most that a GPU takes at once; verl's config has none"
        )
    recipe.note("the launch takes as many processes; see the first line.", "trainer.nnodes", "trainer.n_gpus_per_node")
    recipe.set("num_generations", samples, old_key=f"{ROLLOUT}n")
    return minibatches * int(old[f"{ACTOR}ppo_epochs"])


def _length(recipe: Recipe, steps: int) -> None:
    """Set the length of the run, and how often it saves, evaluates and logs."""
    old = recipe.old
    updates = old.get("trainer.total_training_steps")
    if updates:
        recipe.set("max_steps", updates * steps, f"{updates} updates", old_key="trainer.total_training_steps")
        recipe.note("total_training_steps took its place.", "trainer.total_epochs")
    else:
        recipe.set(
            "num_train_epochs", old["trainer.total_epochs"], "passes over the prompts", old_key="trainer.total_epochs"
        )
    for key, ours, strategy in (
        ("trainer.save_freq", "save_steps", "save_strategy"),
        ("trainer.test_freq", "eval_steps", "eval_strategy"),
    ):
        if old[key] > 0:
            recipe.set(ours, old[key] * steps, f"{old[key]} x {steps} optimizer steps an update", old_key=key)
            recipe.set(strategy, "steps")
        else:
            recipe.set(strategy, "no", "-1 was never", old_key=key)
    recipe.set("logging_steps", steps, "one entry an update")
    trackers = [
        name for name in _listed(old["trainer.logger"]) if name in ("wandb", "tensorboard", "mlflow", "swanlab")
    ]
    recipe.set("report_to", trackers or "none", old_key="trainer.logger")
    warm = old.get("trainer.critic_warmup", 0)
    if warm > 1:
        recipe.set("critic_warmup_updates", warm - 1, "verl counted from 1", old_key="trainer.critic_warmup")
    else:
        recipe.note("the policy trained from the first update. Nothing to do.", "trainer.critic_warmup")


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _adapter(recipe: Recipe) -> None:
    given = recipe.given
    if given.get(f"{MODEL}lora_rank"):
        recipe.set("lora_r", given[f"{MODEL}lora_rank"], old_key=f"{MODEL}lora_rank")
        recipe.set("lora_alpha", given.get(f"{MODEL}lora_alpha", 16), old_key=f"{MODEL}lora_alpha")
        modules = given.get(f"{MODEL}target_modules", "all-linear")
        recipe.set("lora_target_modules", modules, old_key=f"{MODEL}target_modules")
    else:
        recipe.set("lora_r", 16, "verl trained all weights; here LoRA adapters on a frozen backbone train")
        recipe.set("lora_alpha", 32)
        recipe.set("lora_target_modules", "all-linear")
        keys = ("lora_rank", "lora_alpha", "target_modules")
        recipe.note("there was no LoRA without a rank. Nothing to do.", *(f"{MODEL}{key}" for key in keys))
        recipe.remark("learning_rate", ALL_WEIGHTS)
        recipe.remark("value_learning_rate", "the same holds for the value's")
    recipe.set("dtype", "bfloat16", "verl computes in it")
    recipe.set("bf16", True)


def _optimizer(recipe: Recipe) -> None:
    old, optim = recipe.old, f"{ACTOR}optim."
    for number, key in enumerate(("adam_beta1", "adam_beta2")):
        recipe.set(key, old[f"{optim}betas"][number], old_key=f"{optim}betas")
    steps, ratio = (f"{optim}lr_warmup_steps", f"{optim}lr_warmup_steps_ratio")
    if old.get(steps, -1) > 0:
        recipe.set("warmup_steps", old[steps], old_key=steps)
        recipe.note("lr_warmup_steps took its place.", ratio)
    else:
        recipe.set("warmup_steps", old[ratio], "a share of the run", old_key=ratio)
        recipe.note("-1: the ratio counts. Nothing to do.", steps)
    named = f"{optim}warmup_style" if f"{optim}warmup_style" in recipe.given else f"{optim}lr_scheduler_type"
    scheduler, least = old[named], f"{optim}min_lr_ratio"
    if scheduler == "cosine" and old.get(least):
        recipe.set("lr_scheduler_type", "cosine_with_min_lr", old_key=named)
        recipe.set("lr_scheduler_kwargs", {"min_lr_rate": old[least]}, old_key=least)
    else:
        ours = "constant_with_warmup" if scheduler == "constant" else scheduler
        recipe.set("lr_scheduler_type", ours, *([] if ours == scheduler else [scheduler]), old_key=named)
        recipe.note(f"the schedule {scheduler!r} has no lowest rate. Nothing to do.", least)
    recipe.set("vf_coef", 1.0, "the critic had an optimizer of its own, and so its loss the weight 1")


def _losses(recipe: Recipe) -> None:
    """Set the clip ranges."""
    old, given = recipe.old, recipe.given
    low, high, both = (f"{ACTOR}{key}" for key in ("clip_ratio_low", "clip_ratio_high", "clip_ratio"))
    below = low if low in given else both
    above = high if high in given else both
    recipe.set("epsilon", old[below], old_key=below)
    if old[above] != old[below]:
        recipe.set("epsilon_high", old[above], old_key=above)
    if low in given and high in given:
        recipe.note("clip_ratio_low and clip_ratio_high took its place.", both)
    recipe.note("the range is the same on both sides: epsilon. Nothing to do.", *(
        key for key in (low, high) if key in given and old[above] == old[below] and key != below
    ))  # fmt: skip
    mode = old.get(f"{ACTOR}loss_agg_mode", "token-mean")
    same = mode == "token-mean"
    recipe.note(
        "the loss is the mean over all tokens of a minibatch, as with token-mean."
        + ("" if same else " A mean over sequences is not supported."),
        f"{ACTOR}loss_agg_mode",
    )


def _kl(recipe: Recipe) -> None:
    old = recipe.old
    kind, adaptive = old["algorithm.kl_penalty"], old.get("algorithm.kl_ctrl.type", "fixed") == "adaptive"
    in_reward, in_loss = old["algorithm.use_kl_in_reward"], old.get(f"{ACTOR}use_kl_loss", False)
    keys = (
        "algorithm.kl_ctrl.kl_coef",
        "algorithm.kl_penalty",
        "algorithm.kl_ctrl.target_kl",
        "algorithm.kl_ctrl.horizon",
    )
    of_loss = tuple(f"{ACTOR}{key}" for key in ("kl_loss_coef", "kl_loss_type"))
    if in_reward:
        recipe.set("beta", old[keys[0]], old_key=keys[0])
        if kind in ESTIMATORS:
            recipe.set(
                "kl_estimator", ESTIMATORS[kind], *([kind] if kind != ESTIMATORS[kind] else []), old_key=keys[1]
            )
        else:
            recipe.note("`kl_estimator` is k1 or k3, which is never negative and is the nearest.", keys[1])
        recipe.note("beta is the KL coefficient of the reward, as with true.", "algorithm.use_kl_in_reward")
    else:
        recipe.set("beta", 0.0, "no KL penalty in the reward", old_key="algorithm.use_kl_in_reward")
        recipe.note("it was used only with use_kl_in_reward. Nothing to do.", *keys, "algorithm.kl_ctrl.type")
    if in_reward and adaptive:
        recipe.note(
            "verl's target is in nats a token. `kl_target` is in nats a sequence: set it to this times the mean length of "
            "your completions, and kl_horizon to algorithm.kl_ctrl.horizon. Without it beta stays constant.",
            *("algorithm.kl_ctrl.type", *keys[2:]),
        )
    elif in_reward:
        recipe.note("beta stays constant without kl_target. Nothing to do.", "algorithm.kl_ctrl.type", *keys[2:])
    if in_loss:
        recipe.note(
            "there is no KL loss. The KL penalty is part of the reward: give beta this coefficient instead of 0.",
            *(f"{ACTOR}use_kl_loss", *of_loss),
        )
    else:
        recipe.note("there is no KL loss, as with false.", f"{ACTOR}use_kl_loss")
        recipe.note("it was used only with use_kl_loss. Nothing to do.", *of_loss)


def _rewards(recipe: Recipe) -> None:
    old = recipe.old
    path, name = (old.get(f"custom_reward_function.{key}") for key in ("path", "name"))
    if old.get("reward_model.enable") and old.get("reward_model.model.path"):
        name_of_model = old["reward_model.model.path"]
        recipe.set(
            "reward_funcs",
            [f"reward_models.pretrained.get_model(name={name_of_model!r})"],
            "a model of its own; an adapter on the backbone (pipeline.reward, reward_adapter) costs less, and the value "
            "starts from it",
            old_key="reward_model.model.path",
        )
        recipe.note("the model is named in reward_funcs.", "reward_model.enable")
    else:
        recipe.to_do("reward_adapter", "./runs/reward", "yours, from pipeline.reward; or reward_funcs for a rule")
        recipe.note("no reward model was used. Nothing to do.", "reward_model.enable", "reward_model.model.path")
    if path:
        recipe.note(
            f"name it by its dotted path in reward_funcs. {name or 'compute_score'}(data_source, solution_str, ground_truth, "
            "extra_info) scored one completion; here a function gets `completions` and each column of the rows by name, as "
            "lists, and returns one number for each. See docs/rewards.md.",
            *("custom_reward_function.path", "custom_reward_function.name"),
        )
    else:
        recipe.note("it was used only with a path. Nothing to do.", "custom_reward_function.name")


def _sampler(recipe: Recipe) -> None:
    old, name = recipe.old, recipe.old.get(f"{ROLLOUT}name")
    engine = {"gpu_memory_utilization": "vllm_gpu_memory_utilization"}
    engine |= {"tensor_model_parallel_size": "vllm_tensor_parallel_size", "max_model_len": "vllm_max_model_length"}
    engine |= {"free_cache_engine": "vllm_enable_sleep_mode"}
    given = [f"{ROLLOUT}{key}" for key in engine if f"{ROLLOUT}{key}" in recipe.given]
    if name == "vllm":
        recipe.set("use_vllm", True, "needs the extra [vllm]; docs/vllm.md", old_key=f"{ROLLOUT}name")
        recipe.set("vllm_mode", "colocate", "actor and rollout shared the GPUs")
        for key in given:
            recipe.set(engine[key.removeprefix(ROLLOUT)], old[key], old_key=key)
        rollout_is = old.get("algorithm.rollout_correction.rollout_is")
        recipe.set("vllm_importance_sampling_correction", bool(rollout_is))
        if rollout_is in CORRECTIONS:
            key = "algorithm.rollout_correction.rollout_is"
            recipe.set("vllm_importance_sampling_mode", CORRECTIONS[rollout_is], old_key=key)
            most = "algorithm.rollout_correction.rollout_is_threshold"
            recipe.set("vllm_importance_sampling_clip_max", old.get(most, 2.0), old_key=most)
        else:
            recipe.note("it was used only with rollout_is.", "algorithm.rollout_correction.rollout_is_threshold")
    else:
        recipe.note("vLLM or transformers sample (use_vllm). Other engines are not supported.", f"{ROLLOUT}name")
        keys = ("rollout_is", "rollout_is_threshold")
        corrections = (f"algorithm.rollout_correction.{key}" for key in keys)
        recipe.note("it is about the engine that sampled. Nothing to do.", *given, *corrections)
    if old.get(f"{ROLLOUT}top_p", 1) != 1:
        recipe.remark("top_p", "PPO learns from the whole distribution: the preflight warns, and 1.0 is better")
    top_k = old.get(f"{ROLLOUT}top_k", -1)
    if top_k > 0:
        recipe.set("top_k", top_k, "PPO learns from the whole distribution: 0 is better", old_key=f"{ROLLOUT}top_k")
    else:
        recipe.note("all tokens can be sampled: top_k is 0 here, and the default. Nothing to do.", f"{ROLLOUT}top_k")


def _rows(recipe: Recipe) -> None:
    old: Mapping[str, Any] = recipe.old
    for key, ours in (("data.train_files", "dataset_name"), ("data.val_files", "eval_dataset_name")):
        files = _listed(old[key]) if key in recipe.given else []
        if files:
            several = [f"TO DO: one file with the rows of {', '.join(map(str, files))}"] if len(files) > 1 else []
            recipe.set(ours, files[0], *several, old_key=key)
    recipe.to_do("dataset_name", "human_ratings", "your prompts; this is the embedded default")
    recipe.to_do("model_name_or_path", "data/backbone", "your policy; this is the embedded default")
    if "eval_dataset_name" not in recipe.lines and recipe.lines["eval_strategy"][0] == "steps":
        recipe.to_do("eval_dataset_name", "human_ratings", "held-out prompts; this is the embedded default")
    project, experiment = (old.get(f"trainer.{name}_name") for name in ("project", "experiment"))
    recipe.note("set WANDB_PROJECT in the environment, or what your tracker reads.", "trainer.project_name")
    if "trainer.default_local_dir" not in recipe.given:
        recipe.set("output_dir", f"checkpoints/{project}/{experiment}", old_key="trainer.default_local_dir")
