"""Find the accelerate configs that come with this project, and write the command that starts accelerate's launcher.

Nothing here imports torch: `spine` hands over to the launcher within a fraction of a second.
"""

import difflib
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from data.quoting import escaped


# In a clone this is a link to the folder at its top; a wheel has the files here.
CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
# Options of `accelerate launch` that say where processes run. No stage has an option of one of these names.
OPTIONS = (
    *("accelerate_config", "config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip"),
    *("main_process_port", "gpu_ids", "num_cpu_threads_per_process", "rdzv_backend", "rdzv_conf"),
)


def config_names() -> list[str]:
    """Return the names of the accelerate configs that come with this project, such as `ddp`."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_accelerate_config(name: str, option: str = "--accelerate_config ") -> str:
    """Return the path of an accelerate config: a file, or one of this project, as `ddp` or `accelerate_configs/ddp.yaml`.

    Args:
        option: the option that named the config, for errors.

    Raises:
        FileNotFoundError: there is neither.
    """
    if os.path.isfile(name):
        return name
    stem = name.removeprefix("accelerate_configs/").removesuffix(".yaml")
    if stem in config_names():
        return str(CONFIGS / f"{stem}.yaml")
    near = difflib.get_close_matches(stem, config_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(
        f"{option}{escaped(name)}: no such file, and none of {', '.join(config_names())}.{hint} Name one of "
        f"these, or a file that `accelerate config` wrote."
    )


def launch(module: str, words: list[str]) -> list[str]:
    """Return the command by which accelerate launches a module.

    Args:
        words: options of the launcher (`OPTIONS`) and of the module, in any order.

    Raises:
        ValueError: an option of the launcher has no value, or the config is not YAML.
        FileNotFoundError: there is no such accelerate config.
    """
    launcher, own = _parted(words)
    config = launcher.pop("accelerate_config", None) or launcher.pop("config_file", None)
    options = []
    if config is not None:
        path = find_accelerate_config(config)
        options = ["--config_file", path, *_deepspeed(path)]
    for name, value in launcher.items():
        options += [f"--{name}", value]
    # `--quiet`: the error of a stage is its own message, without a traceback of the launcher.
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options, "-m", module, *own]


def _parted(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Part the options of the launcher from the other words."""
    launcher: dict[str, str] = {}
    own: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name not in OPTIONS:
            own.append(word)
            continue
        found = value if equals else next(rest, None)
        if not found or found.startswith("--"):
            raise ValueError(f"command line: --{name} needs a value after it.")
        launcher[name] = found
    if "accelerate_config" in launcher and "config_file" in launcher:
        raise ValueError("command line: --accelerate_config and --config_file both name a config. Give one.")
    return launcher, own


def _deepspeed(path: str) -> list[str]:
    """Return the option that names DeepSpeed's own config, where it lies beside an accelerate config and not where it says.

    `accelerate_configs/zero2.json` is a path in a clone. An option of the launcher takes the place of one in its config.
    """
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--accelerate_config {path}: not a YAML file ({reason}). Correct it.") from error
    options = found.get("deepspeed_config") if isinstance(found, dict) else None
    named = options.get("deepspeed_config_file") if isinstance(options, dict) else None
    beside = Path(path).parent / Path(str(named)).name
    if not isinstance(named, str) or os.path.exists(named) or not beside.is_file():
        return []
    return ["--deepspeed_config_file", str(beside)]
