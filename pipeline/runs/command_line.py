"""Read a stage's options from its recipe and the command line, and refuse every typo."""

import difflib
import sys
import warnings
from io import TextIOWrapper

from transformers import GenerationConfig
from transformers.integrations import get_reporting_integration_callbacks
from trl import TrlParser

from pipeline.runs.errors import report_errors
from pipeline.runs.recipe import check_ranges, check_types, find_recipe, read_recipe


def parse(*dataclass_types, args: list[str] | None = None) -> tuple:
    """Return the dataclasses filled from `--config recipe.yaml` and the command line, which overrides the recipe.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe is not YAML; no dataclass has the key (the message names the nearest one); a value has the
            wrong type, or is outside of its range.
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
    options = [word.lstrip("-").replace("-", "_") for action in parser._actions for word in action.option_strings]
    known = {"config", "env", *options}
    given = [(word[2:].split("=")[0].replace("-", "_"), "command line") for word in args if word.startswith("--")]
    recipe, path, rest = {}, None, list(args)
    if "--config" in args:
        if args[-1] == "--config":
            raise ValueError("command line: --config needs the path of a recipe after it.")
        at = rest.index("--config")
        path = args[args.index("--config") + 1] = find_recipe(rest[at + 1])
        del rest[at : at + 2]
        recipe = read_recipe(path)
        given += [(str(key), path) for key in recipe]
    for key, source in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{source}: unknown key {key!r}.{hint}")
    check_types(recipe, dataclass_types, path)
    parser.set_defaults_with_config(**recipe)
    check_ranges(vars(parser.parse_known_args(rest)[0]))
    with warnings.catch_warnings():  # TRL asks to set it on the tokenizer, and `load_pretrained` does that
        warnings.filterwarnings("ignore", message="`pad_token` is deprecated")
        parts = parser.parse_args_and_config(args)
    for part in parts:
        for name in ("eos_token", "chat_template_path"):
            if value := getattr(part, name, None):
                raise ValueError(
                    f"{name}={value!r} would change only this stage, and all stages must use the same tokenizer. Leave it "
                    f"unset. Change the tokenizer of a local copy of the model, and name the copy in model_name_or_path."
                )
        _check_generation_kwargs(part)
    if runs:
        for part in parts:
            _check_trackers(getattr(part, "report_to", None))
    return parts


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
