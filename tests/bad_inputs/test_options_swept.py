"""Every option of every stage, given values that no one means: a clear error or a config, before anything is loaded."""

import random
from importlib import import_module
from types import UnionType
from typing import Union, get_args, get_origin

import pytest

from pipeline.runs.command_line import parse
from pipeline.runs.recipe import MOST, RANGES, fields_of


STAGES = ("sft", "reward", "ppo", "dpo", "rloo", "grpo", "evaluation", "best_of_n", "reward_eval", "label")
STAGES += ("pairs",)
VALUES = (
    *(
        "-1",
        "0",
        "1",
        "1e9",
        "1e400",
        ".nan",
        "-.inf",
        "''",
        "text",
        "'-'",
        "null",
        "true",
        "1:30",
        "2024-01-01",
        "010",
    ),
    *("[]", "[1e-1, x]", "[[1], [2]]", "{}", "{a: 1e-1}", "'\\0'", "9" * 400),
)
DRAWN = 40  # options of a stage, each with one of the values


def fields_of_stage(stage: str) -> tuple:
    module = import_module(f"pipeline.{stage}")
    return module.OPTIONS


def needed(stage: str) -> dict[str, str]:
    """The options without which a stage's options cannot be made."""
    given = {"output_dir": "out"}
    if stage not in ("evaluation", "best_of_n", "reward_eval", "label", "pairs"):
        given |= {"use_cpu": "true", "bf16": "false"}
    if stage not in ("sft", "reward", "dpo", "label", "pairs"):
        given["reward_funcs"] = "package.function"
    adapters = {"evaluation": {"policy_adapter": "adapter"}, "pairs": {"policies": "adapter"}}
    return given | adapters.get(stage, {})


def judge(stage: str, key: str, value: str, words: list[str], recipe) -> str | None:
    """The fault of what a stage's options say to one value, or None."""
    try:
        parse(*fields_of_stage(stage), args=["--config", str(recipe), *words])
    except (ValueError, OSError, ImportError) as error:
        said = str(error)
        # `fsdp` and `deepspeed` in transformers' own words; two names of one option.
        names = (key, key.replace("activation_", "gradient_"), "transformers_", "ZeRO")
        if "\n" in said or len(said) > 1500 or not any(name in said for name in names):
            return f"{key}: {value} is {type(error).__name__}: {said}"
    except BaseException as error:
        return f"{key}: {value} raises {type(error).__name__}: {error}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recipe", "command line"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_value_of_any_option(stage, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(f"{stage} {way}")
    names = sorted({option.name for option, _ in fields_of(fields_of_stage(stage))})
    faults = []
    for key in draw.sample(names, min(DRAWN, len(names))):
        value, words = draw.choice(VALUES), []
        given = {name: word for name, word in needed(stage).items() if name != key}
        if way == "recipe":
            given[key] = value if value != "'\\0'" else '"\\0"'
        elif value != "'\\0'":  # no command line can hold it
            words = [f"--{key}", value.strip("'")]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("".join(f"{name}: {word}\n" for name, word in given.items()) or "{}\n")
        faults.append(judge(stage, key, value, words, recipe))
    assert not list(filter(None, faults))


@pytest.mark.parametrize("stage", STAGES)
def test_every_number_has_a_range(stage):
    """A new version of TRL or transformers may bring more."""
    ranged = {name for names, _, _ in RANGES for name in names}
    assert set(MOST) <= ranged
    for option, hint in fields_of(fields_of_stage(stage)):
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        numbers = {int, float, list[int], list[float], tuple[float, float]} & set(parts)
        assert not numbers or option.name in ranged, f"{option.name} has no range in pipeline.runs.recipe"
