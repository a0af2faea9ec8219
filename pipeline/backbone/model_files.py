"""Read the files of a pretrained model: its config and its weights, with an error that names what is wrong.

transformers makes a tensor for all that a config names, and fills those that the files lack. So one wrong size in the config
could take all memory, or hours: the sizes are compared with the files first.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning

from data.quoting import escaped
from pipeline.backbone.adapter_tensors import damaged, read_header
from pipeline.backbone.gguf import model_source
from reward_models.pretrained import loaded_whole


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# How many times the numbers in the files a model may have. Tied embeddings are in the files once, and quantised weights are
# packed there, up to eight of them in a number.
AT_MOST, AT_MOST_PACKED = 2, 16


def model_config(
    model: ModelConfig, *, trust_remote_code: bool = False
) -> tuple[str, dict[str, Any], PreTrainedConfig]:
    """Return the place of a model, the options with which it is fetched, and its config.

    The path of a local folder is made absolute.

    Raises the errors of `model_source`, `reached` and `check_size`, and:
        ValueError: config.json cannot be used.
    """
    name = model_source(model.model_name_or_path)
    if Path(name).expanduser().is_dir():
        name = os.path.realpath(Path(name).expanduser())
    source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    try:
        with reached(name):
            config = AutoConfig.from_pretrained(name, **source)
    except (ImportError, OSError):  # a package that is missing, or no such model
        raise
    except Exception as error:  # transformers checks the types of the fields with errors of its own
        raise unusable_config(name, error) from error
    if Path(name).is_dir() and not trust_remote_code:
        check_size(config, Path(name))
    return name, source, config


def read_weights(kind: Any, name: str, config: PreTrainedConfig, **options) -> tuple[PreTrainedModel, dict]:
    """Load a model of an auto class of transformers, and return it with the report of its loading.

    Raises the errors of `reached`, and:
        ValueError: a file is damaged, config.json cannot be used, or the family has no such model.
    """
    options |= {"use_safetensors": True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # the report has them
    try:
        # Warning and report are about the fresh score head, which we want.
        with reached(name), loaded_whole(), suppress_seqcls_warning(), without_report():
            return kind.from_pretrained(name, **options)
    except SafetensorError as error:
        raise damaged(Path(name), error) from error
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "negative dimension" not in str(error):
            raise
        if "Unrecognized configuration class" not in str(error):
            raise unusable_config(name, error) from error
        head = kind is AutoModelForSequenceClassification
        missing = (
            f"{name}: transformers has no {'sequence classifier' if head else 'causal language model'} of the family"
        )
        remedy = "Train PPO with reward functions (reward_funcs), or use" if head else "Use"
        raise ValueError(
            f"{missing} {config.model_type!r}. {remedy} a decoder-only language model (GPT-2, Llama, Qwen, Mistral ...)."
        ) from error


def check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise a ValueError if the tokenizer has more tokens than the model embeds."""
    rows = base.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}. Use the tokenizer that the "
            f"model was trained with, or call `model.resize_token_embeddings({len(tokenizer)})`, train and save it."
        )


def unusable_config(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name}: transformers makes no model of config.json and the options of the model ({type(error).__name__}: "
        f"{escaped(' '.join(str(error).split()), 600)}). Correct them, or name another model."
    )


def without_weights(kinds: Mapping[type, Any], config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model of a config on torch's meta device, where a tensor takes no memory, and draw no random number.

    `from_config` would divide it among the processes under ZeRO-3, with weights.
    """
    kind = kinds[type(config)]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return (kind[0] if isinstance(kind, tuple) else kind)(config)


def check_size(config: PreTrainedConfig, folder: Path) -> None:
    """Check that a model is not much larger than its safetensors files.

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
        model = without_weights(MODEL_MAPPING, config)
    except Exception:  # of any type; loading the model raises it again, and words it
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
