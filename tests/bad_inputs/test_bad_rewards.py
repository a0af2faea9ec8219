"""Rewards that do not exist, cannot be called, or give what is no number: the function, the sample and the remedy."""

import asyncio
import math
import sys
from importlib import import_module

import pytest

from pipeline.reports.metrics import check_both_scored
from reward_models import rules


pytestmark = pytest.mark.slow


NAMES = {
    "none at all": ({"reward_adapter": ""}, r"Name a reward: set reward_adapter, reward_funcs or both"),
    "a misspelt function": (
        {"reward_funcs": "reward_models.rules.containz"},
        r"cannot import 'reward_models.rules.cont",
    ),
    "a misspelt module": ({"reward_funcs": "reward_model.rules.contains"}, r"cannot import .*No module named"),
    "a file": ({"reward_funcs": "rewards.py"}, r"cannot import 'rewards\.py'.*Write it as package\.module\.function"),
    "a function in a file": (
        {"reward_funcs": "./my_rewards.py:brevity"},
        r"'\./my_rewards\.py:brevity', because it names a file\. Write it as package\.module\.function: my_rewards\.brevity",
    ),
    "a function in a folder's file, with options": (
        {"reward_funcs": "rewards/mine.py::get_a(n=3)"},
        r"package\.module\.function: rewards\.mine\.get_a\(n=3\)\. Start",
    ),
    "a function in a file elsewhere": (
        {"reward_funcs": "/home/me/mine.py:a"},
        r": mine\.a\. Start the run in /home/me, or put that folder into PYTHONPATH",
    ),
    "a function in a file, with a dot": ({"reward_funcs": "./mine.a"}, r"package\.module\.function: mine\.a\. Start"),
    "an entry point": ({"reward_funcs": "mine:a"}, r"package\.module\.function: mine\.a\. Start"),
    "no path": ({"reward_funcs": "contains"}, r"cannot import 'contains'"),
    "no function": ({"reward_funcs": "reward_models.rules.__doc__"}, r"is not a function"),
    "a missing column": (
        {"reward_funcs": "reward_models.rules.contains"},
        r"missing a required argument: 'contains'.*none but prompt.*Add the column",
    ),
    "an unknown option": (
        {"reward_funcs": "reward_models.rules.get_length(tokens=3)"},
        r"unexpected keyword argument",
    ),
    "options that are no values": (
        {"reward_funcs": "reward_models.rules.get_length(n)"},
        r"cannot read the options of",
    ),
    "a value out of range": (
        {"reward_funcs": "reward_models.rules.get_length(target=0)"},
        r"target=0 is not a positive",
    ),
    "no pattern": (
        {"reward_funcs": "reward_models.rules.get_regex(pattern='(')"},
        r"'\(' is not a regular expression",
    ),
    "options without brackets": ({"reward_funcs": "trl.rewards.get_soft_overlong_punishment"}, r"in brackets"),
    "a mapping in YAML": (
        {"recipe": "reward_funcs: [{a.b: c}]\n"},
        r"reward_funcs=\[\{'a\.b': 'c'\}\] must be a list",
    ),
    "a weight too many": (
        {"reward_weights": [1.0, 2.0]},
        r"reward_weights=\[1\.0, 2\.0\] has 2 weights for 1 rewards",
    ),
    "a weight that is no number": ({"reward_weights": ["nan"]}, r"reward_weights=\[nan\] must be finite"),
    "a lone weight in YAML": ({"recipe": "reward_weights: 1.0\n"}, r"reward_weights=1\.0 must be a list in brackets"),
    "a scale without an adapter": (
        {"reward_adapter": "", "reward_funcs": "reward_models.rules.get_length(target=3)", "normalize_scores": True},
        r"normalize_scores scales reward adapters\. Name one",
    ),
}


def nan(completions, **kwargs):
    return [math.nan] * len(completions)


def infinite(completions, **kwargs):
    return [math.inf] * len(completions)


def text(completions, **kwargs):
    return ["good"] * len(completions)


def short(completions, **kwargs):
    return [1.0]


def nothing(completions, **kwargs):
    return None


def as_dict(completions, **kwargs):
    return {number: 1.0 for number in range(len(completions))}


def as_set(completions, **kwargs):
    return set(map(float, range(len(completions))))


def one(completions, **kwargs):
    return 1.0


def beyond(completions, **kwargs):
    return [1e39] * len(completions)  # float32 has no such number


def integer(completions, **kwargs):
    return [10**400] * len(completions)


def pairs(completions, **kwargs):
    return [[1.0, 2.0]] * len(completions)


def leaves(completions, **kwargs):
    sys.exit(0)


async def cancelled(completions, **kwargs):
    raise asyncio.CancelledError


def none_each(completions, **kwargs):
    return [None] * len(completions)


def broken(completions, **kwargs):
    raise KeyError("sentiment")


async def broken_service(completions, **kwargs):
    raise ConnectionError("the judge does not answer")


GIVEN = {
    nan: r"reward function 'nan' returned nan for prompt '.*', completion '.*'\. Return a finite number, or None",
    infinite: r"reward function 'infinite' returned inf for prompt",
    text: r"reward function 'text' returned 'good' for prompt",
    short: r"reward function 'short' returned 1 rewards for 8 completions, the first for prompt .*Return one for each",
    nothing: r"reward function 'nothing' returned None\. Return a list with one number for each completion",
    as_dict: r"reward function 'as_dict' returned a dict \(\{0: 1\.0.*Return a list",
    as_set: r"reward function 'as_set' returned a set",
    one: r"reward function 'one' returned a float \(1\.0\)",
    beyond: r"reward function 'beyond' returned 1e\+39 for prompt",
    integer: r"reward function 'integer' returned 1000",
    pairs: r"reward function 'pairs' returned \[1\.0, 2\.0\] for prompt",
    leaves: r"reward function 'leaves' raised SystemExit: 0\. It was called with 8 completions",
    cancelled: r"reward function 'cancelled' raised CancelledError",
    none_each: r"reward functions make no finite score \(none_each nan; nan is None\) for prompt",
    broken: r"reward function 'broken' raised KeyError: 'sentiment'\. It was called with 8 completions",
    broken_service: r"reward function 'broken_service' raised ConnectionError: the judge does not answer",
}


@pytest.mark.parametrize(("options", "message"), NAMES.values(), ids=NAMES)
def test_what_is_named(options, message, refuses):
    refuses("ppo", message, **options)


@pytest.mark.parametrize("stage", ["rloo", "grpo", "evaluation", "best_of_n"])
def test_in_other_stages_too(stage, refuses):
    refuses(stage, r"has 2 weights for 1 rewards", reward_weights=[1.0, 2.0])


@pytest.mark.parametrize("function", GIVEN, ids=lambda function: function.__name__)
def test_what_is_given(function, refuses):
    """At the first rollout, before the first step."""
    path = f"{__name__}.{function.__name__}"
    refuses("ppo", GIVEN[function], loads=True, trains=True, reward_adapter="", reward_funcs=path)


@pytest.mark.parametrize("stage", ["evaluation", "best_of_n"])
@pytest.mark.parametrize("function", [broken, broken_service, nan, none_each], ids=lambda function: function.__name__)
def test_what_is_given_is_looked_at_with_the_first_batch(stage, function, refuses, monkeypatch):
    """Not after all completions were sampled."""
    module, batches = import_module(f"pipeline.{stage}"), []
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda *args, **kwargs: map(noted(batches), sample(*args, **kwargs)))
    message = GIVEN[function].replace("8 completions", "2 completions")
    options = {"reward_adapter": "", "reward_funcs": f"{__name__}.{function.__name__}", "batch_size": 2}
    refuses(stage, message, loads=True, trains=True, **options)
    assert len(batches) == 1


def noted(batches: list):
    return lambda batch: batches.append(batch) or batch


def test_a_value_that_starts_from_no_reward_model(refuses):
    options = {"reward_adapter": "", "reward_funcs": "reward_models.rules.get_length(target=3)"}
    refuses("ppo", r"value_init='reward' needs a reward adapter", loads=True, value_init="reward", **options)


def test_ptx_without_texts(refuses):
    refuses("ppo", r"ptx_coef=0\.5 and ptx_dataset_name belong together", loads=True, ptx_coef=0.5)


@pytest.mark.parametrize(
    "function",
    [
        rules.get_regex("a"),
        rules.get_length(3),
        rules.get_repetition(2),
        rules.sentiment,
    ],
    ids=["regex", "length", "repetition", "sentiment"],
)
def test_an_empty_completion_has_a_reward(function):
    """A policy may end a completion at once: its only token is then end-of-text."""
    values = function(prompts=["A"], completions=[""], completion_ids=[[0]])
    assert len(values) == 1 and math.isfinite(values[0])


@pytest.mark.parametrize(("mean", "scored", "other"), [(math.nan, "SFT", "the policy"), (0.5, "the policy", "SFT")])
def test_a_reward_of_one_policy_alone_is_no_comparison(mean, scored, other):
    sft, policy = ({"reward": 1.0, "length": value} for value in (0.5 if math.isnan(mean) else math.nan, mean))
    check_both_scored(sft, sft)
    with pytest.raises(
        ValueError, match=f"^reward function 'length' scored completions of {scored} and none of {other}, so"
    ):
        check_both_scored(sft, policy)


CALLS: list[int] = []


def of_sft_alone(completions, **kwargs):
    """The evaluation asks for SFT's completions first."""
    CALLS.append(len(completions))
    return [0.5 if len(CALLS) == 1 else None] * len(completions)


def test_the_evaluation_ends_with_it(refuses):
    CALLS.clear()
    message = "reward function 'of_sft_alone' scored completions of SFT and none of the policy"
    refuses("evaluation", message, loads=True, trains=True, reward_funcs=f"{__name__}.of_sft_alone")
    assert len(CALLS) == 2
