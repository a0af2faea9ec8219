"""Find out how a launch shards the model over processes, and gather all weights in each process for a rollout."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl.models import unwrap_model_for_generation


def kind_of(state: PartialState) -> str:
    """Return the wrapper that the launch asks for: no wrapper, DDP, FSDP, ZeRO-1, ZeRO-2 or ZeRO-3.

    Raises:
        ValueError: the launch asks for FSDP 1, or for FSDP on CPUs.
    """
    if is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "fsdp_version 1 is not supported. Set fsdp_version: 2, as in accelerate_configs/fsdp2.yaml."
            )
        if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise ValueError(
                f"the launch asks for FSDP, but accelerate turns it on only for accelerators. On {state.device.type} it "
                f"would run {'DDP' if state.num_processes > 1 else 'one process'} instead. Launch with cpu_ddp.yaml."
            )
        return "FSDP"
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        from accelerate.utils import DeepSpeedPlugin

        return f"ZeRO-{DeepSpeedPlugin().zero_stage}"
    return "DDP" if state.num_processes > 1 else "no wrapper"


def is_set(name: str) -> bool:
    """Tell whether an environment variable is set to true, as accelerate writes it."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def fsdp_modules(wrapped: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP shards as groups of their own; an empty list if FSDP does not run."""
    return [module for module in wrapped.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered_weights(wrapped: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Hold all weights in every process, without gradients, while the code inside runs the model unwrapped.

    Under FSDP and ZeRO-3 the weights are gathered once, at the start. So the processes never wait for each other inside,
    even if their completions differ in length or number.
    """
    shards = fsdp_modules(wrapped)
    if shards:
        # FSDP treats the first module that runs as its root.
        with torch.no_grad():
            wrapped(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device))
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
    try:
        with torch.no_grad(), unwrap_model_for_generation(wrapped, accelerator):
            yield
    finally:  # after an error too, because a checkpoint may still be written
        for module in shards:
            module.reshard()


def keep_shared_shards(wrapped: nn.Module, layers: Iterable[nn.Module], reshard_after_forward: bool) -> None:
    """Tell FSDP to keep all weights outside the decoder `layers` until the backward pass of a training pass has ended.

    Call it before the training pass. accelerate shards embeddings, last norm and language model head as one group, because
    two of them may be tied. FSDP expects each group to run once in a forward pass, but our pass runs this group once for
    each role. Without this call, the backward pass would find the group sharded again.
    """
    layers = set(layers)
    for module in fsdp_modules(wrapped):
        once = module in layers
        module.set_reshard_after_forward(once and reshard_after_forward, recurse=False)
        module.set_reshard_after_backward(once, recurse=False)
