"""Write and read training state: nested values as JSON, and their tensors as safetensors."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.json_files import RESTORE, check_object, read_json
from data.schemas import STATE, Kind


TENSOR, FLOAT = "__tensor__", "__float__"
LARGEST = 256 * 2**20  # bytes of a state's JSON


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


def load_state(path: Path, schema: Kind | None = None) -> Any:
    """Read the files of `save_state`, with tensors on the CPU.

    Raises:
        ValueError: a file is damaged, or the state does not fit the schema.
    """
    file = path.with_suffix(".json")
    found = read_json(file, limit=LARGEST)
    tensors = load_file(path.with_suffix(".safetensors"))

    def with_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {TENSOR}:
                return tensors[value[TENSOR]].clone()  # the file may be removed
            if value.keys() == {FLOAT}:
                return float(value[FLOAT])
            return {key: with_tensors(entry) for key, entry in value.items()}
        return [with_tensors(entry) for entry in value] if isinstance(value, list) else value

    try:
        state = with_tensors(found)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: it names a tensor or a number that there is not ({error}). {RESTORE}") from error
    check_object(state, str(file), schema)
    return state


def load_trainer_state(path: Path) -> dict[str, Any]:
    """Read what a trainer's `training_state` returned. Raises the errors of `load_state`."""
    return load_state(path, STATE)


def local_part(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
