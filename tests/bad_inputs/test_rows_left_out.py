"""What a stage leaves out is said: in the log, in metrics.json and on the model card, as TRL's trainers then do it."""

import json

import pytest
from transformers import Trainer

from data.prompts import load_prompts


pytestmark = pytest.mark.slow


LONG, LONGER = " fine" * 20, " poor" * 40
ROWS = {
    "sft": (
        [{"prompt": "A", "completion": " film"}] * 3
        + [{"prompt": "A", "completion": LONG}, {"prompt": LONGER, "completion": " film"}],
        {"rows": 5, "kept": 3, "cut": 1, "dropped": 1},
    ),
    "reward": (
        [{"prompt": "A", "chosen": " film", "rejected": " b"}] * 3
        + [{"prompt": "A", "chosen": " a", "rejected": LONGER}],
        {"rows": 4, "kept": 3, "cut": 0, "dropped": 1},
    ),
    "dpo": (
        [{"chosen": "A good film", "rejected": "A poor film"}] * 3
        + [
            {"chosen": "A good" + LONG, "rejected": "A poor film"},
            {"chosen": LONGER + " a", "rejected": LONGER + " b"},
        ],
        {"rows": 5, "kept": 3, "cut": 1, "dropped": 1},
    ),
}


@pytest.mark.parametrize("stage", ROWS)
def test_rows_left_out_are_said(stage, world, monkeypatch, capsys):
    rows, expected = ROWS[stage]
    trained, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **kwargs: trained.append(self) or train(self, **kwargs))
    held_out = {} if stage == "dpo" else {"eval_dataset_name": world.write("held_out.jsonl", rows[1:])}
    data = world.write("rows.jsonl", rows)
    options = {} if stage == "sft" else {"sft_adapter": ""}
    world.run(stage, "max_length: 16\n", dataset_name=data, max_steps=1, **held_out, **options)
    (trainer,) = trained
    found = json.loads((world.folder / "out" / "metrics.json").read_text())["rows"]
    longest = found["train"]["longest"]
    assert longest > 40 and found["train"] == expected | {"source": data, "longest": longest}
    assert len(trainer.train_dataset) == expected["kept"] + expected["cut"]
    said = f"train ({data}): 3 of {len(rows)} rows kept, "
    assert said in capsys.readouterr().out
    card = (world.folder / "out" / "README.md").read_text()
    numbers = [str(number) for number in expected.values()]
    assert f"| train | {data} | {' | '.join(numbers)} | {longest} |" in card
    if held_out:
        assert found["held_out"]["rows"] == len(rows) - 1
        assert len(trainer.eval_dataset) == found["held_out"]["kept"] + found["held_out"]["cut"]


@pytest.mark.parametrize(("stage", "share"), [("reward", 0.76), ("sft", 0.61), ("dpo", 0.61)])
def test_below_a_share_a_stage_refuses(stage, share, refuses, world):
    message = rf"max_length=16 leaves 3 of .* rows kept, .* are whole, but min_kept={share}\. Raise max_length"
    options = {} if stage == "sft" else {"sft_adapter": ""}
    data = world.write("rows.jsonl", ROWS[stage][0])
    refuses(stage, message, loads=True, dataset_name=data, min_kept=share, recipe="max_length: 16\n", **options)


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_prompts_are_counted(stage, world, capsys):
    data = world.write("rows.jsonl", [{"prompt": "A"}, {"prompt": "fine " * 150}, {"prompt": "It is"}])
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    options |= {"num_generations": 1 if stage == "ppo" else 2, "max_steps": 1}
    world.run(stage, dataset_name=data, drop_bad_rows="true", **options)
    assert f"train ({data}): 2 of 3 rows kept, 1 dropped; the longest has" in capsys.readouterr().out
    found = json.loads((world.folder / "out" / "metrics.json").read_text())["rows"]["train"]
    assert (found["rows"], found["kept"], found["dropped"]) == (3, 2, 1)


@pytest.mark.parametrize("stage", ["evaluation", "best_of_n"])
def test_prompts_of_the_evaluation_are_counted(stage, world, capsys):
    rows = [{"prompt": "A"}, {"prompt": "fine " * 150}, {"prompt": " "}, {"prompt": "It is"}, {"prompt": "Not"}]
    data = world.write("rows.jsonl", rows)
    options = {"n": ["1", "2"]} if stage == "best_of_n" else {}
    world.run(stage, dataset_name=data, drop_bad_rows="true", **options)
    assert f"prompts ({data}): 3 of 5 rows kept, 2 dropped; the longest has" in capsys.readouterr().out
    name = {"evaluation": "report", "best_of_n": "best_of_n"}[stage]
    key = {"evaluation": "rows", "best_of_n": "read"}[stage]
    report = json.loads((world.folder / "out" / f"{name}.json").read_text())
    found = report[key]["prompts"]
    assert report["prompts"] == 3
    assert (found["rows"], found["kept"], found["dropped"]) == (5, 3, 2)
    assert f"| prompts | {data} | 5 | 3 | 0 | 2 |" in (world.folder / "out" / f"{name}.md").read_text()


def test_rows_left_out_are_those_beside_all_rows(world):
    """Beside the first two of them there are none that could not be used."""
    rows = load_prompts(
        world.write("rows.jsonl", [{"prompt": text} for text in ("A", "B", "C", " ")]), "train", drop=True
    )
    assert (len(rows), rows.left_out, rows.shuffle(seed=0).left_out, rows.select(range(2)).left_out) == (3, 1, 1, 0)


@pytest.mark.parametrize("stage", ["evaluation", "best_of_n"])
def test_too_few_prompts_are_left(stage, refuses, world):
    data = world.write("rows.jsonl", [{"prompt": "A"}, {"prompt": "fine " * 150}])
    message = "1 prompt .*, and intervals need 2 or more"
    refuses(stage, message, loads=True, dataset_name=data, drop_bad_rows="true")


BAD = {
    "sft": ({"prompt": "A", "completion": " film"}, {"prompt": "A", "completion": ""}),
    "reward": (
        {"prompt": "A", "chosen": " film", "rejected": " b"},
        {"prompt": "A", "chosen": " b", "rejected": " b"},
    ),
    "dpo": ({"chosen": "A film", "rejected": "A b"}, {"chosen": "A film", "rejected": "A film"}),
    "ppo": ({"prompt": "A"}, {"prompt": ""}),
}


@pytest.mark.parametrize("stage", BAD)
def test_rows_that_cannot_be_used_are_counted(stage, world, capsys):
    """They are not for `min_kept` to count, which is about lengths."""
    good, bad = BAD[stage]
    data = world.write("rows.jsonl", [good, good, bad, bad, bad, bad])
    options = {} if stage in ("sft", "ppo") else {"sft_adapter": ""}
    world.run(stage, dataset_name=data, drop_bad_rows="true", max_steps=1, min_kept=1.0, **options)
    assert f"train ({data}): 2 of 6 rows kept, 4 dropped; the longest has" in capsys.readouterr().out
    found = json.loads((world.folder / "out" / "metrics.json").read_text())["rows"]["train"]
    assert (found["rows"], found["kept"], found["dropped"]) == (6, 2, 4)
