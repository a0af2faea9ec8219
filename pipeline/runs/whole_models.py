"""Load the weights of a whole model, which a run trains without an adapter, from a checkpoint."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load all weights of a model from the safetensors of a checkpoint.

    Raises:
        FileNotFoundError: the checkpoint has none.
        ValueError: its tensors are not those of the model.
    """
    path = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Name a checkpoint that has it, or start a new run.")
    weights, own = load_file(path), model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {}).keys()  # a file holds the tensor that they are tied to
    odd = sorted(weights.keys() ^ own.keys() - (tied - weights.keys()))
    odd += sorted(key for key in weights.keys() & own.keys() if weights[key].shape != own[key].shape)
    if odd:
        raise ValueError(
            f"{path}: {len(odd)} tensors do not match the model, first {odd[0]!r}. Name the model as it was in "
            f"model_name_or_path, or start a new run."
        )
    model.load_state_dict(weights, strict=False)
