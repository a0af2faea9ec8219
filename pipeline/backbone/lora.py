"""Make the config of a LoRA adapter from options, and check a saved adapter against them."""

from dataclasses import dataclass, field

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from pipeline.backbone.trunk import decoder_layers


@dataclass
class LoraArguments:
    """Options that choose what an adapter changes, besides `lora_target_modules`."""

    lora_top_layers: int | None = field(
        default=None,
        metadata={
            "help": "Adapt only this many decoder layers, from the top; PPO computes those below once a rollout. Unset: all."
        },
    )
    lora_embeddings: bool = field(
        default=False,
        metadata={"help": "Adapt the input embeddings too, which helps a small backbone."},
    )


def lora_config(
    model: ModelConfig, *, task_type: str, lora: LoraArguments | None = None, base: PreTrainedModel | None = None
) -> LoraConfig:
    """Return the config of a LoRA adapter on `base`, from the `lora_*` options of `model` and `lora`.

    A reward adapter (SEQ_CLS) trains and saves its head too.

    Raises:
        ValueError: `lora_top_layers` exceeds the layers of the model; a name in `lora_target_modules` is of no layer that
            LoRA adapts; or an option of ModelConfig has no effect here.
    """
    for option in ("use_dora", "lora_modules_to_save", "lora_target_parameters"):
        if getattr(model, option):
            raise ValueError(f"{option}={getattr(model, option)!r} is not supported. Leave it unset.")
    modules, layers = model.lora_target_modules, {}
    if isinstance(modules, str) and modules != "all-linear":
        modules = [modules]  # ModelConfig unwraps a list of one, and peft would read a bare name as a pattern
    if base is not None and isinstance(modules, list):
        _check_targets(modules, base)
    if lora and (lora.lora_embeddings or lora.lora_top_layers):
        assert base is not None  # these options are about its layers
        named = dict(base.named_modules())
        if modules in (None, "all-linear"):  # peft accepts "all-linear" only alone: not in a list, not for some layers
            modules = _linear_layers(base)
        if lora.lora_embeddings:
            # The full name: with a bare `embed_tokens`, peft would save the frozen embeddings with the adapter.
            modules = [*modules, next(n for n, layer in named.items() if layer is base.get_input_embeddings())]
        if lora.lora_top_layers:
            _, pattern, decoder = decoder_layers(base)
            if not 0 < lora.lora_top_layers <= len(decoder):
                raise ValueError(
                    f"lora_top_layers={lora.lora_top_layers}: the model has {len(decoder)} layers. Set it to a number from 1 "
                    f"to {len(decoder)}."
                )
            top = list(range(len(decoder)))[-lora.lora_top_layers :]
            layers = {"layers_to_transform": top, "layers_pattern": pattern}
    return LoraConfig(
        task_type=task_type,
        fan_in_fan_out=_is_transposed(modules, base),
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=modules,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        use_rslora=model.use_rslora,
        **layers,
    )


def _linear_layers(base: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of the linear layers, but for those of the head."""
    heads = (base.get_output_embeddings(), *(getattr(base, name, None) for name in ("score", "classifier")))
    named = [(name.rpartition(".")[2], layer) for name, layer in base.named_modules()]
    linear = {name for name, layer in named if isinstance(layer, (nn.Linear, Conv1D))}
    return sorted(linear - {name for name, layer in named if layer in heads})


def _check_targets(modules: list[str], base: PreTrainedModel) -> None:
    """Check that each name is of a layer that LoRA adapts: peft leaves out those that are not, unless none is.

    Raises:
        ValueError: a name is of no such layer.
    """
    adaptable = [
        f".{name}" for name, layer in base.named_modules() if isinstance(layer, (nn.Linear, Conv1D, nn.Embedding))
    ]
    for module in modules:
        if not any(name.endswith(f".{module}") for name in adaptable):
            raise ValueError(
                f"lora_target_modules: {module!r} is no layer of {type(base).__name__} that LoRA adapts. Name some of "
                f"{', '.join(_linear_layers(base))}, or set all-linear."
            )


def _is_transposed(modules: list[str] | str | None, base: PreTrainedModel | None) -> bool:
    """Return whether the layers that an adapter of these `modules` adapts keep their weights as (in, out), as GPT-2's do. peft
    finds it out too, and warns."""
    found = [name for name, layer in base.named_modules() if isinstance(layer, Conv1D)] if base is not None else []
    if modules is None or isinstance(modules, str):  # peft's own choice for the family, or all-linear
        return bool(found)
    return any(f".{name}".endswith(f".{module}") for name in found for module in modules)


def check_lora(found: LoraConfig, model: ModelConfig, lora: LoraArguments, base: PreTrainedModel, source: str) -> None:
    """Check that no `lora_*` option that was set contradicts the saved adapter that training continues from.

    Args:
        found: config of the saved adapter.
        source: its name, for errors.

    Raises:
        ValueError: an option was set and differs from `found`. It would have no effect.
    """
    wanted = lora_config(model, task_type=found.task_type, lora=lora, base=base)
    fields = {
        "lora_r": "r",
        "lora_alpha": "lora_alpha",
        "use_rslora": "use_rslora",
        "lora_top_layers": "layers_to_transform",
        "lora_embeddings": "target_modules",  # before the option that it adds to
        "lora_target_modules": "target_modules",
    }
    default, given = vars(ModelConfig()) | vars(LoraArguments()), vars(model) | vars(lora)
    for option, field_name in fields.items():
        values = (getattr(config, field_name) for config in (wanted, found))
        ours, theirs = (sorted(value) if isinstance(value, (list, set)) else value for value in values)
        # peft stores the layers that it chose for "all-linear", not the word.
        if given[option] != default[option] and ours not in (theirs, "all-linear"):
            raise ValueError(
                f"{option}={given[option]!r} describes a fresh adapter, but {source} was saved with {field_name}={theirs}. "
                f"Leave {option} unset, or train {source} anew with it."
            )
