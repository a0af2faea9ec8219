"""Read a stage's options from its recipe and the command line, and refuse every typo."""

import difflib
import os
import re
import sys
import traceback
import warnings
from dataclasses import fields
from io import TextIOWrapper
from typing import Any

from transformers import GenerationConfig, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import ModelConfig, TrlParser

from data.cells import shorten
from pipeline.runs.agreement import awaiting_processes, check_rendezvous, check_same_options
from pipeline.runs.errors import EXPECTED, report_errors
from pipeline.runs.recipe import check_ranges, check_types
from pipeline.runs.recipe_file import find_recipe, read_recipe
from pipeline.runs.terminal import leave_out_bars
from pipeline.runs.trainer_options import check_attention, check_trainer_options


NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-\.?(inf|infinity|nan)$", re.IGNORECASE)


def parse(*dataclass_types, args: list[str] | None = None) -> tuple:
    """Return the dataclasses filled from `--config recipe.yaml` and the command line, which overrides the recipe.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe is not YAML; no dataclass has the key (the message names the nearest one); a value has the
            wrong type, or is outside of its range; or a trainer would refuse an option later.
    """
    runs = args is None
    if args is None:
        args = sys.argv[1:]
        report_errors()
        for stream in (sys.stdout, sys.stderr):  # an ASCII locale cannot print all tokens and paths
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    args = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser = TrlParser(dataclass_types)
    parser.error = _refuse  # argparse would print all options of the stage before the error
    parser._negative_number_matcher = NEGATIVE  # argparse takes -1e-5 and -inf for options
    flags = {_plain(word): action.dest for action in parser._actions for word in action.option_strings}
    keys = {*flags.values(), "env"} - {"help"}
    recipe, path = {}, None
    if "--config" in args:
        if args[-1] == "--config":
            raise ValueError("command line: --config needs the path of a recipe after it.")
        at = args.index("--config")
        path = find_recipe(args[at + 1])
        args = args[:at] + args[at + 2 :]
        recipe = read_recipe(path)
    given: list[tuple[str, str | None]] = [
        (_plain(word.split("=")[0]), "command line") for word in args if word.startswith("--")
    ]
    words = {flags[key] for key, _ in given if key in flags}
    given += [(str(key), str(path)) for key in recipe]
    for key, source in given:
        known = {*flags} if source == "command line" else keys
        if key not in known:
            if key == "config":
                raise ValueError(f"{source}: one run has one recipe. Name it with --config, once.")
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            what = f"unknown key {shorten(key)}" if key else "-- names no option"
            raise ValueError(f"{source}: {what}.{hint}")
    _set_environment(recipe.pop("env", {}), path)
    parser.set_defaults_with_config(**check_types(recipe, dataclass_types, path))
    parsed, others = parser.parse_known_args(args)
    if others:
        raise ValueError(f"command line: {shorten(others)} belong to no option. Write options as --name value.")
    options = vars(parsed)
    options |= check_types({key: options[key] for key in words}, dataclass_types, None)
    check_ranges(options)
    check_rendezvous()
    with awaiting_processes():
        parts = tuple(_made(kind, options, {*words, *recipe}) for kind in dataclass_types)
    check_same_options(*parts)
    for part in parts:
        for name in ("eos_token", "chat_template_path"):
            if value := getattr(part, name, None):
                raise ValueError(
                    f"{name}={value!r} would change only this stage, and all stages must use the same tokenizer. Leave it "
                    f"unset. Change the tokenizer of a local copy of the model, and name the copy in model_name_or_path."
                )
        _check_generation_kwargs(part)
        check_ranges({"generation_batch_size": getattr(part, "generation_batch_size", None)})  # also if it is derived
        if isinstance(part, TrainingArguments):
            check_trainer_options(part, installed=runs)
        if isinstance(part, ModelConfig):
            check_attention(part.attn_implementation, installed=runs)
    if runs:
        if any(getattr(part, "disable_tqdm", False) for part in parts):
            leave_out_bars()
        for part in parts:
            _check_trackers(getattr(part, "report_to", None))
    return parts


def _plain(flag: str) -> str:
    """Return the name of an option from its flag, with either spelling of a hyphen."""
    return flag.lstrip("-").replace("-", "_")


def _set_environment(given: object, path: str | None) -> None:
    """Set the environment variables of a recipe's `env`, a mapping of names to values."""
    if not isinstance(given, dict):
        raise ValueError(f"{path}: env={shorten(given)} must be a mapping of names to values.")
    for name, value in given.items():
        if not isinstance(name, str) or not name or set("=\0") & set(name):
            raise ValueError(f"{path}: env: {shorten(name)} is no name of an environment variable.")
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise ValueError(f"{path}: env: {name}={shorten(value)} must be text or a number.")
    os.environ.update({name: str(value) for name, value in given.items()})


def _made(kind: type, options: dict[str, Any], named: set[str]) -> Any:
    """Make a dataclass from its options, of which a user has set those that are `named`.

    Raises:
        ValueError: the dataclass refuses a value with another error, which does not say that an option is wrong.
    """
    given = {option.name: options[option.name] for option in fields(kind) if option.init}
    with warnings.catch_warnings():  # TRL asks to set it on the tokenizer, and `load_pretrained` does that
        warnings.filterwarnings("ignore", message="`pad_token` is deprecated")
        try:
            return kind(**given)
        except Exception as error:
            if isinstance(error, EXPECTED) and _raised(error):
                if "\n" not in str(error):
                    raise
                raise ValueError(" ".join(str(error).split())) from error
            changed = [f"{name}={shorten(given[name])}" for name in given if name in named - {"hub_token"}]
            raise ValueError(
                f"{kind.__name__} cannot be made from these options ({type(error).__name__}: {error}): "
                f"{', '.join(changed)}. Correct the one that the error is about, or leave it out."
            ) from error


def _raised(error: Exception) -> bool:
    """Return whether a `raise` statement made the error, and so a message for users."""
    return (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")


# Fields of GenerationConfig that change more than which tokens are drawn, and the reason to refuse each.
NO_SAMPLING = {
    "temperature": "logprobs would be those of another temperature. Set the option temperature",
    "eos_token_id": "completions end where the model's own generation config ends them. Set it there",
    "pad_token_id": "all stages pad with one token. Set pad_token",
    "stop_strings": "completions end at a token. Leave it unset",
    "num_return_sequences": "a prompt has one completion at a time. Set num_generations",
    "num_beams": "completions are sampled one token after the other. Leave it unset",
    "prompt_lookup_num_tokens": "completions are sampled one token after the other. Leave it unset",
    "return_dict_in_generate": "only tokens are returned. Leave it unset",
}


def _check_generation_kwargs(args: object) -> None:
    """Raise a ValueError for an entry of `generation_kwargs` that is unknown, or does more than change which tokens are drawn.

    `sample` gives each prompt one completion, and its mask says where that ends. With vLLM the entries are vLLM's options.
    """
    given = getattr(args, "generation_kwargs", None) or {}
    if getattr(args, "use_vllm", False):
        return
    known = vars(GenerationConfig())
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"generation_kwargs: unknown key {key!r}.{hint}")
        if key in NO_SAMPLING:
            raise ValueError(f"generation_kwargs: {key}={given[key]!r} is not supported: {NO_SAMPLING[key]}.")


def _check_trackers(report_to: list[str] | None) -> None:
    """Raise a ValueError for a tracker that is not installed: Trainer would do so only after the model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"report_to={report_to}: {error}") from error


def _refuse(message: str) -> None:
    raise ValueError(f"command line: {message}")
