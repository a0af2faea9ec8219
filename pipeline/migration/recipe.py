"""Write a recipe from another project's config: each of its keys becomes a key of the recipe, or a comment with the reason."""

import difflib
import math
import textwrap
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args

import yaml
from trl import RewardConfig

from data.cells import shorten
from pipeline.backbone.classifiers import RewardModelConfig
from pipeline.backbone.lora import LoraArguments
from pipeline.rl.config import OPTIONS
from pipeline.runs.mixture import RewardDataArguments
from pipeline.runs.recipe import check_ranges, check_types, fields_of
from pipeline.runs.reward_arguments import RewardModelArguments


# Options of each stage that a recipe is written for.
STAGES: dict[str, tuple] = {
    "ppo": OPTIONS,
    "reward": (RewardDataArguments, RewardModelArguments, LoraArguments, RewardModelConfig, RewardConfig),
}
MODEL = ("model_name_or_path", "model_revision", "trust_remote_code", "dtype", "attn_implementation") + (
    *("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "sft_adapter", "reward_adapter", "reward_funcs"),
    *(
        "reward_weights",
        "normalize_scores",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "use_rslora",
    ),
)
DATA = ("dataset_name", "dataset_train_split", "eval_dataset_name", "dataset_eval_split")
OPTIMIZER = ("learning_rate", "value_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps") + (
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)
# The order of keys in a recipe. Keys of no group come last.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "ppo": {
        "roles on one backbone": MODEL,
        "data": DATA,
        "rollouts": ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        + ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "missing_eos_penalty")
        + ("reward_clip_range", "use_vllm", "vllm_mode"),
        "PPO": ("max_steps", "num_train_epochs", "num_iterations", "beta", "kl_estimator", "kl_target", "kl_horizon")
        + ("epsilon", "epsilon_high", "dual_clip", "gamma", "lam", "whiten_rewards", "vf_coef", "value_clip")
        + ("critic_warmup_updates", "max_approx_kl", *OPTIMIZER),
    },
    "reward": {
        "model": MODEL,
        "data": (*DATA, "max_length"),
        "training": ("loss_type", "use_margin", "num_train_epochs", "max_steps", "per_device_train_batch_size")
        + ("per_device_eval_batch_size", "gradient_accumulation_steps", *OPTIMIZER),
    },
}


class Recipe:
    """A recipe: `lines` maps each new key to its value and a remark; `notes` has remarks on old keys without a new key.

    Args:
        given: the old keys and values.
        defaults: defaults of the other project that differ from ours, or may differ later.
        whose: the other project's name in remarks.
        source: the config in words, for the recipe's header.
        stage: the stage of the recipe: ppo or reward.
        launch: options of `accelerate launch`, for the header.
        written: how the user wrote a key, where `given` has it under another name.
    """

    def __init__(
        self,
        given: dict,
        defaults: Mapping[str, Any],
        *,
        whose: str,
        source: str,
        stage: str = "ppo",
        launch: str = "",
        written: Mapping[str, str] | None = None,
    ):
        self.given, self.stage, self.whose, self.source, self.launch = given, stage, whose, source, launch
        self.old: dict[str, Any] = {**defaults, **given}
        self.written = written or {}
        self.lines: dict[str, tuple[object, str]] = {}
        self.notes: dict[str, str] = {}

    def name(self, key: str) -> str:
        """Return an old key as the user wrote it."""
        return self.written.get(key, key)

    def set(self, key: str, value, *remarks: str, old_key: str | None = None) -> None:
        """Set the new `key`, with a remark that has the old key if its name was different or it was left out."""
        source = [] if old_key is None or self.name(old_key) == key else [self.name(old_key)]
        if old_key is not None and old_key not in self.given:
            source.append(f"{self.whose}'s default")
        self.lines[key] = (value, "; ".join([", ".join(source), *remarks] if source else remarks))

    def remark(self, key: str, remark: str) -> None:
        """Add a remark to a key of the recipe."""
        value, before = self.lines[key]
        self.lines[key] = (value, f"{before}; {remark}" if before else remark)

    def note(self, reason: str, *keys: str) -> None:
        """Give the same reason for each of these old keys that the user has set."""
        self.notes.update({key: reason for key in keys if key in self.given})

    def to_do(self, key: str, value, remark: str) -> None:
        """Set a key that the user is still to fill in, unless the old config has it."""
        if key not in self.lines:
            self.set(key, value, f"TO DO: {remark}")

    def take(self, renamed: Mapping[str, str], dropped: Mapping[str, str]) -> None:
        """Take each old key that has a new name with the same value, and note each that has none."""
        for key, value in self.old.items():
            if key in renamed:
                self.set(renamed[key], value, old_key=key)
            elif key in dropped:
                self.notes[key] = dropped[key]

    def check(self) -> None:
        """Check the numbers and switches of the new recipe, as its stage would.

        Raises:
            ValueError: a value has the wrong type, or is outside of its range.
        """
        checked, options = _plain_options(self.stage), STAGES[self.stage]
        values = {key: value for key, (value, _) in self.lines.items() if key in checked}
        try:
            check_ranges(check_types(values, options, "the new recipe"))
        except ValueError:
            for key, value in values.items():  # find the one, for its remark
                try:
                    check_ranges(check_types({key: value}, options, "the new recipe"))
                except ValueError as error:
                    remark = self.lines[key][1]
                    raise ValueError(f"{error} The old config says {remark}." if remark else str(error)) from error
            raise

    def text(self) -> str:
        """Check the recipe and return it in YAML. Raises the errors of `check`."""
        self.check()
        launch = f"accelerate launch {self.launch} -m" if self.launch else "accelerate launch -m"
        text = [
            f"# {launch} pipeline.{self.stage} --config <this file>",
            f"# Made by pipeline.migrate from {self.source}. A comment has the old key if its name was different.",
        ]
        groups = GROUPS[self.stage]
        grouped = {key for keys in groups.values() for key in keys}
        for title, keys in {**groups, "the trainer's own": [key for key in self.lines if key not in grouped]}.items():
            present = [key for key in keys if key in self.lines]
            text += ["", f"# {title}"] if present else []
            for key in present:
                value, remark = self.lines[key]
                value = yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
                text.append(f"{key}: {value}" + (f"  # {remark}" if remark else ""))
        if self.notes:
            text += ["", "# old keys that have no new key, or had another effect"]
        for key, why in self.notes.items():
            default = "" if key in self.given else f" ({self.whose}'s default)"
            text.append(f"# {self.name(key)}: {self.old[key]!r}{default}")
            text += textwrap.wrap(why, width=100, initial_indent="#   ", subsequent_indent="#   ")
        return "\n".join(text) + "\n"


@cache
def _plain_options(stage: str) -> set[str]:
    """Return the options of a stage that are numbers or switches."""
    plain = {int, float, bool, type(None)}
    return {option.name for option, hint in fields_of(STAGES[stage]) if set(get_args(hint) or (hint,)) <= plain}


def check_numbers(given: Mapping[str, Any], counts: Iterable[str], numbers: Iterable[str] = ()) -> None:
    """Check the numbers that are computed with.

    Args:
        counts: keys that count something.
        numbers: keys that are other numbers.

    Raises:
        ValueError: a count is not a whole number from 1 on, or another number is negative, not finite or no number.
    """
    counts = tuple(counts)
    for key in (*counts, *numbers):
        value, least = given.get(key, 1), int(key in counts)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
        if not number or value < least or (least and value != int(value)):
            words = "a whole number, 1 or more" if least else "a number, 0 or more"
            raise ValueError(f"{key}={shorten(value)} must be {words}. Correct it.")


def check_sizes(given: Mapping[str, Any], lists: Mapping[str, int | None]) -> None:
    """Check which values are lists, and how long they are; `lists` has the length of each key's, and None is any.

    Raises:
        ValueError: a value is a list and must not be one, or must be one of another length.
    """
    for key, value in given.items():
        length = lists.get(key, 1)
        if length and (len(value) if isinstance(value, list) else 1) != length:
            words = "one value" if length == 1 else f"{length} numbers"
            raise ValueError(f"{key}={shorten(value)} must be {words}. Correct it.")


def check_switches(given: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise a ValueError for a key that is neither true nor false."""
    for key in keys:
        if not isinstance(given.get(key, True), bool):
            raise ValueError(f"{key}={shorten(given[key])} must be true or false. Correct it.")


def check_known(given: Mapping[str, Any], known: Iterable[str], missing: str) -> None:
    """Check that each key is known.

    Args:
        missing: what to say of a key that is not, such as `verl has no such option`.

    Raises:
        ValueError: one is not; the message suggests the nearest.
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else " Remove it if it is your own."
            raise ValueError(f"unknown key {key!r}: {missing}.{hint}")


def set_sizes(
    recipe: Recipe, rows: int, minibatch: int, piece: int, processes: int, keys: tuple[str, str, str]
) -> int:
    """Set the sizes of a rollout, and return the number of its minibatches.

    Args:
        rows: completions of an update, over all processes.
        minibatch: completions of an optimizer step, over all processes.
        piece: most completions that a process takes at once.
        keys: the old keys of rows, minibatch and piece.

    Raises:
        ValueError: a size does not divide.
    """
    of_rows, of_minibatch, of_piece = keys
    for number, divisor, what in (
        (rows, minibatch, f"the minibatches ({recipe.name(of_minibatch)})"),
        (minibatch, processes, f"{processes} processes"),
    ):
        if number % divisor:
            name = recipe.name(of_rows if number is rows else of_minibatch)
            raise ValueError(
                f"{name}: {number} completions are not a multiple of {what} = {divisor}. Change one of them."
            )
    share = minibatch // processes
    ours = next(size for size in range(min(piece, share), 0, -1) if share % size == 0)
    before = [f"{piece} before"] if ours != piece else []
    recipe.set("per_device_train_batch_size", ours, *before, old_key=of_piece)
    words = f"{ours} x {processes} processes" if processes > 1 else str(ours)
    accumulation, steps = f"minibatches of {minibatch} / ({words})", f"rollouts of {rows} / ({words})"
    recipe.set("gradient_accumulation_steps", share // ours, accumulation, old_key=of_minibatch)
    recipe.set("steps_per_generation", rows // processes // ours, steps, old_key=of_rows)
    return rows // minibatch
