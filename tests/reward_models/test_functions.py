"""`reward_models.functions`: dotted paths become functions, and a path that does not is named."""

import pytest
from trl.rewards import think_format_reward

from reward_models.functions import RewardArguments, load_function, reward_functions
from reward_models.learned import LearnedReward
from reward_models.rules import contains


@pytest.mark.parametrize(
    ("path", "function"),
    [("reward_models.rules.contains", contains), ("trl.rewards.think_format_reward", think_format_reward)],
)
def test_load_function(path, function):
    assert load_function(path) is function


def test_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def length(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("my_own_rewards.length")(["a"]) == [1.0]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("reward_models.rules.contain", "has no attribute 'contain'"),
        ("reward_models.rule.contains", "No module named 'reward_models.rule'"),
        ("no_such_package.contains", "No module named 'no_such_package'"),
        ("contains", "Empty module name"),
        ("", "Empty module name"),
        ("reward_models.rules.", "has no attribute ''"),
        (".rules.contains", "relative"),
    ],
)
def test_path_that_leads_nowhere(path, reason):
    with pytest.raises(ValueError) as caught:
        load_function(path)
    message = str(caught.value)
    assert message.startswith(f"reward_funcs: cannot import {path!r} (")
    assert reason in message
    assert message.endswith("Write it as package.module.function.")


def test_path_of_something_else():
    with pytest.raises(ValueError, match="^reward_funcs: 'reward_models.rules.__doc__' is not a function.$"):
        load_function("reward_models.rules.__doc__")


@pytest.mark.parametrize("given", [{}, {"reward_funcs": []}, {"reward_adapter": ""}])
def test_no_reward(given):
    with pytest.raises(ValueError, match="set reward_adapter, reward_funcs or both"):
        RewardArguments(**given)


PATHS = ["trl.rewards.think_format_reward", "reward_models.rules.contains"]


def test_functions_alone_keep_their_order():
    rewards = RewardArguments(reward_funcs=PATHS)
    assert reward_functions(rewards, backbone=None, tokenizer=None) == [think_format_reward, contains]


def test_adapter_comes_first(backbone, tokenizer):
    first, *rest = reward_functions(RewardArguments("some/adapter", PATHS), backbone, tokenizer)
    assert isinstance(first, LearnedReward)
    assert rest == [think_format_reward, contains]
    assert len(reward_functions(RewardArguments("some/adapter"), backbone, tokenizer)) == 1
