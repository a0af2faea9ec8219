"""Two processes on the CPU (gloo), each with half of the batch, end with what one process ends with: every stage, under
DDP, DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("distributed")  # one process runs them all, so that what they share is made once
KINDS = {"cpu_ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}
TRAINED = ("sft", "reward", "ppo", "ppo_other")
BEST = [
    "--load_best_model_at_end",
    "true",
    "--metric_for_best_model",
    "score",
    "--save_strategy",
    "steps",
    "--save_steps",
    "4",
]
# What PPO cannot do there: name, options, the error.
REFUSED = {
    "zero2": [
        ("early_stop", ["--max_approx_kl", "0.1"], "max_approx_kl=0.1 leaves gradients out of optimizer steps"),
        ("not_finite", ["--learning_rate", "1e30"], "nothing more is saved; go on from the last checkpoint"),
    ],
    "zero3": [("best", BEST, "load_best_model_at_end=True cannot load into a model that is sharded")],
    "fsdp2": [("best", BEST, "load_best_model_at_end=True cannot load into a model that is sharded")],
}
TIMEOUT = int(os.environ.get("T", 300))  # seconds
WORDS = "a the film story cast is was never always quite dull bright slow funny warm cold and but with without".split()


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory) -> dict[str, str]:
    """Small files for every stage, and a tiny model one in eight of whose tokens ends a completion."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    model = GPT2LMHeadModel.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model.config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, len(tokenizer), 8)]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = [{"prompt": text(4), "chosen": " " + text(9), "rejected": " " + text(9)} for _ in range(44)]
    return {
        "model": str(folder / "model"),
        "texts": write_rows(folder / "texts.jsonl", [{"text": text(12)} for _ in range(40)]),
        "held_texts": write_rows(folder / "held_texts.jsonl", [{"text": text(12)} for _ in range(8)]),
        "pairs": write_rows(folder / "pairs.jsonl", pairs[:32]),
        "held_pairs": write_rows(folder / "held_pairs.jsonl", pairs[32:]),
        "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": text(7)} for _ in range(24)]),
        "held_prompts": write_rows(folder / "held_prompts.jsonl", [{"prompt": text(7)} for _ in range(19)]),
    }


def plan(inputs: dict[str, str], out: Path, start: Path, processes: int, use_cpu: bool) -> list[list]:
    """Every stage on a global batch of 8. PPO and evaluation take the adapters in `start`."""
    common = {"model_name_or_path": inputs["model"]}
    training = {
        **common,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # with 1e-8 the step of a tiny gradient tells in which order it was summed
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_steps": 3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": use_cpu,
        "disable_tqdm": True,
    }
    sft = {
        **training,
        "lora_top_layers": 1,  # so that PPO computes the layer below once a rollout
        "dataset_name": inputs["texts"],
        "eval_dataset_name": inputs["held_texts"],
        "max_length": 64,
    }
    reward = {
        **training,
        "lora_embeddings": True,
        "dataset_name": inputs["pairs"],
        "eval_dataset_name": inputs["held_pairs"],
        "max_length": 64,
        "sft_adapter": start / "sft",
        "sft_completions": 21,
        "max_completion_length": 6,
    }
    rewards = {"sft_adapter": start / "sft", "reward_adapter": start / "reward", "normalize_scores": True}
    ppo = {
        **training,
        **rewards,
        "dataset_name": inputs["prompts"],
        "eval_dataset_name": inputs["held_prompts"],
        "per_device_train_batch_size": 4 // processes,
        "steps_per_generation": 2,  # an update: 2 epochs of one minibatch of 8, in two pieces
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 6,
        "top_k": 1,  # the most likely token: sampling draws nothing, and so the same in any number of processes
        "max_completion_length": 8,
        "min_reward_accuracy": 0,
        "disable_dropout": True,
        "missing_eos_penalty": 0.5,
        "kl_target": 5.0,
        "sample_updates": 1,
        "sample_prompts": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_prompts": 16,
    }
    evaluation = {
        **common,
        **rewards,
        "dataset_name": inputs["held_prompts"],
        "policy_adapter": start / "ppo",
        "max_completion_length": 8,
        "batch_size": 4,
    }
    # Other parts of PPO: a fresh policy in all layers and on the embeddings, a value that is a head on it, texts, an
    # entropy bonus.
    other = {
        **{key: value for key, value in ppo.items() if not key.startswith(("eval_", "sample_"))},
        "sft_adapter": "",
        "lora_embeddings": True,
        "critic": "head",
        "entropy_coef": 0.01,
        "whiten_rewards": True,
        "ptx_coef": 0.1,
        "ptx_dataset_name": inputs["texts"],
        "max_steps": 4,
    }
    stages = {"sft": sft, "reward": reward, "ppo": ppo, "ppo_other": other, "evaluation": evaluation}
    return [
        entry(name, name.removesuffix("_other"), {**options, "output_dir": out / name})
        for name, options in stages.items()
    ]


def entry(name: str, stage: str, options: dict, error: str | None = None) -> list:
    return [name, stage, [word for key, value in options.items() for word in (f"--{key}", str(value))], error]


def launch(config: str, processes: int, stages: list, folder: Path) -> tuple[list[dict], str]:
    """What each process saw, and what all of them printed."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(stages))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
    ]
    command += ["--num_processes", str(processes), "--main_process_port", "0", "tests/distributed_worker.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    printed = folder / "printed.txt"
    with printed.open("w") as file:
        group = subprocess.Popen(
            [*command, str(folder / "plan.json"), str(folder)],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            group.wait(timeout=TIMEOUT)
        finally:  # a launch that hangs leaves its processes otherwise
            with suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
    files = [folder / f"process_{i}.json" for i in range(processes)]
    assert all(file.is_file() for file in files), printed.read_text()[-6000:]
    return [json.loads(file.read_text()) for file in files], printed.read_text()


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory) -> tuple[Path, dict]:
    """The stages' output folders, and what the process saw, of one process with the whole batch."""
    out = tmp_path_factory.mktemp("one")
    (saw,), _ = launch("cpu", 1, plan(inputs, out, out, 1, use_cpu=True), out)
    return out, saw


@pytest.fixture(scope="module", params=KINDS)
def two(request, inputs, one, tmp_path_factory) -> tuple[str, Path, list[dict], str]:
    """The name of the accelerate config, and the same of two processes, which take PPO's adapters from `one`."""
    if request.param.startswith("zero") and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed (pip install spine-rlhf[deepspeed])")
    out = tmp_path_factory.mktemp(request.param)
    stages = plan(inputs, out, one[0], 2, use_cpu=request.param != "fsdp2")
    ppo = next(words for name, _, words, _ in stages if name == "ppo")
    for name, options, error in REFUSED.get(request.param, []):
        stages.append([name, "ppo", [*ppo, *options, "--output_dir", str(out / name)], error])
    saw, printed = launch(request.param, 2, stages, out)
    return request.param, out, saw, printed


@pytest.mark.slow
def test_adapters_equal_those_of_one_process(one, two):
    _, out, _, _ = two
    for folder in (*TRAINED, "ppo/value", "ppo_other/value"):
        ours, theirs = (load_file(path / folder / "adapter_model.safetensors") for path in (out, one[0]))
        assert ours.keys() == theirs.keys(), folder
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=f"{folder}: {name}")
    start, ppo, value = (load_file(one[0] / x / "adapter_model.safetensors") for x in ("sft", "ppo", "ppo/value"))
    assert max((ppo[name] - start[name]).abs().max() for name in ppo) > 1e-4  # six steps have moved it
    assert value.keys() > ppo.keys()


@pytest.mark.slow
def test_processes_run_as_launched_and_end_alike(two):
    config, _, saw, printed = two
    assert printed.count(f"Runs as 2 processes on cpu: {KINDS[config]}") >= len(TRAINED)
    assert [seen["process"] for seen in saw] == [0, 1]
    for name in TRAINED:
        first, second = (seen[name] for seen in saw)
        assert first["wrapper"] == second["wrapper"] == KINDS[config]
        assert first["processes"] == second["processes"] == 2
        assert first["digest"] == second["digest"]


@pytest.mark.slow
def test_figures_are_those_of_all_processes(one, two):
    """What is measured on the whole batch is the same to the last digits that sums of another order leave."""
    _, out, saw, _ = two

    def read(folder: Path, name: str) -> dict:
        return json.loads((folder / name).read_text())

    for name in ("reward/score_normalization.json", "evaluation/report.json"):
        ours, theirs = read(out, name), read(one[0], name)
        ours.pop("seconds", None), theirs.pop("seconds", None)
        assert_close(ours, theirs, name)
    ours, theirs = read(out, "reward/metrics.json"), read(one[0], "reward/metrics.json")
    for name in ("accuracy", "ece", "reliability"):
        assert_close(ours[name], theirs[name], name)
    ours, theirs = ([row for row in read(x, "ppo/metrics.json")["history"] if "score" in row] for x in (out, one[0]))
    assert len(ours) == len(theirs) == 3  # updates
    for row, other in zip(ours, theirs, strict=True):
        for name in ("score", "kl", "reward", "value", "beta", "completions/mean_length", "completions/max_length"):
            if name in other:
                assert_close(row[name], other[name], name)
    assert any(row["completions/min_length"] < row["completions/max_length"] for row in ours if "kl" in row)
    ours, theirs = ((x / "ppo" / "samples.jsonl").read_text().splitlines() for x in (out, one[0]))
    assert_close([json.loads(line) for line in ours], [json.loads(line) for line in theirs], "samples")
    for first, second in zip(*(seen["ppo"]["history"] for seen in saw), strict=True):
        names = [name for name in first if not name.endswith(("runtime", "per_second", "time"))]
        assert {name: first[name] for name in names} == {name: second[name] for name in names}


@pytest.mark.slow
def test_what_cannot_run_so_is_refused_and_leaves_no_adapter(two):
    config, out, saw, _ = two
    for name, _, _ in REFUSED.get(config, []):
        assert all(seen[name]["error"] for seen in saw)
        assert not (out / name / "adapter_model.safetensors").exists()


def assert_close(ours, theirs, name: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            if key != "backbone_copies":
                assert_close(ours[key], theirs[key], f"{name}: {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_close(*pair, f"{name}[{i}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), name
    else:
        assert ours == theirs, name


WRONG = {
    "one process": (["--cpu", "--num_processes", "2"], "asks for 2 processes, and accelerate started 1"),
    "two runs": (
        ["--config_file", "accelerate_configs/ddp.yaml"],
        "2 processes were started, and each runs by itself",
    ),
    "DDP for FSDP": (["--config_file", "accelerate_configs/fsdp2.yaml"], "on cpu it would be DDP"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_launch_that_became_something_else_is_refused_before_any_work(wrong, inputs, tmp_path):
    options, message = WRONG[wrong]
    words = ["-m", "pipeline.sft", "--model_name_or_path", inputs["model"], "--dataset_name", inputs["texts"]]
    words += ["--bf16", "false", "--use_cpu", str(wrong != "two runs").lower(), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([*command, *options, *words], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
