"""`pipeline.runs.checkpoints`: a run that was stopped and resumed leaves the same bytes, and nothing damaged is trusted."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import PROMPTS, ROOT
from datasets import Dataset
from distributed_worker import KillAt, Killed
from transformers import Trainer, TrainerCallback

from pipeline.rl.sample_table import SampleTable
from pipeline.runs.manifest import MANIFEST, check_checkpoint, file_digest, find_checkpoint, manifest_digest
from pipeline.runs.optimizer_shards import check_zero
from pipeline.runs.outputs import finish_stage
from pipeline.runs.state_files import load_state
from tests.pipeline import test_stages


pytestmark = pytest.mark.slow


run_stage = test_stages.run
TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19, 20, 21]]
CLOCK = ("time", "runtime", "per_second", "seconds")


def files(folder: Path) -> dict[str, bytes]:
    """The weights that a run leaves, and what it has written of itself, without what a clock showed."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("adapter_model*")}
    found = {name: data for name, data in found.items() if not name.startswith("checkpoint-")}
    metrics = json.loads((folder / "metrics.json").read_text())
    found["metrics"] = [without_clock(row) for row in metrics.pop("history")], without_clock(metrics)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    found["log"] = [without_clock(row) for row in log if "started" not in row]
    found["samples"] = (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else None
    return found


def without_clock(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.endswith(CLOCK)}


EVERYTHING = {
    "beta": 0.5, "kl_target": 1.0, "kl_horizon": 20, "whiten_rewards": True, "ptx_coef": 0.1, "texts": TEXTS,
    "max_approx_kl": 1e-12, "critic_warmup_updates": 1, "held_out": PROMPTS[:2], "eval_strategy": "steps",
    "eval_steps": 3, "per_device_eval_batch_size": 2, "sample_updates": 1, "logging_steps": 2, "normalize_scores": True,
}  # fmt: skip


@pytest.fixture
def ppo_run(make_trainer, tmp_path):
    """Trains PPO in a folder of its own and finishes the stage: 3 updates of 4 steps, 2 updates a pass over prompts."""

    def run(name, kill=None, resume=None, **options):
        folder = tmp_path / name
        settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        prompts = PROMPTS + [text.lower() for text in PROMPTS]
        trainer = make_trainer(prompts=prompts, output_dir=str(folder), **{**settings, **options})
        if options.get("sample_updates"):
            trainer.add_callback(SampleTable(trainer, Dataset.from_dict({"prompt": PROMPTS[:2]})))
        if kill is not None:
            trainer.add_callback(KillAt(kill))
            with pytest.raises(Killed):
                trainer.train(resume_from_checkpoint=resume)
            return None
        trainer.train(resume_from_checkpoint=resume)
        finish_stage(trainer, "backbone", trainer.summary())
        table = {name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")}
        rewards = {name: list(column) for name, column in trainer._logs["rewards"].items()}
        return files(folder) | {"table": (table, rewards), "health": trainer.health}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_ppo_resumes_to_the_bit_from_any_step(ppo_run, options, tmp_path):
    """At the end of an update (4, 8), of a pass over the prompts (8), of an epoch (6), and within one; 7 is skipped."""
    expected = ppo_run("at once", **options)
    folder, resume = tmp_path / "in pieces", None
    for step in (1, 3, 4, 6, 7, 8, 11):
        ppo_run("in pieces", kill=step, resume=resume, **options)
        assert sorted(path.name for path in folder.glob("checkpoint-*"))[-1:] and not (folder / ".staging").exists()
        resume = str(folder / f"checkpoint-{step}")
    found = ppo_run("in pieces", resume=resume, **options)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def of_two_processes(folder: Path) -> None:
    """Make a checkpoint of one process one that two wrote, each with half of its batch and the same state."""
    for suffix in ("json", "safetensors"):
        shutil.copy(folder / f"state_0.{suffix}", folder / f"state_1.{suffix}")
    for process in range(2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{process}.pth")
    (folder / "rng_state.pth").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"world_size": 2, "kind": "DDP"}
    manifest["order"]["per_device_train_batch_size"] //= 2
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in names
        if name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


@pytest.mark.slow
def test_what_other_processes_continue_is_the_same_each_time(ppo_run, tmp_path):
    """They go on with the same prompts, and with random states of their own, in the middle of a pass and at its end."""
    expected = ppo_run("at once")
    ppo_run("begun", kill=9, save_steps=4, save_total_limit=None)
    for step in (4, 8):
        checkpoint = tmp_path / "begun" / f"checkpoint-{step}"
        of_two_processes(checkpoint)
        first, second = (ppo_run(f"{name} {step}", resume=str(checkpoint)) for name in ("first", "second"))
        assert first == second
        assert first["table"][0]["prompt"] == expected["table"][0]["prompt"]
        assert first["table"][0]["completion"] != expected["table"][0]["completion"]
        assert len(first["metrics"][0]) == len(expected["metrics"][0])


# ------------------------------------------------------------------------------------------ the other stages
PAIRS = [
    {"prompt": f"{prompt} film {i}", "chosen": f" is good {'indeed ' * (i % 4)}.", "rejected": " is not."}
    for i, prompt in enumerate(PROMPTS * 2)
]
STAGES = {
    "sft": {"lora_dropout": 0.1, "bf16": False},
    "reward": {"lora_dropout": 0.1, "sft_adapter": ""},
    "dpo": {},
    "rloo": {"num_iterations": 2, "steps_per_generation": 2, "num_generations": 2, "per_device_train_batch_size": 4},
    "grpo": {"num_iterations": 2, "steps_per_generation": 2, "num_generations": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_to_the_bit(stage, run_stage, tmp_path, monkeypatch, capsys):
    """With dropout, in batches grouped by length whose order is drawn anew in each of three passes over the data."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"text": row["prompt"] + row["chosen"]}) + "\n" for row in PAIRS))
    options = {
        "dataset_name": rows, "per_device_train_batch_size": 4, "max_steps": 11, "logging_steps": 2,
        "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto", **STAGES[stage],
    }  # fmt: skip
    original, kill = Trainer._inner_training_loop, [None]

    def loop(self, *args, **kwargs):
        self.add_callback(KillAt(kill[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    run_stage(stage, output_dir=tmp_path / "at once", **options)
    expected = files(tmp_path / "at once")
    assert "holds no checkpoint: training starts from the beginning" in capsys.readouterr().out
    for step in (3, 4, 6, 10, None):
        kill[0] = step
        if step is None:
            run_stage(stage, output_dir=tmp_path / "in pieces", **options)
            assert "in pieces/checkpoint-10." in capsys.readouterr().out
        else:
            with pytest.raises(Killed):
                run_stage(stage, output_dir=tmp_path / "in pieces", **options)
    found = files(tmp_path / "in pieces")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert found["metrics"][0][-1]["step"] == 11
    names = {path.name for path in (tmp_path / "in pieces").iterdir()}
    assert "adapter_model.safetensors" in names and "training_args.bin" not in names


# ------------------------------------------------------------------------------------------ kill -9
@pytest.mark.slow
def test_thirty_kills_change_no_byte(tiny, sft_adapter, reward_adapter, tmp_path):
    """A third while a checkpoint is written, a third while it sets up, the others at any moment."""
    recipe = {
        "model_name_or_path": tiny, "sft_adapter": sft_adapter, "reward_adapter": [reward_adapter],
        "dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 96, "save_strategy": "steps", "save_steps": 1,
        "save_total_limit": 2, "resume_from_checkpoint": "auto", "per_device_train_batch_size": 2,
        "steps_per_generation": 4, "num_iterations": 2, "max_completion_length": 4, "beta": 0.3, "kl_target": 1.0,
        "sample_updates": 2, "sample_prompts": 2, "logging_steps": 3, "learning_rate": 1e-2, "bf16": False,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS * 2))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    told = {}
    for name, kills in (("at once", 0), ("killed", 30)):
        words = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / name)]
        command = [sys.executable, str(Path(__file__).with_name("kill_worker.py")), str(kills), "0", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        told[name] = json.loads(result.stdout.splitlines()[-1])

    assert told["killed"]["inside"] >= 10 and len(set(told["killed"]["steps"])) >= 10, told
    expected, found = files(tmp_path / "at once"), files(tmp_path / "killed")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    checkpoints = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-95", "checkpoint-96"} and not (tmp_path / "killed" / ".staging").exists()


# ------------------------------------------------------------------------------------------ what is refused
@pytest.fixture
def killed_run(ppo_run, tmp_path) -> Path:
    """The folder of a run that was killed after step 6; it holds checkpoints 4 and 6."""
    ppo_run("run", kill=6, save_steps=2)
    return tmp_path / "run"


def arguments(make_trainer, folder, asked, **options):
    return make_trainer(output_dir=str(folder), resume_from_checkpoint=asked and str(asked), **options).args


def test_a_state_of_an_older_release_is_taken_up(make_trainer, ppo_run, tmp_path):
    ppo_run("run", kill=6, save_steps=2)
    state = load_state(tmp_path / "run" / "checkpoint-6" / "state_0")
    assert "rollout" in state  # it is within an update
    older = {**state, "ppo": {"beta": 0.07, "_far": True, "_skip": True}}
    older["watch"] = {**older.pop("health"), "said": ["nan", "flat reward"], "flat_rollouts": 3, "no_more": 1}
    trainer = make_trainer(prompts=PROMPTS + [text.lower() for text in PROMPTS], output_dir=str(tmp_path / "next"))
    trainer.load_training_state(older)
    assert (trainer.beta, trainer._kl_exceeded, trainer._skipping) == (0.07, True, True)
    assert trainer.health.said == {"nan", "flat reward"} and trainer.health.flat_rollouts == 3
    assert torch.equal(trainer._rollout.completion_ids, state["rollout"]["completion_ids"])


def test_a_damaged_file_is_named_and_the_one_before_is_taken_only_by_name(make_trainer, killed_run, tmp_path, capsys):
    args, newest, other = arguments(make_trainer, killed_run, "auto"), killed_run / "checkpoint-6", "checkpoint-4"
    assert find_checkpoint(args) == str(newest)
    assert f"Training resumes from {newest}" in capsys.readouterr().out
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    assert {"state_0.json", "state_0.safetensors", "optimizer.pt", "value/adapter_model.safetensors"} <= set(names)
    for name in names:
        path, data = newest / name, (newest / name).read_bytes()
        flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        for damaged in (None, data[: len(data) * 3 // 4], flipped):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                find_checkpoint(args)
            assert str(caught.value).startswith(f"{path}: "), caught.value
            assert str(caught.value).endswith(
                f"Resume from another checkpoint: --resume_from_checkpoint {killed_run / other}"
            )
            path.write_bytes(data)
    assert find_checkpoint(args) == str(newest)
    (newest / MANIFEST).unlink()
    assert find_checkpoint(arguments(make_trainer, killed_run, killed_run / other)) == str(killed_run / other)
    shutil.rmtree(killed_run / other)
    with pytest.raises(ValueError, match="There is no other checkpoint. Start a new run"):
        find_checkpoint(args)


def test_what_does_not_fit_the_launch_is_refused(make_trainer, ppo_run, killed_run, tmp_path, monkeypatch, capsys):
    newest = killed_run / "checkpoint-6"
    assert find_checkpoint(arguments(make_trainer, tmp_path / "new", "auto")) is None
    assert "new holds no checkpoint: training starts from the beginning" in capsys.readouterr().out
    assert find_checkpoint(arguments(make_trainer, killed_run, None)) is None
    with pytest.raises(FileNotFoundError, match="no such folder. Name a checkpoint-<step> folder, or auto"):
        find_checkpoint(arguments(make_trainer, killed_run, killed_run / "checkpoint-5"))
    with pytest.raises(ValueError, match="written with seed=42, and this run has seed=7, which changes the order"):
        find_checkpoint(arguments(make_trainer, killed_run, "auto", seed=7))
    (newest / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt: not a file of this checkpoint"):
        find_checkpoint(arguments(make_trainer, killed_run, "auto"))
    (newest / "notes.txt").unlink()
    args = arguments(make_trainer, killed_run, "auto")
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(
        ValueError, match="written by 1 process in the middle of an update, and this launch is 2"
    ) as caught:
        find_checkpoint(args)
    assert f"end of an update: --resume_from_checkpoint {killed_run / 'checkpoint-4'}. Or" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.runs.worlds.kind_of", lambda state: "ZeRO-3")
    assert find_checkpoint(arguments(make_trainer, killed_run, "auto")) == str(newest)
    assert "checkpoint-6, which 1 process wrote; 1 process under ZeRO-3 goes on." in capsys.readouterr().out
    monkeypatch.undo()
    trainer = make_trainer(output_dir=str(killed_run), max_steps=12)
    with pytest.raises(ValueError, match="written with 16 rows to train on, and this run has 8"):
        trainer.train(resume_from_checkpoint=str(newest))
    trainer = make_trainer(output_dir=str(killed_run), max_steps=12, prompts=PROMPTS * 2)
    next(p for name, p in trainer.model.named_parameters() if ".ref." in name).data += 1
    with pytest.raises(ValueError, match="written with another backbone, SFT adapter or reward adapter"):
        trainer.train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize(
    "optimizer",
    [
        {},  # stage 0
        {"single_partition_of_fp32_groups": [], "elastic_checkpoint": True},
        {"fp32_partitioned_groups_flat": [], "elastic_checkpoint": False, "swap_optimizer": True},
        {"fp32_partitioned_groups_flat": [], "elastic_checkpoint": False, "params_in_nvme_and_cpu": True},
    ],
)
def test_an_optimizer_of_deepspeed_that_cannot_be_saved_is_refused(optimizer):
    """Those that can are in tests/test_distributed.py."""
    with pytest.raises(
        ValueError, match="no checkpoint of it can be written. Set stage 1, 2 or 3 without nvme and elastic"
    ):
        check_zero(SimpleNamespace(**optimizer))


def test_without_a_state_there_is_nothing_to_resume(make_trainer, ppo_run, tmp_path):
    ppo_run("run", kill=4, save_steps=2, save_only_model=True)
    with pytest.raises(ValueError, match="checkpoint-4: written with save_only_model"):
        find_checkpoint(arguments(make_trainer, tmp_path / "run", "auto"))


def test_a_finished_run_takes_no_further_step(ppo_run, tmp_path):
    """Also in the middle of a pass over the prompts, where Trainer would."""
    expected = ppo_run("run", max_steps=6)
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()  # as if it had been killed before it left its adapter
    found = ppo_run("run", max_steps=6, resume=str(tmp_path / "run" / "checkpoint-6"))
    assert found == expected


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_run_is_replaced(ppo_run, make_trainer, tmp_path):
    ppo_run("run", max_steps=6, save_steps=3, seed=1)
    expected = ppo_run("run", max_steps=6, save_steps=3)
    for step in (3, 6):
        check_checkpoint(tmp_path / "run" / f"checkpoint-{step}", arguments(make_trainer, tmp_path / "run", None))
    assert ppo_run("run", max_steps=6, save_steps=3, resume=str(tmp_path / "run" / "checkpoint-3")) == expected


def test_what_is_not_ours_is_not_removed(ppo_run, tmp_path):
    for name in ("checkpoint-1", "checkpoint-mine"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "notes.txt").write_text("mine")
    ppo_run("run", kill=6, save_steps=2, save_total_limit=1)
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-mine", "checkpoint-6"}


def fading(completions, trainer_state, **kwargs):
    """Worth less with every step, so that the first checkpoint is the best."""
    return [-1.0 - trainer_state.global_step] * len(completions)


@pytest.mark.slow
def test_the_best_checkpoint_is_known_after_a_resume_and_a_move(ppo_run, tmp_path):
    options = {
        "reward_funcs": [fading], "held_out": PROMPTS[:2], "save_steps": 2, "save_total_limit": 2, "eval_steps": 2,
        "eval_strategy": "steps", "per_device_eval_batch_size": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "score",
    }  # fmt: skip
    expected = ppo_run("at once", **options)
    ppo_run("run", kill=7, **options)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    shutil.move(tmp_path / "run", tmp_path / "moved")
    found = ppo_run("moved", resume=str(tmp_path / "moved" / "checkpoint-6"), **options)
    assert found == expected
    assert {path.name for path in (tmp_path / "moved").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-12"}
    assert (
        found["adapter_model.safetensors"]
        == (tmp_path / "moved" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    )
    shutil.rmtree(tmp_path / "moved" / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="checkpoint-2: the best checkpoint so far is missing"):
        ppo_run("moved", resume=str(tmp_path / "moved" / "checkpoint-12"), **options)


# ------------------------------------------------------------------------------------------ a full disk
@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 4 MB in memory; yields what fills it but for 100 kB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield lambda: (folder / "full").write_bytes(bytes(shutil.disk_usage(folder).free - 100_000))
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def small_files(folder: Path):
    """Files of up to 100 kB, once what it yields is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("disk", [small_disk, small_files])
def test_a_disk_that_fills_up(disk, ppo_run, make_trainer, tmp_path):
    expected = ppo_run("at once")
    folder, options = tmp_path / "run", {"save_total_limit": None, "save_steps": 6}
    with contextlib.ExitStack() as stack:
        try:
            fill = stack.enter_context(disk(folder))
        except (subprocess.CalledProcessError, FileNotFoundError):
            pytest.skip("mounting a file system is not allowed here")
        ppo_run("run", kill=6, **options)
        fill()
        with pytest.raises(OSError, match="checkpoint-12 could not be written: .*Earlier checkpoints are complete"):
            ppo_run("run", resume=str(folder / "checkpoint-6"), **options)
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
        assert not (folder / ".staging").exists()
        if disk is small_disk:
            (folder / "full").unlink()
        else:
            stack.close()
        assert ppo_run("run", resume=find_checkpoint(arguments(make_trainer, folder, "auto")), **options) == expected


# ------------------------------------------------------------------------------------------ planted pickles
class Payload:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plant(folder: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint, and the manifest right, as one who writes checkpoints could."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": file_digest(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # a pickle of Python's own
def test_planted_pickles_are_not_executed(ppo_run, killed_run, make_trainer, tmp_path):
    newest, marker = killed_run / "checkpoint-6", tmp_path / "executed"
    torch.save({"state": Payload(marker)}, tmp_path / "payload.pt")
    payloads = [pickle.dumps(Payload(marker)), (tmp_path / "payload.pt").read_bytes()]
    pickle.loads(payloads[0])
    assert marker.is_dir()  # it does what it says
    marker.rmdir()
    torch.load(tmp_path / "payload.pt", weights_only=False)
    assert marker.is_dir()
    marker.rmdir()
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    beside = [
        "adapter_model.bin",
        "pytorch_model.bin",
        "scaler.pt",
        "optimizer.bin",
        "training_args.bin",
        "random.pkl",
    ]
    broken = []
    for name in [*set(names) - {MANIFEST}, *beside]:
        for number, payload in enumerate(payloads):
            folder = tmp_path / "planted" / f"checkpoint-{number}"
            shutil.copytree(newest, folder)
            plant(folder, name, payload)
            try:
                ppo_run("resumed", kill=6, resume=str(folder))
            except Exception as error:
                broken.append((name, type(error).__name__))
            assert not marker.exists(), name
            shutil.rmtree(folder)
    read = {name for name, _ in broken}
    assert read >= {
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "state_0.json", "state_0.safetensors",
        "adapter_model.safetensors", "adapter_config.json", "value/adapter_model.safetensors",
    }  # fmt: skip
    assert not read & {"adapter_model.bin", "pytorch_model.bin", "training_args.bin"}, broken


# ------------------------------------------------------------------------------------------ signals
class Send(TrainerCallback):
    """Sends this process a signal as a step begins."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)], ids=lambda x: str(x)
)
def test_a_signal_ends_the_update_and_saves(number, code, ppo_run, make_trainer, tmp_path, capsys):
    """Of 4 steps; the signal comes in the second update's second. No checkpoint was asked for otherwise."""
    options = {"save_strategy": "no", "prompts": PROMPTS + [text.lower() for text in PROMPTS], "max_steps": 12}
    trainer = make_trainer(output_dir=str(tmp_path / "run"), **options)
    trainer.add_callback(Send(number, 5))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == code and signal.getsignal(number) is before
    name = signal.Signals(number).name
    said = (
        f"{name}: stopped after step 8. checkpoint-8 is in {tmp_path / 'run'}. To continue, run the same command with"
    )
    assert f"{said} --resume_from_checkpoint auto." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    if number == signal.SIGTERM:
        found = ppo_run("run", resume=str(tmp_path / "run" / "checkpoint-8"), save_strategy="no")
        assert found == ppo_run("at once", save_strategy="no")


def test_a_signal_ends_sft_at_once_and_its_folder_holds_no_result(run_stage, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row["chosen"]}) + "\n" for row in PAIRS))
    original = Trainer._inner_training_loop

    def loop(self, *args, **kwargs):
        self.add_callback(Send(signal.SIGTERM, 1))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    with pytest.raises(SystemExit) as caught:
        run_stage("sft", dataset_name=tmp_path / "rows.jsonl", max_steps=4, per_device_train_batch_size=4)
    assert caught.value.code == 143
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    pickles = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir() if path.suffix in (".bin", ".pt")}
    assert pickles == {"optimizer.pt", "scheduler.pt"}  # read with weights_only
    targets = json.loads((tmp_path / "out" / "checkpoint-2" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 1 and targets == sorted(targets)


# ------------------------------------------------------------------------------------------ under accelerate launch
TWO = "distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\nmixed_precision: 'no'\nmain_process_port: 0\n"


@pytest.fixture
def launch():
    """Starts a stage, under `accelerate launch` if it is given a config, in a process group of its own; all that it and
    its workers say goes to `log`."""
    started = []

    def launch(stage, config, recipe, folder, log) -> psutil.Popen:
        command = [sys.executable]
        if config:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["-m", f"pipeline.{stage}", "--config", str(recipe), "--output_dir", str(folder)]
        command += ["--resume_from_checkpoint", "auto"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with open(log, "a") as file:
            started.append(psutil.Popen(command, stdout=file, **options))
        return started[-1]

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(path: Path, process: psutil.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.005)


def wait_for_end(workers: list[psutil.Process], log: Path) -> None:
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive, log.read_text()[-4000:]


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(launch, tiny, sft_adapter, reward_adapter, tmp_path):
    """Killed, then asked to stop through the launcher, then left to finish."""
    recipe = {
        "model_name_or_path": tiny, "sft_adapter": sft_adapter, "reward_adapter": [reward_adapter],
        "dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 24, "save_strategy": "steps", "save_steps": 1,
        "per_device_train_batch_size": 2, "steps_per_generation": 4, "num_iterations": 2, "max_completion_length": 4,
        "beta": 0.3, "kl_target": 1.0, "logging_steps": 3, "learning_rate": 1e-2, "bf16": False, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    rows = [{"prompt": text + word} for text in PROMPTS for word in ("", " film", " one or two")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "two.yaml").write_text(TWO)
    given = ("ppo", tmp_path / "two.yaml", tmp_path / "recipe.yaml")

    log, folder = tmp_path / "log", tmp_path / "at once"
    assert launch(*given, folder, log).wait(120) == 0, log.read_text()[-4000:]
    expected = files(folder)
    folder = tmp_path / "in pieces"
    process = launch(*given, folder, log)
    wait_for(folder / "checkpoint-5", process, log)
    workers = process.children(recursive=True)
    assert len(workers) >= 2
    for one in [process, *workers]:
        one.kill()
    wait_for_end([process, *workers], log)
    process = launch(*given, folder, log)
    wait_for(folder / "checkpoint-9", process, log)
    workers = process.children(recursive=True)
    process.terminate()
    wait_for_end([process, *workers], log)
    stopped = re.search(r"SIGTERM: stopped after step (\d+)\. checkpoint-\1 is in", log.read_text())
    assert stopped and (folder / f"checkpoint-{stopped[1]}" / "rng_state_1.pth").is_file(), log.read_text()[-4000:]
    assert int(stopped[1]) % 8 == 0  # an update is of 8
    assert launch(*given, folder, log).wait(120) == 0, log.read_text()[-4000:]
    assert f"resumes from {folder}/checkpoint-{stopped[1]}." in log.read_text()
    found = files(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert json.loads((folder / "checkpoint-24" / MANIFEST).read_text())["world_size"] == 2


@pytest.mark.slow
def test_one_process_stops_under_the_launcher_and_without_it(launch, tiny, tmp_path):
    recipe = {
        "model_name_or_path": tiny, "dataset_name": str(tmp_path / "rows.jsonl"), "max_steps": 10_000, "save_steps": 4,
        "save_total_limit": 1, "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "report_to": "none",
        "gradient_checkpointing": False, "max_length": 64,
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    log, folder = tmp_path / "log", tmp_path / "run"
    process = launch("sft", ROOT / "accelerate_configs" / "cpu.yaml", tmp_path / "recipe.yaml", folder, log)
    wait_for(folder / "checkpoint-4", process, log)
    workers = process.children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)  # as slurm, a terminal or `timeout` does
    wait_for_end([process, *workers], log)
    assert re.search(r"SIGTERM: stopped after step (\d+)\. checkpoint-\1 is in", log.read_text())
    steps = int(max(folder.glob("checkpoint-*")).name.removeprefix("checkpoint-"))
    process = launch("sft", None, tmp_path / "recipe.yaml", folder, log)
    later = steps // 4 * 4 + 8
    wait_for(folder / f"checkpoint-{later}", process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 128 + signal.SIGUSR1
    assert "SIGUSR1: stopped after step" in log.read_text()
