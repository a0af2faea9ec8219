"""How a launch shares the model out over processes, and how a rollout gets all weights back in each of them."""

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
    """Return how the launch asks the model to be wrapped: no wrapper, DDP, FSDP, ZeRO-1, ZeRO-2 or ZeRO-3.

    Raises:
        ValueError: FSDP or DeepSpeed was asked for, and does not apply here.
    """
    if is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("fsdp_version 1 is not supported; set fsdp_version: 2, as accelerate_configs/fsdp2.yaml.")
        if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise ValueError(
                f"the launch asks for FSDP, which accelerate turns on for accelerators alone; on {state.device.type} "
                f"it would be {'DDP' if state.num_processes > 1 else 'one process'}. Launch with cpu_ddp.yaml."
            )
        return "FSDP"
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        from accelerate.utils import DeepSpeedPlugin

        return f"ZeRO-{DeepSpeedPlugin().zero_stage}"
    return "DDP" if state.num_processes > 1 else "no wrapper"


def is_set(name: str) -> bool:
    """Return whether an environment variable says yes, as accelerate writes it."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def fsdp_modules(wrapped: nn.Module) -> list[FSDPModule]:
    """Return the parts of a model that FSDP shards each by itself; none where it does not run."""
    return [module for module in wrapped.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered_weights(wrapped: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Hold all weights in every process, without gradients, while the code inside runs the model unwrapped.

    Under FSDP and ZeRO-3 the weights are gathered once, at the start. Processes whose completions differ in length or
    number then never wait for each other inside.
    """
    shards = fsdp_modules(wrapped)
    if shards:
        # FSDP takes the first module that runs for its root.
        with torch.no_grad():
            wrapped(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device))
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
    try:
        with torch.no_grad(), unwrap_model_for_generation(wrapped, accelerator):
            yield
    finally:  # also after an error: a checkpoint may still be written
        for module in shards:
            module.reshard()


def keep_shared_shards(wrapped: nn.Module, layers: Iterable[nn.Module], reshard_after_forward: bool) -> None:
    """Tell FSDP, before a training pass, to keep what lies beside the decoder `layers` until its backward pass has ended.

    accelerate shards embeddings, last norm and language-model head as one group, since two of them may be tied. FSDP
    expects each group to run once in a forward pass. In ours the group runs once for each role, and without this the
    backward pass would find it sharded again.
    """
    layers = set(layers)
    for module in fsdp_modules(wrapped):
        once = module in layers
        module.set_reshard_after_forward(once and reshard_after_forward, recurse=False)
        module.set_reshard_after_backward(once, recurse=False)
