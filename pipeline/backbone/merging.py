"""Merge an adapter into the weights of the plain model, one layer at a time, without changing the model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def merged_weights(
    base: PreTrainedModel, adapter: str, role: str, *, dtype: torch.dtype | None = None, untie: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each weight in the plain model, and the weight with `adapter` merged into it.

    Each layer is merged in a copy of its weights, and then gets its own weights back. peft's unmerging would subtract what
    it added, and so leave rounding errors in the frozen backbone. Errors call the adapter `role`.

    Args:
        dtype: precision of the weights. Each is merged in float32 and rounded once. None: weights and sums have the
            precision of the base.
        untie: yield a weight that several layers share once for each, since the adapter may change one of them.

    Raises:
        ValueError: the adapter changes weights that several layers share, and `untie` is not set.
    """
    layers = {layer.get_base_layer(): layer for layer in base.modules() if isinstance(layer, BaseTunerLayer)}
    uses = Counter(parameter for _, parameter in base.named_parameters(remove_duplicate=False))
    done: set[Tensor] = set()
    for path, module in base.named_modules():
        if "lora_" in path:
            continue
        own, layer = dict(module.named_parameters(recurse=False)), layers.get(module)
        with _merged(layer, adapter, dtype and torch.float32) if layer else nullcontext():
            weights = {name: parameter.data for name, parameter in own.items()}
            if layer and layer.merged and not untie and any(uses[parameter] > 1 for parameter in own.values()):
                raise ValueError(
                    f"the adapter of {role!r} changes {path.removesuffix('.base_layer')}, whose weights another layer "
                    f"shares. No plain model can hold both versions. Train an adapter that does not change embeddings "
                    f"and head (lora_embeddings: false)."
                )
        for name, weight in weights.items():
            if untie or own[name] not in done:  # yield tied weights once
                yield f"{path}.{name}".replace(".base_layer.", "."), weight.to(dtype or weight.dtype)
        done.update(own.values())


@contextmanager
def _merged(layer: BaseTunerLayer, adapter: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Replace a layer's weights by a copy, in `dtype` if given, with an adapter merged into it, while the code inside runs."""
    before = [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
    for parameter, weights in before:
        parameter.data = weights.to(dtype or weights.dtype, copy=True)
    layer.merge(adapter_names=[adapter])
    try:
        yield
    finally:
        for parameter, weights in before:
            parameter.data = weights
        layer.merged_adapters.clear()
