"""The rewards that a recipe names: adapters by folder, functions by dotted path, with options in brackets."""

import ast
import asyncio
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from datasets import Dataset


# What TRL's trainers give a reward function by name, beside the columns of the dataset.
PROTOCOL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL's trainers would take for pictures are given to them under another name, and to functions under their own.
PICTURES = ("image", "images")
HIDDEN = "column:"
# A function that is named by its file: `my_rewards.py:brevity`, `./my_rewards.brevity`, `my_rewards:brevity`.
FILE_NAME = re.compile(r"[/\\:]|\.py$")
# What a function may raise and the run must end for with an error: `sys.exit(0)` among it, but for Ctrl-C.
RAISED = (Exception, SystemExit, asyncio.CancelledError)


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
        check_weights_count(weights, [*self.reward_adapter, *self.reward_funcs])


def load_function(text: str) -> Callable:
    """The reward function that a recipe names, as Python would: a dotted path is the function itself, and a path with
    brackets calls a function that makes one, `reward_models.rules.get_length(target=12)`.

    Raises:
        ValueError: there is no such module or function, or its options are not what it takes.
    """
    if not isinstance(text, str):  # YAML reads `: ` as a mapping
        raise ValueError(f"reward_funcs: {text!r} is not text. Put the entry in quotes.")
    path, bracket, options = text.partition("(")
    if FILE_NAME.search(path):
        raise ValueError(
            f"reward_funcs: cannot import {path!r}, which names a file. {_dotted(path, bracket + options)}"
        )
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        failure = ValueError(f"reward_funcs: cannot import {path!r} ({error}). Write it as package.module.function.")
        if isinstance(error, ModuleNotFoundError):
            failure.add_note(f"Python looks in the current folder ({Path.cwd()}) and in those of PYTHONPATH.")
        raise failure from error
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


def _dotted(path: str, options: str) -> str:
    """Return how a function in a file, such as `./my_rewards.py:brevity`, is to be written."""
    of_file, _, name = (
        (path, "", "<function>") if path.endswith(".py") else path.rpartition(":" if ":" in path else ".")
    )
    file = Path(of_file.rstrip(":").removesuffix(".py")).expanduser()
    parts, folder = [part for part in file.parts if part not in (".", "..")], Path.cwd()
    if file.is_absolute() or ".." in file.parts:
        parts, folder = [file.name], file.resolve().parent
    module = ".".join(parts)
    return (
        f"Write it as package.module.function: {module}.{name}{options}, and start the run in {folder}, or name that folder in "
        f"PYTHONPATH."
    )


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
            inspect.signature(function, follow_wrapped=False).bind(**dict.fromkeys([*PROTOCOL, *extra_columns(rows)]))
        except TypeError as error:
            raise ValueError(
                f"reward_funcs: {text!r} cannot be called ({error}). It gets {', '.join(PROTOCOL)} and the columns of "
                f"{name} ({', '.join(extra_columns(rows)) or 'none but prompt'}) by name. Add the column it needs; or, if "
                f"it makes a reward function, write its options in brackets."
            ) from error
    return functions


def check_weights_count(weights: list[float] | None, names: list[str]) -> None:
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights={weights} has {len(weights)} weights for {len(names)} rewards, {', '.join(names)}. Give "
            f"each one."
        )


def extra_columns(rows: Dataset) -> list[str]:
    """The columns that TRL's trainers hand to reward functions."""
    return [column for column in rows.column_names if column not in ("prompt", "completion", "completion_ids")]
