"""Which rewards a recipe names: a learned reward adapter, functions by their dotted path, or both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from transformers import PreTrainedTokenizerBase

from pipeline.backbone import Backbone
from reward_models.learned import LearnedReward


@dataclass
class RewardArguments:
    """The rewards of a run; `reward_weights` weighs them in this order: the adapter first, then the functions."""

    reward_adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a reward adapter."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of reward functions in TRL's protocol."}
    )

    def __post_init__(self):
        if not self.reward_adapter and not self.reward_funcs:
            raise ValueError("Name a reward: set reward_adapter, reward_funcs or both.")


def load_function(path: str) -> Callable:
    """The function at a dotted path, such as `reward_models.rules.contains` or `trl.rewards.think_format_reward`.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"reward_funcs: cannot import {path!r} ({error}). Write it as package.module.function."
        ) from error
    if not callable(function):
        raise ValueError(f"reward_funcs: {path!r} is not a function.")
    return function


def reward_functions(
    rewards: RewardArguments, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> list[Callable]:
    """The rewards as functions of TRL's protocol. The backbone has its reward role already, if an adapter is named."""
    learned = [LearnedReward(backbone, tokenizer)] if rewards.reward_adapter else []
    return learned + [load_function(path) for path in rewards.reward_funcs or []]
