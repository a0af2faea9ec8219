"""`reward_models.composite`: what a recipe names becomes functions, and each mistake of theirs is one clear error."""

import asyncio
import io
import math
import os
import re
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import gather
from datasets import Dataset
from transformers import TrainerState
from trl import ModelConfig
from trl.rewards import think_format_reward
from trl.trainer.utils import is_async_callable

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone
from pipeline.runs.command_line import parse
from reward_models.composite import Composite, RewardError, async_runner, call_rewards
from reward_models.functions import PROTOCOL, RewardArguments, load_function, load_functions
from reward_models.rules import contains


ROOT = Path(__file__).parents[2]
ROWS = Dataset.from_dict({"prompt": ["A", "B"], "contains": ["x", "y"]})


# ------------------------------------------------------------------------------------ what a recipe names
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


def test_brackets_call_a_function_that_makes_one():
    # Of 3 tokens the limit 4 leaves 2 unpunished and the third costs 1/2; of 2 tokens none is over.
    punish = load_function("trl.rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)")
    assert punish(completion_ids=[[1, 2, 3], [1, 2]]) == [-0.5, 0.0]
    # Its default: bigrams are given, the penalty is -1. Of (5 5) (5 5), one of two repeats.
    assert load_function("trl.rewards.get_repetition_penalty_reward(ngram_size=2)")([[5, 5, 5]]) == [-0.5]
    assert load_function("trl.rewards.get_repetition_penalty_reward()")([[5, 5, 5]]) == [0.0]
    assert load_function("reward_models.rules.get_regex(pattern=r'(?i)^(a|b), \\d+$')")(["A, 12", "c, 3"]) == [1, 0]


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
@pytest.mark.parametrize("options", ["", "(n=2)"])
def test_path_that_leads_nowhere(path, reason, options):
    with pytest.raises(ValueError) as caught:
        load_function(path + options)
    message = str(caught.value)
    assert message.startswith(f"reward_funcs: cannot import {path!r} (")
    assert reason in message
    assert message.endswith("Write it as package.module.function.")


@pytest.mark.parametrize(
    "options", ["(", "(12)", "(target=12", "(target=12))", "(target=twelve)", "(target=12)(1)", "(*[12])", "(target=)"]
)
def test_options_that_cannot_be_read(options):
    with pytest.raises(ValueError) as caught:
        load_function(f"reward_models.rules.get_length{options}")
    message = str(caught.value)
    assert message.startswith(f"reward_funcs: cannot read the options of 'reward_models.rules.get_length{options}'. ")
    assert "Name each one" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "reward_models.rules.get_length(targt=12)",
            "TypeError: get_length() got an unexpected keyword argument 'targt'",
        ),
        ("reward_models.rules.get_length()", "missing 1 required positional argument: 'target'"),
        ("reward_models.rules.get_length(target=0)", "ValueError: target=0 is not a positive number of tokens."),
        ("reward_models.rules.get_regex(pattern='(')", "ValueError: pattern='(' is not a regular expression"),
        ("reward_models.rules.contains(contains='a')", "missing 1 required positional argument: 'completions'"),
    ],
)
def test_options_that_make_no_function(text, reason):
    with pytest.raises(ValueError) as caught:
        load_function(text)
    message = str(caught.value)
    assert message.startswith(f"reward_funcs: {text!r} makes no reward function (")
    assert reason in message
    assert message.endswith("from these options.") == ("TypeError" in reason or "argument" in reason)


def test_what_is_no_function():
    with pytest.raises(ValueError, match="^reward_funcs: 'reward_models.rules.__doc__' is not a function. Name a "):
        load_function("reward_models.rules.__doc__")
    with pytest.raises(
        ValueError, match=r"^reward_funcs: 'builtins.dict\(a=1\)' is not a function. Name a reward function.$"
    ):
        load_function("builtins.dict(a=1)")


def test_an_entry_that_yaml_reads_as_a_mapping():
    with pytest.raises(ValueError, match=r"^reward_funcs: \{.*\} is not text\. Put the entry in quotes\.$"):
        load_function({"reward_models.rules.get_regex(pattern='a": "b')"})


def needs_client(client, completions, **kwargs):
    return [client for _ in completions]


def needs_completion(completion, **kwargs):
    return [1.0 for _ in completion]


def with_client(*args, **kwargs):
    return needs_client(1.0, *args, **kwargs)


with_client.__wrapped__ = needs_client  # as functools.wraps leaves it


def test_functions_are_checked_against_the_columns():
    assert load_functions(["reward_models.rules.contains"], ROWS, "rows.jsonl") == [contains]
    with pytest.raises(ValueError) as caught:
        load_functions(["reward_models.rules.contains"], ROWS.rename_column("contains", "contain"), "rows.jsonl")
    message = str(caught.value)
    assert message.startswith(
        "reward_funcs: 'reward_models.rules.contains' cannot be called (missing a required argument: 'contains')."
    )
    assert "the columns of rows.jsonl (contain) by name. Add the column" in message
    # TRL hands on no column called `completion`.
    rows = Dataset.from_dict({"prompt": ["A"], "completion": ["b"]})
    with pytest.raises(ValueError, match="missing a required argument: 'completion'.*none but prompt"):
        load_functions([f"{__name__}.needs_completion"], rows, "rows.jsonl")
    with pytest.raises(ValueError, match="'trl.rewards.get_soft_overlong_punishment' cannot be called.* in brackets"):
        load_functions(["trl.rewards.get_soft_overlong_punishment"], ROWS, "rows.jsonl")
    assert load_functions([f"{__name__}.with_client"], ROWS, "rows.jsonl") == [with_client]


@pytest.mark.parametrize("given", [{}, {"reward_funcs": []}, {"reward_adapter": ""}, {"reward_adapter": [""]}])
def test_no_reward(given):
    with pytest.raises(ValueError, match="set reward_adapter, reward_funcs or both"):
        RewardArguments(**given)


RECIPE = """
reward_adapter: runs/reward
reward_funcs:
  - trl.rewards.think_format_reward
  - trl.rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
  - reward_models.rules.get_regex(pattern=r'^\\d+, [a-z]$')
"""


def test_a_recipe_and_the_command_line_name_rewards_alike(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (given,) = parse(RewardArguments, args=["--config", str(tmp_path / "recipe.yaml")])
    assert given.reward_adapter == ["runs/reward"]
    path, call, regex = map(load_function, given.reward_funcs)
    assert path is think_format_reward and call([[1, 2, 3]]) == [-0.5] and regex(["12, a"]) == [1.0]
    flags = ["--reward_adapter", "runs/a", "runs/b", "--reward_funcs", *given.reward_funcs]
    assert parse(RewardArguments, args=flags) == (RewardArguments(["runs/a", "runs/b"], given.reward_funcs),)
    (tmp_path / "recipe.yaml").write_text(
        "reward_adapter: [runs/a, runs/b]\nreward_funcs: reward_models.rules.contains\n"
    )
    (given,) = parse(RewardArguments, args=["--config", str(tmp_path / "recipe.yaml")])
    assert given == RewardArguments(["runs/a", "runs/b"], ["reward_models.rules.contains"])


def test_the_rewards_in_the_docs_load():
    page = (ROOT / "docs" / "rewards.md").read_text()
    own = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), own)  # a function of the reader's own
    rows = {"completions": ["Hello world", "Hello"], "contains": ["world", "world"]}
    assert own["contains"](**rows) == contains(**rows) == [1.0, 0.0]
    block = re.search(r"```yaml\n(reward_adapter:.*?)```", page, re.DOTALL).group(1)
    given = yaml.safe_load(block)
    regex, punish = map(load_function, given["reward_funcs"])
    assert regex(["It has 4 stars", "No stars"]) == [1.0, 0.0]
    assert punish([[1] * 20]) == [-0.5]  # 4 of 8 tokens beyond 24 - 8
    assert len(given["reward_weights"]) == len(given["reward_adapter"] + given["reward_funcs"])


def test_several_adapters_score_as_each_does_alone(tiny, sft_adapter, reward_adapter, other_reward_adapter, tokenizer):
    def learned(*folders):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(sft_adapter, base=base))
        return learned_rewards(RewardArguments(list(folders)), backbone, tokenizer), backbone.eval()

    given = {"prompts": ["A film", "It's"], "completion_ids": [tokenizer(" of wit")["input_ids"], [5]]}
    both, backbone = learned(other_reward_adapter, reward_adapter)
    assert [reward.role for reward in both] == ["reward", "reward_2"]
    assert Composite(both).names == [Path(other_reward_adapter).name, Path(reward_adapter).name]
    scores = [reward(**given) for reward in both]
    for folder, together in zip((other_reward_adapter, reward_adapter), scores, strict=True):
        (alone,), _ = learned(folder)
        assert together == pytest.approx(alone(**given), abs=1e-5)
    assert abs(scores[0][0] - scores[1][0]) > 1e-3
    backbone.add_value()  # starts from the first
    assert torch.equal(backbone.heads["value"].weight, backbone.heads["reward"].weight)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        first, second = (backbone.scores(ids, torch.ones_like(ids), role=reward.role) for reward in both)
        # The value read before a token that follows: of the state where the score is read.
        value = backbone.values(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long), 1)[:, 0]
    assert value.item() == pytest.approx(first.item(), abs=1e-5)
    assert value.item() != pytest.approx(second.item(), abs=1e-3)


# ------------------------------------------------------------------------------------ what they give
def scores_of(functions, prompts, completions, weights=None):
    """As TRL's trainers do on one process: call, stack, sum."""
    composite = Composite(functions, weights)
    rows = Dataset.from_dict({"prompt": prompts})
    with asyncio.Runner() as runner:
        columns = call_rewards(composite.functions, rows, completions, [[1]] * len(prompts), runner)
    return composite.total(columns, prompts, completions).tolist()


def words(completions, **kwargs):
    return [len(completion.split()) for completion in completions]


async def slow_words(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(completion.split())) for completion in completions]


class Vowels:
    async def __call__(self, completions, **kwargs):
        return torch.tensor([sum(letter in "aeiou" for letter in completion) for completion in completions])


def short_only(completions, **kwargs):
    return [1.0 if len(completion) < 4 else None for completion in completions]


def test_a_weighted_sum_of_sync_and_async_functions():
    functions = [words, slow_words, Vowels(), short_only]
    # "a b": 2 words, 2 words, 1 vowel, short.  "an idea": 2, 2, 4 vowels, and short_only does not apply.
    assert scores_of(functions, ["p", "q"], ["a b", "an idea"]) == [2 + 2 + 1 + 1, 2 + 2 + 4]
    weights = [1.0, -0.5, 0.25, 10.0]
    assert scores_of(functions, ["p", "q"], ["a b", "an idea"], weights) == [2 - 1 + 0.25 + 10, 2 - 1 + 1]


def test_async_functions_run_where_an_event_loop_runs_already():
    """As in a notebook. All calls of a run share one loop, since async clients are bound to theirs."""
    loops = []

    async def remembers(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.5] * len(completions)

    def evaluate() -> list:
        composite, rows = Composite([remembers, words]), Dataset.from_dict({"prompt": ["p"]})
        with async_runner() as runner:
            return [call_rewards(composite.functions, rows, ["a b"], [[1]], runner).tolist() for _ in range(2)]

    async def notebook() -> list:
        return evaluate()

    assert asyncio.run(notebook()) == evaluate() == [[[0.5, 2.0]]] * 2
    assert loops[0] is loops[1] and all(loop.is_closed() for loop in loops)


def test_functions_of_trl_work_unchanged():
    functions = [
        load_function("trl.rewards.think_format_reward"),
        load_function("trl.rewards.get_repetition_penalty_reward()"),
    ]
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    assert scores_of(functions, ["p", "q"], completions) == [1.0, 0.0]
    # They read conversations; of a text, think_format_reward takes the first letter for a message.
    with pytest.raises(ValueError, match="^reward function 'think_format_reward' raised TypeError: .* completion 'b'"):
        scores_of(functions, ["p"], ["b"])


def test_functions_keep_their_kind_and_get_names_of_their_own():
    composite = Composite([words, slow_words, Vowels(), words, partial(words)])
    assert composite.names == ["words", "slow_words", "Vowels", "words_2", "words_3"]
    assert [function.__name__ for function in composite.functions] == composite.names
    assert [is_async_callable(function) for function in composite.functions] == [False, True, True, False, False]


def test_weights_are_one_a_function():
    with pytest.raises(ValueError, match=r"^reward_weights=\[1.0\] has 1 weights for 2 rewards, words, Vowels\. "):
        Composite([words, Vowels()], [1.0])


def raises(completions, **kwargs):
    raise KeyError("solution")


async def raises_later(completions, **kwargs):
    await asyncio.sleep(0)
    raise KeyError("solution")


def forgets_return(completions, **kwargs):
    words(completions)


def gives_one(completions, **kwargs):
    return [1.0]


def second(value):
    def gives(completions, **kwargs):
        return [0.0, value]

    return gives


def returns(value):
    """A function that returns what `value()` makes."""

    def gives(completions, **kwargs):
        return value()

    return gives


def forever():
    while True:
        yield 1.0


class Stop(BaseException):
    pass


def stops(error):
    def gives(completions, **kwargs):
        raise error

    return gives


FIRST = "2 completions, the first for prompt 'p', completion 'a b'"
FIRST_ROW = "for prompt 'p', completion 'a b'. Return a finite number, or None if the function does not apply."
SECOND = "for prompt 'q', completion 'c'. Return a finite number, or None if the function does not apply."


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


def logs(name, value):
    """Return a reward that logs a metric."""

    def logs(completions, log_metric, **kwargs):
        log_metric(name, value)
        return [0.0] * len(completions)

    return logs


def test_rloo_cannot_learn_from_rows_that_are_all_without_a_score():
    nothing = torch.full((2, 1), float("nan"))
    composite = Composite([words])
    scored = composite.total(torch.tensor([[1.0], [float("nan")]]), ["p", "q"], ["a", "b"], all_scored=False)
    assert scored.tolist() == [1.0, 0.0]
    with pytest.raises(
        RewardError, match=r"make no finite score \(words nan; nan is None\) for prompt 'p', completion 'a'"
    ):
        composite.total(nothing, ["p", "q"], ["a", "b"], all_scored=False)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, f"'raises' raised KeyError: 'solution'. It was called with {FIRST}."),
        (raises_later, f"'raises_later' raised KeyError: 'solution'. It was called with {FIRST}."),
        (
            forgets_return,
            "'forgets_return' returned None. Return a list with one number for each completion.",
        ),
        (gives_one, f"'gives_one' returned 1 rewards for {FIRST}. Return one for each completion."),
        (second(float("nan")), f"'gives' returned nan {SECOND}"),
        (second(float("-inf")), f"'gives' returned -inf {SECOND}"),
        (second("1.0"), f"'gives' returned '1.0' {SECOND}"),
        (second(1j), f"'gives' returned 1j {SECOND}"),
        (second("x" * 1000), f"'gives' returned '{'x' * 56}... {SECOND}"),
        (returns(forever), f"'gives' returned more than 2 rewards for {FIRST}. Return one for each completion."),
        (
            returns(lambda: numpy.ones((1, 2))),
            f"'gives' returned 1 rewards for {FIRST}. Return one for each completion.",
        ),
        (returns(lambda: torch.ones(2, 3)), f"'gives' returned tensor([1., 1., 1.]) {FIRST_ROW}"),
        (
            returns(lambda: torch.ones(2, device="meta")),
            f"'gives' returned tensor(..., device='meta', size=()) {FIRST_ROW}",
        ),
        (stops(SystemExit(0)), f"'gives' raised SystemExit: 0. It was called with {FIRST}."),
        (stops(GeneratorExit()), f"'gives' raised GeneratorExit: . It was called with {FIRST}."),
        (stops(Stop("now")), f"'gives' raised Stop: now. It was called with {FIRST}."),
        (stops(Mute()), f"'gives' raised Mute: <an error without a text>. It was called with {FIRST}."),
        (
            logs("share", "half"),
            f"'logs' raised TypeError: log_metric has 'half' for 'share'. Give it a number. It was called with {FIRST}.",
        ),
        (
            logs(3, 0.5),
            f"'logs' raised TypeError: log_metric has 3 for a name. Give it a text. It was called with {FIRST}.",
        ),
    ],
)
def test_a_mistake_names_the_function_and_shows_the_sample(function, message):
    with pytest.raises(ValueError) as caught:
        scores_of([words, function], ["p", "q"], ["a b", "c"])
    assert str(caught.value) == f"reward function {message}"
    assert isinstance(caught.value.__cause__, KeyError) == function.__name__.startswith("raises")


@pytest.mark.parametrize(
    "values",
    [
        (True, None),
        (1, 2.5),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        numpy.array([1, 2], dtype=numpy.int8),
        [numpy.bool_(True), torch.tensor(2)],
        {"a": 1.0, "b": 2.0}.values(),
    ],
    ids=["bools", "tuple", "tensor", "array", "scalars", "values"],
)
def test_numbers_of_any_kind_are_scored(values):
    given = values.detach() if isinstance(values, torch.Tensor) else values
    expected = [0.0 if value is None else float(value) for value in given]
    scores = scores_of([returns(lambda: values), lambda completions, **_: [0.0, 0.0]], ["p", "q"], ["a", "b"])
    assert scores == expected
    assert scores_of([returns(lambda: (float(value or 0) for value in given))], ["p", "q"], ["a", "b"]) == expected


def test_ctrl_c_names_the_function_that_was_running():
    """It stays a KeyboardInterrupt: a user pressed it."""
    with pytest.raises(KeyboardInterrupt) as caught:
        scores_of([stops(KeyboardInterrupt())], ["p", "q"], ["a", "b"])
    assert caught.value.__notes__ == ["The reward function 'gives' was running."]


def test_a_function_that_closes_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(RewardError, match=r"'gives' closed sys\.stdout or sys\.stderr, to which the run prints"):
        scores_of([returns(lambda: sys.stdout.close() or [1.0, 1.0])], ["p", "q"], ["a", "b"])


async def disturbs(completions, **kwargs):
    torch.manual_seed(0)
    await asyncio.sleep(0)
    torch.rand(3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    os.chdir("/")
    sys.stdout = io.StringIO()
    return [1.0, 1.0]


@pytest.mark.parametrize("raises", [False, True])
def test_what_a_function_changes_in_the_process_is_undone(raises, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    functions = Composite([disturbs, stops(ValueError()) if raises else words]).functions
    stdout, expected = sys.stdout, torch.random.get_rng_state()
    with asyncio.Runner() as runner:
        call_rewards(functions, ROWS, ["a", "b"], [[1], [2]], runner)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert (Path.cwd(), sys.stdout, torch.get_default_dtype()) == (tmp_path, stdout, torch.float32)
    assert torch.is_grad_enabled() and torch.get_default_device().type == torch.empty(0).device.type == "cpu"


def test_a_row_that_no_function_scores_is_an_error_that_shows_it():
    with pytest.raises(ValueError) as caught:
        scores_of([short_only, short_only], ["p", "q"], ["a b", "an idea"])
    assert str(caught.value) == (
        "reward functions make no finite score (short_only nan, short_only_2 nan; nan is None) for prompt 'q', "
        "completion 'an idea'. At least one function must return a number for each row."
    )


def test_a_sum_beyond_the_precision_is_an_error():
    composite = Composite([words, words], [1e30, 1.0])
    with pytest.raises(ValueError, match=r"no finite score \(words 1e\+30, words_2 1; .* completion 'b'"):
        composite.total(torch.tensor([[1.0, 1.0], [1e30, 1.0]]), ["p", "q"], ["a", "b"])


def test_a_weight_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match=r"no finite score \(words 1;"):
        scores_of([words], ["p"], ["a"], [float("nan")])


def test_a_mistake_is_raised_once():
    composite = Composite([raises, words])
    composite.functions[0](prompts=["p"], completions=["a"])
    with pytest.raises(ValueError, match="raised KeyError"):
        composite.total(torch.tensor([[0.0, 1.0]]), ["p"], ["a"])
    assert composite.total(torch.tensor([[0.0, 1.0]]), ["p"], ["a"]).tolist() == [1.0]


def test_without_a_trainer_functions_get_what_the_protocol_promises():
    seen = {}

    def curious(prompts, completions, completion_ids, contains, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(prompts=prompts, completion_ids=completion_ids, contains=contains, step=trainer_state.global_step)
        seen.update(kwargs)
        log_extra("column", completions)
        log_metric("metric", 1.0)
        return [1.0, None]

    rows = ROWS.add_column("completion_ids", [[9], [9]]).add_column("completion", ["x", "y"])
    with asyncio.Runner() as runner:
        columns = call_rewards([curious], rows, ["a", "b"], [[1], [2, 3]], runner)
    assert seen == {"prompts": ["A", "B"], "completion_ids": [[1], [2, 3]], "contains": ["x", "y"], "step": 0}
    assert columns[0].tolist() == [1.0] and columns[1].isnan().all()


def test_async_functions_of_several_calls_share_an_event_loop():
    loops = []

    async def client(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0, 1.0]

    with asyncio.Runner() as runner:
        for _ in range(2):
            call_rewards([client], ROWS, ["a", "b"], [[1], [2]], runner)
        assert loops[0] is loops[1] and not loops[0].is_closed()


def clears(completions, **kwargs):
    values = [1.0] * len(completions)
    completions.clear()
    return values


def edits_texts(prompts, completions, **kwargs):
    prompts[:] = completions[:] = ["edited"] * len(prompts)
    return [1.0] * len(prompts)


def edits_turns(completions, **kwargs):
    for turns in completions:
        turns[0]["content"] = "edited"
    return [1.0] * len(completions)


def edits_tokens(completion_ids, **kwargs):
    for row in completion_ids:
        row.pop()
    return [1.0] * len(completion_ids)


def edits_columns(contains, **kwargs):
    contains[0]["words"].append("edited")
    return [1.0] * len(contains)


def edits_state(completions, trainer_state, **kwargs):
    trainer_state.log_history[0]["loss"] = 0.0
    trainer_state.log_history.clear()
    trainer_state.max_steps = 0
    trainer_state.stateful_callbacks["x"] = {}
    return [1.0] * len(completions)


async def clears_later(completions, completion_ids, **kwargs):
    completions.clear()
    completion_ids[0].clear()
    return [1.0, 1.0]


@pytest.mark.parametrize(
    "function",
    [clears, edits_texts, edits_turns, edits_tokens, edits_columns, edits_state, clears_later],
    ids=lambda function: function.__name__,
)
def test_a_function_that_edits_what_it_gets_changes_nothing(function):
    state = TrainerState(max_steps=8, log_history=[{"loss": 1.0}])
    given = {"prompts": ["p", "q"], "completions": [[{"role": "assistant", "content": c}] for c in "ab"]}
    given |= {"completion_ids": [[1], [2, 3]], "contains": [{"words": ["x"]}, {"words": []}], "trainer_state": state}
    before = deepcopy(given)
    (guarded,) = Composite([function]).functions
    output = guarded(**given)
    assert (asyncio.run(output) if asyncio.iscoroutine(output) else output) == [1.0, 1.0]
    assert given == before


def test_a_function_that_logs_reaches_the_trainer():
    logged = []

    def logs(completions, log_metric, **kwargs):
        log_metric("name", 1.0)
        return [1.0]

    given = {"prompts": ["p"], "completions": ["a"], "log_metric": lambda *metric: logged.append(metric)}
    Composite([logs]).functions[0](**given)
    assert logged == [("name", 1.0)]


def test_rows_that_no_function_scores_are_trls_to_leave_out():
    composite, columns = Composite([words]), torch.tensor([[1.0], [math.nan]])
    with pytest.raises(RewardError, match="no finite score"):
        composite.total(columns, ["p", "q"], ["a", "b"])
    assert composite.total(columns, ["p", "q"], ["a", "b"], all_scored=False).tolist() == [1.0, 0.0]
    with pytest.raises(RewardError, match="no finite score"):
        composite.total(torch.tensor([[math.inf], [1.0]]), ["p", "q"], ["a", "b"], all_scored=False)


@pytest.mark.parametrize("column", PROTOCOL)
def test_a_column_with_a_name_of_the_protocol(column):
    rows = ROWS.add_column(column, ["taken", "taken"])
    with pytest.raises(
        ValueError, match=f"^rows.jsonl: the column '{column}' has the name of .* Rename or remove the column"
    ):
        load_functions([], rows, "rows.jsonl")


# ------------------------------------------------------------------------------------ two processes
def fails_on_one(prompts, completions, **kwargs):
    if prompts == ["of 1"]:
        raise KeyError("solution")
    return [1.0]


def misses_on_one(prompts, completions, **kwargs):
    return [None if prompt == "of 1" else 1.0 for prompt in prompts]


def on_each_process(function, message):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    prompts, completions = [f"of {accelerator.process_index}"], ["c"]
    composite = Composite([function])
    given = composite.functions[0](prompts=prompts, completions=completions)
    columns = gather(torch.tensor([[float("nan") if value is None else value] for value in given]))
    with pytest.raises(ValueError, match=message):
        composite.total(columns, prompts, completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails_on_one, r"'fails_on_one' raised KeyError: 'solution'\. .* for prompt 'of 1', completion 'c'"),
        (misses_on_one, "no finite score .* for prompt 'of 1', completion 'c'"),
    ],
)
def test_what_one_process_cannot_score_is_raised_on_all(function, message, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # without it accelerate warns that it sets it
    debug_launcher(on_each_process, (function, message), num_processes=2)
