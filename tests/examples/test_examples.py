"""Each example as a user runs it, on a two-layer GPT-2: it does what its docstring says, and stays short."""

import ast
import json
import re
import shlex
import sys
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import ROOT, make_adapter
from safetensors.torch import load_file
from trl import ModelConfig

from pipeline import merge, ppo
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.members import write_members
from pipeline.backbone.roles import Backbone
from pipeline.runs.command_line import parse
from reward_models.normalization import Normalization


EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def commands(name: str) -> list[str]:
    """The commands in the docstring of an example."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())).replace("\\\n", " ")
    return [line.strip() for line in docstring.splitlines() if line.startswith(("    python", "    accelerate"))]


def stage_command(name: str) -> list[str]:
    """The options of the command in an example's docstring that launches PPO."""
    (line,) = (line for line in commands(name) if line.startswith("accelerate"))
    return shlex.split(line.partition(" -m pipeline.ppo ")[2])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the text of an example as a script in an empty folder, with small values in the place of its own."""

    def run(name: str, *args: object, changes: dict[str, str] | None = None) -> str:
        text = (EXAMPLES / name).read_text()
        for old, new in (changes or {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_says_how_it_is_started(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 40
    started = "\n".join(commands(name))
    assert f"examples/{name}" in started or f"examples.{name.removesuffix('.py')}" in started
    for path in re.findall(r"(?:pipeline/recipes|accelerate_configs)/\S+", started):
        assert (ROOT / path).is_file(), path
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()


def test_ppo_is_ten_lines():
    tree = ast.parse((EXAMPLES / "ppo_in_ten_lines.py").read_text())
    nodes = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]
    assert sum(node.end_lineno - node.lineno + 1 for node in nodes) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_reward.py", "async_reward.py"])
def test_a_reward_of_ones_own(name, tiny, tmp_path, monkeypatch):
    """The docstring's command, on fewer steps; each completion of the log has the reward that the function is to give."""
    module, seen = import_module(f"examples.{name.removesuffix('.py')}"), []
    server = None
    if name == "async_reward.py":
        original = module.Service.do_POST
        monkeypatch.setattr(module.Service, "do_POST", lambda self: (seen.append(1), original(self)))
        monkeypatch.setattr(module.Service, "log_message", lambda *args: None)
        server = ThreadingHTTPServer(("localhost", 0), module.Service)
        monkeypatch.setattr(module, "URL", f"http://localhost:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
    small = ["--model_name_or_path", tiny, "--max_steps", "4", "--output_dir", str(tmp_path / "out")]
    small += ["--per_device_train_batch_size", "8", "--max_completion_length", "3", "--logging_steps", "1"]
    monkeypatch.chdir(ROOT)
    try:
        ppo.main(*parse(*ppo.OPTIONS, args=[*stage_command(name), *small]))
    finally:
        if server:
            server.shutdown()
            server.server_close()
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    function = module.greets_briefly if name == "own_reward.py" else module.ask
    column = f"rewards/{function.__name__}/mean"
    assert column in history[0]
    if name == "own_reward.py":
        assert history[0][column] == pytest.approx(-history[0]["completions/mean_length"] / 20, abs=1e-6)
        rewards = function(completions=[", world!", " there"], completion_ids=[[1, 2], [3]], contains=["world"] * 2)
        assert rewards == pytest.approx([0.9, -0.05])
    else:
        assert len(seen) >= 8


@pytest.mark.slow
def test_ppo_in_ten_lines(run, tmp_path):
    out = run("ppo_in_ten_lines.py", changes={'"max_steps": 60': '"max_steps": 4', "* 8})": "* 4})"})
    assert re.search(r"step +4/4 +score", out)
    base, _ = load_pretrained(ModelConfig("data/backbone"))
    adapter = read_adapter(str(tmp_path / "runs" / "ten_lines"), needs_head=False, base=base)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.weights.items() if "lora_B" in name)
    assert load_file(tmp_path / "runs" / "ten_lines" / "value" / "adapter_model.safetensors")


def test_an_ensemble(run, tiny, tmp_path):
    folder = tmp_path / "ensemble"
    for number in range(2):
        member = make_adapter(tiny, folder / f"member_{number}", head=True, seed=number)
        Normalization(mean=0.5, std=2.0, completions=8).save(member)
    write_members(folder, {"member_0": 0, "member_1": 1}, folder)
    out = run("ensemble.py", folder, tiny)
    rows = re.findall(r"members (\S+) (\S+) +mean less deviation (\S+)", out)
    assert len(rows) == 4 and len({row[0] for row in rows}) == 4
    for one, other, score in ([float(number) for number in row] for row in rows):
        assert score == pytest.approx(
            min(one, other), abs=0.02
        )  # of two, the mean less the deviation is the lower one


def test_texts_are_scored_in_plain_transformers(run, tiny, reward_adapter, tmp_path):
    merge.main([reward_adapter, str(tmp_path / "merged")])
    assert not re.search(
        r"^(from|import) (pipeline|data|reward_models)", (EXAMPLES / "score_texts.py").read_text(), re.MULTILINE
    )
    out = run("score_texts.py", tmp_path / "merged")
    scores = {text: float(score) for score, text in re.findall(r"^([+-]\d\.\d{3})  (.+)$", out, re.MULTILINE)}
    assert len(scores) == 3
    base, tokenizer = load_pretrained(ModelConfig(tiny))
    backbone = Backbone(base, read_adapter(reward_adapter, base=base))
    backbone.add_role("reward", read_adapter(reward_adapter, needs_head=True, base=base))
    for text, score in scores.items():
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            assert score == pytest.approx(backbone.eval().scores(ids, torch.ones_like(ids)).item(), abs=1e-3)
    first, second, _ = scores.values()
    share = torch.sigmoid(torch.tensor(first - second)).item()
    assert float(re.search(r"second: (\S+)%", out)[1]) / 100 == pytest.approx(share, abs=2e-3)


def test_merge_and_generate(run, sft_adapter, tmp_path):
    out = run("merge_and_generate.py", sft_adapter, tmp_path / "merged")
    lines = out.splitlines()
    assert "GPT2LMHeadModel" in lines[0]
    assert [line for line in lines if line.startswith("What's surprising about")]
    assert (Path(tmp_path) / "merged" / "model.safetensors").is_file()
