"""The translation recipe, one small step a stage on a two-layer GPT-2: its data, reward and judge fit each other."""

import json
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from data import tasks
from pipeline.runs.command_line import parse
from reward_models.translation import get_bleu, get_chrf


RECIPES = Path(__file__).parents[2] / "pipeline" / "recipes" / "translation"


def run(stage: str, **options) -> None:
    main = import_module(f"pipeline.{stage}").main
    kinds = [kind for argument, kind in get_type_hints(main).items() if argument != "return"]
    flags = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    main(*parse(*kinds, args=["--config", str(RECIPES / f"{stage}.yaml"), *flags]))


@pytest.mark.slow
def test_every_stage(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the recipes' `runs` go
    tasks.main(["translation", "runs/translation/data", "--demonstrations", "8", "--prompts", "8", "--held_out", "4"])
    small = {"model_name_or_path": tiny, "per_device_train_batch_size": 4, "max_steps": 2}
    run("sft", **small, lora_top_layers=1)
    run("ppo", **small, max_completion_length=4)
    # The loss of texts too: on the pairs that SFT learned from.
    texts = {"text_dataset_name": "runs/translation/data/sft_train.jsonl", "max_prompts": 4}
    run("evaluation", model_name_or_path=tiny, max_completion_length=4, **texts)

    report = json.loads(Path("runs/translation/report.json").read_text())
    assert report["prompts"] == 4 and report["judge"] == "reward_models.translation.get_bleu()"
    assert 0 <= report["policy"]["score"] <= 1 and set(report["policy"]["rewards"]) == {"chrf"}
    assert report["rows"]["texts"]["rows"] == 4
    change = report["policy"]["text_loss"] - report["sft"]["text_loss"]
    assert report["text_loss_change"]["mean"] == pytest.approx(change) and 4 < report["sft"]["text_loss"] < 12
    assert "| language-model loss on texts (nats a token) |" in Path("runs/translation/report.md").read_text()


def test_what_is_rewarded_is_the_translation():
    """The first reference of each prompt scores 1 with the space that it is sampled with, and another sentence less."""
    rows = tasks.make("translation", 1, 40, 40, 0)["prompts_test"]
    references = [row["references"] for row in rows]
    right = [f" {of_row[0]}" for of_row in references]
    for metric in (get_chrf(), get_bleu()):
        assert metric(right, references) == pytest.approx([1.0] * 40)
        assert max(metric(right[1:] + right[:1], references)) < 0.99
