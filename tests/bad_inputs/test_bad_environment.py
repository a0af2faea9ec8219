"""What the machine lacks or holds already."""

import socket

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from trl.import_utils import is_vllm_available


def test_a_port_in_use_is_named_before_a_process_starts(monkeypatch):
    """accelerate says so itself, and every stage is started by it: on several machines, that is, for which all must name
    the same port. On one machine it takes another port."""
    monkeypatch.setattr("torch.distributed.run.run", lambda args: pytest.fail("a process was started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        where = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
        options = ["--multi_gpu", "--num_processes", "4", "--mixed_precision", "no", "--dynamo_backend", "no"]
        args = launch_command_parser().parse_args(
            [*options, *where, "--main_process_port", port, "-m", "pipeline.sft"]
        )
        with pytest.raises(ConnectionError, match=rf"port `{port}`, but another process .*`--main_process_port`"):
            launch_command(args)


@pytest.mark.skipif(is_vllm_available(), reason="vLLM is installed")
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_vllm_that_is_not_installed(stage, refuses):
    refuses(stage, "vLLM is not available.*pip install", loads=True, use_vllm=True)


def test_vllm_with_4_bits(refuses):
    refuses("ppo", "use_vllm=True with load_in_4bit=True is not supported", use_vllm=True, load_in_4bit=True)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "evaluation"])
def test_4_bits_without_bitsandbytes(stage, refuses, monkeypatch):
    monkeypatch.setattr("pipeline.backbone.loading.is_bitsandbytes_available", lambda: False)
    refuses(
        stage,
        r"load_in_4bit=True needs bitsandbytes\. Install it: pip install 'spine-rlhf\[quantization\]'",
        load_in_4bit=True,
    )


@pytest.mark.parametrize("kind", ["FSDP", "ZeRO-3"])
def test_4_bits_sharded(kind, refuses, monkeypatch):
    monkeypatch.setattr("pipeline.backbone.loading.kind_of", lambda state: kind)
    refuses("sft", f"load_in_4bit=True does not run under {kind}, which would shard", load_in_4bit=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu(refuses):
    refuses("sft", "Your setup doesn't support bf16/gpu", recipe="bf16: true\nuse_cpu: false\n")
