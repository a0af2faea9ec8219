"""Put an optimizer's state together from the parts of several processes, and cut it for other processes.

All functions take tensors and return tensors. A process under FSDP holds rows of each weight. DeepSpeed lays weights out in
flat tensors: under ZeRO-1 and ZeRO-2 a flat tensor of all weights is cut into equal parts, and under ZeRO-3 each weight is
cut, and the pieces of one process make its flat tensor. Without a wrapper and under DDP every process holds all.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


ROWS, FLAT, PIECES = "rows", "flat", "pieces"
# How the optimizer's state lies under each wrapper (`pipeline.backbone.sharding.kind_of`).
LAYOUTS = {"no wrapper": ROWS, "DDP": ROWS, "FSDP": ROWS, "ZeRO-1": FLAT, "ZeRO-2": FLAT, "ZeRO-3": PIECES}


# Entries of a scheduler's state that have a value for each parameter group.
OF_GROUPS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs")


class Whole(NamedTuple):
    """The state of all trained weights, each under its name and whole.

    `moments` holds what the optimizer keeps of a weight: tensors of the weight's shape, and counts. `groups` holds the options
    of the parameter groups, `group_of` the group of each weight, and `schedule` the scheduler's state.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    group_of: dict[str, int]
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Describe how the processes of a launch hold the weights that an optimizer updates.

    Args:
        kind: `ROWS`, `FLAT` or `PIECES`.
        processes: the number of processes that share them; 1 if each holds all.
        units: for each tensor that the optimizer updates, the names of the weights in it, and the element at which each
            begins: in the flat tensor of all processes (`FLAT`), or of each process (`PIECES`); 0 for `ROWS`.
        shapes: the shape of each weight.
    """

    kind: str
    processes: int
    units: list[dict[str, int]]
    shapes: dict[str, list[int]]

    def join(self, unit: int, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the whole weights, or moments, of a unit from the parts of all processes.

        Raises:
            ValueError: the parts are not those of this layout.
        """
        offsets, found = self.units[unit], {}
        if self.kind == FLAT:
            flat = torch.cat([part.flatten() for part in parts])
        for name, offset in offsets.items():
            size = torch.Size(self.shapes[name]).numel()
            if self.kind == ROWS:
                value = torch.cat(list(parts))
            elif self.kind == FLAT:
                value = flat[offset : offset + size]
            else:
                length = self._length(name)
                value = torch.cat([part.flatten()[offset : offset + length] for part in parts])[:size]
            if value.numel() != size:
                raise ValueError(f"the parts of {name} have {value.numel()} elements, and the weight has {size}.")
            found[name] = value.reshape(self.shapes[name])
        return found

    def cut(self, unit: int, whole: dict[str, Tensor], process: int, size: int) -> Tensor:
        """Return the part of a process of a unit: rows, or a flat tensor of `size` elements with zeros as padding."""
        offsets = self.units[unit]
        if self.kind == ROWS:
            (name,) = offsets
            rows = torch.chunk(whole[name], self.processes)  # fewer than `processes` if there are not enough rows
            return rows[process] if process < len(rows) else whole[name][:0]
        flat = torch.zeros(size * self.processes if self.kind == FLAT else size)
        for name, offset in offsets.items():
            value = whole[name].flatten()
            if self.kind == PIECES:
                length = self._length(name)
                value = value[process * length : (process + 1) * length]
            flat[offset : offset + value.numel()] = value
        return flat[process * size : (process + 1) * size].clone() if self.kind == FLAT else flat

    def _length(self, name: str) -> int:
        """Return the number of elements of a weight that a process holds under ZeRO-3, padding included."""
        return -(-torch.Size(self.shapes[name]).numel() // self.processes)


def gather(layout: Layout, parts: Sequence[dict]) -> Whole:
    """Return the whole state from the parts of all processes.

    Args:
        layout: the layout of the launch that wrote the parts.
        parts: for each process the state dict of its `optimizer`, the `weights` it updates, one tensor for each unit, and
            the state dict of its `scheduler`.

    Raises:
        ValueError: an entry of the state is neither a count nor as large as the weights.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Any]] = {}
    for unit, offsets in enumerate(layout.units):
        weights |= layout.join(unit, [part["weights"][unit] for part in parts])
        moments |= {name: {} for name in offsets}
        states = [part["optimizer"]["state"].get(unit, {}) for part in parts]
        for entry, first in states[0].items():
            values = [state[entry] for state in states]
            if not isinstance(first, Tensor) or first.dim() == 0:
                # The optimizer counts in place, and so each weight needs a count of its own.
                of_names = {name: deepcopy(first) for name in offsets}
            elif all(_fits(layout, x, part["weights"][unit]) for x, part in zip(values, parts, strict=True)):
                of_names = layout.join(unit, values)
            else:
                raise ValueError(
                    f"the optimizer keeps {entry!r} of {next(iter(offsets))} as a tensor of shape {tuple(first.shape)}, which "
                    f"does not belong to single elements of the weight, and so cannot be cut for other processes."
                )
            for name, value in of_names.items():
                moments[name][entry] = value
    groups = parts[0]["optimizer"]["param_groups"]
    group_of = {name: at for at, group in enumerate(groups) for unit in group["params"] for name in layout.units[unit]}
    return Whole(weights, moments, groups, group_of, parts[0]["scheduler"])


def share_out(whole: Whole, layout: Layout, process: int, sizes: Sequence[int], groups: list[dict]) -> dict:
    """Return the part of a process, in the form that `gather` takes.

    Args:
        layout: the layout of the launch that goes on.
        sizes: the number of elements of each flat tensor in a process; not used for `ROWS`.
        groups: the parameter groups of that launch's optimizer, as its state dict has them.

    Raises:
        ValueError: weights that are to lie in one flat tensor were not updated equally often.
    """
    state: dict[int, dict[str, Any]] = {}
    weights = []
    for unit, offsets in enumerate(layout.units):
        names = list(offsets)
        weights.append(layout.cut(unit, whole.weights, process, sizes[unit]))
        entries = whole.moments[names[0]]
        for name in names:
            if not _same_counts(whole.moments[name], entries):
                raise ValueError(
                    f"the optimizer has updated {names[0]} and {name} a different number of times, and DeepSpeed counts the "
                    f"updates of all weights together."
                )
        state[unit] = {
            entry: layout.cut(unit, {name: whole.moments[name][entry] for name in names}, process, sizes[unit])
            if isinstance(value, Tensor) and value.dim() > 0
            else value
            for entry, value in entries.items()
        }
        if not state[unit]:  # a weight that was never updated
            del state[unit]
    # DeepSpeed drops groups without weights. Such a group takes the values of the first.
    origins = [
        next((whole.group_of[name] for unit in group["params"] for name in layout.units[unit]), 0) for group in groups
    ]
    param_groups = [
        {key: value if key == "params" else whole.groups[origin].get(key, value) for key, value in group.items()}
        for origin, group in zip(origins, groups, strict=True)
    ]
    schedule = {
        key: [value[origin] for origin in origins] if key in OF_GROUPS else value
        for key, value in whole.schedule.items()
    }
    return {
        "optimizer": {"state": state, "param_groups": param_groups},
        "weights": weights,
        "scheduler": schedule,
    }


def _fits(layout: Layout, value: Tensor, weights: Tensor) -> bool:
    """Tell whether a tensor of the optimizer's state has an element for each element of the weights it belongs to.

    DeepSpeed writes flat weights without their padding.
    """
    if layout.kind == ROWS:
        return value.shape == weights.shape
    return value.dim() == 1 and value.numel() >= weights.numel()


def _same_counts(entries: dict[str, Any], others: dict[str, Any]) -> bool:
    if entries.keys() != others.keys():
        return False
    counts = [name for name, value in entries.items() if not isinstance(value, Tensor) or value.dim() == 0]
    return all(float(entries[name]) == float(others[name]) for name in counts)
