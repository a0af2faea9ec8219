"""Compute fingerprints of pretrained models, and record beside an adapter which model it belongs to."""

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from data.json_files import write_json


IDENTITY = "backbone.json"


def fingerprint(base: PreTrainedModel, *, learned: Collection[str] = ()) -> str:
    """Return a fingerprint of a pretrained model, the same in float32 and bfloat16.

    It is the hex digest of the trunk, then a `+` and that of the language model head. A classifier on the same trunk has
    only the first digest.

    LoRA weights are left out. A quantised base has a fingerprint of its own, that of its 4-bit codes. Their scales
    (`weight.absmax` and the like) are left out too, because another device may round them differently.

    Args:
        learned: full names of modules that are left out, since they are trained whole.
    """
    trained = tuple(f"{module.removeprefix(f'{base.base_model_prefix}.')}." for module in learned)

    def of(tensors: dict[str, Tensor]) -> str:
        ours = ((n, tensor) for n, tensor in sorted(tensors.items()) if "lora_" not in n and ".weight." not in n)
        return digest((n.replace("base_layer.", ""), tensor) for n, tensor in ours)

    weights = base.base_model.state_dict()
    trunk = of({name: tensor for name, tensor in weights.items() if not name.startswith(trained)})
    if base.get_output_embeddings() is None:
        return trunk
    prefix = f"{base.base_model_prefix}."
    return f"{trunk}+{of({n: tensor for n, tensor in base.state_dict().items() if not n.startswith(prefix)})}"


def precision_of(config: PreTrainedConfig) -> str:
    """Return the precision of a base in words: not quantised, or its 4-bit type."""
    bits = getattr(config, "quantization_config", None)
    return f"4-bit {bits.bnb_4bit_quant_type}" if bits else "not quantised"


def write_identity(folder: str | Path, config: PreTrainedConfig, digest: str) -> None:
    """Write beside an adapter the backbone and the pad token that it was trained with.

    `config` is the config of the backbone, and `digest` its fingerprint.
    """
    record = {"model_name_or_path": config._name_or_path, "precision": precision_of(config), "fingerprint": digest}
    record["pad_token_id"] = config.get_text_config().pad_token_id
    write_json(Path(folder) / IDENTITY, record)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hex digest of names, shapes and up to 65,536 evenly spaced values of every tensor, rounded to bfloat16."""
    result = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(-(-flat.numel() // 65_536), 1)].to("cpu", torch.bfloat16)
        result.update(f"{name} {tuple(tensor.shape)}".encode())
        result.update(sample.view(torch.int16).numpy().tobytes())
    return result.hexdigest()
