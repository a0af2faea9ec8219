"""Train the members of an ensemble of reward adapters one after another, each as a run of its own.

A member differs from the next in its seed: in its adapter's and its head's start, and in the order of its data. It is the
adapter that a run of this seed alone would leave, with its own folder, checkpoints, metrics and normalization. So a run that
was ended goes on with the member that it was at, and members that are done are only measured again.
"""

import gc
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainingArguments
from trl import ModelConfig

from data.json_files import write_json
from data.saving import save
from pipeline.backbone.adapter_config import ADAPTER_CONFIG
from pipeline.backbone.adapters import read_metrics
from pipeline.backbone.members import MEMBER, write_members
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.live_files import LOG
from pipeline.runs.output_lock import lock_for_training
from pipeline.runs.ownership import FILES
from reward_models.ensembles import ensemble_report
from reward_models.normalization import FILE as SCALE


def member_arguments(args: TrainingArguments, number: int) -> Iterator[TrainingArguments]:
    """Yield the training arguments of each of `number` members: with a folder and a seed of its own."""
    for index in range(number):
        of_member = copy(args)
        of_member.output_dir = str(Path(args.output_dir) / f"{MEMBER}{index}")
        of_member.seed = args.seed + index
        of_member.data_seed = None if args.data_seed is None else args.data_seed + index
        yield of_member


def open_ensemble(
    args: TrainingArguments,
    model: ModelConfig,
    number: int,
    *,
    policies: tuple[str | None, ...],
    data: tuple[str | None, ...],
) -> None:
    """Check the folders of an ensemble and of all its members, and lock them, before the first member is trained.

    Each member's run makes its own checks too (`pipeline.runs.opening.open_run`). The arguments are those of `open_run`.

    Raises the errors of `check_launch`, `check_folders` and `lock_output`, and:
        ValueError: an option is not supported for several members, or the folder holds one adapter.
    """
    check_launch(args)
    if args.push_to_hub:
        raise ValueError(
            f"push_to_hub=True is not supported with num_members={number}: a repository has one adapter. Upload the folder "
            f"when it is done (`hf upload`)."
        )
    if args.resume_from_checkpoint not in (None, "auto"):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r} names one checkpoint, and each of num_members={number} "
            f"has its own. Set auto."
        )
    highest = max(args.seed, args.data_seed or 0) + number - 1
    if highest >= 2**32:
        raise ValueError(f"seed={args.seed}: the last of num_members={number} would have seed {highest}. Lower seed.")
    if (Path(args.output_dir) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"output_dir={args.output_dir!r} holds one adapter, and an ensemble (num_members={number}) must not be beside it. "
            f"Name another folder in output_dir."
        )
    shared: dict[str, Any] = {"policies": policies, "data": data}
    check_folders(args.output_dir, model.model_name_or_path, **shared, writes=FILES["ensemble"])
    for of_member in member_arguments(args, number):
        writes = (*FILES["adapter"], SCALE, LOG)
        check_folders(of_member.output_dir, model.model_name_or_path, **shared, leaves_reward=True, writes=writes)
    lock_for_training(args)


def in_turn(args: TrainingArguments, number: int) -> Iterator[TrainingArguments]:
    """Yield the arguments of each member as `member_arguments` does, with accelerate as it was before the first member.

    A second accelerator in one process would be refused its plugins, or go without them.
    """
    kind = PartialState().distributed_type  # an accelerator with FSDP changes it
    for index, of_member in enumerate(member_arguments(args, number)):
        if index:
            gc.collect()  # a trainer holds itself
            AcceleratorState._reset_state()
            GradientState._reset_state()
            PartialState().distributed_type = kind
        yield of_member


def finish_ensemble(args: TrainingArguments, number: int, held_out: list[dict[str, Any]]) -> None:
    """Save the manifest of an ensemble whose members are saved, and its metrics.

    Args:
        held_out: the scores of the held-out pairs by each member, as `reward_model_report` takes them; empty without pairs.
    """
    seeds = {Path(one.output_dir).name: one.seed for one in member_arguments(args, number)}
    folder = Path(args.output_dir)
    figures = ensemble_report(held_out) if held_out else {"members": [{} for _ in seeds]}
    named = [{"folder": name, "seed": seed} for name, seed in seeds.items()]
    figures["members"] = [name | of_member for name, of_member in zip(named, figures["members"], strict=True)]
    figures["seconds"] = round(sum(read_metrics(folder / name).get("seconds", 0.0) for name in seeds), 1)

    def write(staged: Path) -> None:
        write_members(staged, seeds, members_in=folder)
        write_json(staged / "metrics.json", figures)

    save(folder, "ensemble", write)
    if held_out:
        of_members = [one["accuracy"] for one in figures["members"]]
        print(
            f"{folder}: {number} members, each with an accuracy of {min(of_members):.3f} to {max(of_members):.3f}; together "
            f"{figures['accuracy']:.3f}, ECE {figures['ece']:.3f}. They agree on the winner of {figures['unanimous']:.1%} of "
            f"the held-out pairs."
        )
