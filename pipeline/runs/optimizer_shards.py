"""Write and read an optimizer that FSDP or DeepSpeed shards: each process its part, as safetensors.

accelerate and DeepSpeed would write pickles, and reading a pickle can execute code from it.
"""

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pipeline.backbone.adapters import WEIGHTS
from pipeline.runs.manifest import read_manifest
from pipeline.runs.resharding import LAYOUTS, Layout, gather, share_out
from pipeline.runs.state_files import load_state, local_part, save_state
from pipeline.runs.worlds import this_world, writers


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


def was_shared_out(checkpoint: str | Path) -> bool:
    """Return whether each of the processes that wrote a checkpoint held a part of the optimizer's state."""
    return (Path(checkpoint) / "optimizer_0.json").is_file()


def read_part(path: Path) -> dict:
    """Read the part of one process."""
    part = load_state(path)
    # JSON keys are text, not integers.
    part["optimizer"]["state"] = {int(index): entry for index, entry in part["optimizer"]["state"].items()}
    return part


def weights_by_name(
    model: PeftModel, names: Iterable[str], weights: dict[str, Tensor], adapter: str = "default"
) -> dict[str, Tensor]:
    """Return the saved weights of an adapter under the names that the model's parameters have.

    Args:
        names: the names of parameters of adapters; those of other adapters are left out.
        weights: weights as peft saves them, without the adapter's name.
    """
    ours = [name for name in names if adapter in name.split(".")]
    if not ours:
        return {}
    # peft renames numbers as it would rename weights.
    numbers = {name: torch.tensor(number) for number, name in enumerate(ours)}
    saved = get_peft_model_state_dict(model, numbers, adapter_name=adapter, save_embedding_layers=False)
    return {ours[int(number)]: weights[name] for name, number in saved.items()}


def flat_weights(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 weights that a DeepSpeed optimizer updates in this process, padding included.

    The list is empty if the optimizer keeps none.
    """
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), [])


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
        units = self._units()
        state = {"trained": self._trained, "layout": units, "scheduler": self.lr_scheduler.state_dict()}
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

    def _units(self) -> list[dict[str, int]]:
        """Return where the trained weights lie in the tensors that the optimizer updates (`Layout.units`)."""
        trained = (p for p in self.model.parameters() if p.requires_grad)
        names = {id(p): name for name, p in zip(self._trained, trained, strict=True)}
        if not self.is_deepspeed_enabled:
            return [{names[id(p)]: 0} for group in self.optimizer.param_groups for p in group["params"]]
        zero = self.optimizer.optimizer
        if hasattr(zero, "fp16_groups"):  # ZeRO-3
            sizes = [{names[id(p)]: p.partition_numel() for p in group} for group in zero.fp16_groups]
            return [dict(zip(of, accumulate(of.values(), initial=0), strict=False)) for of in sizes]
        return [  # the weights are views of the flat tensor of their group
            {names[id(p)]: (p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in group}
            for group, flat in zip(zero.bit16_groups, zero.bit16_groups_flat, strict=True)
        ]

    def _saved_weights(self, checkpoint: str) -> dict[str, Tensor]:
        """Return the trained weights of a checkpoint's adapter files, by the names of the parameters."""
        return weights_by_name(self.model, self._trained, load_file(Path(checkpoint) / WEIGHTS))

    def _parts(self, checkpoint: str, processes: int) -> list[dict]:
        """Read the parts of all processes that wrote a checkpoint; without shards there is one, and it is whole."""
        folder = Path(checkpoint)
        if was_shared_out(checkpoint):
            return [read_part(folder / f"optimizer_{process}") for process in range(processes)]
        weights = self._saved_weights(checkpoint)
        names = [name for unit in self._units() for name in unit]  # the order in which Trainer makes every optimizer
        optimizer, scheduler = (
            torch.load(folder / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        return [
            {
                "trained": self._trained,
                "layout": [{name: 0} for name in names],
                "optimizer": optimizer,
                "weights": [weights[name] for name in names],
                "scheduler": scheduler,
            }
        ]

    def _part(self, checkpoint: str) -> dict:
        """Return this process's part of a checkpoint; cut it anew if the checkpoint is from another launch."""
        then, now = writers(read_manifest(Path(checkpoint)), self.args), this_world(self.args)
        path = Path(checkpoint) / f"optimizer_{self.args.process_index}"
        if then == now:
            part = read_part(path)
        else:
            parts = self._parts(checkpoint, then.processes)
            part, path = parts[0], path.with_name("optimizer_0")
        theirs, ours = part["trained"], self._trained
        odd = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        if odd:
            raise ValueError(
                f"{path}.json: {len(odd)} tensors do not match the model's adapter, first {odd[0]!r}. Set the LoRA options "
                f"as they were, or start a new run."
            )
        if then == now:
            return part
        whole = gather(Layout(LAYOUTS[then.kind], len(parts), part["layout"], theirs), parts)
        processes, process = (now.processes, self.args.process_index) if self._shared_out else (1, 0)
        layout = Layout(LAYOUTS[now.kind], processes, self._units(), ours)
        if self.is_deepspeed_enabled:
            zero, (of_optimizer, _) = self._zero_state()
            state, sizes = zero[of_optimizer], [flat.numel() for flat in flat_weights(self.optimizer.optimizer)]
        else:
            state, sizes = self.optimizer.state_dict(), [0] * len(layout.units)
        scale = {"loss_scaler": part["loss_scaler"]} if "loss_scaler" in part else {}
        return share_out(whole, layout, process, sizes, state["param_groups"]) | scale

    def _load_shards(self, checkpoint: str) -> None:
        """Load this process's part of the optimizer and of the weights, and the scheduler."""
        state = self._part(checkpoint)
        if self.is_deepspeed_enabled:
            zero = self.optimizer.optimizer
            vars(zero.loss_scaler).update(state.get("loss_scaler", {}))
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
