"""Weigh and add what reward functions give, and raise what they do wrong on every process.

TRL's trainers call the functions, sync or async, and log each by itself.
"""

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Coroutine, Mapping, Set
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

from data.cells import shorten
from reward_models.functions import HIDDEN, RAISED, check_weights_count, extra_columns
from reward_models.learned import KNOWN_SCORES, LearnedReward


LARGEST = torch.finfo(torch.float32).max  # rewards are kept in float32


class RewardError(ValueError):
    """A reward function failed, or what it gave is no reward. All processes raise it together."""


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
        check_weights_count(weights, names)
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        self.names = [name if n == 1 else f"{name}_{n}" for name, n in zip(names, counts, strict=True)]
        self.functions = [self._guard(*named) for named in zip(functions, self.names, strict=True)]
        self.weights = torch.tensor(weights or [1.0] * len(functions), dtype=torch.float64)
        self._failures: list[ValueError] = []

    def _guard(self, function: Callable, name: str) -> Callable:
        """The function, whose failures are kept, with zeros in their place until `total` raises them."""

        def fail(problem: str, given: dict, cause: BaseException | None = None) -> list[float | None]:
            failure = RewardError(f"reward function {name!r} {problem}")
            failure.__cause__ = cause
            if where := _where(cause):
                failure.add_note(where)
            self._failures.append(failure)
            return [0.0] * len(given["prompts"])

        def finish(output: object, given: dict) -> list[float | None]:
            if output is None or isinstance(output, (str, bytes, Mapping, Set)) or not hasattr(output, "__iter__"):
                kind = "None" if output is None else f"a {type(output).__name__} ({shorten(output)})"
                return fail(f"returned {kind}. Return a list with one number for each completion.", given)
            values = list(output)
            problem = _problem(values, given["prompts"], given["completions"])
            return fail(problem, given) if problem else [None if value is None else float(value) for value in values]

        def raised(error: BaseException, given: dict) -> list[float | None]:
            samples = _samples(given["prompts"], given["completions"])
            return fail(f"raised {type(error).__name__}: {error}; it was called with {samples}.", given, error)

        def call(**given):
            try:
                return finish(function(**_own(function, given)), given)
            except RAISED as error:  # whatever it is, all processes must hear of it
                return raised(error, given)

        async def call_async(**given):
            try:
                return finish(await function(**_own(function, given)), given)
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

    def check_batch(self, rewards: list[list[float]], prompts: list, completions: list) -> None:
        """Raise what `total` raises for what the functions gave for one batch of this process, (B, functions). All
        processes call it together: what a function does wrong is told with the first batch, not after all sampling."""
        self.total(torch.tensor(gather_object(rewards), dtype=torch.float64), prompts, completions)


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


def _is_finite(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return abs(float(value)) <= LARGEST
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several numbers
        return False


def _own(function: Callable, given: dict) -> dict:
    """Return what one function gets: copies, so that one which edits its lists changes nothing for the others, for what is
    learned or for what is logged."""
    own = {}
    for name, value in given.items():
        if name == KNOWN_SCORES:
            if isinstance(function, LearnedReward):
                own["known_scores"] = value
            continue
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


def _where(error: BaseException | None) -> str:
    """Return the file and line of the reward function that an error came from, the deepest in that file."""
    called = traceback.extract_tb(error.__traceback__ if error else None)[1:]  # the first is of ours, which called it
    last = next((frame for frame in reversed(called) if frame.filename == called[0].filename), None)
    return f"It was raised in {last.filename}, line {last.lineno}." if last else ""


def _samples(prompts: list, completions: list) -> str:
    return f"{len(prompts)} completions, the first for prompt {prompts[0]!r}, completion {completions[0]!r}"


class Runner(Protocol):
    """Runs the coroutines of async rewards: an `asyncio.Runner`, or the event loop of a trainer."""

    def run(self, coroutine: Coroutine, /) -> Any:
        """Return what the coroutine returns."""


def call_rewards(
    functions: list[Callable],
    rows: Dataset,
    completions: list,
    completion_ids: list[list[int]],
    runner: Runner,
) -> Tensor:
    """What each function gives for the completions of the prompts in `rows`, (B, functions), NaN for None.

    It calls them as TRL's trainers do, sync or async, but there is no training: the trainer's state is a fresh one,
    and what they log is dropped. One `runner` for all calls, since async clients are bound to their event loop.
    """
    nothing = {"trainer_state": TrainerState(), "log_extra": lambda *args: None, "log_metric": lambda *args: None}
    given = {"prompts": rows["prompt"][:], "completions": completions, "completion_ids": completion_ids, **nothing}
    given |= {column: rows[column][:] for column in extra_columns(rows)}
    outputs = [function(**given) for function in functions]
    outputs = [runner.run(output) if inspect.iscoroutine(output) else output for output in outputs]
    numbers = [[math.nan if value is None else value for value in output] for output in outputs]
    return torch.tensor(numbers, dtype=torch.float64).T
