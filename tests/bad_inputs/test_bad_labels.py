"""`pipeline.label`, given what users get wrong: one clear error before the model is loaded, and no answer is touched."""

import json
import re
import socket

import pytest
from trl import ModelConfig

from pipeline import label
from pipeline.label import LabelArguments
from pipeline.runs.command_line import parse


PAIRS = [{"prompt": "A", "response_1": " b", "response_2": " c"}]
ANSWER = {"pair": "d13a8ae6b3fa9f0f", "annotator": "Ana", "label": "1", "prompt": "A", "first": " b", "second": " c"}
ANSWER |= {"first_from": "x", "second_from": "y", "swapped": False, "shared": False, "number": 1, "disagreement": None}
CASES = {
    "three policies": ({"policy_adapter": ["a", "b", "c"]}, "policy_adapter names 3 policies, and a pair has 2 sides"),
    "pairs and policies": ({"policy_adapter": ["a"], "pairs": "pairs.jsonl"}, "Name one of the two"),
    "rewards for nothing": ({"reward_adapter": ["{reward}"]}, "reward_adapter is for choose: disagreement"),
    "no rewards": ({"choose": "disagreement"}, "needs the reward models that may disagree"),
    "one reward": (
        {"choose": "disagreement", "reward_adapter": ["{reward}"]},
        r"compares two or more reward models, and reward_adapter names \S+ alone",
    ),
    "another choice": (
        {"choose": "best"},
        r"--choose: invalid choice: 'best' \(choose from '?random'?, '?disagreement",
    ),
    "no policy": ({"policy_adapter": ["nowhere"]}, r"nowhere/adapter_config\.json: no such file"),
    "a reward as policy": ({"policy_adapter": ["{reward}"]}, "A policy cannot start from it"),
    "no model": ({}, "model_name_or_path is not set"),
    "no pairs": ({"pairs": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
    "no guidelines": (
        {"pairs": "pairs.jsonl", "guidelines": "no.md"},
        r"guidelines='no\.md': cannot be read \(No such file",
    ),
    "no password": ({"pairs": "pairs.jsonl", "password_file": "no"}, r"password_file='no': cannot be read"),
    "empty password": (
        {"pairs": "pairs.jsonl", "password_file": "empty"},
        "password_file='empty': the password is empty",
    ),
    "latin guidelines": ({"pairs": "pairs.jsonl", "guidelines": "latin"}, "guidelines='latin': not UTF-8"),
    "no port": ({"pairs": "pairs.jsonl", "port": "0"}, "port=0 must be from 1 to 65535"),
    "no host": (
        {"pairs": "pairs.jsonl", "host": "999.1.1.1"},
        r"host='999\.1\.1\.1', port=\d+: the page cannot listen there",
    ),
    "fewer than no pairs": ({"pairs": "pairs.jsonl", "max_pairs": "0"}, "max_pairs=0 must be 1 or more"),
    "negative overlap": ({"pairs": "pairs.jsonl", "overlap": "-1"}, "overlap=-1 must be 0 or more"),
    "preferences read": (
        {"pairs": "made/preferences.jsonl", "output_dir": "made"},
        "the run reads made/preferences.jsonl beneath this folder",
    ),
    "preferences of others": (
        {"pairs": "pairs.jsonl", "output_dir": "theirs"},
        r"output_dir='theirs' holds preferences\.jsonl, which no run of Spine has written",
    ),
    "answers of others": (
        {"pairs": "pairs.jsonl", "output_dir": "notes"},
        r"notes/answers\.jsonl line 1: 'pair' is missing",
    ),
    "texts to conversations": (
        {"pairs": "turns.jsonl", "output_dir": "answered"},
        r"answered/answers\.jsonl is about texts, and turns\.jsonl has conversations",
    ),
}


@pytest.fixture
def here(tmp_path, monkeypatch, reward_adapter):
    """A folder of files, with the loading of models forbidden."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(label, "load_backbone", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    turns = {"prompt": [{"role": "user", "content": "A"}], "response_1": "b", "response_2": "c"}
    files = {
        "pairs.jsonl": PAIRS,
        "turns.jsonl": [turns],
        "theirs/preferences.jsonl": PAIRS,
        "notes/answers.jsonl": PAIRS,
    }
    files |= {"answered/answers.jsonl": [ANSWER], "made/preferences.jsonl": PAIRS}
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    return tmp_path


def run(**options) -> None:
    """The command up to the page, which is never opened."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    args, model = parse(LabelArguments, ModelConfig, args=flags)
    label.check(args, model)
    with label.open_desk(args, model):
        pytest.fail("the desk was opened")


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case, here, reward_adapter):
    options, message = CASES[case]
    options = {"output_dir": "out", "port": free_port()} | options
    options = {
        name: [entry.format(reward=reward_adapter) for entry in value] if isinstance(value, list) else value
        for name, value in options.items()
    }
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError)) as caught:
        run(**options)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_a_port_in_use(here):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(OSError, match=rf"port={port}: the page cannot listen there \(Address already in use"):
            run(output_dir="out2", pairs="pairs.jsonl", port=port)


def test_without_gradio(here, monkeypatch):
    monkeypatch.setattr(label, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"The page needs gradio\. Install it: pip install 'spine-rlhf\[pages\]'"):
        run(output_dir="out2", pairs="pairs.jsonl", port=free_port())


def test_the_password_comes_from_a_file_or_the_environment(here, monkeypatch):
    args = LabelArguments("out", pairs="pairs.jsonl")
    assert args.password() is None
    monkeypatch.setenv("SPINE_LABEL_PASSWORD", "of the environment")
    assert args.password() == "of the environment"
    (here / "secret").write_text("of the file\n")
    assert LabelArguments("out", pairs="pairs.jsonl", password_file="secret").password() == "of the file"
    monkeypatch.setenv("SPINE_LABEL_PASSWORD", "")
    with pytest.raises(ValueError, match="SPINE_LABEL_PASSWORD: the password is empty"):
        args.password()
