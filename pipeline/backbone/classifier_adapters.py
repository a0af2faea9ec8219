"""LoRA adapters on a classifier of its own, such as BERT: their config for training, and a saved one as a whole model."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_CHOICE
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from pipeline.backbone.adapter_config import peft_config, read_adapter_config
from pipeline.backbone.adapter_tensors import WEIGHTS, check_fits, check_tensors, read_header
from pipeline.backbone.adapters import check_base, check_weights, load_tokenizer
from pipeline.backbone.classifiers import Classifier, load_classifier
from pipeline.backbone.lora import LoraArguments, lora_config


def classifier_lora(classifier: Classifier, model: ModelConfig, lora: LoraArguments) -> LoraConfig:
    """Return the config of a LoRA adapter on the layers of a classifier. What `classifier.learned` names trains whole.

    `lora_target_modules` may be unset (peft's choice for the family), `all-linear`, or names of modules.

    Raises:
        ValueError: an option has no effect here; peft has no choice for the family; a name is of no layer that LoRA adapts;
            or the head has a name that parts of the layers have too.
    """
    base = classifier.model
    if lora.lora_top_layers:
        raise ValueError(
            f"lora_top_layers={lora.lora_top_layers} saves PPO work on a shared backbone, and {classifier.name} is a model of "
            f"its own. Leave it unset."
        )
    config = lora_config(model, task_type="SEQ_CLS", base=base)
    config.target_modules = _targets(classifier, config.target_modules, embeddings=lora.lora_embeddings)
    _check_names(classifier)
    config.modules_to_save = list(classifier.learned)
    return config


def _targets(classifier: Classifier, asked: Collection[str] | str | None, *, embeddings: bool) -> set[str]:
    """Return the full names of the layers to adapt: peft would also adapt those of the head."""
    base = classifier.model
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if name.startswith(f"{base.base_model_prefix}.") and not _is_within(name, classifier.learned)
    }
    linear = {name for name, layer in layers.items() if isinstance(layer, (nn.Linear, Conv1D))}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if asked is None:
        asked = PEFTS_CHOICE.get(base.config.model_type)
        if asked is None:
            raise ValueError(
                f"lora_target_modules is not set, and peft has no choice for the family {base.config.model_type!r}. Set it to "
                f"all-linear, or to some of {', '.join(known)}."
            )
    found = set(linear) if asked == "all-linear" else set()
    for name in () if asked == "all-linear" else asked:
        named = {layer for layer in layers if f".{layer}".endswith(f".{name}")} & (linear | _embeddings(layers))
        if not named:
            raise ValueError(
                f"lora_target_modules: {name!r} is no layer of {type(base).__name__} that LoRA adapts. Name some of "
                f"{', '.join(known)}, or set all-linear."
            )
        found |= named
    if embeddings:
        found.add(next(name for name, layer in layers.items() if layer is base.get_input_embeddings()))
    return found


def _embeddings(layers: dict[str, nn.Module]) -> set[str]:
    return {name for name, layer in layers.items() if isinstance(layer, nn.Embedding)}


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _check_names(classifier: Classifier) -> None:
    """Check that peft, which goes by the ends of names, finds the head and nothing else to train whole.

    Raises:
        ValueError: it would find more.
    """
    for name, _ in classifier.model.named_modules():
        if name.endswith(classifier.learned) and not _is_within(name, classifier.learned):
            raise ValueError(
                f"{classifier.name}: {name!r}, a part of its layers, ends like a part of its head, and peft would train it "
                f"whole. Set use_peft: false to train all weights."
            )


def read_classifier_adapter(
    name: str, folder: Path, *, model: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of an adapter on a classifier, merge the adapter into it, and return it with the adapter's tokenizer.

    Args:
        name: the adapter's name, for errors.
        folder: its local folder.
        model: its base; None is the one that it names.
        dtype: the precision of the base; None is float32.

    Raises the errors of `read_adapter_config`, `load_classifier`, `check_base`, `check_fits`, `check_tensors` and
    `check_weights`.
    """
    found = read_adapter_config(name, folder, trains_modules=True)
    with torch.random.fork_rng(devices=[]):  # heads are drawn, which the adapter's replace
        classifier = load_classifier(ModelConfig(model or found["base_model_name_or_path"], dtype=dtype))
        base, config = classifier.model, peft_config(name, found)
        check_base(name, folder, base, learned=config.modules_to_save or ())
        shapes = read_header(folder / WEIGHTS)
        check_fits(name, config, shapes, base)
        adapted = get_peft_model(base, config)
    needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_tensors(name, shapes, {key: tuple(of.shape) for key, of in needed.items()})
    weights = load_file(folder / WEIGHTS)
    check_weights(folder, weights)
    set_peft_model_state_dict(adapted, weights)
    tokenizer = classifier.tokenizer
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    return adapted.merge_and_unload(), tokenizer
