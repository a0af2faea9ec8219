"""Compute the layers that no adapter changes only once, and start passes from their output.

If the adapter of a role begins at layer d, the layers below d are those of the bare backbone. So all roles that begin at d or
above share the inputs of layer d, and a pass starts from them. The results are exact: the same operations run in the same
order. The model's own forward runs both parts, with its list of decoder layers cut. So masks, positions and the last norm are
its own, in any architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the module that holds the decoder layers, the name of its list, and the list.

    The decoder is searched first, because a tower for images or sound may have as many layers.

    Raises:
        ValueError: the model has no list of the length of its layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for owner in (*model.get_decoder().modules(), *model.base_model.modules()):
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, name, child
    raise ValueError(
        f"{type(model).__name__} has no list of its {count} decoder layers. Use another decoder-only model."
    )


def first_adapted_layer(model: PreTrainedModel, adapter: str) -> int:
    """Return the lowest decoder layer that an adapter changes.

    It is 0 if the adapter changes the embeddings too, and the number of layers if it changes no layer.
    """
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
def _cut(model: PreTrainedModel, part: slice, states: Tensor | None = None) -> Iterator[nn.ModuleList]:
    """Give the model only a part of its layers while the code inside runs, the first of them on `states` if given.

    Yields the list of these layers.
    """
    owner, name, layers = decoder_layers(model)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)  # the kind of mask of each layer, read by the layer's index
    if kinds is not None:
        # Before the layers are cut, because a config that computes its `layer_types` raises an error here.
        config.layer_types = kinds[part]
    kept = layers[part]
    if states is not None:
        kept[0] = _StartingFrom(states, kept[0])
    setattr(owner, name, kept)
    try:
        yield kept
    finally:
        setattr(owner, name, layers)
        if kinds is not None:
            config.layer_types = kinds


class _StartingFrom(nn.Module):
    """A decoder layer that runs on given states instead of its input; attributes are those of the layer.

    A hook on the layer would do for a plain pass. But in older transformers (5.10) a layer whose activations are checkpointed
    runs its hooks a second time in the backward pass, when the hook is gone: it would be recomputed on its own input.
    """

    def __init__(self, states: Tensor, layer: nn.Module):
        super().__init__()
        self.states, self.layer = states, layer
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the states, which it takes as its first argument or as `hidden_states`."""
        return (
            self.layer(self.states, *args[1:], **kwargs)
            if args
            else self.layer(**kwargs | {"hidden_states": self.states})
        )


@torch.no_grad()
def lower(model: PreTrainedModel, depth: int, **inputs: Shaped[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """Run the first `depth` layers and return their output; the inputs are those of the forward."""
    return _output(model, slice(depth), None, inputs)


@torch.no_grad()
def middle(
    model: PreTrainedModel, start: int, depth: int, states: Float[Tensor, "B S D"], **inputs: Shaped[Tensor, "B S"]
) -> Float[Tensor, "B S D"]:
    """Run the layers from `start` on and below `depth`, and return their output, which is that of `lower` at `depth`.

    `states` is the output of `lower` at `start`. The inputs are those of `upper`.
    """
    return _output(model, slice(start, depth), states, inputs | {"inputs_embeds": _embeddings_for(model, states)})


def _output(model: PreTrainedModel, part: slice, states: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
    kept = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with _cut(model, part, states) as layers:
        hook = layers[-1].register_forward_hook(keep)
        try:
            model.base_model(**inputs, use_cache=False)
        finally:
            hook.remove()
    return kept[0]


def upper(
    model: PreTrainedModel, depth: int, states: Float[Tensor, "B S D"], **inputs: Shaped[Tensor, "B S"]
) -> Float[Tensor, "B S D"]:
    """Run the layers from `depth` on, and return the last hidden states.

    `states` is the output of `lower`. The inputs are those of the model's forward, without `input_ids`.
    """
    with _cut(model, slice(depth, None), states):
        return model.base_model(
            inputs_embeds=_embeddings_for(model, states), **inputs, use_cache=False
        ).last_hidden_state


def _embeddings_for(model: PreTrainedModel, states: Float[Tensor, "B S D"]) -> Float[Tensor, "B S E"]:
    """Return embeddings of the shape that a pass from `states` is given, and does not use.

    Those of OPT can be narrower than the states.
    """
    width = model.get_input_embeddings().weight.shape[1]
    return states if width == states.shape[-1] else states.new_zeros(*states.shape[:2], width)


@torch.no_grad()
def trunk_fault(
    model: PreTrainedModel, depth: int, input_ids: Int[Tensor, "B S"], **inputs: Shaped[Tensor, "B S"]
) -> str | None:
    """Return the reason why a pass cannot start from the inputs of layer `depth`, or None if it can.

    Both kinds of pass are run and compared, on the tokens of `attention_mask` only. They can differ: layers may need more
    than hidden states (extra inputs for each token, keys of a layer below), or find their mask by an index that the cut
    changes. The mode of the model is restored. In a plan, tensors have shapes but no values, so only an error is a fault.
    """
    was_training = model.training
    model.eval()
    try:
        full = model.base_model(input_ids=input_ids, **inputs, use_cache=False).last_hidden_state
        short = upper(model, depth, lower(model, depth, input_ids=input_ids, **inputs), **inputs)
    except Exception as error:  # a layer may lack anything
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    finally:
        model.train(was_training)
    if isinstance(full, FakeTensor):
        return None
    real = inputs["attention_mask"].bool()
    difference, size = (short - full)[real].float().abs().mean().item(), full[real].float().abs().mean().item()
    return None if difference <= 1e-3 * size else f"hidden states differ by {difference:.3g} on average, of {size:.3g}"
