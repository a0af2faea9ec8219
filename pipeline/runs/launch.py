"""What was asked for against what runs. Most wrong launches fail silently: one process where two were meant, runs that
know nothing of each other, DDP in the place of FSDP. Each is refused, before any long work.
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
    """Say what this run is, and refuse what is not what `accelerate launch` was asked for. Every stage calls it first.

    Args:
        args: the stage's; None for a stage that trains nothing.
        shards: whether the stage runs where the model is sharded over processes (FSDP, ZeRO-3).

    Raises:
        ValueError: fewer processes than asked for, processes that do not know each other, a CPU in the place of a GPU
            or the other way round, or a way to shard that does not apply or that the stage does not support.
    """
    no_accelerator = not torch.accelerator.is_available()
    # Without an accelerator, processes find each other only when accelerate is told so; TrainingArguments has use_cpu.
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
                f"{source} asks for {asked} processes, and accelerate started {found}: it starts several only with "
                f"distributed_type MULTI_GPU, FSDP or DEEPSPEED, also on CPUs. Launch with "
                f"accelerate_configs/cpu_ddp.yaml."
            )
        if config and config.use_cpu and where != "cpu":
            raise ValueError(f"{source} sets use_cpu: true, and this process is on {where}; add --use_cpu true.")
        if config and not config.use_cpu and not launcher.cpu and where == "cpu" and not no_accelerator:
            raise ValueError(
                f"{source} asks for accelerators, and this process is on the CPU; set use_cpu: false in the recipe, or "
                f"launch with a config of the CPU (cpu.yaml, cpu_ddp.yaml)."
            )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != found:
        raise ValueError(
            f"{world} processes were started, and each runs by itself: accelerate found no accelerator to join them. "
            f"On CPUs add --use_cpu true (use_cpu in the recipe)."
        )
    if args and args.n_gpu > 1:
        raise ValueError(
            f"one process was started for {args.n_gpu} GPUs, which torch's DataParallel would share; launch with "
            f"accelerate_configs/ddp.yaml, or show one GPU alone with CUDA_VISIBLE_DEVICES."
        )
    kind = kind_of(state)
    if args and shards is False and kind in ("FSDP", "ZeRO-3"):
        raise ValueError(
            f"this stage does not run under {kind}: the weights that TRL's trainer scores and samples with, or sends to "
            f"vLLM (use_vllm), are sharded there. Launch with accelerate_configs/ddp.yaml or zero2.yaml."
        )
    if state.is_main_process:
        processes = "1 process" if found == 1 else f"{found} processes"
        print(
            f"Runs as {processes} on {where}: {kind}" + (f", {state.backend}." if state.backend else "."), flush=True
        )
    return state


def check_wrapper(trainer: Trainer) -> None:
    """Have the trainer refuse, before its first step, a model that accelerate wrapped otherwise than was asked for."""
    trainer.add_callback(_WrapperCheck(trainer))


class _WrapperCheck(TrainerCallback):
    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        asked, wrapped = kind_of(args.distributed_state), self.trainer.model_wrapped
        if _wrapper_kind(wrapped) != asked:
            raise ValueError(
                f"the launch asks for {asked}, and accelerate made the model a {type(wrapped).__name__}; launch with "
                f"one of accelerate_configs/ as it is."
            )


def _wrapper_kind(model: nn.Module) -> str:
    if isinstance(model, FSDPModule):
        return "FSDP"
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if hasattr(model, "zero_optimization_stage"):  # DeepSpeed's engine
        return f"ZeRO-{model.zero_optimization_stage()}"
    return "no wrapper"


def launch_command() -> argparse.Namespace | None:
    """The options of the `accelerate launch` that started this process, None where something else did. accelerate
    hands on what it did, not what it was asked for, which only its own command line tells."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    for i, word in enumerate(words):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate-launch":
            return launch_command_parser().parse_args(words[i + 1 :])
        if Path(word).name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return launch_command_parser().parse_args(words[i + 2 :])
    return None
