"""Runs stages in turn in every process of a launch, and writes what each process saw to a file of its own.

    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml tests/distributed_worker.py plan.json folder

`plan.json` is a list of [name, stage, command line, the error that is expected or null, more]. `more` may have `kill`, the
step at which to end training, and `plant`: the checkpoint to copy, where to, and the files to put a payload into, which
makes a folder called `executed` when it is unpickled. A process is judged by its file alone: two in fifteen of gloo's
abort as they exit, after all is done.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest.mock import patch


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
from transformers import TrainerCallback

from pipeline.runs import launch
from pipeline.runs.command_line import parse
from pipeline.runs.manifest import MANIFEST, file_digest, manifest_digest


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
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            found.update(whole.detach().clone().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return found.hexdigest()


def look(name, module):
    """What the stage calls as it finishes, which notes its trainer's state too."""
    finish = module.finish_stage

    def finish_and_look(trainer, *args, **options):
        seen[name] = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "wrapper": launch._wrapper_kind(trainer.model_wrapped),
            "digest": digest(trainer),
            "history": trainer.state.log_history,
        }
        finish(trainer, *args, **options)

    return finish_and_look


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends training when a step begins, as no handler would: what is not on disk by then is lost."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def kill(step: int, module):
    """What the stage calls before it trains, which adds the end too."""
    check = module.check_wrapper

    def check_and_kill(trainer):
        check(trainer)
        trainer.add_callback(KillAt(step))

    return check_and_kill


class Payload:
    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant(source: str, target: str, names: list[str]) -> None:
    """Copy a checkpoint, put payloads into it and the manifest right, as one who writes checkpoints could."""
    folder, executed = Path(target), Path(target).parent / "executed"
    if PartialState().is_main_process:
        shutil.copytree(source, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix in (".pt", ".pth", ".bin"):
                torch.save(Payload(executed), path)
            elif path.name == "latest":  # names the folder that DeepSpeed reads
                path.write_text("global_step2")
            else:
                path.write_bytes(pickle.dumps(Payload(executed)))
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    PartialState().wait_for_everyone()


def main(plan: str, folder: str) -> None:
    for name, stage, words, error, more in json.loads(Path(plan).read_text()):
        module = import_module(f"pipeline.{stage}")
        Accelerator.end_training = lambda self: None  # one process group for all stages of this process
        AcceleratorState._reset_state()
        GradientState._reset_state()
        changed = {}
        if hasattr(module, "finish_stage"):
            changed["finish_stage"] = look(name, module)
        if "kill" in more:
            changed["check_wrapper"] = kill(more["kill"], module)
        if "plant" in more:
            plant(*more["plant"])
        types = [t for t in module.main.__annotations__.values() if t is not None]
        try:
            with patch.multiple(module, **changed) if changed else nullcontext():
                module.main(*parse(*types, args=words))
        except Exception as raised:
            if error is None or error not in f"{type(raised).__name__}: {raised}":
                raise
            seen[name] = {"error": f"{type(raised).__name__}: {raised}"}
        else:
            assert error is None, f"{name}: {error!r} was not raised"
    state = PartialState()
    seen["process"] = state.process_index
    (Path(folder) / f"process_{state.process_index}.json").write_text(json.dumps(seen))
    if state.num_processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
