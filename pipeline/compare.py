r"""Compare policies on a page: a prompt or a conversation, their completions side by side, and what PPO sees in each token.

    python -m pipeline.compare runs/demo
    python -m pipeline.compare runs/demo runs/baselines --config pipeline/recipes/demo/ppo.yaml

The folder of a run is searched for policies (`sft`, `ppo`, checkpoints, baselines), rewards and values. All of them are
adapters on one frozen backbone, which is in memory once. Under the words of a completion the page shows the KL, reward, value
and advantage of each token, as PPO computes them, and the reward model's score of each beginning.
"""

import argparse
import inspect
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from trl import ModelConfig

from data.quoting import escaped
from pipeline.backbone.adapters import load_tokenizer
from pipeline.backbone.members import check_rewards, members_of
from pipeline.backbone.plain import base_of
from pipeline.pages.compare_models import Sampling, load
from pipeline.pages.compare_runs import Options, Run, bare, find_runs
from pipeline.rl.config import OF_TOKENS, OPTIONS
from pipeline.runs.command_line import parse
from pipeline.runs.errors import report_errors
from reward_models.functions import PROTOCOL, RewardArguments, load_function


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m pipeline.compare", allow_abbrev=False)
    parser.add_argument("run", nargs="*", help="Folders of runs, or of adapters; unset: those of the recipe.")
    parser.add_argument(
        "--config", help="Recipe of PPO, for its model, rewards and options; unset: what the runs say."
    )
    parser.add_argument("--model_name_or_path", help="The base model; unset: the one that the adapters name.")
    parser.add_argument("--dtype", help="Precision of the base; unset: that of the recipe, else float32.")
    parser.add_argument("--sft_adapter", help="Adapter that the KL is measured to; unset: the SFT policy of the run.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; others can use 0.0.0.0.")
    parser.add_argument("--port", type=int, help="Port to listen on; unset: the first free one from 7860.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the model's repository.")
    given = parser.parse_args(args)
    if not given.run and not given.config:
        parser.error("name the folder of a run, such as runs/demo, or a recipe with --config")
    if given.port is not None and not 0 < given.port < 2**16:
        parser.error(f"--port {given.port} must be from 1 to 65535")
    return given


def check_address(host: str, port: int | None) -> None:
    """Check that the page can listen on an address, before the model is loaded.

    Raises:
        OSError: it cannot.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise OSError(
            f"--host {host}{f' --port {port}' if port else ''}: the page cannot listen there ({error.strerror or error}). "
            f"Name another port or address."
        ) from error


def check_gradio() -> None:
    """Check that gradio is installed.

    Raises:
        ImportError: it is not.
    """
    if find_spec("gradio") is None:
        raise ImportError("pipeline.compare needs gradio. Install it: pip install 'spine-rlhf[pages]'.")


def pad_token_of(runs: list[Run]) -> str | None:
    """Return the pad token of the tokenizer that was saved beside an adapter: a reward's if there is one."""
    rewards = [member for run in runs for reward in run.rewards for member in members_of(reward)]
    policies = [policy.folder for run in runs for policy in run.policies]
    for folder in (*rewards, *filter(None, policies)):
        if (Path(folder) / "tokenizer.json").is_file():
            return load_tokenizer(folder, trust_remote_code=False).pad_token
    return None


def model_of(runs: list[Run], named: str | None) -> ModelConfig:
    """Return the base model of the runs.

    Raises:
        ValueError: the adapters name none.
        FileNotFoundError: the adapters name a folder that is not here.
    """
    folder = next(policy.folder for run in runs for policy in run.policies if policy.folder)
    base = named or base_of(folder)
    if base is None:
        raise ValueError(f"{folder}: the adapter names no base model. Name it with --model_name_or_path.")
    if named is None and Path(base).is_absolute() and not Path(base).exists():
        raise FileNotFoundError(
            f"{folder}: its base model {escaped(base)} is not here. Name it with --model_name_or_path."
        )
    return ModelConfig(base)


def functions_of(
    rewards: RewardArguments, weights: list[float] | None
) -> tuple[list[Callable], list[float] | None, list[str]]:
    """Return the reward functions of a recipe that a prompt alone is enough for, the weights without the others, and these.

    Raises the errors of `load_function`.
    """
    functions, kept, left_out = [], [], []
    for number, text in enumerate(rewards.reward_funcs):
        function = load_function(text)
        try:
            inspect.signature(function, follow_wrapped=False).bind(**dict.fromkeys(PROTOCOL))
        except TypeError:  # it reads another column of the data
            left_out.append(text)
        else:
            functions.append(function)
            kept.append(number)
    if weights is not None:
        adapters = len(weights) - len(rewards.reward_funcs)
        weights = [*weights[:adapters], *(weights[adapters + number] for number in kept)]
    return functions, weights, left_out


def main(args: list[str]) -> None:
    given = arguments(args)
    check_gradio()
    check_address(given.host, given.port)
    rewards: RewardArguments | None = None
    options, weights, pad_token, recipe_model = None, None, None, None
    names, reference = given.run, given.sft_adapter
    if given.config:
        # The page does not train, so the precision of training does not matter.
        _, start, _, rewards, _, recipe_model, ppo = parse(
            *OPTIONS, args=["--config", given.config, "--bf16", "false"]
        )
        options = Options({name: getattr(ppo, name) for name in OF_TOKENS}, given.config)
        names = names or list(dict.fromkeys(filter(None, (start.sft_adapter, ppo.output_dir))))
        reference = reference or (None if given.run else start.sft_adapter)
        weights, pad_token = ppo.reward_weights, ppo.pad_token
    runs = find_runs(names, sft_adapter=reference, options=options)
    if rewards:
        there = next((run.rewards for run in runs if run.rewards), None)  # the folders may have been moved
        rewards = replace(rewards, reward_adapter=there or rewards.reward_adapter)
        check_rewards(rewards, weights)
    model = recipe_model or model_of(runs, given.model_name_or_path)
    model.model_name_or_path = given.model_name_or_path or model.model_name_or_path
    model.dtype = given.dtype or model.dtype
    functions: list[Callable] = []
    left_out: list[str] = []
    if rewards:
        functions, weights, left_out = functions_of(rewards, weights)
    found = [policy for run in runs for policy in run.policies]
    finished = [policy.name for policy in found if not policy.is_checkpoint][:3]
    policies = [*found, bare(runs)]
    comparison = load(
        *(runs, policies, model, rewards, functions),
        weights=weights,
        trust_remote_code=given.trust_remote_code,
        pad_token=pad_token or pad_token_of(runs),
    )

    from pipeline.pages.compare import build, launch  # imports gradio

    seen = found[0].options
    sampling = Sampling()
    if seen is not None and seen.source is not None:
        sampling = Sampling(seen["temperature"], seen["max_completion_length"])
    base = Path(model.model_name_or_path).name
    chosen = finished if len(finished) > 1 else [*finished, policies[-1].name]
    about = f"{', '.join(names)}: {len(policies)} policies on one backbone, {base}."
    if left_out:
        about += f" Not in the score, since they read more of the data than the prompt: {', '.join(left_out)}."
    page = build(comparison, about, sampling=sampling, chosen=chosen)
    launch(page, host=given.host, port=given.port)


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
