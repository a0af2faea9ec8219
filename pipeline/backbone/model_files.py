"""Check the files of a model before transformers makes it: they can be had, and config.json describes no larger model.

transformers makes a tensor for all that the config names, and fills those that the files lack. So one wrong size in the
config could take all memory, or hours.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig

from data.quoting import escaped
from pipeline.backbone.adapter_tensors import read_header


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# How many times the numbers in the files a model may have. Tied embeddings are in the files once, and quantised weights are
# packed there, up to eight of them in a number.
AT_MOST, AT_MOST_PACKED = 2, 16


def check_size(config: PreTrainedConfig, folder: Path) -> None:
    """Check that a model is not much larger than its safetensors files.

    The model is made on torch's meta device, where a tensor takes no memory.

    Raises:
        ValueError: the config names more layers than the files have tensors, or makes a model that is much larger than they
            are; or a file is damaged.
    """
    shapes = [
        shape for file in sorted(folder.glob("*.safetensors")) for shape in read_header(file, any_type=True).values()
    ]
    remedy = "Correct the sizes there, or copy the model anew."
    text = config.get_text_config()
    for name in LAYERS:
        layers = getattr(text, name, None)
        if isinstance(layers, int) and layers > len(shapes):  # each is a module, also on the meta device
            raise ValueError(
                f"{folder}: config.json names {layers:,} layers ({name}), but the model's files have {len(shapes):,} tensors. "
                f"{remedy}"
            )
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (
        Exception
    ):  # as transformers loads the model it raises the same error, of any type, and `load_pretrained` words it
        return
    made = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(torch.Size(shape).numel() for shape in shapes)
    packed = getattr(config, "quantization_config", None) is not None
    if made > held * (AT_MOST_PACKED if packed else AT_MOST):
        raise ValueError(
            f"{folder}: config.json describes a model of {made:,} numbers, but the model's files hold {held:,}. {remedy}"
        )


@contextmanager
def reached(name: str) -> Iterator[None]:
    """Say in one line that the files of a model that is no local folder cannot be had.

    Raises:
        OSError: the code inside raised one: there is no such model, it is not public, or the hub cannot be reached.
    """
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"model_name_or_path={name!r}: there is no such folder, and the hub did not give such a model "
            f"({escaped(' '.join(str(error).split()), 400)}). Correct the name; or reach the hub, and log in if the model is "
            f"not public; or copy the model to a folder here."
        ) from error


@contextmanager
def without_report() -> Iterator[None]:
    """Leave out transformers' table of tensors that are missing: loading refuses all but the fresh score head."""
    logger = logging.getLogger("transformers.modeling_utils")

    def told(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text  # an error refers to the table then

    logger.addFilter(told)
    try:
        yield
    finally:
        logger.removeFilter(told)
