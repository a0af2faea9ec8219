"""How a launch shares the model out over processes, and all of its weights in each while a rollout needs them."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType


def kind_of(state: PartialState) -> str:
    """How the launch asks the model to be wrapped.

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
    return os.environ.get(name, "false").lower() in ("true", "1")
