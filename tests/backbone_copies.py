"""Count the backbones that this process holds: the claim that all roles share one, on which the memory rests."""

import gc

from torch import nn

from pipeline.backbone.roles import Backbone


def is_ours(name: str) -> bool:
    return "lora_" in name or ".heads." in f".{name}"


def backbone_copies(backbone: Backbone) -> float:
    """Count the backbones in this process: all live parameters that are neither LoRA nor heads, over those of one.

    Every `nn.Parameter` the interpreter can reach is counted, in this model or not, each storage once; those on the meta
    device have none.
    """
    gc.collect()  # a model already dropped may still wait in a cycle
    ours = {id(parameter) for name, parameter in backbone.named_parameters() if is_ours(name)}
    base = {p.data_ptr(): p.nbytes for name, p in backbone.named_parameters() if not is_ours(name)}
    # By type: quantised weights are of a subclass, and `isinstance` would ask proxies whose object is gone.
    parameters = [p for p in gc.get_objects() if issubclass(type(p), nn.Parameter) and not p.is_meta]
    live = {p.data_ptr(): p.nbytes for p in parameters if id(p) not in ours}
    return sum(live.values()) / sum(base.values())
