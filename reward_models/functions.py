"""Load the rewards that a recipe names: adapters by folder, functions by dotted path, with options in brackets."""

import ast
import asyncio
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from datasets import Dataset

from data.boundaries import real_path


# Arguments that TRL's trainers give each reward function by name, besides the columns of the dataset.
PROTOCOL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# TRL's trainers would take these columns for pictures, so they get them under another name. Functions get their own name.
PICTURES = ("image", "images")
HIDDEN = "column:"
# A function named by its file: `my_rewards.py:brevity`, `./my_rewards.brevity`, `my_rewards:brevity`.
FILE_NAME = re.compile(r"[/\\:]|\.py$")
# How the scores of an ensemble's members become one (`reward_models.ensembles.combine`).
COMBINATIONS = ("mean", "min", "mean_minus_std")
COMPARED = ("min", "mean_minus_std")  # these compare members, so a member's zero and scale matter
ENSEMBLE = "ensemble"  # name of the reward that `reward_combination` makes of all adapters
# Errors of a function that end the run with an error: `sys.exit(0)` too, but not Ctrl-C.
RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


@dataclass
class RewardArguments:
    """The rewards of a run.

    `reward_weights` has the weights of the adapters first, then those of the functions.
    """

    reward_adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward adapters, each a folder or hub id; of an ensemble, its folder. The value starts from the first."
        },
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
    reward_combination: str | None = field(
        default=None,
        metadata={
            "help": f"Make one reward of all adapters, as an ensemble: {', '.join(COMBINATIONS)}. Unset: they add up, and an "
            f"ensemble's folder is the mean of its members."
        },
    )
    reward_std_coef: float = field(
        default=1.0, metadata={"help": "What mean_minus_std takes off: this many deviations of the members' scores."}
    )

    def __post_init__(self):
        for name in ("reward_adapter", "reward_funcs"):
            given = getattr(self, name) or []
            given = given if isinstance(given, list) else [given]  # in YAML, a single reward needs no brackets
            setattr(self, name, [entry for entry in given if entry])
        if not self.reward_adapter and not self.reward_funcs:
            raise ValueError("Name a reward: set reward_adapter, reward_funcs or both.")
        if self.normalize_scores and not self.reward_adapter:
            raise ValueError(
                "normalize_scores scales reward adapters. Name one in reward_adapter, or leave normalize_scores unset."
            )
        self._check_combination()

    def _check_combination(self) -> None:
        named = self.reward_combination
        if named is not None and named not in COMBINATIONS:
            raise ValueError(f"reward_combination={named!r} is not one of {', '.join(COMBINATIONS)}.")
        if named and not self.reward_adapter:
            raise ValueError(
                f"reward_combination={named!r} combines reward adapters. Name them in reward_adapter, or leave "
                f"reward_combination unset."
            )
        if named in COMPARED and not self.normalize_scores:
            raise ValueError(
                f"reward_combination={named!r} compares the members' scores, and each member has a zero and a scale of its "
                f"own. Set normalize_scores: true."
            )
        if self.reward_std_coef != 1 and named != "mean_minus_std":
            raise ValueError(
                f"reward_std_coef={self.reward_std_coef:g} has no effect without reward_combination: mean_minus_std. Set "
                f"that, or leave reward_std_coef unset."
            )

    def check_weights(self, weights: list[float] | None) -> None:
        """Check that there is one of `reward_weights` for each named reward, before any reward is loaded.

        Raises:
            ValueError: the numbers of weights and rewards differ.
        """
        adapters = [ENSEMBLE] if self.reward_combination else self.reward_adapter
        check_weights_count(weights, [*adapters, *self.reward_funcs])


def load_function(text: str, option: str = "reward_funcs") -> Callable:
    """Return the reward function that an `option` of a recipe names.

    A dotted path names the function itself. A path with brackets calls a function that makes the reward function:
    `reward_models.rules.get_length(target=12)`.

    Raises:
        ValueError: there is no such module or function, or it does not take the options.
    """
    if not isinstance(text, str):  # YAML reads `: ` as a mapping
        raise ValueError(f"{option}: {text!r} is not text. Put the entry in quotes.")
    path, bracket, options = text.partition("(")
    if FILE_NAME.search(path):
        raise ValueError(
            f"{option}: cannot import {path!r}, because it names a file. {_dotted(path, bracket + options)}"
        )
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        lacks = error.name if isinstance(error, ModuleNotFoundError) else None
        if lacks and not f"{module}.".startswith(
            f"{lacks}."
        ):  # the module is there, and a package that it imports is not
            raise ValueError(
                f"{option}: cannot import {path!r} ({error}). Install the package that has the module {lacks!r}."
            ) from error
        failure = ValueError(f"{option}: cannot import {path!r} ({error}). Write it as package.module.function.")
        if lacks:
            failure.add_note(f"Python looks in the current folder ({Path.cwd()}) and in those of PYTHONPATH.")
        raise failure from error
    except RAISED as error:
        raise ValueError(
            f"{option}: cannot import {path!r}: importing the module {module} raises {type(error).__name__}: {error}. "
            f"Correct the module. Code of a script belongs under `if __name__ == '__main__'`."
        ) from error
    if bracket:
        given = _options(text, options, option)
        try:
            function = function(**given)
        except RAISED as error:
            message = f"{option}: {text!r} makes no reward function ({type(error).__name__}: {error})."
            if isinstance(error, TypeError):  # it does not take the options
                message += " Use brackets only for a function that makes a reward function from these options."
            raise ValueError(message) from error
    if not callable(function):
        raise ValueError(f"{option}: {text!r} is not a function. Name a reward function.")
    return function


def _dotted(path: str, options: str) -> str:
    """Return the remedy for a function named by its file, such as `./my_rewards.py:brevity`: its dotted path."""
    of_file, _, name = (
        (path, "", "<function>") if path.endswith(".py") else path.rpartition(":" if ":" in path else ".")
    )
    file = Path(of_file.rstrip(":").removesuffix(".py")).expanduser()
    parts, folder = [part for part in file.parts if part not in (".", "..")], Path.cwd()
    if file.is_absolute() or ".." in file.parts:
        parts, folder = [file.name], real_path(file).parent
    module = ".".join(parts)
    return (
        f"Write it as package.module.function: {module}.{name}{options}. Start the run in {folder}, or put that folder into "
        f"PYTHONPATH."
    )


def _options(text: str, options: str, option: str) -> dict:
    """Return the options in brackets as a dict: `{"a": 1, "b": "x"}` for `a=1, b='x')`."""
    try:
        call = ast.parse(f"f({options}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not named options alone")
        return {option.arg: ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{option}: cannot read the options of {text!r}. Name each one and give it a plain Python value, "
            f"as in package.module.get_function(size=3, words=['a', 'b'])."
        ) from error


def load_functions(texts: list[str], rows: Dataset, name: str, option: str = "reward_funcs") -> list[Callable]:
    """Load each function with `load_function`, and check that it can be called with the columns of `rows`.

    Args:
        name: name of the dataset `rows`, for errors.
        option: the option that names the functions, for errors.

    Raises the errors of `load_function`, and:
        ValueError: a column has the name of an argument that every function gets; or a function cannot be called, for
            example because it needs a column that `rows` lacks.
    """
    for column in rows.column_names:
        if column in PROTOCOL:
            raise ValueError(
                f"{name}: the column {column!r} has the name of an argument that every reward function gets from the "
                f"trainer ({', '.join(PROTOCOL)}). Rename or remove the column."
            )
    functions = [load_function(text, option) for text in texts]
    for text, function in zip(texts, functions, strict=True):
        try:
            inspect.signature(function, follow_wrapped=False).bind(**dict.fromkeys([*PROTOCOL, *extra_columns(rows)]))
        except TypeError as error:
            raise ValueError(
                f"{option}: {text!r} cannot be called ({error}). It gets {', '.join(PROTOCOL)} and the columns of "
                f"{name} ({', '.join(extra_columns(rows)) or 'none but prompt'}) by name. Add the column it needs. Or, if "
                f"it makes a reward function, write its options in brackets."
            ) from error
    return functions


def check_weights_count(weights: list[float] | None, names: list[str]) -> None:
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights={weights} has {len(weights)} weights for {len(names)} rewards, {', '.join(names)}. Give each "
            f"reward one weight."
        )


def extra_columns(rows: Dataset) -> list[str]:
    """Return the columns that TRL's trainers pass to reward functions."""
    return [column for column in rows.column_names if column not in ("prompt", "completion", "completion_ids")]
