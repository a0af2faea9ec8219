"""Write and read an optimizer that FSDP or DeepSpeed shards: each process its part, as safetensors.

accelerate and DeepSpeed would write pickles, and reading a pickle can execute code from it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.runs.state_files import load_state, local_part, save_state


# Names in DeepSpeed's state of its part of torch's optimizer state and of the weights in float32, in ZeRO-2 and ZeRO-3.
ZERO = (
    ("base_optimizer_state", "single_partition_of_fp32_groups"),
    ("optimizer_state_dict", "fp32_flat_groups"),
)


def _shard_like(parameter: Tensor, value: Any) -> Any:
    """Return an optimizer's entry for a sharded parameter: a moment is sharded like the parameter, a count is not."""
    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, Tensor)
        or value.shape != local_part(parameter).shape
    ):
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def check_zero(optimizer: Any) -> None:
    """Refuse a DeepSpeed optimizer that does not keep its part of the state in memory as flat tensors.

    Raises:
        ValueError: the DeepSpeed config asks for such an optimizer.
    """
    flat = any(
        hasattr(optimizer, name) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    )
    on_disk = any(getattr(optimizer, name, False) for name in ("swap_optimizer", "params_in_nvme_and_cpu"))
    if not flat or on_disk or optimizer.elastic_checkpoint:
        raise ValueError(
            f"the DeepSpeed config makes the optimizer a {type(optimizer).__name__}, and no checkpoint of it can be "
            f"written. Set stage 1, 2 or 3 without nvme and elastic_checkpoint, as in accelerate_configs/zero2.json."
        )


class OptimizerShards:
    """Mixin for one of TRL's trainers: under FSDP and DeepSpeed each process writes its part of the optimizer.

    The part goes into `optimizer_<process>`, together with the float32 weights that this process updates.
    """

    @property
    def _shared_out(self) -> bool:
        """Return whether each process holds a part of the optimizer's state."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Override `_prepare_for_training`: read our safetensors, so that accelerate and DeepSpeed unpickle nothing."""
        theirs = None if self._shared_out else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, theirs)
        if self.is_deepspeed_enabled:
            check_zero(self.optimizer.optimizer)
        if self._shared_out and resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            if self.accelerator.scaler is not None:
                self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Override `_save_optimizer_and_scheduler`: if the optimizer is sharded, each process writes its part and weights."""
        if not self._shared_out:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"trained": self._trained, "scheduler": self.lr_scheduler.state_dict()}
        if self.is_deepspeed_enabled:
            zero, (of_optimizer, of_weights) = self._zero_state()
            scale = {
                name: x for name, x in vars(self.optimizer.optimizer.loss_scaler).items() if type(x) in (int, float)
            }
            state |= {"optimizer": zero[of_optimizer], "weights": zero[of_weights], "loss_scaler": scale}
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            state |= {"optimizer": self.optimizer.state_dict(), "weights": parameters}
        save_state(state, Path(output_dir) / f"optimizer_{self.args.process_index}")

    def _zero_state(self) -> tuple[dict, tuple[str, str]]:
        """Return the state of DeepSpeed's optimizer in this process, and the names of the entries to save."""
        state = self.optimizer.optimizer.state_dict()
        return state, next(names for names in ZERO if names[0] in state)

    def _load_shards(self, checkpoint: str) -> None:
        """Load this process's part of the optimizer and of the weights, and the scheduler."""
        path = Path(checkpoint) / f"optimizer_{self.args.process_index}"
        state = load_state(path)
        then, now = state["trained"], self._trained
        odd = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if odd:
            raise ValueError(
                f"{path}.json: {len(odd)} tensors do not match the model's adapter, first {odd[0]!r}. Set the LoRA options "
                f"as they were, or start a new run."
            )
        # JSON keys are text, not integers.
        state["optimizer"]["state"] = {int(index): entry for index, entry in state["optimizer"]["state"].items()}
        if self.is_deepspeed_enabled:
            zero = self.optimizer.optimizer
            vars(zero.loss_scaler).update(state["loss_scaler"])
            whole, (of_optimizer, of_weights) = self._zero_state()
            whole |= {of_optimizer: state["optimizer"], of_weights: state["weights"]}
            if hasattr(zero, "checkpoint_event_prologue"):
                zero.checkpoint_event_prologue()
            zero.load_state_dict({self.args.process_index: whole}, load_from_fp32_weights=True)
            if hasattr(zero, "checkpoint_event_epilogue"):
                zero.checkpoint_event_epilogue()
            else:
                zero.update_lp_params()
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for index, entry in state["optimizer"]["state"].items():
                state["optimizer"]["state"][index] = {
                    name: _shard_like(parameters[index], x) for name, x in entry.items()
                }
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, saved in zip(parameters, state["weights"], strict=True):
                local_part(parameter.detach()).copy_(saved)
        self._load_schedule(state["scheduler"])
