"""What is written can be read: strict JSON, UTF-8 in any locale, modes by the umask, cards that name the base."""

import ast
import json
import math
import os
import stat
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from data.files import load_rows
from data.json_files import write_json
from data.pip_files import Release, fetch
from data.saving import open_to_umask
from pipeline.runs.outputs import complete_card, seconds_running
from pipeline.runs.state_files import load_state, save_state


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_null(number, tmp_path):
    value = {"sft": {"rewards": {"nothing": number}}, "rows": [{"kl": number}, (1.5, number)], "name": "é"}
    write_json(tmp_path / "report.json", value)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == {"sft": {"rewards": {"nothing": None}}, "rows": [{"kl": None}, [1.5, None]], "name": "é"}


def test_a_state_keeps_what_is_not_finite_in_strict_json(tmp_path):
    state = {"rewards": [1.0, math.nan], "beta": -math.inf, "tensor": torch.tensor([math.inf])}
    save_state(state, tmp_path / "state_0")
    json.loads((tmp_path / "state_0.json").read_text(encoding="utf-8"), parse_constant=refuse)
    found = load_state(tmp_path / "state_0")
    assert found["rewards"][0] == 1.0 and math.isnan(found["rewards"][1])
    assert found["beta"] == -math.inf and found["tensor"].tolist() == [math.inf]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_mode_of_any_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        (tmp_path / "value").mkdir()
        for path in (tmp_path / "adapter_model.safetensors", tmp_path / "value" / "adapter_model.safetensors"):
            save_file({"weight": torch.zeros(1)}, path)
        open_to_umask(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*.safetensors")} == {mode}


def test_a_card_names_the_base_and_the_adapter(tmp_path):
    card = tmp_path / "README.md"
    card.write_text('of [None](https://huggingface.co/None). `model="None"`', encoding="utf-8")
    complete_card(tmp_path, "/home/someone/models/backbone", "sft")
    assert card.read_text(encoding="utf-8") == 'of `backbone`. `model="sft"`'


@pytest.mark.parametrize("package", ["pipeline", "reward_models", "data"])
def test_every_text_file_is_read_and_written_as_utf_8(package):
    """Whatever the locale: the default of `open` is its encoding."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            modes = [
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            ]
            binary = name == "open" and any("b" in mode for mode in modes)
            archive = (
                name == "open"
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) in ("tarfile", "os", "opener")
            )
            if name in ("open", "read_text", "write_text") and not binary and not archive:
                assert "encoding" in [word.arg for word in node.keywords], f"{path}:{node.lineno}"


@pytest.mark.parametrize("cache", ["/dev/null/x", "/proc/none", "file"])
def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "A"}\n')
    cache = cache if cache.startswith("/") else str(tmp_path / cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
    with pytest.raises(OSError, match=r"the cache of `datasets` cannot be written .*HF_DATASETS_CACHE or HF_HOME"):
        load_rows("owner/name", "train")
    assert len(load_rows(str(tmp_path / "rows.jsonl"), "train")) == 1  # which needs no cache
    monkeypatch.setenv("SPINE_CACHE", cache)
    with pytest.raises(OSError, match=r"this cache cannot be written .*Set SPINE_CACHE"):
        fetch(Release("a==1", "a-1-py3-none-any.whl", "0" * 64))


def test_seconds_are_none_below_0_if_the_clock_is_set_back(monkeypatch):
    assert 0 < seconds_running() < 24 * 3600
    monkeypatch.setattr("time.time", lambda now=time.time: now() - 48 * 3600)
    assert seconds_running() == 0
