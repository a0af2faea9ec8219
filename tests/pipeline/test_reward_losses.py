"""`pipeline.reward` on rankings, ratings and several files: what it trains and leaves, and that it resumes to the byte."""

import json
import statistics
from pathlib import Path

import pytest
from distributed_worker import KillAt, Killed
from safetensors.torch import load_file
from transformers import Trainer

from pipeline import reward, tables
from pipeline.backbone.adapters import WEIGHTS
from pipeline.reports.loss_table import LOSSES_NOTE
from tests.pipeline import test_stages


run_stage = test_stages.run
WORDS = ("fine", "good", "so so", "dull", "bad")
RANKINGS = [
    {"prompt": f"The film {i}", "ranking": [f" is {word}{' indeed' * (i % 3)}." for word in WORDS[: 2 + i % 4]]}
    for i in range(12)
]
RATED = [
    {"prompt": row["prompt"], "completion": text, "rating": 5.0 - place}
    for row in RANKINGS
    for place, text in enumerate(row["ranking"])
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["ranking"][0], "rejected": row["ranking"][-1], "agreement": 0.75}
    for row in RANKINGS
]
LOSSES = {"plackett_luce": RANKINGS, "regression": RATED}


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path):
    """Options of a short run on the rows of a loss, with held-out rows of the same kind."""

    def of(loss: str, **more) -> dict:
        held_out = write(tmp_path / "held_out.jsonl", LOSSES[loss][:8])
        return {
            "loss_type": loss, "dataset_name": write(tmp_path / "rows.jsonl", LOSSES[loss]), "eval_dataset_name": held_out,
            "per_device_train_batch_size": 4, "sft_adapter": "", "logging_steps": 2, "max_steps": 4, **more,
        }  # fmt: skip

    return of


def result(folder: Path) -> tuple[bytes, dict]:
    metrics = json.loads((folder / "metrics.json").read_text())
    clock = ("seconds", "runtime", "per_second")
    metrics["history"] = [
        {name: value for name, value in row.items() if not name.endswith(clock)} for row in metrics["history"]
    ]
    return (folder / WEIGHTS).read_bytes(), {name: value for name, value in metrics.items() if name != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_resumes_to_the_byte(loss, run_stage, options, tmp_path, monkeypatch):
    """With dropout, in batches of like length; rankings are killed at the end of a pass over the rows, ratings within one."""
    original, kill = Trainer._inner_training_loop, [None]

    def loop(self, *args, **kwargs):
        self.add_callback(KillAt(kill[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    given = options(loss, lora_dropout=0.1, save_strategy="steps", save_steps=1, resume_from_checkpoint="auto")
    run_stage("reward", output_dir=tmp_path / "at once", **given)
    for step in (3, None):
        kill[0] = step
        if step is None:
            run_stage("reward", output_dir=tmp_path / "in pieces", **given)
        else:
            with pytest.raises(Killed):
                run_stage("reward", output_dir=tmp_path / "in pieces", **given)
    expected, found = result(tmp_path / "at once"), result(tmp_path / "in pieces")
    assert found == expected
    metrics = found[1]
    assert metrics["rows"]["train"]["rows"] == len(LOSSES[loss]) and metrics["pairs"] > 8
    ratings = [row["rating"] for row in RATED]
    scale = {"mean": pytest.approx(statistics.fmean(ratings)), "std": pytest.approx(statistics.pstdev(ratings))}
    assert metrics.get("rating_scale") == (scale if loss == "regression" else None)
    other = {"plackett_luce": "regression", "regression": "plackett_luce"}[loss]
    with pytest.raises(
        ValueError, match=f"loss_type='{other}' instead of '{loss}' .scores mean something else under it"
    ):
        run_stage("reward", output_dir=tmp_path / "in pieces", **given | options(other))


@pytest.mark.slow
def test_scores_of_sft_completions_are_measured(run_stage, options, sft_adapter, tmp_path, monkeypatch):
    """The prompt of whole texts is what they begin with; plain rated texts have none."""
    asked, original = [], reward.normalization_of

    def measure(folder, pairs, model, args, prompts):
        asked.extend(prompts)
        return original(folder, pairs, model, args, prompts)

    monkeypatch.setattr(reward, "normalization_of", measure)
    given = {"sft_adapter": sft_adapter, "sft_completions": 4, "max_completion_length": 4, "max_steps": 1}
    texts = [{"text": row["prompt"] + row["completion"], "rating": row["rating"]} for row in RATED]
    with pytest.raises(
        ValueError, match="texts.jsonl: the rows have no prompts, and sft_adapter asks to complete them"
    ):
        run_stage("reward", **options("regression") | given | {"dataset_name": write(tmp_path / "texts.jsonl", texts)})
    whole = [{"ranking": [row["prompt"] + text for text in row["ranking"]]} for row in RANKINGS]
    run_stage("reward", **options("plackett_luce") | given | {"dataset_name": write(tmp_path / "whole.jsonl", whole)})
    assert len(asked) == 4 and set(asked) <= {f"{row['prompt']} is" for row in RANKINGS}
    assert (tmp_path / "out" / "score_normalization.json").is_file()


@pytest.mark.slow
def test_several_files_train_as_the_file_of_their_rows(run_stage, options, tmp_path, capsys):
    """A ranking is passed over twice, and pairs once, as in a file that holds these rows."""
    parts = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", RANKINGS[2:5]), ("b", PAIRS[6:]))]
    datasets = json.dumps([{"path": parts[0], "weight": 2}, {"path": parts[1]}])
    together = [
        *RANKINGS[2:5],
        *RANKINGS[2:5],
        *({"prompt": r["prompt"], "ranking": [r["chosen"], r["rejected"]]} for r in PAIRS[6:]),
    ]
    given = options("plackett_luce", save_strategy="steps", save_steps=2, max_steps=2)
    one = {**given, "dataset_name": write(tmp_path / "one.jsonl", together), "output_dir": tmp_path / "one"}
    several = {name: value for name, value in given.items() if name != "dataset_name"} | {"datasets": datasets}
    run_stage("reward", **one)
    capsys.readouterr()
    run_stage("reward", **several)
    said = capsys.readouterr().out
    assert f"train ({parts[0]}: 6 rows an epoch, of 3)." in said and "12 of 12 rows kept" in said
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    assert all(ours[name].equal(theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"]["train"]["source"] == ", ".join(parts) and "accuracy" in metrics
    more = several | {"datasets": datasets.replace('"weight": 2', '"weight": 3'), "resume_from_checkpoint": "auto"}
    with pytest.raises(ValueError, match="written with 12 rows to train on, and this run has 15"):
        run_stage("reward", **more)


def test_the_table_of_losses(tmp_path):
    for loss, of_seeds in {"regression": (0.7, 0.8), "margin": (0.5, 0.5)}.items():
        for seed, accuracy in enumerate(of_seeds):
            folder = tmp_path / loss / str(seed)
            folder.mkdir(parents=True)
            curve = [
                {"low": 0.5, "high": 0.6, "count": 1, "predicted": 0.5, "observed": 0.5},
                {"low": 0.6, "high": 0.7, "count": 3, "predicted": 0.7, "observed": accuracy},
            ]
            metrics = {"accuracy": accuracy, "ece": 0.0625, "reliability": curve}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(
        FileNotFoundError, match="ties: the folder has no <seed>/metrics.json. Run `make reward-losses`"
    ):
        tables.reward_losses(tmp_path, "margin", "ties")
    tables.reward_losses(tmp_path, "regression", "margin")
    *_, first, second, _, note = (tmp_path / "table.md").read_text().splitlines()
    assert first == ("| `regression` | 2 | 75.0% [70.0%, 80.0%] | 68.8% [65.0%, 72.5%] | 0.062 [0.062, 0.062] |")
    assert second.startswith("| `margin` | 2 | 50.0% [50.0%, 50.0%] |") and note == LOSSES_NOTE
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows[0]["runs"][1] == {"seed": 1, "accuracy": 0.8, "agreement": pytest.approx(0.725), "ece": 0.0625}
