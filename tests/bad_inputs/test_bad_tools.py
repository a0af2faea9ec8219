"""The commands that are no stages, called with nonsense: one line that says what to correct, and an exit code other than 0."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from pipeline.runs.errors import report


ROOT = Path(__file__).parents[2]
PLAN = ("--config", str(ROOT / "pipeline" / "recipes" / "gpt2" / "ppo.yaml"))
PRETRAIN = ("--output_dir", "out", "--use_cpu", "--report_to", "none")
CASES = [
    ("plan", [], r"Name a reward"),
    ("plan", ["--reward_funcs", "a.b"], r"model_name_or_path: no model is named"),
    ("plan", [*PLAN, "--processes", "0"], r"^processes=0 must be 1 or more"),
    ("plan", [*PLAN, "--prompt_tokens", "-5"], r"^prompt_tokens=-5 must be 1 or more"),
    ("plan", [*PLAN, "--prompt_tokens", "999999999"], r"^prompt_tokens=999999999 is more than"),
    ("plan", [*PLAN, "--device", "tpu"], r"^device='tpu' is not one of cuda, cpu"),
    (
        "plan",
        [*PLAN, "--model_name_or_path", "./nowhere"],
        r"^model_name_or_path='./nowhere': there is no such folder",
    ),
    ("plan", [*PLAN, "--model_name_or_path", "./empty"], r"^model_name_or_path='./empty': its config cannot be read"),
    (
        "plan",
        [*PLAN, "--model_name_or_path", "./broken"],
        r"^model_name_or_path='./broken': its config cannot be read",
    ),
    ("tables", [], r"'' is not one of seeds, judges, baselines"),
    ("tables", ["seeds"], r"seeds cannot be called so"),
    ("tables", ["seeds", "empty", "more"], r"seeds cannot be called so"),
    ("tables", ["ablations", "empty"], r"ablations cannot be called so"),
    ("tables", ["baselines", "runs", ""], r"baselines got an empty word \(''\)"),
    ("tables", ["seeds", "nowhere"], r"^nowhere: no such folder"),
    ("tables", ["seeds", "text.jsonl"], r"^text.jsonl: no such folder"),
    ("tables", ["seeds", "empty"], r"^empty: the folder has no <seed>/report.json"),
    ("tables", ["seeds", "runs"], r"^runs/0/report.json: 'sft' is missing. It must be an object with"),
    ("tables", ["baselines", "empty", "empty"], r"^empty/report.json: no such file"),
    ("tables", ["baselines", "empty", "runs/0"], r"^runs/0/report.json: 'sft' is missing. It must be"),
    ("tables", ["ablations", "empty", "a=1"], r"^empty/a=1: the folder has no <seed>/report.json"),
    ("migrate", ["--", "--batch_size", "0"], r"batch_size=0 must be a whole number, 1 or more"),
    ("migrate", ["--", "--batch_size", "8", "--mini_batch_size", "0"], r"mini_batch_size=0 must be a whole number"),
    ("migrate", ["--", "--num_mini_batches", "0"], r"num_mini_batches=0 must be a whole number"),
    ("migrate", ["--", "--steps", "-1"], r"steps=-1 must be a whole number"),
    ("migrate", ["--", "--logging_steps", "often"], r"logging_steps='often' must be a number, 0 or more"),
    ("migrate", ["--", "--total_episodes", "1e400"], r"total_episodes=inf must be a whole number"),
    ("migrate", ["--", "--early_stopping", "maybe"], r"early_stopping='maybe' must be true or false"),
    ("migrate", ["--", "--gamma", ".nan"], r"gamma=nan must be from 0 to 1"),
    ("migrate", ["--", "--learning_rate", "[1]"], r"learning_rate=\[1\] must be a number"),
    ("migrate", ["--", "--kl_coef", "["], r"while parsing a flow node"),
    ("migrate", ["bomb.yaml"], r"^pipeline.migrate: bomb.yaml line 1: not a YAML recipe \(an alias stands inside"),
    ("migrate", ["empty"], r"empty: no such file"),
    ("convert_hh", ["nowhere.jsonl", "out"], r"^nowhere.jsonl: no such file or folder"),
    ("convert_hh", ["text.jsonl", "out"], r"^text.jsonl: no column 'chosen'"),
    ("convert_hh", ["text.jsonl", "text.jsonl"], r"^output_dir='text.jsonl': text.jsonl is a file. Name a folder"),
    ("convert_hh", ["empty", "out"], r"^empty: no data found in this folder"),
    (
        "convert_hh",
        ["hh.jsonl", "out", "--max_tokens", "9", "--tokenizer", "./broken"],
        r"^--tokenizer ./broken: cannot be",
    ),
    ("pretrain", [*PRETRAIN, "--n_head", "3"], r"^n_embd=256 is not a multiple of n_head=3"),
    ("pretrain", [*PRETRAIN, "--n_positions", "1"], r"^n_positions=1: a text of one token"),
    ("pretrain", [*PRETRAIN, "--backbone_dir", "text.jsonl"], r"text.jsonl is a file"),
    (
        "pretrain",
        [*PRETRAIN, "--resume_from_checkpoint", "nowhere"],
        r"^resume_from_checkpoint='nowhere': no such folder",
    ),
]


@pytest.mark.parametrize(
    ("tool", "words", "message"), CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)]
)
def test_a_tool_called_with_nonsense(tool, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "broken", "runs/0/ppo"):
        Path(folder).mkdir(parents=True)
    pair = {"chosen": "\n\nHuman: A?\n\nAssistant: B", "rejected": "\n\nHuman: A?\n\nAssistant: C"}
    for file, text in (
        ("text.jsonl", '{"text": "A"}\n'),
        ("hh.jsonl", json.dumps(pair) + "\n"),
        ("bomb.yaml", "a: &a [*a]\n"),
        ("broken/config.json", "{"),
        ("runs/0/report.json", "{}"),
        ("runs/0/ppo/metrics.json", '{"history": []}'),
    ):
        Path(file).write_text(text)
    code, said = run(tool, words, monkeypatch)
    assert code not in (0, None)
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert re.search(message, said), said


def run(tool: str, words: list[str], monkeypatch) -> tuple[int | None, str]:
    """Run a command as Python does; return its exit code and what it writes to stderr last."""
    said: list[str] = []
    monkeypatch.setattr(sys, "argv", [tool, *words])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        runpy.run_path(str(ROOT / "pipeline" / f"{tool}.py"), run_name="__main__")
    except SystemExit as end:
        return (end.code, "") if isinstance(end.code, (int, type(None))) else (1, str(end.code))
    except BaseException as error:
        monkeypatch.setattr(sys, "stderr", type("Written", (), {"write": staticmethod(said.append)}))
        report(type(error), error, error.__traceback__)
        return 1, "".join(said)
    return 0, ""
