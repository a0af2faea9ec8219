"""Start a reward adapter from the LoRA weights of an SFT policy.

Ziegler et al. 2019 (arXiv 1909.08593) and Stiennon et al. 2020 (arXiv 2009.01325) start their reward models from the policy,
with a head drawn at random. Here the reward adapter begins as a copy of the policy's adapter, and trains on by itself.
"""

from copy import deepcopy

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from trl import ModelConfig

from pipeline.backbone.adapter_tensors import (
    HEAD,
    PREFIX,
    check_tensors,
    is_lora,
    module_of,
    without_the_base,
)
from pipeline.backbone.adapters import Adapter
from pipeline.backbone.lora import LoraArguments, check_lora


def reward_config(policy: Adapter, model: ModelConfig, lora: LoraArguments, base: PreTrainedModel) -> LoraConfig:
    """Return the config of a reward adapter that starts from a policy's: with its rank, its scale and its modules.

    The dropout is that of this run. An adapter on the language model head is left out, since a classifier has no such head.

    Args:
        base: the classifier, without adapters.

    Raises:
        ValueError: a `lora_*` option was set and contradicts the policy's adapter, or that changes nothing but the head.
    """
    check_lora(policy.config, model, lora, base, policy.source)
    modules = {module_of(key) for key in policy.weights if is_lora(key)}
    kept = {module_of(key) for key in _below_the_head(policy, base) if is_lora(key)}
    if not kept:
        raise ValueError(
            f"{policy.source}: the adapter changes only the language model head, which a reward model does not have. Leave "
            f"start_from_sft unset, or train an adapter of the layers."
        )
    config = deepcopy(policy.config)
    if kept < modules:
        config.target_modules = kept
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    config.lora_dropout, config.base_model_name_or_path = model.lora_dropout, None
    return config


def start_from(model: PeftModel, policy: Adapter) -> None:
    """Copy the LoRA weights of a policy into the reward adapter of a classifier, and leave its head as it is.

    Raises:
        ValueError: the tensors do not match, or one would change the base.
    """
    base = model.get_base_model()
    weights = without_the_base(policy.source, _below_the_head(policy, base), base)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    head = own.pop(HEAD)
    shapes, needed = ({key: tuple(of.shape) for key, of in found.items()} for found in (weights, own))
    check_tensors(policy.source, shapes, needed)
    set_peft_model_state_dict(model, {**weights, HEAD: head})


def _below_the_head(policy: Adapter, base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a policy's adapter that a classifier has a place for."""
    return {key: of for key, of in policy.weights.items() if key.startswith(f"{PREFIX}{base.base_model_prefix}.")}
