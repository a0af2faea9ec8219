"""The evaluation of a reward model in this process: figures, the saved temperature, and inputs that are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.json_files import read_json
from data.listing import read_listing
from pipeline import reward_eval
from pipeline.backbone.adapters import read_adapter
from pipeline.reports.report import _reward_model
from pipeline.runs.command_line import parse
from reward_models.reward_bench import SECTIONS
from reward_models.temperature import FILE, read_calibration


ROOT = Path(__file__).parents[2]
REWARDS = """
def size(completions, **kwargs):
    return [float(len(text)) for text in completions]

def stars(completions, stars, **kwargs):
    return [float(text.count("*") == wanted) for text, wanted in zip(completions, stars, strict=True)]

def tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]
"""
PAIR = {"prompt": "The film", "chosen": " is fine.", "rejected": " is poor."}
WORDS = "film plot cast story joke score scene song light sound".split()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(**options) -> None:
    flags = [str(word) for key, value in options.items()
             for word in (f"--{key}", *(value if isinstance(value, list) else [value]))]  # fmt: skip
    reward_eval.main(*parse(*reward_eval.OPTIONS, args=flags))


@pytest.fixture
def functions(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def texts(number: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [f" has {' '.join(draw.choice(WORDS, draw.integers(2, 9)))} {i}." for i in range(number)]


def test_a_rule_is_measured_without_a_model(functions, tmp_path, capsys):
    """The reward is the length; people prefer the longer side in three of four pairs."""
    sides = texts(480)
    rows = []
    for i, (one, other) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        short, long = sorted((one, other + "."), key=len)
        chosen, rejected = (short, long) if i % 4 == 0 else (long, short)
        votes = {"a": 1.0, "b": float(i % 2)}
        rows.append(
            {"prompt": "The film", "chosen": chosen, "rejected": rejected, "topic": WORDS[i % 2], "votes": votes}
        )
    out = tmp_path / "out"
    run(output_dir=out, dataset_name=write(tmp_path / "pairs.jsonl", rows), reward_funcs="own_rewards.size",
        domain_column="topic")  # fmt: skip
    found = json.loads((out / "reward_eval.json").read_text())
    (only,) = found["datasets"]
    equal = sum(len(row["chosen"]) == len(row["rejected"]) for row in rows)
    wrong = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows)
    assert only["accuracy"]["mean"] == pytest.approx((240 - wrong - equal / 2) / 240) and only["ties"] == equal
    assert only["by_length"]["model"]["mean"] == 1 and only["by_length"]["pairs"] == 240 - equal
    assert only["by_length"]["people"]["mean"] == pytest.approx((240 - wrong - equal) / (240 - equal))
    assert {row["group"]: row["pairs"] for row in only["by_domain"]} == {WORDS[0]: 120, WORDS[1]: 120}
    a, b = only["by_rater"]["raters"]
    assert (
        a["model"]["mean"] == only["accuracy"]["mean"] and b["others"]["mean"] == 0.5
    )  # b prefers the other side half of it
    assert found["calibration"]["temperature"] > 1 and found["calibration"]["ece"] < found["calibration"]["ece_before"]
    assert only["gap"] == "scores" and sum(row["pairs"] for row in only["by_gap"]) == 240
    assert [row["probability"] for row in found["mistakes"]] == sorted(
        (row["probability"] for row in found["mistakes"]), reverse=True
    )
    text = (out / "reward_eval.md").read_text()
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert set(pictures) == {"reward_eval_length.png", "reward_eval_domain.png", "reward_eval_reliability.png"}
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    assert set(read_listing(out)) == {*pictures, "reward_eval.json", "reward_eval.md"}
    assert re.search(r"reward_eval.md: accuracy 0\.7\d+ \[0.*of 240 pairs, ECE", capsys.readouterr().out)


def scores_of(backbone, tokenizer, sides: list[str]) -> list[float]:
    """The reward adapter's score of each text, alone and without padding."""
    ids = [torch.tensor([tokenizer("The film" + side + tokenizer.eos_token)["input_ids"]]) for side in sides]
    with torch.no_grad():
        return [backbone.scores(row, torch.ones_like(row), "reward").item() for row in ids]


@pytest.mark.slow
def test_an_adapter_its_temperature_and_where_it_is_shown(tiny, reward_adapter, backbone, tokenizer, tmp_path):
    sides = texts(400)
    scores = scores_of(backbone, tokenizer, sides)
    rows, right = [], 0
    for i in range(0, len(sides), 2):
        high, low = (i, i + 1) if scores[i] > scores[i + 1] else (i + 1, i)
        chosen, rejected = (low, high) if i % 5 == 0 else (high, low)
        right += chosen == high
        rows.append(PAIR | {"chosen": sides[chosen], "rejected": sides[rejected], "margin": 1.0, "agreement": 0.75})
    adapter, out = shutil.copytree(reward_adapter, tmp_path / "adapter"), tmp_path / "out"
    options = {"output_dir": out, "model_name_or_path": tiny, "reward_adapter": adapter, "save_temperature": "true"}
    run(dataset_name=[write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:60])], **options)
    found = json.loads((out / "reward_eval.json").read_text())
    first, second = found["datasets"]
    assert first["accuracy"]["mean"] == right / 200 and second["pairs"] == 60
    assert found["all"]["pairs"] == 260 and first["human_ceiling"] == 0.75
    margins = np.abs(np.subtract(scores[::2], scores[1::2]))
    assert first["mean_margin"] == pytest.approx(margins.mean(), rel=1e-4)
    saved = read_calibration(adapter)
    assert saved.temperature == found["calibration"]["temperature"] and saved.pairs == 200
    assert FILE in read_listing(adapter)
    base = backbone.get_base_model()
    kept, before = (
        read_adapter(str(folder), needs_head=True, base=base).weights for folder in (adapter, reward_adapter)
    )
    assert all(torch.equal(kept[name], before[name]) for name in before)  # the scores stay as they were
    said = " ".join(_reward_model({"pairs": 200, "accuracy": 0.8, "ece": 0.1}, read_json(adapter / FILE)))
    assert (
        f"With the temperature T = {saved.temperature:.2f} of calibration.json" in said
        and f"**{saved.ece:.3f}**" in said
    )
    run(dataset_name=tmp_path / "a.jsonl", max_pairs=100, **options)  # again, over our own
    assert json.loads((out / "reward_eval.json").read_text())["datasets"][0]["pairs"] == 100
    (adapter / FILE).unlink()
    (adapter / FILE).write_text("mine")
    with pytest.raises(ValueError, match="calibration.json"):
        run(dataset_name=tmp_path / "a.jsonl", **options)


def test_rewards_with_weights_and_a_column(functions, tmp_path):
    rows = [PAIR | {"chosen": " is *.", "rejected": " is not *.", "stars": 1} for _ in range(3)]
    rows += [PAIR | {"chosen": " is **.", "rejected": " is not **.", "stars": 2}] * 2
    rows = [row | {"prompt": f"Film {i}"} for i, row in enumerate(rows)]
    name = write(tmp_path / "pairs.jsonl", rows)
    run(output_dir=tmp_path / "out", dataset_name=name, reward_funcs=["own_rewards.stars", "own_rewards.size"],
        reward_weights=[1.0, -1.0])  # fmt: skip
    found = json.loads((tmp_path / "out" / "reward_eval.json").read_text())
    assert found["datasets"][0]["accuracy"]["mean"] == 1  # the shorter side is chosen, and the stars are equal
    assert {name: one["mean"] for name, one in found["rewards"].items()} == {"stars": 0.5, "size": 0.0}
    assert "no temperature was fitted: the two halves of 5 pairs" in found["no_temperature"]


def test_a_file_of_rewardbench_has_sections(tmp_path):
    """One pair of each subset is right, and one of each but `math-prm` and Safety's is wrong."""
    rows = [
        {"prompt": f"{subset} {i}?", "chosen": "Yes!", "rejected": "No.", "subset": subset, "id": i}
        if i == 0 or section == "Safety" or subset == "math-prm"
        else {"prompt": f"{subset} {i}?", "chosen": "Yes.", "rejected": "No!", "subset": subset, "id": i}
        for section, subsets in SECTIONS.items()
        for subset in subsets
        for i in range(2)
    ]
    run(output_dir=tmp_path / "out", dataset_name=write(tmp_path / "bench.jsonl", rows), form="conversation",
        reward_funcs="reward_models.rules.get_regex(pattern='!')")  # fmt: skip
    (found,) = json.loads((tmp_path / "out" / "reward_eval.json").read_text())["datasets"]
    assert len(found["by_domain"]) == 23 and found["accuracy"]["mean"] == pytest.approx((23 + 6) / 46)
    code = {"Chat": 0.5, "Chat Hard": 0.5, "Safety": 1.0, "Reasoning": 0.75}
    assert found["sections"] == pytest.approx(code | {"all four sections": 2.75 / 4})
    assert "| all four sections | 68.8% |" in (tmp_path / "out" / "reward_eval.md").read_text()


BAD = {
    "no reward": ({}, "Name a reward: set reward_adapter, reward_funcs or both"),
    "an adapter without its model": ({"reward_adapter": "ADAPTER"}, "model_name_or_path"),
    "a function that counts tokens": (
        {"reward_funcs": "own_rewards.tokens"}, "counts tokens. Name the model whose tokenizer does it"),
    "a length without a tokenizer": ({"reward_funcs": "own_rewards.size", "max_length": 9}, "max_length=9 counts tokens"),
    "a temperature of no adapter": (
        {"reward_funcs": "own_rewards.size", "save_temperature": "true"}, "Set one reward_adapter, and no reward_funcs"),
    "a temperature of scaled scores": (
        {"reward_adapter": "ADAPTER", "model_name_or_path": "TINY", "normalize_scores": "true",
         "save_temperature": "true"}, "or normalize_scores"),
    "a dataset twice": ({"reward_funcs": "own_rewards.size", "dataset_name": ["PAIRS", "PAIRS"]}, "each once"),
    "no such dataset": ({"reward_funcs": "own_rewards.size", "dataset_name": "none.jsonl"}, "none.jsonl: no such file"),
    "a column that is missing": ({"reward_funcs": "own_rewards.stars"}, "missing a required argument: 'stars'"),
    "a domain that is missing": ({"reward_funcs": "own_rewards.size", "domain_column": "topic"}, "no column 'topic'"),
    "texts and conversations": (
        {"reward_funcs": "own_rewards.size", "dataset_name": ["PAIRS", "CHAT"]}, "has texts, .*CHAT.* has conversations"),
    "a single pair": ({"reward_funcs": "own_rewards.size", "dataset_name": "ONE"}, "1 pair, and intervals need 2"),
    "a form that is none": ({"reward_funcs": "own_rewards.size", "form": "chat"}, "argument --form: invalid choice: 'chat'"),
    "too many weights": (
        {"reward_funcs": "own_rewards.size", "reward_weights": [1, 2]}, "has 2 weights for 1 rewards"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_before_any_work(options, message, functions, tiny, reward_adapter, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("work began")

    for name in ("load_backbone", "score_texts"):
        monkeypatch.setattr(reward_eval, name, work)
    turn = {"prompt": [{"role": "user", "content": "Q"}]}
    turn |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    files = {"PAIRS": [PAIR] * 3, "CHAT": [turn] * 3, "ONE": [PAIR]}
    paths = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()} | {
        "ADAPTER": reward_adapter
    }
    given = {"dataset_name": "PAIRS", "output_dir": str(tmp_path / "out")} | options
    named = {key: [paths.get(one, one) for one in value] if isinstance(value, list) else paths.get(value, value)
             for key, value in given.items()}  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(**named)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "reward_eval.json").exists()


def test_pairs_that_are_too_long(tiny, reward_adapter, tmp_path):
    rows = [PAIR | {"prompt": f"Film {i}", "chosen": " is fine" + " and fine" * (3 * i)} for i in range(8)]
    options = {"output_dir": tmp_path / "out", "model_name_or_path": tiny, "reward_adapter": reward_adapter,
               "dataset_name": write(tmp_path / "pairs.jsonl", rows)}  # fmt: skip
    with pytest.raises(ValueError, match=r"max_length=20 leaves .* min_kept=0.5"):
        run(max_length=20, **options)
    run(max_length=20, min_kept=0, **options)
    (found,) = json.loads((tmp_path / "out" / "reward_eval.json").read_text())["datasets"]
    assert found["rows"] == 8 and found["pairs"] + found["long"] == 8 and 1 < found["pairs"] < 4
    with pytest.raises(ValueError, match="max_length=129 exceeds the model's context of 128 tokens"):
        run(max_length=129, **options)


def test_the_recipes_of_the_page(tmp_path):
    page = (ROOT / "docs" / "reward-evaluation.md").read_text()
    recipes = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(recipes) == 2
    for number, recipe in enumerate(recipes):
        (tmp_path / "recipe.yaml").write_text(recipe)
        more = ["--output_dir", "out", "--reward_funcs", "package.function"] if number else []
        args, rewards, model = parse(*reward_eval.OPTIONS, args=["--config", str(tmp_path / "recipe.yaml"), *more])
        assert (args.form, model.model_name_or_path) == (("conversation", None) if number else (None, "data/backbone"))
