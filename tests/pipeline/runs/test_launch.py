"""`pipeline.runs.launch`: what runs is what was launched. tests/test_distributed.py launches for real."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerControl, TrainerState

from pipeline.runs import launch
from pipeline.runs.launch import check_launch, check_wrapper


CONFIGS = sorted((Path(__file__).parents[3] / "accelerate_configs").glob("*.yaml"))
CPU = "accelerate_configs/cpu.yaml"


@pytest.fixture
def launched(monkeypatch):
    """Makes this process look as if it were started by a command line, with environment and state as it leaves them."""

    def launched(
        command: str, *, processes=1, device="cpu", kind=DistributedType.NO, n_gpu=0, accelerator=False, **env
    ):
        monkeypatch.setattr(psutil.Process, "parent", lambda self: SimpleNamespace(cmdline=command.split))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
        for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        state = SimpleNamespace(
            num_processes=processes,
            device=torch.device(device),
            distributed_type=kind,
            backend="gloo" if processes > 1 else None,
            is_main_process=True,
        )
        return SimpleNamespace(distributed_state=state, n_gpu=n_gpu, deepspeed_plugin=None)

    return launched


@pytest.mark.parametrize(
    "command",
    [
        f"python -m accelerate.commands.launch --config_file {CPU} -m pipeline.sft --seed 1",
        f"/usr/bin/python /usr/bin/accelerate launch --config_file={CPU} -m pipeline.sft --config x.yaml",
        f"/usr/bin/python /usr/bin/accelerate-launch --config_file {CPU} script.py",
        "bash",
        "python -m pytest --num_processes 2",
    ],
)
def test_one_process_as_asked(launched, capsys, command):
    check_launch(launched(command))
    assert capsys.readouterr().out == "Runs as 1 process on cpu: no wrapper.\n"


def test_two_processes_as_asked(launched, capsys):
    command = "accelerate launch --config_file accelerate_configs/cpu_ddp.yaml -m pipeline.sft"
    check_launch(launched(command, processes=2, kind=DistributedType.MULTI_CPU, WORLD_SIZE="2"))
    assert capsys.readouterr().out == "Runs as 2 processes on cpu: DDP, gloo.\n"


@pytest.mark.parametrize(
    ("command", "found", "message"),
    [
        (
            "accelerate launch --cpu --num_processes 2 -m pipeline.sft",
            {},
            r"the command line asks for 2 processes, and accelerate started 1\. .* launch with accelerate_configs/cpu_ddp",
        ),
        (
            f"accelerate launch --config_file {CPU} --num_processes 3 -m pipeline.sft",
            {},
            "cpu.yaml asks for 3 processes, and accelerate started 1",
        ),
        (
            "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m pipeline.sft",
            {"WORLD_SIZE": "2"},
            "2 processes were started, and each runs by itself.* add --use_cpu true",
        ),
        ("torchrun --nproc_per_node 2 -m pipeline.sft", {"WORLD_SIZE": "2"}, "2 processes .* each runs by itself"),
        (
            f"accelerate launch --config_file {CPU} -m pipeline.sft",
            {"device": "cuda", "accelerator": True},
            "cpu.yaml sets use_cpu: true, and this process is on cuda. Add --use_cpu true",
        ),
        (
            "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m pipeline.sft",
            {"processes": 2, "kind": DistributedType.MULTI_CPU, "WORLD_SIZE": "2", "accelerator": True},
            "ddp.yaml asks for accelerators, and this process is on the CPU. Set use_cpu: false in the recipe",
        ),
        (
            "accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 -m pipeline.sft",
            {
                "processes": 2,
                "kind": DistributedType.MULTI_CPU,
                "WORLD_SIZE": "2",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
            },
            "the launch asks for FSDP, but accelerate turns it on only for accelerators. On cpu it would run DDP",
        ),
        (
            "accelerate launch --use_fsdp --num_processes 2 -m pipeline.sft",
            {"processes": 2, "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "fsdp_version 1 is not supported. Set fsdp_version: 2",
        ),
        ("python -m pipeline.sft", {"n_gpu": 4, "device": "cuda", "accelerator": True}, "one process .* for 4 GPUs"),
    ],
)
def test_what_is_not_as_asked_is_refused(launched, command, found, message):
    with pytest.raises(ValueError, match=message):
        check_launch(launched(command, **found))


def test_a_stage_that_cannot_shard(launched):
    found = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    args = launched("bash", processes=2, device="cuda", kind=DistributedType.MULTI_GPU, accelerator=True, **found)
    check_launch(args)
    with pytest.raises(ValueError, match="this stage does not run under FSDP: .*ddp.yaml or zero2.yaml"):
        check_launch(args, shards=False)


def test_a_stage_without_arguments(launched):
    launched("bash")
    assert isinstance(check_launch(), PartialState)


def test_a_wrapper_that_was_not_asked_for_is_refused_before_the_first_step(launched):
    found = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    args = launched("bash", processes=2, device="cuda", kind=DistributedType.MULTI_GPU, accelerator=True, **found)
    callbacks = []
    check_wrapper(SimpleNamespace(add_callback=callbacks.append, model_wrapped=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="the launch asks for FSDP, and accelerate made the model a Linear"):
        callbacks[0].on_train_begin(args, TrainerState(), TrainerControl())
    callbacks[0].on_train_begin(launched("bash"), TrainerState(), TrainerControl())  # one process needs none


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_the_command_that_uses_it(path):
    config, text = load_config_from_file(str(path)), path.read_text()
    assert text.startswith(f"# accelerate launch --config_file accelerate_configs/{path.name} ")
    command = re.sub(
        r"\\\n#", "", text.split("\n# ", 1)[0] if path.stem != "multi_node" else text[: text.index("\n# DDP")]
    )
    words = re.sub(r"\$\(\([^)]*\)\)|\$\w+", "2", command.removeprefix("# accelerate launch ")).split()
    given = launch.launch_command_parser().parse_args(words)
    assert given.module and given.training_script == "pipeline.<stage>"
    assert config.use_cpu == ("--use_cpu" not in words)  # in a demo recipe it is true
    expected = {"cpu": "NO", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}.get(path.stem, "MULTI_GPU")
    assert config.distributed_type == expected
    if expected == "DEEPSPEED":
        settings = json.loads((path.parents[1] / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(path.stem[-1])
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
            assert settings[name] == "auto"
