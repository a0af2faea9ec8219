"""Check the type and the range of every option before anything is loaded.

Most options belong to TRL and Trainer. They read `max_steps: 0` as three epochs, accept a `learning_rate` of -1, and read
`save_strategy: no` as False. Here each of these is an error. A value gets the type that the option's annotation names, also
inside lists and mappings.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from data.cells import shorten


ABOVE_0 = """
    temperature num_train_epochs epsilon epsilon_high dual_clip value_clip kl_target kl_horizon max_approx_kl adam_epsilon
    repetition_penalty logging_steps eval_steps save_steps lora_alpha vllm_importance_sampling_clip_max
    vllm_importance_sampling_cap delta discopop_tau sapo_temperature_neg sapo_temperature_pos
"""
FROM_0 = """
    first_prompt
    learning_rate value_learning_rate weight_decay max_grad_norm beta vf_coef entropy_coef ptx_coef missing_eos_penalty
    critic_warmup_updates sample_updates warmup_steps top_k vllm_importance_sampling_clip_min dataloader_num_workers
    center_rewards_coefficient router_aux_loss_coef eval_delay neftune_noise_alpha num_completions_to_print
    entropy_coef_delta entropy_coef_min entropy_coef_max entropy_target off_policy_mask_threshold reward_std_coef
    overlap max_tool_calling_iterations vllm_server_timeout vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
"""
FROM_1 = """
    rounds labels
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps steps_per_generation
    generation_batch_size num_generations num_generations_eval num_iterations max_completion_length max_length
    sft_completions sample_prompts eval_prompts max_prompts max_pairs candidates batch_size lora_r lora_top_layers
    precompute_ref_batch_size eval_accumulation_steps dataloader_prefetch_factor dataset_num_proc ddp_bucket_cap_mb
    ddp_timeout torch_empty_cache_steps ref_model_sync_steps vllm_max_model_length vllm_tensor_parallel_size
    pad_to_multiple_of prompt_tokens processes num_members vocab_size n_positions n_layer n_embd n_head
"""
SHARE = """
    gamma lam value_lam min_reward_accuracy min_p lora_dropout dropout label_smoothing label_smoothing_factor ld_alpha
    ref_model_mixup_alpha top_entropy_quantile min_kept warmup_ratio
"""
# Ranges of the options that are numbers; unset (None) is always allowed.
RANGES = (
    (ABOVE_0.split(), "above 0", lambda x: x > 0),
    (FROM_0.split(), "0 or more", lambda x: x >= 0),
    (FROM_1.split(), "1 or more", lambda x: x >= 1),
    (SHARE.split(), "from 0 to 1", lambda x: 0 <= x <= 1),
    (["adam_beta1", "adam_beta2"], "0 or more and below 1", lambda x: 0 <= x < 1),
    (["top_p", "vllm_gpu_memory_utilization"], "above 0 and at most 1", lambda x: 0 < x <= 1),
    (["ptx_max_length"], "2 or more", lambda x: x >= 2),  # a text of one token has nothing to predict
    (["seed", "data_seed"], "from 0 to 4294967295", lambda x: 0 <= x < 2**32),
    (["vllm_server_port", "vllm_group_port", "port"], "from 1 to 65535", lambda x: 1 <= x <= 65535),
    # Trainer would read 0 as unset, and train `num_train_epochs`.
    (["max_steps"], "1 or more, or -1 to train num_train_epochs", lambda x: x == -1 or x >= 1),
    (
        ["reward_weights", "reward_clip_range", "loss_weights", "f_alpha_divergence_coef", "save_total_limit"]
        + ["local_rank", "n"],
        "finite",
        lambda x: True,
    ),
)
# Sizes that fill the memory, or start a process each, without a word. No run needs more.
MOST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "batch_size"), 2**16),
    **dict.fromkeys(("precompute_ref_batch_size", "num_generations", "num_generations_eval", "n", "lora_r"), 2**16),
    **dict.fromkeys(("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"), 2**20),
    **dict.fromkeys(("num_iterations", "sft_completions", "sample_prompts", "pad_to_multiple_of"), 2**20),
    **dict.fromkeys(("max_length", "max_completion_length", "ptx_max_length", "prompt_tokens", "vocab_size"), 2**24),
    **dict.fromkeys(("n_positions", "n_embd"), 2**13),
    **dict.fromkeys(("n_layer", "n_head"), 2**7),
    "num_members": 2**7,
    **dict.fromkeys(("rounds", "labels"), 2**20),
    **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc", "processes"), 2**12),
    **dict.fromkeys(("num_train_epochs", "max_steps", "ddp_timeout", "dataloader_prefetch_factor"), 2**30),
    "vllm_server_timeout": 2**30,
}
# Text options for which an empty text says something: no evaluation, no reward of this kind, no debugging.
MAY_BE_EMPTY = ("eval_dataset_name", "reward_adapter", "reward_funcs", "debug", "fsdp")
# With an empty text, a command line takes back what the recipe names.
UNSET_BY_EMPTY = ("sft_adapter", "ptx_dataset_name", "report", "judge", "pairwise_judge")
# TRL's annotations allow null here, and its trainers do not.
NEVER_NULL = ("max_completion_length", "num_generations")
# Options that name a folder or a file, some of them or a repository on the hub.
PATHS = (
    *("model_name_or_path", "dataset_name", "eval_dataset_name", "ptx_dataset_name", "sft_adapter", "reward_adapter"),
    *("policy_adapter", "resume_from_checkpoint", "report", "pairs", "guidelines", "password_file"),
    "policies",
)
LONGEST_PART = 255  # bytes of a path between two slashes, on the file systems in use
# Options that are a mapping or the path of a JSON file; the other mappings may be given as JSON text.
MAPPING_OR_PATH = ("accelerator_config", "deepspeed", "fsdp_config")

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def fields_of(dataclass_types: tuple) -> Iterator[tuple[Field, Any]]:
    """Yield each option of the dataclasses, with its annotation."""
    for kind in dataclass_types:
        hints = get_type_hints(kind)
        for option in fields(kind):
            yield option, hints[option.name]


def check_types(given: Mapping[str, Any], dataclass_types: tuple, path: str | None) -> dict[str, Any]:
    """Return the given values with the types of their options, also inside lists and mappings.

    A number may be written as text, since YAML reads `1e-5` as text.

    Args:
        path: the recipe, for errors; None for the command line.

    Raises:
        ValueError: a value has another type; a text is empty or holds a zero byte.
    """
    found = dict(given)
    for option, hint in fields_of(dataclass_types):
        if option.name in given:
            found[option.name] = _typed(option, given[option.name], hint, path)
    return found


def _typed(option: Field, value: Any, hint: Any, path: str | None) -> Any:
    if value is None and option.name in NEVER_NULL:
        raise ValueError(f"{path or 'command line'}: {option.name}=None must be a whole number.")
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    if value is default or (type(value) is type(default) and value == default):
        return value
    if value == "" and option.name in UNSET_BY_EMPTY:
        return None
    where = f"{path or 'command line'}: {option.name}={shorten(value)}"
    if isinstance(value, str) and not value and option.name not in MAY_BE_EMPTY:
        raise ValueError(f"{where} is an empty text. Give a value, or leave {option.name} out.")
    if option.name in PATHS and any(
        isinstance(name, str) and name and not name.strip() for name in (value if isinstance(value, list) else [value])
    ):
        raise ValueError(f"{where} has a name of blanks alone. Name a folder, a file or a repository on the hub.")
    if _holds_zero(value):
        raise ValueError(f"{where} holds a zero byte, which no name and no path can. Remove it.")
    choices = option.metadata.get("choices") or _choices(hint)
    if choices and isinstance(value, str):
        if value not in choices:
            raise ValueError(f"{where} is not one of {', '.join(choices)}.")
        return value
    try:
        typed = _converted(value, hint)
    except ValueError:
        remedy = ""
        if isinstance(value, bool):  # YAML 1.1
            remedy = " YAML reads yes, no, on and off as true and false. If you mean the word, put it in quotes."
        raise ValueError(f"{where} must be {_words(hint)}.{remedy}") from None
    if typed == [] and default is None:
        raise ValueError(f"{where} is an empty list. Name what it is about, or leave {option.name} out.")
    if option.name == "pad_to_multiple_of" and isinstance(typed, str):
        if not typed.isdigit():
            raise ValueError(f"{where} must be a whole number, auto or null.")
        return int(typed)
    if isinstance(typed, str) and any(get_origin(part) is dict or part is dict for part in _parts(hint)):
        _check_json(option.name, typed, where)
    return typed


def _check_json(name: str, text: str, where: str) -> None:
    """Check a text that stands for a mapping: JSON, or, for some options, the path of a JSON file."""
    if name in MAPPING_OR_PATH and not text.startswith("{"):
        if not os.path.isfile(os.path.expanduser(text)):  # False for a name that no file system holds
            raise ValueError(f"{where} is neither a mapping nor a JSON file that exists. Correct it, or leave it out.")
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a mapping, or JSON text of one ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a mapping, or JSON text of one.")


def _holds_zero(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_zero(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple)):
        return any(map(_holds_zero, value))
    return isinstance(value, str) and "\0" in value


def _parts(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [
        str(each.value) for part in _parts(hint) if isinstance(part, type) and issubclass(part, Enum) for each in part
    ]


def _converted(value: Any, hint: Any) -> Any:
    """Return a value in the type of an annotation.

    Raises:
        ValueError: it does not have this type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _in_union(value, inner)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in inner):
            raise ValueError
        return value
    if origin in (list, tuple):
        return _in_list(value, origin, inner)
    if hint is dict or origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError
        return {key: _converted(entry, inner[1] if inner else Any) for key, entry in value.items()}
    if hint is Any:
        return _plain(value)
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint in (int, float):
        return _number(value, hint)
    if not isinstance(hint, type) or not isinstance(value, hint):
        raise ValueError
    return value


def _in_union(value: Any, parts: tuple) -> Any:
    # Text stays text where the option allows it, so that a number as text is not converted.
    for part in sorted(parts, key=lambda part: part is not type(value)):
        try:
            return _converted(value, part)
        except ValueError:
            continue
    raise ValueError


def _in_list(value: Any, origin: type, inner: tuple) -> Any:
    if isinstance(value, str) and inner[0] is str:  # a single text needs no brackets
        return [value]
    of_each = inner[:1] * len(value) if origin is list and isinstance(value, list) else inner
    if not isinstance(value, (list, tuple)) or len(of_each) != len(value):
        raise ValueError
    return origin(_converted(each, part) for each, part in zip(value, of_each, strict=True))


def _plain(value: Any) -> Any:
    """Return a value of a mapping without annotation: a number that YAML reads as text, such as 1e-5, is a number."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return _number(value, float if re.search(r"[.eE]", value) else int)
    return value


def _number(value: Any, hint: type) -> Any:
    if isinstance(value, bool):
        raise ValueError
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError from None
    if isinstance(value, str):
        return number
    if not isinstance(value, (int, float)) or not (number == value or math.isnan(number)):
        raise ValueError
    return number  # also a whole number as a float, as on the command line: transformers refuses temperature 1


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    found = []
    for part in _parts(hint):
        if get_origin(part) in (list, tuple):
            found.append(f"a list in brackets, each entry {_words(get_args(part)[0])}")
        elif get_origin(part) is Literal:
            found += [str(each).lower() for each in get_args(part)]
        else:
            found.append(names.get(part) or ("a mapping" if dict in (part, get_origin(part)) else "text"))
    return " or ".join(dict.fromkeys(found))


def check_ranges(options: Mapping[str, Any]) -> None:
    """Check the ranges of all options that are numbers, of any stage, and the length of those that are paths.

    Raises:
        ValueError: a number is outside of its range, too large to be meant, or not finite; or no file system has such a path.
    """
    for name in PATHS:
        given = options.get(name)
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, str) and any(len(os.fsencode(part)) > LONGEST_PART for part in path.split("/")):
                raise ValueError(
                    f"{name}={shorten(path)} has a part of more than {LONGEST_PART} bytes, and no file has such a name. "
                    f"Correct the path."
                )
    for names, words, holds in RANGES:
        for name in names:
            value = options.get(name)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(number, (int, float)) or isinstance(number, bool):
                    continue
                try:
                    finite = math.isfinite(number)
                except OverflowError:  # a whole number that float64 does not hold
                    finite = False
                if not (finite and holds(number)):
                    raise ValueError(f"{name}={shorten(value)} must be {words}.")
                if number > MOST.get(name, math.inf):
                    raise ValueError(
                        f"{name}={shorten(value)} is more than {MOST[name]:,}, the most that a run can use."
                    )
