"""Convert the options of OpenRLHF's train_ppo_ray or train_rm to a recipe for pipeline.ppo or pipeline.reward.

Keys are those of releases from 0.10.2 on, with dots (`actor.adam.lr`), or those before (`actor_learning_rate`). Names,
defaults and what they do were read in OpenRLHF 0.11.0, and the older names in 0.8.0 and 0.9.10.
"""

from collections.abc import Mapping
from typing import Any

from data.cells import shorten
from pipeline.migration import openrlhf_options as tables
from pipeline.migration.recipe import Recipe, check_known, check_numbers, check_sizes, set_sizes


MODULES = {"openrlhf.cli.train_ppo_ray": "ppo", "openrlhf.cli.train_ppo": "ppo", "openrlhf.cli.train_rm": "reward"}
BASELINES = {
    "rloo": "rloo",
    "reinforce_baseline": "rloo",
    "reinforce": "rloo",
    "group_norm": "grpo",
    "dr_grpo": "grpo",
}
CORRECTIONS = {"tis": "token_truncate", "icepop": "token_mask", "seq-mask-tis": "sequence_mask"}
OWN_MODEL = (
    "a model of its own, whose head must be called score; an adapter on the backbone (pipeline.reward, reward_adapter) costs "
    "less, and the value starts from it"
)
ALL_WEIGHTS = "this was for all weights; LoRA usually wants 10 to 100 times as much"


def known_keys(stage: str) -> set[str]:
    """Return all keys of a stage, with dots, that can be converted."""
    return {*tables.RENAMED[stage], *tables.READ[stage], *tables.DROPPED[stage]}


def stage_of(given: Mapping[str, Any]) -> str:
    """Tell from the keys which stage they are for: `reward` or `ppo`.

    Raises:
        ValueError: a key belongs to neither; or there are keys of both.
    """
    names = {stage: {*known_keys(stage), *tables.FLAT[stage]} for stage in ("ppo", "reward")}
    check_known(given, names["ppo"] | names["reward"], "neither train_ppo_ray nor train_rm of OpenRLHF has it")
    of_reward = [key for key in given if key not in names["ppo"]]
    of_ppo = [key for key in given if key not in names["reward"]]
    if of_reward and of_ppo:
        raise ValueError(
            f"{of_ppo[0]!r} is an option of train_ppo_ray, {of_reward[0]!r} of train_rm. Give the options of one run."
        )
    return "reward" if of_reward else "ppo"


def migrate(given: dict[str, Any], stage: str | None = None) -> str:
    """Return a recipe, in YAML, from the options of a run of OpenRLHF.

    Args:
        stage: ppo or reward; None tells it from the keys.

    Raises:
        ValueError: OpenRLHF has no such key; a number is none; sizes do not divide; or the run is no PPO.
    """
    given = {key: value for key, value in given.items() if value is not None}
    stage = stage or stage_of(given)
    check_known(given, {*known_keys(stage), *tables.FLAT[stage]}, "OpenRLHF has no such option")
    written: dict[str, str] = {}
    named: dict[str, Any] = {}
    for key, value in given.items():
        name = tables.FLAT[stage].get(key, key)
        if name in named:
            raise ValueError(f"{written[name]!r} and {key!r} are one option. Keep one of them.")
        written[name], named[name] = key, tables.FLAGS.get(key, value) if value is True else value
    check_numbers(
        given, [written.get(key, key) for key in tables.COUNTS], [written.get(key, key) for key in tables.NUMBERS]
    )
    check_sizes(given, {written.get(key, key): size for key, size in tables.LISTS.items()})
    flat = any(key in tables.FLAT[stage] for key in given)
    defaults = tables.DEFAULTS[stage] | (tables.FLAT_DEFAULTS[stage] if flat else {})
    recipe = Recipe(
        named,
        defaults,
        whose="OpenRLHF",
        source=f"a run of OpenRLHF's {'train_rm' if stage == 'reward' else 'train_ppo_ray'}",
        stage=stage,
        launch=_launch(defaults | named, stage),
        written=written,
    )
    recipe.take(tables.RENAMED[stage], {key: why for key, why in tables.DROPPED[stage].items() if key in named})
    _common(recipe, "actor." if stage == "ppo" else "")
    (_ppo if stage == "ppo" else _reward)(recipe)
    return recipe.text()


def _launch(old: Mapping[str, Any], stage: str) -> str:
    config = {0: "ddp", 1: "zero2", 2: "zero2", 3: "zero3"}.get(old.get("ds.zero_stage", 2), "zero2")
    processes = f" --num_processes {_processes(old)}" if stage == "ppo" else ""
    return f"--config_file accelerate_configs/{config}.yaml{processes}"


def _processes(old: Mapping[str, Any]) -> int:
    """Return the number of GPUs that each hold a share of the policy's batch."""
    return max(
        1,
        old["actor.num_nodes"]
        * old["actor.num_gpus_per_node"]
        // (old.get("ds.ring_attn_size", 1) * old.get("ds.tensor_parallel_size", 1)),
    )


def _common(recipe: Recipe, prefix: str) -> None:
    """Set precision, adapter, optimizer and trackers; `prefix` is that of the policy's options."""
    old = recipe.old
    if old["ds.param_dtype"] == "bf16":
        recipe.set("dtype", "bfloat16", old_key="ds.param_dtype")
        recipe.set("bf16", True, old_key="ds.param_dtype")
    else:
        recipe.note("the backbone is kept in bfloat16 or float32, and fp16 is not supported by PPO.", "ds.param_dtype")
    if rank := old.get("ds.lora.rank", 0):
        recipe.set("lora_r", rank, old_key="ds.lora.rank")
        recipe.set("lora_alpha", old.get("ds.lora.alpha", 16), old_key="ds.lora.alpha")
        modules = old.get("ds.lora.target_modules", "all-linear")
        recipe.set("lora_target_modules", modules, old_key="ds.lora.target_modules")
    else:
        reason = "OpenRLHF trained all weights; here LoRA adapters on a frozen backbone train"
        recipe.set("lora_r", 16, reason)
        recipe.set("lora_alpha", 32)
        recipe.set("lora_target_modules", "all-linear")
        recipe.note("there was no LoRA without a rank. The values above are a start.", "ds.lora.rank", "ds.lora.alpha")
        recipe.note("there was no LoRA without a rank. Nothing to do.", "ds.lora.target_modules")
        recipe.remark("learning_rate", ALL_WEIGHTS)
    betas = f"{prefix}adam.betas"
    for number, key in enumerate(("adam_beta1", "adam_beta2")):
        recipe.set(key, old[betas][number], old_key=betas)
    scheduler, least = old[f"{prefix}lr_scheduler"], f"{prefix}min_lr_ratio"
    recipe.set("lr_scheduler_type", scheduler, old_key=f"{prefix}lr_scheduler")
    if scheduler == "cosine_with_min_lr":
        recipe.set("lr_scheduler_kwargs", {"min_lr_rate": old[least]}, old_key=least)
    else:
        recipe.note(f"the schedule {scheduler!r} has no lowest rate. Nothing to do.", least)
    muon = old.get(f"{prefix}optim", "adam") == "muon"
    optimizer = (
        "Muon is not among Trainer's optimizers. AdamW takes its place." if muon else "AdamW, as here. Nothing to do."
    )
    recipe.note(optimizer, f"{prefix}optim")
    trackers = [name for name in ("wandb", "tensorboard") if _tracks(old, name)]
    recipe.set(
        "report_to", trackers or "none", *(["set WANDB_PROJECT in the environment"] if "wandb" in trackers else [])
    )
    recipe.note(
        f"the tracker is named in report_to ({', '.join(trackers)}).", "logger.wandb.key", "logger.tensorboard_dir"
    )


def _tracks(old: Mapping[str, Any], name: str) -> bool:
    return bool(old.get("logger.wandb.key" if name == "wandb" else "logger.tensorboard_dir"))


def _steps(recipe: Recipe, key: str, ours: str, factor: int) -> None:
    """Set a number of steps; OpenRLHF's -1 means never."""
    steps = recipe.old.get(key, -1)
    strategy = {"save_steps": "save_strategy", "eval_steps": "eval_strategy"}.get(ours)
    if ours == "eval_steps" and not recipe.old.get("eval.dataset"):
        recipe.note("there were no rows to evaluate on. Name some in eval_dataset_name.", key)
    elif steps > 0:
        remark = [f"{steps} x {factor} optimizer steps an update"] if factor > 1 else []
        recipe.set(ours, steps * factor, *remark, old_key=key)
        if strategy:
            recipe.set(strategy, "steps")
    elif strategy and key in recipe.old:
        recipe.set(strategy, "no", "-1 was never", old_key=key)


# ------------------------------------------------------------------------------------------------ PPO
def _ppo(recipe: Recipe) -> None:
    old = recipe.old
    estimator = old.get("algo.advantage.estimator", "gae")
    if estimator != "gae":
        command = BASELINES.get(estimator, "rloo")
        raise ValueError(
            f"{recipe.name('algo.advantage.estimator')}={shorten(estimator)} has no critic, so it is not PPO. See "
            f"pipeline.{command} and pipeline/recipes/baselines/{command}.yaml, or set gae."
        )
    recipe.note("PPO, as here. Nothing to do.", "algo.advantage.estimator")
    if old.get("train.agent_func_path"):
        raise ValueError(
            f"{recipe.name('train.agent_func_path')}: turns with an environment are not supported. A prompt has one "
            f"completion, and a reward function scores it. Write your agent's reward as a function for reward_funcs."
        )
    samples = old["rollout.n_samples_per_prompt"]
    sizes = ("rollout.batch_size", "train.batch_size", "train.micro_batch_size")
    rows, minibatch, piece = (int(old[key]) for key in sizes)
    minibatches = set_sizes(recipe, rows * samples, minibatch, piece, _processes(old), sizes)
    recipe.note(
        "the launch takes as many processes; see the first line.", "actor.num_nodes", "actor.num_gpus_per_node"
    )
    steps = minibatches * int(old["train.max_epochs"])
    _steps(recipe, "ckpt.save_steps", "save_steps", steps)
    _steps(recipe, "eval.steps", "eval_steps", steps)
    _steps(recipe, "logger.logging_steps", "logging_steps", steps)
    recipe.set("vf_coef", 1.0, "the critic had an optimizer of its own, and so its loss the weight 1")
    frozen = int(old.get("critic.freezing_steps", -1))
    if frozen >= 0:
        recipe.set("critic_warmup_updates", frozen + 1, "counted from 0", old_key="critic.freezing_steps")
    low, high = old.get("actor.eps_clip_low_high") or (None, None)
    if low is not None:
        recipe.set("epsilon", low, old_key="actor.eps_clip_low_high")
        recipe.set("epsilon_high", high, old_key="actor.eps_clip_low_high")
        recipe.note("actor.eps_clip_low_high took its place.", "actor.eps_clip")
    if not recipe.given.get("ds.lora.rank"):
        recipe.remark("value_learning_rate", "the same holds for the value's")
    if old.get("rollout.top_p", 1) != 1:
        recipe.remark("top_p", "PPO learns from the whole distribution: the preflight warns, and 1.0 is better")
    _kl(recipe)
    _completion_length(recipe)
    _rewards(recipe)
    _vllm(recipe)
    if "pretrain_data" in recipe.given:
        recipe.set("ptx_coef", old.get("ptx_coef", 0.05), old_key="ptx_coef")
    else:
        recipe.note("it was used only with pretrain_data. Nothing to do.", "ptx_coef", "pretrain_split")
        recipe.lines.pop("ptx_dataset_split", None)
    recipe.to_do("model_name_or_path", "data/backbone", "your policy; this is the embedded default")
    recipe.to_do("dataset_name", "human_ratings", "your prompts; this is the embedded default")


def _kl(recipe: Recipe) -> None:
    estimator, target = recipe.old.get("algo.kl.estimator", "k1"), recipe.old.get("algo.kl.target")
    if estimator in ("k1", "k3"):
        recipe.set("kl_estimator", estimator, old_key="algo.kl.estimator")
    else:
        recipe.note("`kl_estimator` is k1 or k3, which is never negative and is the nearest.", "algo.kl.estimator")
    recipe.note(
        "the KL penalty is part of the reward (beta), as without this switch. There is no KL loss.", "algo.kl.use_loss"
    )
    if target:
        recipe.note(
            "OpenRLHF's target is in nats a token. `kl_target` is in nats a sequence: set it to this times the mean length "
            "of your completions, and kl_horizon to algo.kl.horizon. Without it beta stays constant.",
            *("algo.kl.target", "algo.kl.horizon"),
        )
    else:
        recipe.note("it was used only with a target. Nothing to do.", "algo.kl.horizon")


def _completion_length(recipe: Recipe) -> None:
    old, words = recipe.old, "vLLM's limit of prompt and completion"
    most = next((key for key in ("rollout.max_new_tokens", "generate_max_len") if old.get(key)), None)
    if most:
        recipe.set("max_completion_length", old[most], old_key=most)
    else:
        remark = f"TO DO: data.max_len = {old['data.max_len']} less your longest prompt; this is half of it"
        recipe.set("max_completion_length", old["data.max_len"] // 2, remark, old_key="data.max_len")
    room = f"a prompt must leave room for a completion in the model's context. {words} is vllm_max_model_length."
    recipe.note(room, "data.max_len", "prompt_max_len")


def _rewards(recipe: Recipe) -> None:
    old, functions = recipe.old, []
    urls, models = old.get("reward.remote_url"), old.get("reward.model_name_or_path")
    for entry in urls if isinstance(urls, list) else str(urls or "").split(","):
        if entry.startswith(("http://", "https://")):
            functions.append(f"reward_models.remote.get_remote(url={entry!r})")
        elif entry:
            recipe.note(
                "a function for reward_funcs is named by its dotted path, gets `prompts`, `completions` and each column of "
                "the rows (a label too) by name, and returns one number for each completion. See docs/rewards.md.",
                "reward.remote_url",
            )
    if not urls:
        functions += [
            f"reward_models.pretrained.get_model(name={name!r})" for name in str(models or "").split(",") if name
        ]
    if functions:
        key = "reward.remote_url" if urls else "reward.model_name_or_path"
        recipe.set("reward_funcs", functions, *([] if urls else [OWN_MODEL]), old_key=key)
        if urls:
            recipe.note("the server took its place.", "reward.model_name_or_path")
    else:
        recipe.to_do("reward_adapter", "./runs/reward", "yours, from pipeline.reward, or reward_funcs")
    buffer = old.get("reward.overlong_buffer_len")
    if buffer:
        length, factor = recipe.lines["max_completion_length"][0], old.get("reward.overlong_penalty_factor", 1)
        recipe.note(
            f"add trl.rewards.get_soft_overlong_punishment(max_completion_len={length}, soft_punish_cache={int(buffer)}) to "
            f"reward_funcs, with the weight {factor} in reward_weights.",
            *("reward.overlong_buffer_len", "reward.overlong_penalty_factor"),
        )
    else:
        recipe.note("it was used only with overlong_buffer_len. Nothing to do.", "reward.overlong_penalty_factor")


def _vllm(recipe: Recipe) -> None:
    old, engines = recipe.old, recipe.old.get("vllm.num_engines") or 0
    sampler = [key for key in recipe.given if key.startswith(("vllm.", "algo.advantage.is_correction"))]
    if not engines:
        for key in sampler:
            recipe.lines.pop(tables.RENAMED["ppo"].get(key, ""), None)
        without = "completions are sampled without vLLM, as vllm.num_engines is not set. Nothing to do."
        recipe.note(without, *sampler, "train.colocate_all")
        return
    recipe.set("use_vllm", True, "needs the extra [vllm]; docs/vllm.md", old_key="vllm.num_engines")
    together = bool(old.get("train.colocate_all"))
    recipe.set("vllm_mode", "colocate" if together else "server", old_key="train.colocate_all" if together else None)
    corrects = bool(old.get("algo.advantage.is_correction_enable"))
    recipe.set("vllm_importance_sampling_correction", corrects, old_key="algo.advantage.is_correction_enable")
    if corrects:
        kind = old.get("algo.advantage.is_correction_type", "tis")
        if kind not in CORRECTIONS:
            name = recipe.name("algo.advantage.is_correction_type")
            raise ValueError(f"{name}={shorten(kind)} is not one of {', '.join(CORRECTIONS)}.")
        recipe.set(
            "vllm_importance_sampling_mode", CORRECTIONS[kind], kind, old_key="algo.advantage.is_correction_type"
        )
        if kind == "seq-mask-tis":
            recipe.remark(
                "vllm_importance_sampling_mode", "ours takes the product of a sequence's ratios, not their mean"
            )
        for number, end in enumerate(("min", "max")):
            threshold = old.get("algo.advantage.is_correction_threshold", [0.5, 5.0])[number]
            recipe.set(
                f"vllm_importance_sampling_clip_{end}", threshold, old_key="algo.advantage.is_correction_threshold"
            )
    else:
        unused = ("algo.advantage.is_correction_type", "algo.advantage.is_correction_threshold")
        recipe.note("it was used only with is_correction_enable. Nothing to do.", *unused)


# ------------------------------------------------------------------------------------------------ the reward model
def _reward(recipe: Recipe) -> None:
    old = recipe.old
    sizes = ("train.batch_size", "train.micro_batch_size")
    batch, piece = (int(old[key]) for key in sizes)
    ours = next(size for size in range(min(piece, batch), 0, -1) if batch % size == 0)
    recipe.set("per_device_train_batch_size", ours, "pairs", old_key=sizes[1])
    words = f"{batch} pairs / {ours}, for one process: divide it by your number of processes"
    recipe.set("gradient_accumulation_steps", batch // ours, words, old_key=sizes[0])
    _steps(recipe, "ckpt.save_steps", "save_steps", 1)
    _steps(recipe, "eval.steps", "eval_steps", 1)
    loss = old.get("model.loss_type", "sigmoid")
    recipe.set("loss_type", "bradley_terry", f"{loss}: -log sigmoid of the difference", old_key="model.loss_type")
    if "model_name_or_path" in recipe.lines:
        recipe.remark("model_name_or_path", "the backbone that PPO will have")
    recipe.to_do("model_name_or_path", "data/backbone", "the policy's backbone; this is the embedded default")
    recipe.to_do("dataset_name", "human_ratings", "your pairs; this is the embedded default")
    columns = {"data.chosen_key": "chosen", "data.rejected_key": "rejected", "data.prompt_key": "prompt"}
    for key, column in columns.items():
        same = old.get(key) == column
        recipe.note("it has this name here too." if same else f"rename this column of the rows to {column}.", key)
