"""Weigh and add the rewards of several functions, and raise their errors on every process.

TRL's trainers call the functions, sync or async, and log each one separately.
"""

import asyncio
import copy
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable

from data.quoting import escaped, quoted
from reward_models.functions import HIDDEN, check_weights_count, extra_columns, load_functions
from reward_models.learned import KNOWN_SCORES, LearnedReward


LARGEST = torch.finfo(torch.float32).max  # rewards are kept in float32


class RewardError(ValueError):
    """Error of a reward function that failed or returned no valid reward; all processes raise it together."""


class Composite:
    """The weighted sum of reward functions of TRL's protocol, under several processes too.

    If one process alone raised an error, the others would wait for it where rewards are gathered. So each given function
    is wrapped. A wrapper keeps the error of its function, and `total` raises the first error on all processes.

    Args:
        functions: reward functions, sync or async.
        weights: one weight for each function; None gives each the weight 1.

    Attributes:
        functions: the wrapped functions, for TRL's trainers to call.
        names: names of the functions. A repeated name gets a number (`regex`, `regex_2`), so that each has its own log.
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
        """Return the function wrapped: it keeps a failure for `total` to raise, and returns zeros instead."""

        def fail(problem: str, given: dict, cause: BaseException | None = None) -> list[float | None]:
            failure = RewardError(f"reward function {name!r} {problem}")
            failure.__cause__ = cause
            if where := _where(cause):
                failure.add_note(where)
            self._failures.append(failure)
            return [0.0] * len(given["prompts"])

        def finish(output: object, given: dict) -> list[float | None]:
            if output is None or isinstance(output, (str, bytes, Mapping, Set)) or not hasattr(output, "__iter__"):
                kind = "None" if output is None else f"a {type(output).__name__} ({quoted(output)})"
                return fail(f"returned {kind}. Return a list with one number for each completion.", given)
            if any(getattr(stream, "closed", False) for stream in (sys.stdout, sys.stderr)):
                return fail("closed sys.stdout or sys.stderr, to which the run prints. Leave them open.", given)
            output = output.detach() if isinstance(output, Tensor) else output
            values = list(islice(output, len(given["prompts"]) + 1))  # a generator may have no end
            problem = _problem(values, given["prompts"], given["completions"])
            return fail(problem, given) if problem else [None if value is None else float(value) for value in values]

        def raised(error: BaseException, given: dict) -> list[float | None]:
            samples = _samples(given["prompts"], given["completions"])
            return fail(f"raised {type(error).__name__}: {_text(error)}. It was called with {samples}.", given, error)

        def call(**given):
            try:
                return finish(function(**_own(function, given)), given)
            except KeyboardInterrupt as error:  # it may be a user's Ctrl-C
                error.add_note(f"The reward function {name!r} was running.")
                raise
            except BaseException as error:  # all processes must know of any error, also of `sys.exit(0)`
                return raised(error, given)

        async def call_async(**given):
            try:
                return finish(await function(**_own(function, given)), given)
            except KeyboardInterrupt as error:
                error.add_note(f"The reward function {name!r} was running.")
                raise
            except BaseException as error:
                return raised(error, given)

        guarded = call_async if is_async_callable(function) else call
        guarded.__name__ = name
        return guarded

    def weigh(self, columns: Tensor) -> Tensor:
        """Return the weighted sum, (B, functions) -> (B,); NaN, which stands for None, adds nothing."""
        return (columns.masked_fill(columns.isnan(), 0) * self.weights.to(columns)).sum(dim=1)

    def total(self, columns: Tensor, prompts: list, completions: list, *, all_scored: bool = True) -> Tensor:
        """Return the weighted sum of the rewards, (all B, functions) -> (all B,), or raise the first error.

        All processes call it together. `columns` are gathered; `prompts` and `completions` are those of this process. With
        `all_scored`, a row for which every function returned None is an error. TRL's RLOO and GRPO allow such a row: they
        leave it out of their baselines. They learn nothing if all rows are such rows, so that is an error too.

        Raises:
            RewardError: on some process a function raised, returned the wrong number of rewards, or returned one that is
                not finite; or no function returned a number for a row. Every process raises it.
        """
        failures, self._failures = self._failures, []
        messages = gather_object([str(failure) for failure in failures])
        if messages:
            raise failures[0] if failures else RewardError(messages[0])
        scores = self.weigh(columns)
        bad, unscored = ~scores.isfinite(), columns.isnan().all(dim=1)
        if all_scored or unscored.all():
            bad |= unscored
        if bad.any():  # the columns are gathered, so this is the same on all processes
            row = int(bad.nonzero()[0])
            prompt, completion = gather_object(list(zip(prompts, completions, strict=True)))[row]
            gave = ", ".join(
                f"{name} {value:g}" for name, value in zip(self.names, columns[row].tolist(), strict=True)
            )
            raise RewardError(
                f"reward functions make no finite score ({gave}; nan is None) for prompt {quoted(prompt, 300)}, completion "
                f"{quoted(completion, 300)}. At least one function must return a number for each row."
            )
        return scores

    def check_batch(self, rewards: list[list[float]], prompts: list, completions: list) -> None:
        """Raise the errors of `total` for the rewards of one batch of this process, (B, functions).

        All processes call it together. So an error comes with the first batch, not after all sampling.
        """
        self.total(torch.tensor(gather_object(rewards), dtype=torch.float64), prompts, completions)


def load_judge(text: str | None, rows: Dataset, name: str) -> Composite | None:
    """Load the reward function that judges completions in a report, if a recipe names one; nothing is trained on it.

    Args:
        rows: the prompts, with the columns that the function may read.
        name: name of the dataset `rows`, for errors.

    Raises the errors of `load_functions`.
    """
    return Composite(load_functions([text], rows, name, "judge")) if text else None


def _problem(values: list, prompts: list, completions: list) -> str | None:
    """Return the fault in the values that a reward function returned, with a sample, or None."""
    if len(values) != len(prompts):
        number = f"{len(values)}" if len(values) < len(prompts) else f"more than {len(prompts)}"
        return f"returned {number} rewards for {_samples(prompts, completions)}. Return one for each completion."
    for value, prompt, completion in zip(values, prompts, completions, strict=True):
        if value is not None and not _is_finite(value):
            return (
                f"returned {quoted(value)} for prompt {quoted(prompt, 300)}, completion {quoted(completion, 300)}. Return a "
                f"finite number, or None if the function does not apply."
            )
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return abs(float(value)) <= LARGEST
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return False


def _own(function: Callable, given: dict) -> dict:
    """Return the arguments of one function, as copies.

    So a function that edits its lists changes nothing for other functions, for training or for the log.
    """
    own = {}
    for name, value in given.items():
        if name == KNOWN_SCORES:
            if isinstance(function, LearnedReward):
                own["known_scores"] = value
            continue
        if isinstance(value, TrainerState):  # copy each log row only shallowly: the history grows with the run
            value = copy.copy(value)
            value.log_history = [dict(row) for row in value.log_history]
            value.stateful_callbacks = copy.deepcopy(value.stateful_callbacks)
        elif name == "log_metric":
            value = partial(_log_number, value)
        elif name != "log_extra":
            value = _copy(value)
        own[name.removeprefix(HIDDEN)] = value
    return own


def _log_number(log_metric: Callable[[str, float], None], name: str, value: Any) -> None:
    """Call TRL's `log_metric`, which adds numbers up only after the rewards are there."""
    if not isinstance(name, str):
        raise TypeError(f"log_metric has {quoted(name)} for a name. Give it a text.")
    try:
        value = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"log_metric has {quoted(value)} for {quoted(name)}. Give it a number.") from error
    log_metric(name, value)


def _text(error: BaseException) -> str:
    """Return an error's text in short; its class may be a user's, and fail at it."""
    try:
        return escaped(error, 1000).rstrip(".")
    except Exception:
        return "<an error without a text>"


def _copy(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy, value)) if type(value) in (list, tuple) else copy.deepcopy(value)
    if type(value) is dict:
        return {key: _copy(entry) for key, entry in value.items()}
    return value if isinstance(value, (str, int, float, bytes, type(None))) else copy.deepcopy(value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo, after reward functions ran, what they changed in the whole process.

    These are torch's random stream, from which the run samples, its default dtype and device, and whether it computes
    gradients; the current folder, in which a relative `output_dir` lies; and sys.stdout and sys.stderr, if a function put
    others in their place.
    """
    folder, streams, dtype = None, (sys.stdout, sys.stderr), torch.get_default_dtype()
    gradients, device = torch.is_grad_enabled(), torch.get_default_device()
    with suppress(OSError):  # the folder was removed
        folder = os.getcwd()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        sys.stdout, sys.stderr = streams
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        with suppress(OSError):
            if folder is not None and os.getcwd() != folder:
                os.chdir(folder)


def _where(error: BaseException | None) -> str:
    """Return the file and the deepest line of the reward function that an error came from."""
    called = traceback.extract_tb(error.__traceback__ if error else None)[1:]  # the first frame is our call
    last = next((frame for frame in reversed(called) if frame.filename == called[0].filename), None)
    return f"It was raised in {last.filename}, line {last.lineno}." if last else ""


def _samples(prompts: list, completions: list) -> str:
    first = f"the first for prompt {quoted(prompts[0], 300)}, completion {quoted(completions[0], 300)}"
    return f"{len(prompts)} completions, {first}"


class Runner(Protocol):
    """Runs the coroutines of async rewards: that of `async_runner`, or the event loop of a trainer."""

    def run(self, coroutine: Coroutine, /) -> Any:
        """Return what the coroutine returns."""


class _InThread:
    """Run the coroutines of a runner in a thread of its own."""

    def __init__(self, thread: ThreadPoolExecutor, runner: asyncio.Runner):
        self.thread, self.runner = thread, runner

    def run(self, coroutine: Coroutine, /) -> Any:
        """Return what the coroutine returns."""
        return self.thread.submit(self.runner.run, coroutine).result()


@contextmanager
def async_runner() -> Iterator[Runner]:
    """Yield a runner of coroutines, with one event loop for all of them.

    A thread can have one running event loop only, and a notebook has its own. There the coroutines run in another thread.
    """
    if not _loop_runs():
        with asyncio.Runner() as runner:
            yield runner
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        runner = asyncio.Runner()
        try:
            yield _InThread(thread, runner)
        finally:
            thread.submit(runner.close).result()


def _loop_runs() -> bool:
    """Tell whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def call_rewards(
    functions: list[Callable],
    rows: Dataset,
    completions: list,
    completion_ids: list[list[int]],
    runner: Runner,
    extra: dict[str, list] | None = None,
) -> Tensor:
    """Return the rewards of each function for the completions of the prompts in `rows`, (B, functions), NaN for None.

    The functions are called as TRL's trainers call them, sync or async, but without training: the trainer's state is a
    fresh one, and their metrics are dropped. The columns that they log are added to `extra`, if it is given. Use one
    `runner` for all calls, because async clients are bound to their event loop.
    """

    def log_extra(column: str, values: list) -> None:
        if extra is not None:
            extra.setdefault(column, []).extend(values)

    logs = {"trainer_state": TrainerState(), "log_extra": log_extra, "log_metric": lambda *args: None}
    given = {"prompts": rows["prompt"][:], "completions": completions, "completion_ids": completion_ids, **logs}
    given |= {column: rows[column][:] for column in extra_columns(rows)}
    with undisturbed():
        outputs = [function(**given) for function in functions]
        outputs = [runner.run(output) if inspect.iscoroutine(output) else output for output in outputs]
    numbers = [[math.nan if value is None else value for value in output] for output in outputs]
    return torch.tensor(numbers, dtype=torch.float64).T
