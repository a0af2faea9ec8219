"""Check that a run is what `accelerate launch` was asked for, and refuse it otherwise, before any long work.

Most wrong launches fail silently: one process instead of two, processes that each run alone, DDP instead of FSDP.
"""

import argparse
import os
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline.backbone.sharding import is_set, kind_of


def check_launch(args: TrainingArguments | None = None, *, shards: bool = True) -> PartialState:
    """Print how this run is launched, and refuse a launch that is not what was asked for. Every stage calls this first.

    Args:
        args: the training arguments of the stage; None for a stage that trains nothing.
        shards: whether the stage supports a model that is sharded over processes (FSDP, ZeRO-3).

    Raises:
        ValueError: there are fewer processes than asked for; processes are not connected; a CPU is used instead of a GPU or
            the other way round; the model is not sharded as asked for, or the stage does not support it.
    """
    no_accelerator = not torch.accelerator.is_available()
    # Without an accelerator, processes connect only if accelerate is told so; TrainingArguments has use_cpu for it.
    state = args.distributed_state if args else PartialState(cpu=is_set("ACCELERATE_USE_CPU") or no_accelerator)
    found, where, config = state.num_processes, state.device.type, None
    launcher = launch_command()
    if launcher is not None:
        path = launcher.config_file or (default_config_file if Path(default_config_file).is_file() else None)
        config = load_config_from_file(path) if path and not launcher.cpu else None
        asked = launcher.num_processes or (config and config.num_processes) or found
        source = path or "the command line"
        if asked != found and int(os.environ.get("WORLD_SIZE", 1)) != asked:
            raise ValueError(
                f"{source} asks for {asked} processes, and accelerate started {found}. It starts several only with "
                f"distributed_type MULTI_GPU, FSDP or DEEPSPEED, also on CPUs. On CPUs launch with "
                f"accelerate_configs/cpu_ddp.yaml."
            )
        if config and config.use_cpu and where != "cpu":
            raise ValueError(f"{source} sets use_cpu: true, and this process is on {where}. Add --use_cpu true.")
        if config and not config.use_cpu and not launcher.cpu and where == "cpu" and not no_accelerator:
            raise ValueError(
                f"{source} asks for accelerators, and this process is on the CPU. Set use_cpu: false in the recipe, or "
                f"launch with a config for CPUs (cpu.yaml, cpu_ddp.yaml)."
            )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != found:
        raise ValueError(
            f"{world} processes were started, and each runs by itself: accelerate found no accelerator to connect them. "
            f"On CPUs add --use_cpu true (use_cpu in the recipe)."
        )
    if args and args.n_gpu > 1:
        raise ValueError(
            f"one process was started for {args.n_gpu} GPUs, and would use them with torch's DataParallel. Launch with "
            f"accelerate_configs/ddp.yaml, or show only one GPU with CUDA_VISIBLE_DEVICES."
        )
    kind = kind_of(state)
    if args and shards is False and kind in ("FSDP", "ZeRO-3"):
        raise ValueError(
            f"this stage does not run under {kind}: TRL's trainer needs whole weights to score and sample, or to send to "
            f"vLLM (use_vllm), and {kind} shards them. Launch with accelerate_configs/ddp.yaml or zero2.yaml."
        )
    if state.is_main_process:
        processes = "1 process" if found == 1 else f"{found} processes"
        print(
            f"Runs as {processes} on {where}: {kind}" + (f", {state.backend}." if state.backend else "."), flush=True
        )
    return state


def check_wrapper(trainer: Trainer) -> None:
    """Make the trainer refuse, before its first step, a model that accelerate did not wrap as asked for."""
    trainer.add_callback(_WrapperCheck(trainer))


class _WrapperCheck(TrainerCallback):
    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        asked, wrapped = kind_of(args.distributed_state), self.trainer.model_wrapped
        if _wrapper_kind(wrapped) != asked:
            raise ValueError(
                f"the launch asks for {asked}, and accelerate made the model a {type(wrapped).__name__}. Launch with one "
                f"of accelerate_configs/ without changes."
            )


def _wrapper_kind(model: nn.Module) -> str:
    if isinstance(model, FSDPModule):
        return "FSDP"
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if stage := getattr(model, "zero_optimization_stage", None):  # DeepSpeed's engine
        return f"ZeRO-{stage()}"
    return "no wrapper"


def launch_command() -> argparse.Namespace | None:
    """Return the options of the `accelerate launch` that started this process, or None if something else started it.

    accelerate passes on what it did, not what it was asked for. Only its own command line tells that.
    """
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for i, word in enumerate(words):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate-launch":
            return launch_command_parser().parse_args(words[i + 1 :])
        if Path(word).name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return launch_command_parser().parse_args(words[i + 2 :])
    return None
