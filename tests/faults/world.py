"""The small world of a case: a folder with a model, data and one finished run of every stage, all its own to be spoiled."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from data.json_files import read_json
from pipeline.runs.output_lock import LOCK
from tests.faults.runner import Ended, Running


FILMS = ("film", "story", "plot", "cast", "scene", "score", "joke", "ending")
PRAISE, BLAME = ("fine", "funny", "warm", "clever"), ("poor", "dull", "cold", "stale")
PROMPTS = [{"prompt": f"The {film}"} for film in FILMS]
PAIRS = [
    {"prompt": f"The {film}", "chosen": f" is {good} and {better}.", "rejected": f" is {bad}."}
    for film, good, better, bad in zip(FILMS, PRAISE * 2, reversed(PRAISE * 2), BLAME * 2, strict=True)
]
TEXTS = [{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS]
DATA = {"texts.jsonl": TEXTS, "pairs.jsonl": PAIRS, "prompts.jsonl": PROMPTS}
READS = {"sft": "texts.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}  # the others read prompts.jsonl
TRAINS = ("sft", "reward", "ppo", "rloo", "grpo", "dpo")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LARGEST = 1e4  # a weight beyond this is one of a run that diverged


def good_options(stage: str) -> dict[str, Any]:
    """Return a recipe of the stage that runs within seconds; paths are relative to the folder of a case."""
    options: dict[str, Any] = {"model_name_or_path": "base", "output_dir": "out", "seed": 0}
    options["dataset_name"] = READS.get(stage, "prompts.jsonl")
    if stage in TRAINS:
        options |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
        options |= {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
    else:
        options |= {"max_prompts": 6, "max_completion_length": 4, "batch_size": 4}
    if stage in ("sft", "reward", "dpo"):
        options["max_length"] = 48
    if stage in ("ppo", "rloo", "grpo"):
        options["max_completion_length"] = 4
    if stage == "reward":
        options |= {"eval_dataset_name": "pairs.jsonl", "sft_completions": 8, "max_completion_length": 4}
    if stage == "ppo":
        options |= {"steps_per_generation": 2, "num_iterations": 1, "max_steps": 4, "min_reward_accuracy": 0.0}
    if stage in ("rloo", "grpo"):
        options |= {"num_generations": 2}
    if stage == "best_of_n":
        options["n"] = [1, 2]
    if stage in TRAINS and stage != "dpo":
        options["lora_target_modules"] = "all-linear"
    if stage in ("sft", "reward", "ppo"):
        options["lora_r"] = 4
    if stage not in ("sft", "reward", "dpo"):
        options["reward_adapter"] = "reward"
    if stage == "evaluation":
        options["policy_adapter"] = "ppo"
    if stage != "sft":
        options["sft_adapter"] = "sft"
    return options


class Raw(str):
    """YAML as it is to stand in a recipe."""


def as_recipe(options: dict[str, Any]) -> str:
    return "".join(
        f"{key}: {value if isinstance(value, Raw) else json.dumps(value)}\n" for key, value in options.items()
    )


@cache
def kinds_of(stage: str) -> tuple[type, ...]:
    """Return the dataclasses of a stage's options."""
    hints = get_type_hints(import_module(f"pipeline.{stage}").main)
    return tuple(kind for name, kind in hints.items() if name != "return")


@dataclass
class Case:
    """One case: its name, by which it can be repeated, its folder and its random numbers."""

    name: str
    folder: Path
    draw: random.Random
    notes: list[str] = field(default_factory=list)

    def note(self, text: object) -> None:
        """Keep what was drawn, for the line of the case."""
        self.notes.append(str(text))

    def write(self, name: str, content: str | bytes | list) -> Path:
        """Write a file of text, of bytes or of JSON lines."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def start(
        self,
        stage: str,
        *words: str,
        recipe: str | bytes | None = None,
        setup: Callable[[], None] | None = None,
        without: tuple[str, ...] = (),
        **changes: Any,
    ) -> Running:
        """Start a stage with a good recipe in which some options are changed, or left out, and words of the command line."""
        options = {key: value for key, value in (good_options(stage) | changes).items() if key not in without}
        number = len(list(self.folder.glob("recipe-*.yaml")))
        path = self.write(f"recipe-{number}-{stage}.yaml", as_recipe(options) if recipe is None else recipe)
        return Running(stage, ["--config", path.name, *words], self.folder, setup)

    def run(self, stage: str, *words: str, **given: Any) -> Ended:
        """Run a stage to its end: see `start`."""
        return self.start(stage, *words, **given).wait()

    def tool(self, command: str, *words: str) -> Ended:
        return Running(command, list(words), self.folder).wait()

    def files(self, *names: str) -> dict[str, bytes]:
        """Return the contents of all files below the folder, or below some folders of it, logs and recipes left out."""
        return dict(_contents(self.folder, names or (".",)))

    def changed(self, before: dict[str, bytes], *, but: tuple[str, ...] = ()) -> list[str]:
        """Say which files are not as they were, except below the folders `but`."""
        found = []
        for name, content in before.items():
            if Path(name).name == LOCK:  # a run that was refused has taken it before it read the rest
                continue
            if any(name == folder or name.startswith(f"{folder}/") for folder in but):
                continue
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is gone")
            elif path.read_bytes() != content:
                found.append(f"{name} was changed")
        return found


def _contents(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        for path in sorted((folder / name).rglob("*")):
            place = path.relative_to(folder).as_posix()
            if path.is_file() and not place.startswith((".logs/", "recipe-", "home/")):
                yield place, path.read_bytes()


# ------------------------------------------------------------------------------------ making it
def make_base(folder: Path) -> None:
    """Save a random two-layer GPT-2 with a tokenizer of its own, of bytes and a few words."""
    special = ["<|end|>", "<|pad|>", "<user>", "<assistant>", "<system>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([row["text"] for row in TEXTS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        bos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    ids = {"bos_token_id": fast.eos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(fast)}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape, **ids, initializer_range=0.2)).save_pretrained(folder)


def make_template(folder: Path) -> None:
    """Make the folder that every case gets a copy of. Exit if a stage fails on it."""
    case = Case("template", folder, random.Random(0))
    folder.mkdir(parents=True)
    for name, rows in DATA.items():
        case.write(name, rows)
    make_base(folder / "base")
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    for stage, changes in {"sft": saves, "reward": {}, "ppo": saves, "evaluation": {}}.items():
        ended = case.run(stage, output_dir=stage, **changes)
        problem = ended.code or ended.hung or unsound(stage, folder / stage)
        if problem:
            raise SystemExit(f"{stage} fails on good inputs ({problem}):\n{ended.said[-3000:]}")
    shutil.rmtree(folder / ".logs")
    for path in folder.glob("recipe-*"):
        path.unlink()


# ------------------------------------------------------------------------------------ the oracle
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "backbone.json", "metrics.json", "README.md")
LEAVES = {
    "sft": ADAPTER,
    "reward": ADAPTER,
    "ppo": (*ADAPTER, "value/adapter_model.safetensors", "value/adapter_config.json"),
    "rloo": ADAPTER,
    "grpo": ADAPTER,
    "dpo": ADAPTER,
    "evaluation": ("report.json", "report.md", "score_histograms.png"),
    "best_of_n": ("best_of_n.json", "best_of_n.md", "best_of_n.png"),
}


def unsound(stage: str, out: Path) -> str | None:
    """Say what is wrong with what a stage left: a file is missing or cannot be read, a number is not finite."""
    for name in LEAVES[stage]:
        if not (out / name).is_file():
            return f"exit code 0, and there is no {out.name}/{name}"
    for file in (file for file in LEAVES[stage] if file.endswith(".safetensors")):
        try:
            tensors = load_file(out / file)
        except SafetensorError as error:
            return f"{file}: {error}"
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not (tensor.isfinite().all() and tensor.abs().max() <= LARGEST):
                return f"{file}: {name} is not finite, or huge"
    for name in LEAVES[stage]:
        if name.endswith(".json"):
            try:
                json.loads((out / name).read_text(encoding="utf-8"), parse_constant=_refuse)
            except ValueError as error:
                return f"{name}: {error}"
    for name in ("report.json", "best_of_n.json"):
        if name in LEAVES[stage] and (where := _null_in(read_json(out / name), name)):
            return f"{where} was not measured"
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _null_in(value: object, where: str) -> str | None:
    """Return the place of a figure that is null."""
    if isinstance(value, dict):
        pairs = [(f"{where} {key}", entry) for key, entry in value.items() if key not in ("completions", "preflight")]
    elif isinstance(value, list):
        pairs = [(f"{where} {number}", entry) for number, entry in enumerate(value)]
    else:
        return where if value is None else None
    return next((found for place, entry in pairs if (found := _null_in(entry, place))), None)
