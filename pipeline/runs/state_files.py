"""Write and read training state: nested values as JSON, and their tensors as safetensors."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor


TENSOR, FLOAT = "__tensor__", "__float__"


def save_state(state: Any, path: Path) -> None:
    """Write nested dicts and lists of tensors and JSON values as `path`.json and `path`.safetensors.

    Of a tensor that is sharded over processes, this process's part is written.
    """
    tensors = {}

    def without_tensors(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = local_part(value.detach()).cpu().clone()
            return {TENSOR: name}
        if isinstance(value, dict):
            return {key: without_tensors(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [without_tensors(entry, f"{name}.{i}") for i, entry in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return {FLOAT: str(value)}  # JSON has no NaN and no infinity
        return value

    text = json.dumps(without_tensors(state, "state"), allow_nan=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))


def load_state(path: Path) -> Any:
    """Read the files of `save_state`, with tensors on the CPU."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def with_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {TENSOR}:
                return tensors[value[TENSOR]].clone()  # the file may be removed
            if value.keys() == {FLOAT}:
                return float(value[FLOAT])
            return {key: with_tensors(entry) for key, entry in value.items()}
        return [with_tensors(entry) for entry in value] if isinstance(value, list) else value

    return with_tensors(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def local_part(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
