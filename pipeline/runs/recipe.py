"""Check a recipe before anything is loaded: its YAML, and the type and range of every option.

Most options belong to TRL and Trainer. They read `max_steps: 0` as three epochs, accept a `learning_rate` of -1, and read
`save_strategy: no` as False. Here each of these is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


ABOVE_0 = """
    temperature num_train_epochs epsilon epsilon_high value_clip kl_target kl_horizon max_approx_kl adam_epsilon
    repetition_penalty top_p logging_steps eval_steps save_steps lora_alpha vllm_importance_sampling_clip_max
"""
FROM_0 = """
    learning_rate value_learning_rate weight_decay max_grad_norm beta vf_coef entropy_coef ptx_coef missing_eos_penalty
    critic_warmup_updates sample_updates warmup_steps top_k vllm_importance_sampling_clip_min
"""
FROM_1 = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps steps_per_generation
    generation_batch_size num_generations num_iterations max_completion_length max_length sft_completions
    sample_prompts eval_prompts max_prompts max_pairs batch_size lora_r lora_top_layers
"""
SHARE = "gamma lam value_lam min_reward_accuracy min_p lora_dropout adam_beta1 adam_beta2"
# Ranges of the options that are numbers; unset (None) is always allowed.
RANGES = (
    (ABOVE_0.split(), "above 0", lambda x: x > 0),
    (FROM_0.split(), "0 or more", lambda x: x >= 0),
    (FROM_1.split(), "1 or more", lambda x: x >= 1),
    ([*SHARE.split(), "min_kept"], "from 0 to 1", lambda x: 0 <= x <= 1),
    (["ptx_max_length"], "2 or more", lambda x: x >= 2),  # a text of one token has nothing to predict
    (["seed"], "from 0 to 4294967295", lambda x: 0 <= x < 2**32),
    # Trainer would read 0 as unset, and train `num_train_epochs`.
    (["max_steps"], "1 or more, or -1 to train num_train_epochs", lambda x: x == -1 or x >= 1),
    (["reward_weights", "reward_clip_range"], "finite", lambda x: True),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} comes twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def find_recipe(path: str) -> str:
    """Return the path of a recipe. Recipes of `pipeline/recipes` are found from any folder."""
    ours = Path(__file__).parents[1] / "recipes" / path.removeprefix("pipeline/recipes/")
    named = path.startswith("pipeline/recipes/") and not Path(path).exists()
    return str(ours) if named and ours.is_file() else path


def read_recipe(path: str) -> dict[str, Any]:
    """Read the keys and values of a recipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, is not a mapping, or has a key twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.load(file, _Loader)  # noqa: S506 (a safe loader)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(
            f"--config {path}: no such file. Name a recipe, such as those in pipeline/recipes."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not a YAML recipe ({problem}). Correct the file.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: not a YAML mapping. Write a recipe as lines of `key: value`.")
    return recipe


def check_types(recipe: dict[str, Any], dataclass_types: tuple, path: str | None) -> None:
    """Check that each value of a recipe has the type that its dataclass gives the key.

    A number may be written as text, since YAML reads `1e-5` as text.

    Raises:
        ValueError: a value has another type.
    """
    for kind in dataclass_types:
        hints = get_type_hints(kind)
        for option in fields(kind):
            if option.name in recipe:
                _check_type(option, recipe[option.name], hints[option.name], path)


def _check_type(option: Field, value: Any, hint: Any, path: str | None) -> None:
    where = f"{path}: {option.name}={value!r}"
    choices = option.metadata.get("choices") or _choices(hint)
    if choices and isinstance(value, str):
        if value not in choices:
            raise ValueError(f"{where} is not one of {', '.join(choices)}.")
    elif not (_fits(value, hint) or value is option.default):
        remedy = ""
        if isinstance(value, bool):  # YAML 1.1
            remedy = " YAML reads yes, no, on and off as true and false. If you mean the word, put it in quotes."
        raise ValueError(f"{where} must be {_words(hint)}.{remedy}")


def _parts(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [
        str(each.value) for part in _parts(hint) if isinstance(part, type) and issubclass(part, Enum) for each in part
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple):
        if isinstance(value, str):  # a single text needs no brackets
            return inner[0] is str
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if hint is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false")
    if hint in (int, float):
        try:
            number = hint(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return not isinstance(value, bool) and (isinstance(value, str) or math.isnan(number) or number == value)
    if not isinstance(hint, type):  # dict[str, int], Any
        return hint is Any or origin is None or isinstance(value, (origin, str))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    found = []
    for part in _parts(hint):
        if get_origin(part) in (list, tuple):
            found.append(f"a list in brackets, each entry {_words(get_args(part)[0])}")
        else:
            found.append(names.get(part) or ("a mapping" if part is dict else "text"))
    return " or ".join(dict.fromkeys(found))


def check_ranges(options: Mapping[str, Any]) -> None:
    """Check the ranges of all options that are numbers, of any stage.

    Raises:
        ValueError: a number is outside of its range, or not finite.
    """
    for names, words, holds in RANGES:
        for name in names:
            value = options.get(name)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, (int, float)) and not (math.isfinite(number) and holds(number)):
                    raise ValueError(f"{name}={value} must be {words}.")
