"""Open a run that trains: make all checks that take less than a second, before anything large is read."""

from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig

from pipeline.backbone.members import check_rewards
from pipeline.runs.changed_options import changed_options
from pipeline.runs.folders import check_checkpoints, check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.live_files import LOG, SAMPLES
from pipeline.runs.manifest import find_checkpoint
from pipeline.runs.output_lock import lock_for_training
from pipeline.runs.ownership import FILES, VALUE
from reward_models.functions import RewardArguments
from reward_models.normalization import FILE as SCALE


def open_run(
    args: TrainingArguments,
    model: ModelConfig,
    *,
    options: dict[str, dict[str, Any]],
    leaves_reward: bool,
    policies: tuple[str | None, ...] = (),
    rewards: RewardArguments | None = None,
    data: tuple[str | None, ...] = (),
    shards: bool = True,
    whole: bool = False,
) -> str | None:
    """Check launch, folders and reward weights, lock the output folder, and return the checkpoint to resume from, if any.

    Args:
        options: all options of the stage (`options_of`), to be compared with the checkpoint's.
        leaves_reward: whether the run saves a reward adapter (True) or a policy (False) in `output_dir`.
        policies: policy adapters that the run reads; None is an option that is not set.
        rewards: the rewards that the run trains against.
        data: datasets that the run reads.
        shards: whether the run supports a model that is sharded over processes (FSDP, ZeRO-3).
        whole: whether the run saves a whole model, not an adapter.

    Raises the errors of `check_launch`, `check_folders`, `check_rewards`, `lock_output`, `find_checkpoint` and
    `check_checkpoints` or `changed_options`.
    """
    check_launch(args, shards=shards)
    adapters = rewards.reward_adapter if rewards else ()
    writes = (LOG, *(FILES["model"] if whole else (*FILES["adapter"], *((SCALE,) if leaves_reward else ()))))
    if hasattr(args, "sample_updates"):  # PPO
        writes += (*VALUE, *((SAMPLES,) if args.sample_updates else ()))
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=policies,
        rewards=adapters,
        leaves_reward=leaves_reward,
        whole=whole,
        data=data,
        writes=writes,
    )
    if rewards:
        check_rewards(rewards, args.reward_weights)
    lock_for_training(args)
    checkpoint = find_checkpoint(args)
    if checkpoint is None:
        check_checkpoints(args.output_dir)
    else:
        changed_options(checkpoint, args, options)
    return checkpoint
