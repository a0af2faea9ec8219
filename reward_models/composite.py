"""Any weighted sum of learned reward adapters and reward functions, each logged by itself.

How a recipe names them, what is an error in what they give, and the sum. Calling them in training, sync or async, is
TRL's.
"""

import ast
import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

from data.files import shorten
from pipeline.backbone.loading import read_adapter
from pipeline.backbone.roles import Backbone
from reward_models.learned import LearnedReward
from reward_models.normalization import read_normalization


# What TRL's trainers give a reward function by name, beside the columns of the dataset.
PROTOCOL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL's trainers would take for pictures are given to them under another name, and to functions under their own.
PICTURES = ("image", "images")
HIDDEN = "column:"
# What a function may raise and the run must end for with an error: `sys.exit(0)` among it, but for Ctrl-C.
RAISED = (Exception, SystemExit, asyncio.CancelledError)
LARGEST = torch.finfo(torch.float32).max  # rewards are kept in float32


class RewardError(ValueError):
    """A reward function failed, or what it gave is no reward. All processes raise it together."""


# ------------------------------------------------------------------------------------ what a recipe names
@dataclass
class RewardArguments:
    """The rewards of a run. `reward_weights` weighs them in this order: the adapters, then the functions."""

    reward_adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward adapters, each a folder or hub id. The value starts from the first."},
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions in TRL's protocol by dotted path, such as trl.rewards.think_format_reward; "
            "with options, functions that make one: trl.rewards.get_repetition_penalty_reward(ngram_size=2)."
        },
    )

    normalize_scores: bool = field(
        default=False,
        metadata={"help": "Scale each adapter's scores to mean 0, deviation 1 on completions of the SFT policy."},
    )

    def __post_init__(self):
        for name in ("reward_adapter", "reward_funcs"):
            given = getattr(self, name) or []
            given = given if isinstance(given, list) else [given]  # in YAML, one needs no brackets
            setattr(self, name, [entry for entry in given if entry])
        if not self.reward_adapter and not self.reward_funcs:
            raise ValueError("Name a reward: set reward_adapter, reward_funcs or both.")
        if self.normalize_scores and not self.reward_adapter:
            raise ValueError("normalize_scores scales reward adapters; name one in reward_adapter, or leave it unset.")

    def check_weights(self, weights: list[float] | None) -> None:
        """Check `reward_weights` against the rewards that are named, before any is loaded.

        Raises:
            ValueError: they are not as many.
        """
        _check_weights(weights, [*self.reward_adapter, *self.reward_funcs])


def load_function(text: str) -> Callable:
    """The reward function that a recipe names, as Python would: a dotted path is the function itself, and a path with
    brackets calls a function that makes one, `reward_models.rules.get_length(target=12)`.

    Raises:
        ValueError: there is no such module or function, or its options are not what it takes.
    """
    if not isinstance(text, str):  # YAML reads `: ` as a mapping
        raise ValueError(f"reward_funcs: {text!r} is not text. Put the entry in quotes.")
    path, bracket, options = text.partition("(")
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"reward_funcs: cannot import {path!r} ({error}). Write it as package.module.function."
        ) from error
    except RAISED as error:
        raise ValueError(
            f"reward_funcs: cannot import {path!r}: the module {module} raises {type(error).__name__}: {error} as it is "
            f"imported. Correct it there; what a script does belongs under `if __name__ == '__main__'`."
        ) from error
    if bracket:
        given = _options(text, options)
        try:
            function = function(**given)
        except RAISED as error:
            raise ValueError(
                f"reward_funcs: {text!r} makes no reward function ({type(error).__name__}: {error}). Brackets are for "
                f"functions that make one from these options."
            ) from error
    if not callable(function):
        raise ValueError(f"reward_funcs: {text!r} is not a function.")
    return function


def _options(text: str, options: str) -> dict:
    """`{"a": 1, "b": "x"}` of `a=1, b='x')`."""
    try:
        call = ast.parse(f"f({options}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not named options alone")
        return {option.arg: ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"reward_funcs: cannot read the options of {text!r}. Name each one and give it a plain Python value, "
            f"as in package.module.get_function(size=3, words=['a', 'b'])."
        ) from error


def load_functions(texts: list[str], rows: Dataset, name: str) -> list[Callable]:
    """`load_function` of each; all can be called with the columns of `rows`, a dataset called `name`.

    Raises:
        ValueError: what `load_function` raises; or a column has the name of an argument of every function, whose place it
            would take; or a function takes no such call, as where it needs a column that `rows` lacks.
    """
    for column in rows.column_names:
        if column in PROTOCOL:
            raise ValueError(
                f"{name}: the column {column!r} has the name of what every reward function gets from the trainer "
                f"({', '.join(PROTOCOL)}). Rename the column, or remove it."
            )
    functions = [load_function(text) for text in texts]
    for text, function in zip(texts, functions, strict=True):
        try:
            inspect.signature(function, follow_wrapped=False).bind(**dict.fromkeys([*PROTOCOL, *_columns(rows)]))
        except TypeError as error:
            raise ValueError(
                f"reward_funcs: {text!r} cannot be called ({error}). It gets {', '.join(PROTOCOL)} and the columns of "
                f"{name} ({', '.join(_columns(rows)) or 'none but prompt'}) by name. Add the column it needs; or, if "
                f"it makes a reward function, write its options in brackets."
            ) from error
    return functions


def learned_rewards(
    rewards: RewardArguments, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> list[LearnedReward]:
    """Each adapter as a role of the backbone (`reward`, `reward_2`, ...) with a head of its own, called as its folder.

    Normalised, the head in memory gives scores of deviation 1, and a value that starts from it values of that scale.

    Raises what `read_adapter` and `read_normalization` raise.
    """
    learned = []
    for number, folder in enumerate(rewards.reward_adapter, 1):
        role = "reward" if number == 1 else f"reward_{number}"
        backbone.add_role(
            role, read_adapter(folder, needs_head=True, base=backbone.get_base_model(), tokenizer=tokenizer)
        )
        shift = 0.0
        if rewards.normalize_scores:
            scale = read_normalization(folder)
            backbone.heads[role].weight.data /= scale.std
            shift = scale.mean / scale.std
        learned.append(LearnedReward(backbone, tokenizer, role=role, name=Path(folder).absolute().name, shift=shift))
    return learned


# ------------------------------------------------------------------------------------ what they give
class Composite:
    """The weighted sum of reward functions of TRL's protocol, under several processes too.

    An error that one process raised alone would leave the others waiting for it where rewards are gathered. So the
    `functions` here, which stand for those given, keep their errors, and `total` raises the first one everywhere.

    Args:
        functions: sync or async.
        weights: one a function; None is 1 each.

    Attributes:
        functions: what TRL's trainers are given to call.
        names: theirs. A name that comes again is numbered (`regex`, `regex_2`), so that each is logged by itself.
    """

    def __init__(self, functions: list[Callable], weights: list[float] | None = None):
        names = [get_callable_name(function) for function in functions]
        _check_weights(weights, names)
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        self.names = [name if n == 1 else f"{name}_{n}" for name, n in zip(names, counts, strict=True)]
        self.functions = [self._guard(*named) for named in zip(functions, self.names, strict=True)]
        self.weights = torch.tensor(weights or [1.0] * len(functions), dtype=torch.float64)
        self._failures: list[ValueError] = []

    def _guard(self, function: Callable, name: str) -> Callable:
        """The function, whose failures are kept, with zeros in their place until `total` raises them."""

        def fail(problem: str, given: dict, cause: BaseException | None = None) -> list[float]:
            failure = RewardError(f"reward function {name!r} {problem}")
            failure.__cause__ = cause
            self._failures.append(failure)
            return [0.0] * len(given["prompts"])

        def finish(output: object, given: dict) -> list[float | None]:
            if output is None or isinstance(output, (str, bytes, Mapping, Set)) or not hasattr(output, "__iter__"):
                kind = "None" if output is None else f"a {type(output).__name__} ({shorten(output)})"
                return fail(f"returned {kind}. Return a list with one number for each completion.", given)
            values = list(output)
            problem = _problem(values, given["prompts"], given["completions"])
            return fail(problem, given) if problem else [None if value is None else float(value) for value in values]

        def raised(error: BaseException, given: dict) -> list[float]:
            samples = _samples(given["prompts"], given["completions"])
            return fail(f"raised {type(error).__name__}: {error}; it was called with {samples}.", given, error)

        def call(**given):
            try:
                return finish(function(**_own(given)), given)
            except RAISED as error:  # whatever it is, all processes must hear of it
                return raised(error, given)

        async def call_async(**given):
            try:
                return finish(await function(**_own(given)), given)
            except RAISED as error:
                return raised(error, given)

        guarded = call_async if is_async_callable(function) else call
        guarded.__name__ = name
        return guarded

    def weigh(self, columns: Tensor) -> Tensor:
        """The weighted sum, (B, functions) -> (B,). NaN, for None, adds nothing."""
        return (columns.masked_fill(columns.isnan(), 0) * self.weights.to(columns)).sum(dim=1)

    def total(self, columns: Tensor, prompts: list, completions: list, *, all_scored: bool = True) -> Tensor:
        """`weigh` of what the functions gave, (all B, functions) -> (all B,), or an error.

        All processes call it together: `columns` are gathered, `prompts` and `completions` are those of this process.
        Where not `all_scored`, a row to which every function gave None is no error, as in TRL's RLOO and GRPO, which leave
        it out of their baselines.

        Raises:
            RewardError: on every process, when on any a function raised, gave the wrong number of rewards or one that
                is not finite, or no function gave a row a number.
        """
        failures, self._failures = self._failures, []
        messages = gather_object([str(failure) for failure in failures])
        if messages:
            raise failures[0] if failures else RewardError(messages[0])
        scores = self.weigh(columns)
        bad = ~scores.isfinite()
        if all_scored:
            bad |= columns.isnan().all(dim=1)
        if bad.any():  # of gathered columns, and so the same on all processes
            row = int(bad.nonzero()[0])
            prompt, completion = gather_object(list(zip(prompts, completions, strict=True)))[row]
            gave = ", ".join(
                f"{name} {value:g}" for name, value in zip(self.names, columns[row].tolist(), strict=True)
            )
            raise RewardError(
                f"reward functions make no finite score ({gave}; nan is None) for prompt {prompt!r}, completion "
                f"{completion!r}. At least one must give each row a number."
            )
        return scores


def _check_weights(weights: list[float] | None, names: list[str]) -> None:
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights={weights} has {len(weights)} weights for {len(names)} rewards, {', '.join(names)}. Give "
            f"each one."
        )


def _problem(values: list, prompts: list, completions: list) -> str | None:
    """What is wrong with the values that a reward function gave, with a sample."""
    if len(values) != len(prompts):
        return f"returned {len(values)} rewards for {_samples(prompts, completions)}. Return one for each completion."
    for value, prompt, completion in zip(values, prompts, completions, strict=True):
        if value is not None and not _is_finite(value):
            return (
                f"gave {value!r} for prompt {prompt!r}, completion {completion!r}. Return a finite number, or None "
                f"where the function does not apply."
            )
    return None


def _is_finite(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return abs(float(value)) <= LARGEST
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several numbers
        return False


def _own(given: dict) -> dict:
    """Return what one function gets: copies, so that one which edits its lists changes nothing for the others, for what is
    learned or for what is logged."""
    own = {}
    for name, value in given.items():
        if isinstance(value, TrainerState):  # not its history's every figure: that grows with the run
            value = copy.copy(value)
            value.log_history = [dict(row) for row in value.log_history]
        elif name not in ("log_extra", "log_metric"):
            value = _copy(value)
        own[name.removeprefix(HIDDEN)] = value
    return own


def _copy(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value)) if type(value) in (list, tuple) else copy.deepcopy(value)
    if type(value) is dict:
        return {key: _copy(entry) for key, entry in value.items()}
    return value if isinstance(value, (str, int, float, bytes, type(None))) else copy.deepcopy(value)


def _samples(prompts: list, completions: list) -> str:
    return f"{len(prompts)} completions, the first for prompt {prompts[0]!r}, completion {completions[0]!r}"


# ------------------------------------------------------------------------------------ without a trainer
def call_rewards(
    functions: list[Callable],
    rows: Dataset,
    completions: list,
    completion_ids: list[list[int]],
    runner: asyncio.Runner,
) -> Tensor:
    """What each function gives for the completions of the prompts in `rows`, (B, functions), NaN for None.

    It calls them as TRL's trainers do, sync or async, but there is no training: the trainer's state is a fresh one,
    and what they log is dropped. One `runner` for all calls, since async clients are bound to their event loop.
    """
    nothing = {"trainer_state": TrainerState(), "log_extra": lambda *args: None, "log_metric": lambda *args: None}
    given = {"prompts": rows["prompt"][:], "completions": completions, "completion_ids": completion_ids, **nothing}
    given |= {column: rows[column][:] for column in _columns(rows)}
    outputs = [function(**given) for function in functions]
    outputs = [runner.run(output) if inspect.iscoroutine(output) else output for output in outputs]
    numbers = [[math.nan if value is None else value for value in output] for output in outputs]
    return torch.tensor(numbers, dtype=torch.float64).T


def _columns(rows: Dataset) -> list[str]:
    """The columns that TRL's trainers hand to reward functions."""
    return [column for column in rows.column_names if column not in ("prompt", "completion", "completion_ids")]
