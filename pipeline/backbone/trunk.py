"""The layers that no adapter touches, computed once.

A role whose adapter begins at layer d sees below it what the bare backbone sees. So roles that begin at d or above share
the states at the foot of layer d, and a pass starts from them. It is exact: the same operations, in the same order. The
model's own forward runs both parts, with its list of decoder layers cut, so that masks, positions and the last norm are
its own, whatever the architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the decoder layers, the name of its list, and the list. A tower for images or sound beside the
    decoder may have as many layers, and is left out.

    Raises:
        ValueError: no list of the model is as long as it has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for owner in (*model.get_decoder().modules(), *model.base_model.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name, child
    raise ValueError(f"{type(model).__name__} has no list of its {count} decoder layers.")


def first_adapted_layer(model: PreTrainedModel, adapter: str) -> int:
    """The lowest decoder layer that an adapter changes: 0 if it changes the embeddings too, the number of layers if it
    changes none."""
    layers = decoder_layers(model)[2]

    def adapted(module: nn.Module) -> bool:
        tuned = (part for part in module.modules() if isinstance(part, BaseTunerLayer))
        return any(adapter in getattr(part, name) for part in tuned for name in ("lora_A", "lora_embedding_A"))

    inside = [adapted(layer) for layer in layers]
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, BaseTunerLayer) and adapter in embeddings.lora_embedding_A:
        return 0
    return inside.index(True) if any(inside) else len(inside)


@contextmanager
def _cut(model: PreTrainedModel, part: slice) -> Iterator[nn.ModuleList]:
    owner, name, layers = decoder_layers(model)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)  # which mask a layer gets: models read it by the layer's place
    if kinds is not None:
        config.layer_types = kinds[part]  # first, since configs that compute it raise, and the model must stay whole
    setattr(owner, name, layers[part])
    try:
        yield layers
    finally:
        setattr(owner, name, layers)
        if kinds is not None:
            config.layer_types = kinds


@torch.no_grad()
def lower(model: PreTrainedModel, depth: int, **inputs: Tensor) -> Tensor:
    """States at the foot of layer `depth` (from 1), (B, S) -> (B, S, D). The inputs are those of the model's forward."""
    kept = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with _cut(model, slice(depth)) as layers:
        hook = layers[depth - 1].register_forward_hook(keep)
        try:
            model.base_model(**inputs, use_cache=False)
        finally:
            hook.remove()
    return kept[0]


def upper(model: PreTrainedModel, depth: int, states: Tensor, **inputs: Tensor) -> Tensor:
    """Last hidden states (B, S, D) from the states at the foot of layer `depth`. The inputs are those of the model's
    forward but `input_ids`."""

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    with _cut(model, slice(depth, None)) as layers:
        hook = layers[depth].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            # The embeddings of these "inputs" are thrown away; only their shape counts, and OPT's can be narrower.
            width = model.get_input_embeddings().weight.shape[1]
            given = states if width == states.shape[-1] else states.new_zeros(*states.shape[:2], width)
            return model.base_model(inputs_embeds=given, **inputs, use_cache=False).last_hidden_state
        finally:
            hook.remove()


@torch.no_grad()
def trunk_fault(model: PreTrainedModel, depth: int, input_ids: Tensor, **inputs: Tensor) -> str | None:
    """Return why a pass cannot start from the states at the foot of layer `depth`, or None: both ways are run.

    Layers may need more than hidden states (inputs of their own for each token, keys of a layer below), or find their mask
    by a number that the cut changes. Only the tokens of `attention_mask` are compared. The mode is put back. Where
    tensors have shapes and no values, as in a plan, only an error is a fault.
    """
    was_training = model.training
    model.eval()
    try:
        full = model.base_model(input_ids=input_ids, **inputs, use_cache=False).last_hidden_state
        short = upper(model, depth, lower(model, depth, input_ids=input_ids, **inputs), **inputs)
    except Exception as error:  # whatever a layer lacks
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    finally:
        model.train(was_training)
    if isinstance(full, FakeTensor):
        return None
    real = inputs["attention_mask"].bool()
    difference, size = (short - full)[real].float().abs().mean().item(), full[real].float().abs().mean().item()
    return (
        None if difference <= 1e-3 * size else f"hidden states differ by {difference:.3g} in the mean, of {size:.3g}"
    )
