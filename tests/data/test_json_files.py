"""`data.json_files` and `data.schemas`: every JSON file that is read fits its schema, or is one clear error."""

import copy
import json
import os
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerState

from data import json_files, schemas
from data.json_files import check_object, parse_json, read_json
from data.quoting import escaped, quoted
from data.schemas import either, fault, list_of, nullable, number, one_of, record, text, whole
from pipeline import tables
from pipeline.backbone.adapters import read_metrics
from pipeline.pages import dashboard_page
from pipeline.reports.markdown import number as shown
from pipeline.reports.report import _reward_model, best_of_n_table, markdown_report, read_report
from pipeline.reports.run_files import read_run
from pipeline.rl.checks import Check
from pipeline.rl.health import Health
from pipeline.rl.sample_table import SampleTable
from pipeline.runs.live_files import LOG
from pipeline.runs.manifest import MANIFEST, manifest_digest, read_manifest
from pipeline.runs.state_files import load_trainer_state, save_state
from pipeline.runs.training_log import TrainingLog
from reward_models.calibration import reward_model_report
from reward_models.normalization import FILE, Normalization, read_normalization
from reward_models.temperature import FILE as TEMPERATURE
from reward_models.temperature import Calibration, probabilities, read_calibration


# ------------------------------------------------------------------------------------ one file
CONTENTS = {
    "empty": b"",
    "cut": b'{"a": 1, "b',
    "a list": b"[1]",
    "null": b"null",
    "a text": b'"text"',
    "not UTF-8": b'{"a": "caf\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice, deep": b'{"a": [{"\x1b[2J": 1, "\x1b[2J": 2}]}',
    "deep lists": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "a number of many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "two objects": b'{"a": 1}{"b": 2}',
    "escapes": b'{"a": "\x1b[2J',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_that_is_no_object(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.json: not .*JSON.*\. Restore the file, or the folder it is in\.$"
    ) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_path_that_is_no_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")  # reading it would never end
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("folder", "pipe", "loop", "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{name}\.json: no such file\. Run it again\."):
            read_json(tmp_path / f"{name}.json", remedy="Run it again.")


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2 * 2**30)
    with pytest.raises(ValueError, match=r"a\.json: the file is larger than 32 MiB, the most that is read\. Restore"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"a": 1}')
    monkeypatch.setattr(json_files, "LIMIT", 8)
    assert read_json(tmp_path / "b.json", limit=8) == {"a": 1}
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "b.json", limit=7)


KINDS = [
    (number(), [0, -1.5, 10**200], [True, "1", None, float("nan"), float("inf"), 10**400, []]),
    (number(0, 1), [0, 1, 0.5], [-0.1, 1.1]),
    (whole(1), [1, 10**15], [0, 1.0, True, 10**30]),
    (text(), ["", "a"], [None, 1, ["a"]]),
    (one_of(None, True, "gaussian"), [None, True, "gaussian"], [False, 1, "x"]),
    (nullable(number()), [None, 1], ["x", 10**400, float("nan")]),
    (schemas.FIGURE, [None, 1, float("nan")], ["x", 10**400]),
    (nullable(either(number(), text())), [None, 1, "x"], [[], True]),
    (list_of(whole(), 1, 3), [[1], [1, 2, 3]], [[], [1] * 4, [1, "x"], "ab", {}]),
    (
        record({"a": whole()}, {"b": text()}),
        [{"a": 1}, {"a": 1, "b": "", "c": []}],
        [{}, {"a": "x"}, {"a": 1, "b": 1}, [], 1],
    ),
]


@pytest.mark.parametrize(("kind", "good", "bad"), KINDS, ids=[kind.words for kind, _, _ in KINDS])
def test_kinds(kind, good, bad):
    assert [value for value in good if fault(value, kind)] == []
    assert [value for value in bad if not fault(value, kind)] == []


def test_a_message_names_the_field_the_value_and_the_remedy():
    schema = record({"rows": list_of(record({"n": number(0, 1)}))})
    with pytest.raises(
        ValueError, match=r"^f: 'rows'\[1\]\['n'\] is 'high', but must be a number from 0 to 1\. Do it\.$"
    ):
        check_object({"rows": [{"n": 1}, {"n": "high"}]}, "f", schema, remedy="Do it.")
    with pytest.raises(
        ValueError, match=r"^f: 'rows'\[0\]\['n'\] is missing\. It must be a number from 0 to 1\. Do it\.$"
    ):
        check_object({"rows": [{"m": 1}]}, "f", schema, remedy="Do it.")


def test_values_are_quoted_shortly_and_without_codes():
    assert quoted("café 中") == "'café 中'"
    assert quoted({"b": [1, 2], "a": None}) == "{'b': [1, 2], 'a': None}"
    for value in ("\x1b[2J\u202e\x07", ["\x1b" * 10**6] * 10**6, {"\x9b": "\ud800"}, 10**5000, [10**5000]):
        for shown_text in (quoted(value), escaped(value if isinstance(value, str) else "\x1b]0;a\x07\n")):
            assert shown_text.isprintable() and shown_text.isascii() and len(shown_text) <= 300
    bomb: list = []
    for _ in range(50):  # 2^50 entries, if each is looked at
        bomb = [bomb, bomb]
    assert len(quoted(bomb)) <= 60
    assert escaped("a\nb") == "a\\nb" and escaped("x" * 400) == "x" * 297 + "..."


# ------------------------------------------------------------------------------------ each file that is read
ROWS = {"train": {"source": "a.jsonl", "rows": 9, "kept": 8, "cut": 0, "dropped": 1, "longest": 12}}
HISTORY = [
    {"step": 1, "score": 0.5, "kl": 0.0, "loss/value": 1.0, "approxkl": 0.0, "epoch": 0.1},
    {"train_runtime": 2.0},
]
CHECKS = [
    asdict(Check("one", None, "at least 1", "warning", "why")),
    asdict(Check("two", 1.0, "at most 2", "passed", "b")),
]
SIDE = {
    "score": 1.0,
    "judge": 0.5,
    "kl": 2.0,
    "distinct_1": 0.2,
    "distinct_2": 0.5,
    "perplexity": 9.0,
    "mean_length": 4.0,
}
INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75}


def reward_figures() -> dict:
    generator = np.random.default_rng(0)
    margins, gaps = generator.normal(1, 1, 64), generator.uniform(0.5, 4, 64)
    return reward_model_report(margins, agreement=generator.uniform(0.5, 1, 64), gaps=gaps)


def metrics() -> dict:
    of_stage = {
        "rows": ROWS,
        "history": HISTORY,
        "seconds": 9.5,
        "completions": 64,
        "preflight": CHECKS,
        "warnings": [],
    }
    return reward_figures() | of_stage


def report() -> dict:
    return {
        "policy_name": "PPO",
        "seed": 0,
        "prompts": 4,
        "rows": ROWS,
        "sft": SIDE,
        "policy": SIDE,
        "judge_gain": INTERVAL,
        "win_rate": INTERVAL,
        "reward_model": reward_figures(),
        "preflight": CHECKS,
        "completions": None,
        "seconds": {"sft": 1.0, "policy": 2.0},
    }


def manifest() -> dict:
    found = {
        "step": 4,
        "written": 1e9,
        "world_size": 1,
        "kind": "no wrapper",
        "holds": ["weights", "optimizer"],
        "order": {"seed": 0},
        "files": {"a": {"bytes": 1, "sha256": "0"}},
    }
    return {**found, "sha256": manifest_digest(found)}


def use_metrics(folder: Path) -> None:
    found = read_metrics(folder)
    measured = {key: value for key, value in found.items() if key in schemas.REWARD_MODEL}
    check_object(measured, "metrics.json", schemas.MEASURED)
    sides = {"sft": SIDE, "policy": SIDE, "judge_gain": INTERVAL, "win_rate": INTERVAL}
    whole_report = {
        **sides,
        "reward_model": measured,
        "preflight": found.get("preflight", []),
        "rows": found.get("rows"),
    }
    markdown_report(whole_report, [])
    [statistics.fmean([row["kl"]]) for row in found.get("history", []) if row.get("kl") is not None]


def use_report(folder: Path) -> None:
    markdown_report(read_report(folder / "report.json"), [])
    tables.baselines_row("PPO", read_report(folder / "report.json"))
    tables.seeds_table([{**read_report(folder / "report.json", schemas.SEED_REPORT), "kl_held": 1.0}])


def use_best_of_n(folder: Path) -> None:
    rows = read_json(folder / "best_of_n.json", schemas.BEST_OF_N)["rows"]
    best_of_n_table([{"mean_length": 1.0, "judge_gain": INTERVAL, "win_rate": INTERVAL, **row} for row in rows])
    tables.comparison_table([{"method": f"best of {row['n']}", **row} for row in rows])


def use_temperature(folder: Path) -> None:
    found = read_calibration(folder)
    assert found is not None
    _reward_model({"pairs": 3, "accuracy": 0.5, "ece": 0.1}, asdict(found))
    probabilities([1.0], found.temperature)


def use_manifest(folder: Path) -> None:
    """Only its own digest can be right, so that every value is looked at."""
    found = json.loads((folder / MANIFEST).read_text())
    if isinstance(found.get("sha256"), str):
        (folder / MANIFEST).write_text(json.dumps({**found, "sha256": manifest_digest(found)}))
    checked = read_manifest(folder)
    if checked is None:
        raise ValueError(f"{MANIFEST} damaged")
    assert checked["world_size"] >= 1 and "weights" in checked["holds"] or checked["holds"] is not None
    [(file["bytes"] + 1, file["sha256"] + "") for file in checked["files"].values()]
    dict(checked["order"].items())
    sorted([checked["written"], 0])


def use_state(folder: Path) -> None:
    state = load_trainer_state(folder / "state_0")
    check_object(state, "state_0.json", schemas.PPO_STATE)
    [(name, list(values)) for of_mode in state["metrics"].values() for name, values in of_mode.items()]
    (state["seconds"] + 1, state["trained_for"] + 1, state["epoch_start"]["torch"], state["now"]["sampler"])
    for part in (state["counters"], state["ppo"], state.get("loop", {})):
        list(part.items())
    for columns in state.get("logs", {}).values():
        [list(column) for column in (columns.values() if isinstance(columns, dict) else [columns])]
    health = state["health"] if "health" in state else state["watch"]
    set(health["said"]), health["first_entropy"] or 0.0, health["flat_rollouts"] + 1


def state() -> dict:
    torch_state = {"torch": torch.zeros(3, dtype=torch.uint8), "sampler": None}
    return {
        "counters": {"_step": 4},
        "metrics": {"train": {"kl": [0.1, float("nan")]}, "eval": {}},
        "loop": {"_tr_loss": torch.ones(())},
        "trained_for": 1.0,
        "epoch_start": torch_state,
        "now": torch_state,
        "rows": 8,
        "frozen": "0" * 64,
        "seconds": 2.0,
        "logs": {"prompt": ["a"], "rewards": {"r": [1.0]}, "extra": {}},
        "ppo": {"beta": 0.05, "_kl_exceeded": False, "_skipping": False},
        "health": {**asdict(Health()), "said": ["a"]},
    }


def use_trainer_state(folder: Path) -> None:
    read_json(folder / "trainer_state.json", schemas.TRAINER_STATE)
    TrainerState.load_from_json(str(folder / "trainer_state.json"))


class Trainer:
    def __init__(self, folder: Path):
        self.args = type("Args", (), {"output_dir": str(folder)})


def use_samples(folder: Path) -> None:
    SampleTable(Trainer(folder), None)._keep_rows_of(3)


def training_log() -> dict:
    check = {"name": "first KL", "measured": 0.25, "bound": "at most 0.1", "result": "warning", "why": "It must be 0."}
    about = {"stage": "ppo", "max_steps": 8, "options": {"kl_target": 9.0, "beta": 0.2}, "preflight": [check]}
    return {"step": 2, "time": 1e9, "started": about, "warning": "a", "ended": "finished"}


def use_training_log(folder: Path) -> None:
    """Show it, with a row of figures of the same step and time, and go on from step 3."""
    try:
        row = json.loads((folder / LOG).read_bytes())
    except (ValueError, RecursionError):
        row = {}
    with (folder / LOG).open("a") as file:
        file.write(json.dumps({**{name: row[name] for name in ("step", "time") if name in row}, "kl": 0.5}) + "\n")
    run = read_run(folder)
    dashboard_page.content([("a", run), ("b", replace(run, history=run.history * 2, ended=None, holder={"pid": 1}))])
    state = type("State", (), {"global_step": 3, "log_history": [{"step": 2, "kl": 0.5}]})
    TrainingLog(folder, {})._kept(state)


FILES = {
    "metrics.json": (metrics, use_metrics),
    "report.json": (report, use_report),
    "best_of_n.json": (
        lambda: {"rows": [{"n": 1, **SIDE, "judge_gain": INTERVAL, "win_rate": INTERVAL}]},
        use_best_of_n,
    ),
    TEMPERATURE: (
        lambda: asdict(Calibration(2.0, 130, 120, 0.1, 0.02, 0.7, 0.6, (2.1, 1.9), (0.03, 0.02), "pairs.jsonl")),
        use_temperature,
    ),
    FILE: (lambda: {"mean": 0.5, "std": 2.0, "completions": 8}, lambda folder: read_normalization(folder).mean + 1),
    MANIFEST: (manifest, use_manifest),
    "state_0.json": (state, use_state),
    "trainer_state.json": (lambda: json.loads(json.dumps(asdict(TrainerState()))), use_trainer_state),
    "samples.jsonl": (lambda: {"step": 2, "prompt": "a", "score": 1.0}, use_samples),
    LOG: (training_log, use_training_log),
}
WRONG = [None, True, "text", -1, float("nan"), float("inf"), 10**400, [], {}, [[]], {"a": {}}, "\x1b[2J", 10**20]


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """The way to each value in a JSON value; of a list, to the first."""
    for key in value if isinstance(value, dict) else range(len(value))[:1] if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def spoiled(good: dict, seed: int) -> Iterator[dict]:
    """The value without each of its keys, and with wrong values for each."""
    draw = random.Random(seed)
    for *way, last in places(good):
        for wrong in [KeyError, *draw.sample(WRONG, 4)]:
            bad = copy.deepcopy(good)
            holder = bad
            for key in way:
                holder = holder[key]
            if wrong is KeyError:
                del holder[last]
            else:
                holder[last] = wrong
            yield bad


@pytest.mark.parametrize("name", FILES)
def test_every_key_missing_or_of_another_kind(name, tmp_path):
    make, use = FILES[name]
    good, path = make(), tmp_path / name
    if name == "state_0.json":
        save_state(good, tmp_path / "state_0")
        good = json.loads(path.read_text())
    path.write_text(json.dumps(good) + "\n")
    use(tmp_path)
    refused = 0
    cases = list(spoiled(good, seed=0))
    for bad in cases:
        path.write_text(json.dumps(bad) + "\n")
        try:
            use(tmp_path)
        except ValueError as error:
            assert name in str(error) and str(error).isprintable(), error
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {bad}") from error
    assert refused > len(cases) / 8


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["a list", "deep lists", "a key twice", "not UTF-8", "a number of many digits"])
def test_every_file_that_is_no_object(kind, name, tmp_path):
    make, use = FILES[name]
    if name == "state_0.json":
        save_state(make(), tmp_path / "state_0")
    (tmp_path / name).write_bytes(CONTENTS[kind] + b"\n")
    if name == MANIFEST:
        assert read_manifest(tmp_path) is None
        return
    with pytest.raises(ValueError, match=name):
        use(tmp_path)


def test_files_of_older_versions(tmp_path):
    older = {key: value for key, value in state().items() if key not in ("loop", "logs", "health")}
    older["watch"] = {"said": [], "first_entropy": None, "flat_rollouts": 0, "kl_rollouts": 3}
    save_state(older, tmp_path / "state_0")
    use_state(tmp_path)
    assert fault({"fingerprint": "0" * 64}, schemas.IDENTITY) is None
    assert fault({"accuracy": 0.9}, schemas.METRICS) is None
    assert fault({"history": [{"kl": float("nan")}]}, schemas.METRICS) is None  # as they were once written
    assert shown(float("nan"), ".1f") == "–"
    Normalization(0.5, 2.0, 8).save(tmp_path)
    assert read_normalization(tmp_path).std == 2.0
    assert parse_json('{"a": Infinity}', "f") == {"a": float("inf")}  # in the configs of some models
