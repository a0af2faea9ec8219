"""Continue a run on other processes than those that wrote its checkpoint: check that it can, and say what becomes of it.

Weights, optimizer, schedule, adaptive coefficients and the place in the data are kept. A rollout belongs to the processes
that sampled it, so the run can change hands only between updates. Random states belong to processes too: the new ones are
seeded from seed, step and process, so that the continued run can itself be repeated.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from pipeline.backbone.sharding import kind_of
from pipeline.runs.state_files import load_trainer_state


# The options that the global batch is made of: of the manifest's `order`, those that may change with the processes.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


class World(NamedTuple):
    """The processes of a launch, and the wrapper that they run the model in (`pipeline.backbone.sharding.kind_of`)."""

    processes: int
    kind: str

    def __str__(self) -> str:
        number = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return number if self.kind == "no wrapper" else f"{number} under {self.kind}"


def this_world(args: TrainingArguments) -> World:
    return World(args.world_size, kind_of(args.distributed_state))


def writers(manifest: dict | None, args: TrainingArguments) -> World:
    """Return the world that wrote a checkpoint. What the manifest does not name, as older ones do, is as in this launch."""
    found, now = manifest or {}, this_world(args)
    return World(found.get("world_size", now.processes), found.get("kind", now.kind))


def told(manifest: dict, args: TrainingArguments) -> str:
    """Return what a run says of a checkpoint that another world wrote; an empty text if the world is the same."""
    then, now = writers(manifest, args), this_world(args)
    if then == now:
        return ""
    text = f", which {then} wrote; {now} {'goes' if now.processes == 1 else 'go'} on"
    if then.processes == now.processes:
        return text
    return f"{text}. Random states begin anew, from seed, step and process"


# ------------------------------------------------------------------------------------------ the global batch
def fit_batch(manifest: dict | None, args: TrainingArguments) -> None:
    """Set `gradient_accumulation_steps`, and with it `steps_per_generation`, so that the global batch stays the same.

    Does nothing where no value fits, or without a manifest: `check_checkpoint` refuses these. The next manifest keeps the
    recipe's own values (`recipe_batch`), so that the same command resumes the run again.
    """
    if manifest is None:
        return
    order, recipe = manifest["order"], manifest.get("recipe", {})
    if manifest["world_size"] != args.world_size:
        fitting = _fitting(manifest, args, args.per_device_train_batch_size)
    else:
        unchanged = all(getattr(args, name) == value for name, value in recipe.items())
        fitting = {name: order[name] for name in recipe} if unchanged else {}
    changed = {name: value for name, value in fitting.items() if getattr(args, name) != value}
    if not changed:
        return
    before = {name: getattr(args, name) for name in changed}
    vars(args)["recipe_batch"] = before
    for name, value in changed.items():
        setattr(args, name, value)
    batch = args.world_size * args.per_device_train_batch_size
    if "steps_per_generation" in changed:
        args.generation_batch_size = batch * args.steps_per_generation
    values = " and ".join(f"{name} is {new} instead of {before[name]}" for name, new in changed.items())
    PartialState().print(f"{values}, so that the global batch stays {batch * args.gradient_accumulation_steps}.")


def recipe_batch(args: TrainingArguments) -> dict[str, dict[str, int]]:
    """Return the manifest's entry of the recipe's values of the options that `fit_batch` has set, if it has set any."""
    found = vars(args).get("recipe_batch")
    return {"recipe": found} if found else {}


def _fitting(manifest: dict, args: TrainingArguments, per_device: int) -> dict[str, int]:
    """Return the values that keep the global batch with `per_device` rows a pass; an empty dict if there are none."""
    order, then = manifest["order"], manifest["world_size"] * manifest["order"]["per_device_train_batch_size"]
    now = args.world_size * per_device
    fitting = {}
    for name in BATCH[1:]:
        if name in order:
            if then * order[name] % now:
                return {}
            fitting[name] = then * order[name] // now
    # Without a short last batch, an epoch has as many steps as before only if each step takes as many passes.
    whole = "steps_per_generation" not in order and args.dataloader_drop_last
    return {} if whole and fitting["gradient_accumulation_steps"] != order["gradient_accumulation_steps"] else fitting


def _check_batch(folder: Path, manifest: dict, args: TrainingArguments) -> None:
    """Check that this launch has the global batch of the checkpoint. Raises a ValueError that names values that fit."""
    fitting = _fitting(manifest, args, args.per_device_train_batch_size)
    if fitting and all(getattr(args, name) == value for name, value in fitting.items()):
        return
    asked, most = args.per_device_train_batch_size, manifest["world_size"] * manifest["order"][BATCH[0]]
    sizes = [n for n in range(1, most + 1) if _fitting(manifest, args, n)]
    remedy = f"Launch with --num_processes {manifest['world_size']}"
    if sizes:
        size = max((n for n in sizes if n <= asked), default=sizes[0])
        values = {BATCH[0]: size, **_fitting(manifest, args, size)}
        remedy = f"Set {', '.join(f'{name} to {value}' for name, value in values.items())}; or {remedy.lower()}"
    then = _described(manifest["world_size"], manifest["order"])
    now = _described(args.world_size, {name: getattr(args, name, None) for name in manifest["order"]})
    raise ValueError(
        f"{folder}: written with {then}, and this launch has {now}. The global batch must stay the same, and an epoch must "
        f"keep its number of steps. {remedy}."
    )


def _described(processes: int, order: dict) -> str:
    batch = processes * order["per_device_train_batch_size"] * order["gradient_accumulation_steps"]
    values = ", ".join(f"{name}={order[name]}" for name in BATCH if name in order)
    return f"a global batch of {batch} (processes={processes}, {values})"


# ------------------------------------------------------------------------------------------ what cannot go on
def check_world(folder: Path, manifest: dict, args: TrainingArguments, others: dict[Path, dict]) -> tuple[str, ...]:
    """Check that the processes of this launch can continue a checkpoint; return the options of `order` that were checked.

    Args:
        others: the usable checkpoints beside it, with their manifests.

    Raises:
        ValueError: they cannot.
    """
    then, now = writers(manifest, args), this_world(args)
    if then == now:
        return ()
    again = f"Launch {then} as before"
    part = folder / "optimizer_0.json"
    if part.name in manifest["files"] and "layout" not in json.loads(part.read_text(encoding="utf-8")):
        raise ValueError(
            f"{folder}: written by {then} of an older release, and this launch is {now}. The parts of the optimizer do not "
            f"say which weights they belong to. {again}."
        )
    if args.fp16 and ("ZeRO" in then.kind) != ("ZeRO" in now.kind):  # DeepSpeed scales the loss itself
        raise ValueError(
            f"{folder}: written by {then}, and this launch is {now}. The loss scale of fp16 is not carried over. {again}, "
            f"or set bf16."
        )
    if then.processes == now.processes:
        return ()
    if (
        "steps_per_generation" not in manifest["order"]
    ):  # otherwise TRL draws the order of prompts, from the seed alone
        option = "train_sampling_strategy=group_by_length" if _groups_by_length(args) else "use_seedable_sampler=False"
        if _groups_by_length(args) or not args.accelerator_config.use_seedable_sampler:
            raise ValueError(
                f"{folder}: written by {then}, and this launch is {now}. With {option} the order of the rows depends on the "
                f"number of processes. {again}, or start a new run."
            )
    if not _between_updates(folder, manifest):
        ends = {path: other for path, other in others.items() if other["step"] < manifest["step"]}
        ends = {path: other for path, other in ends.items() if _between_updates(path, other)}
        newest = max(ends, key=lambda path: ends[path]["step"], default=None)
        back = f"Go back to the end of an update: --resume_from_checkpoint {newest}. Or launch" if newest else "Launch"
        raise ValueError(
            f"{folder}: written by {then} in the middle of an update, and this launch is {now}. The rollout belongs to the "
            f"processes that sampled it. {back} {then} as before. SIGTERM then ends the run after the update."
        )
    _check_batch(folder, manifest, args)
    return BATCH


def _groups_by_length(args: TrainingArguments) -> bool:
    return args.train_sampling_strategy == "group_by_length"


def _between_updates(folder: Path, manifest: dict) -> bool:
    """Tell whether a checkpoint was written at the end of an update; one of a stage that samples nothing always was."""
    counters = json.loads((folder / "state_0.json").read_text(encoding="utf-8"))["counters"]
    return counters.get("_step", 0) % _passes(manifest["order"]) == 0


def _passes(order: dict) -> int:
    """Count the forward and backward passes of a process in an update."""
    return order.get("steps_per_generation", 1) * order.get("num_iterations", 1)


# ------------------------------------------------------------------------------------------ the state of a process
def state_of(folder: Path, manifest: dict | None, args: TrainingArguments) -> dict:
    """Return the state with which this process goes on from a checkpoint (`Checkpointed.training_state`).

    Other processes than those that wrote it take the state of the first one, with the mean of all sums of the loss: the rest
    of that state is the same in all processes between updates.
    """
    if manifest is None or manifest["world_size"] == args.world_size:
        return load_trainer_state(folder / f"state_{args.process_index}")
    states = [load_trainer_state(folder / f"state_{process}") for process in range(manifest["world_size"])]
    state = states[0]
    state["loop"]["_tr_loss"] = torch.stack([each["loop"]["_tr_loss"] for each in states]).mean(dim=0)
    state["counters"].pop("_buffered_inputs", None)  # of the update that has ended
    if "_step" in state["counters"]:
        now = {name: getattr(args, name) for name in manifest["order"] if hasattr(args, name)}
        state["counters"]["_step"] = state["counters"]["_step"] // _passes(manifest["order"]) * _passes(now)
    return state | {"draws_anew": True}


def seed_of_process(seed: int, step: int, process: int) -> int:
    """Return the seed of a process's random states in a run that other processes continue from `step`."""
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    return int.from_bytes(digest[:4], "big")  # numpy's limit
