"""Runs stages in turn in every process of a launch, and writes what each process saw to a file of its own.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml tests/distributed_worker.py plan.json folder

`plan.json` is a list of [name, stage, command line, the error that is expected or null]. A process is judged by its file alone: two in fifteen of gloo's abort as
they exit, after all is done.
"""

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    # accelerate turns FSDP on for accelerators alone. For these tests the CPU is one.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # A faster collective for CPUs, which takes a compiler and minutes to build. gloo does without.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor

from pipeline import launch
from pipeline.configs import parse


seen = {}


def digest(trainer) -> str:
    """Of all trainable weights, whole."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gather = nullcontext()
    if trainer.is_deepspeed_enabled:
        gather = deepspeed.zero.GatheredParameters(parameters)
    found = hashlib.sha256()
    with gather:
        for p in parameters:
            found.update((p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().numpy().tobytes())
    return found.hexdigest()


def look(name, module) -> None:
    """Have the stage note its trainer's state as it finishes."""
    finish = module.finish_stage

    def finish_and_look(trainer, *args):
        seen[name] = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "wrapper": launch._wrapper_kind(trainer.model_wrapped),
            "digest": digest(trainer),
            "history": trainer.state.log_history,
        }
        finish(trainer, *args)
        module.finish_stage = finish

    module.finish_stage = finish_and_look


def main(plan: str, folder: str) -> None:
    for name, stage, words, error in json.loads(Path(plan).read_text()):
        module = import_module(f"pipeline.{stage}")
        Accelerator.end_training = lambda self: None  # one process group for all stages of this process
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if hasattr(module, "finish_stage"):
            look(name, module)
        types = [t for t in module.main.__annotations__.values() if t is not None]
        try:
            module.main(*parse(*types, args=words))
            assert error is None, f"{name}: {error!r} was not raised"
        except (ValueError, FloatingPointError) as raised:
            if error is None or error not in str(raised):
                raise
            seen[name] = {"error": str(raised)}
    state = PartialState()
    seen["process"] = state.process_index
    (Path(folder) / f"process_{state.process_index}.json").write_text(json.dumps(seen))
    if state.num_processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
