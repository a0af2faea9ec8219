"""Merge an adapter into the weights of the plain model, one layer at a time, without changing the model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def merged_weights(base: PreTrainedModel, adapter: str, role: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each weight in the plain model, and the weight with `adapter` merged into it.

    Each layer is merged in a copy of its weights, and then gets its own weights back. peft's unmerging would subtract what
    it added, and so leave rounding errors in the frozen backbone. Errors call the adapter `role`.

    Raises:
        ValueError: the adapter changes weights that several layers share, so no plain model equals this role.
    """
    layers = {layer.get_base_layer(): layer for layer in base.modules() if isinstance(layer, BaseTunerLayer)}
    uses = Counter(parameter for _, parameter in base.named_parameters(remove_duplicate=False))
    done: set[Tensor] = set()
    for path, module in base.named_modules():
        if "lora_" in path:
            continue
        own, layer = dict(module.named_parameters(recurse=False)), layers.get(module)
        with _merged(layer, adapter) if layer else nullcontext():
            weights = {name: parameter.data for name, parameter in own.items()}
            if layer and layer.merged and any(uses[parameter] > 1 for parameter in own.values()):
                raise ValueError(
                    f"the adapter of {role!r} changes {path.removesuffix('.base_layer')}, whose weights another layer "
                    f"shares. No plain model can hold both versions. Train an adapter that does not change embeddings "
                    f"and head (lora_embeddings: false)."
                )
        for name, weight in weights.items():
            if own[name] not in done:  # yield tied weights once
                yield f"{path}.{name}".replace(".base_layer.", "."), weight
        done.update(own.values())


@contextmanager
def _merged(layer: BaseTunerLayer, adapter: str) -> Iterator[None]:
    """Replace a layer's weights by a copy into which an adapter is merged, while the code inside runs."""
    before = [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
    for parameter, weights in before:
        parameter.data = weights.clone()
    layer.merge(adapter_names=[adapter])
    try:
        yield
    finally:
        for parameter, weights in before:
            parameter.data = weights
        layer.merged_adapters.clear()
