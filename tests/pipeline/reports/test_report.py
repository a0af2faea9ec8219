import copy
import json
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pipeline.reports.markdown import markdown_cell
from pipeline.reports.plots import (
    PPO,
    SFT,
    draw_accuracy_by_gap,
    draw_best_of_n,
    draw_calibration,
    draw_ppo_curves,
    draw_score_histograms,
)
from pipeline.reports.report import best_of_n_table, markdown_report, read_report


RELIABILITY = [
    {"low": 0.5, "high": 0.6, "count": 30, "predicted": 0.55, "observed": 0.5},
    {"low": 0.6, "high": 0.7, "count": 10, "predicted": 0.66, "observed": 0.7},
]
BY_GAP = [
    {"low": 0.5, "high": 1.0, "pairs": 1200, "accuracy": 0.6, "human": 0.65},
    {"low": 1.0, "high": 8.0, "pairs": 300, "accuracy": 0.8, "human": 0.9},
]
REPORT = {
    "seed": 0,
    "prompts": 1024,
    "sft": {
        "score": 0.1,
        "judge": 0.25,
        "kl": 0.0,
        "distinct_1": 0.3,
        "distinct_2": 0.7,
        "perplexity": 50.04,
        "mean_length": 20,
    },
    "policy": {
        "score": 1.7,
        "judge": 0.6254,
        "kl": 11.934,
        "distinct_1": 0.2,
        "distinct_2": 0.5,
        "perplexity": 35.25,
        "mean_length": 18.36,
    },
    "judge_gain": {"mean": 0.3754, "low": 0.35, "high": 0.4},
    "win_rate": {"mean": 0.8125, "low": 0.79, "high": 0.835},
    "reward_model": {
        "pairs": 4000,
        "accuracy": 0.701,
        "human_ceiling": 0.752,
        "ece": 0.0412,
        "by_gap": BY_GAP,
        "reliability": RELIABILITY,
    },
    "seconds": {"sft": 61.25, "policy": 1800.0},
}
SAMPLES = [
    {
        "prompt": "The film",
        "sft": " is a|b\n<b>",
        "sft_score": -0.5,
        "sft_judge": 0.125,
        "policy": " is *great*",
        "policy_score": 2.0,
        "policy_judge": 0.875,
    }
]


def without(report: dict, *keys: str) -> dict:
    return {key: value for key, value in copy.deepcopy(report).items() if key not in keys}


def ink(path, color: str) -> int:
    """Number of pixels of exactly one colour, after checking that `path` is a PNG."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == 900
    assert pixels.var() > 1e-3
    return int((np.abs(pixels - to_rgb(color)).max(axis=-1) < 1 / 255).sum())


def test_ppo_curves_skip_rows_without_the_key(tmp_path):
    history = [{"step": n, "score": n / 10, "kl": n / 5, "loss/value": 1 / n} for n in range(1, 30)]
    extra = [{"step": 15, "train_runtime": 9.0}, {"step": 15, "kl": float("nan")}, {"train_loss": 0.1, "score": None}]
    draw_ppo_curves(history, tmp_path / "plain.png")
    # In the middle, where a NaN that is drawn would break the line.
    draw_ppo_curves(history[:15] + extra + history[15:], tmp_path / "extra.png")
    assert ink(tmp_path / "plain.png", PPO) > 500
    assert (imread(tmp_path / "plain.png") == imread(tmp_path / "extra.png")).all()


def test_ppo_curves_show_each_panel_on_its_own(tmp_path):
    keys = ("score", "kl", "loss/value")
    for panel, key in enumerate(keys):
        draw_ppo_curves([{"step": n, key: n} for n in range(9)], tmp_path / "one.png")
        assert ink(tmp_path / "one.png", PPO) > 150
        inked = np.abs(imread(tmp_path / "one.png")[..., :3] - to_rgb(PPO)).max(axis=-1) < 1 / 255
        assert [part.any() for part in np.array_split(inked, 3, axis=1)] == [n == panel for n in range(3)]


def test_ppo_curves_of_one_update_show_a_point(tmp_path):
    draw_ppo_curves([{"step": 1, "score": 0.5}], tmp_path / "curves.png")
    assert ink(tmp_path / "curves.png", PPO) > 20


@pytest.mark.parametrize("shift", [2.0, 0.0, -2.0])
def test_score_histograms(tmp_path, shift):
    scores = np.random.default_rng(0).normal(size=200)
    draw_score_histograms(scores, scores + shift, tmp_path / "scores.png")
    assert ink(tmp_path / "scores.png", SFT) > 100
    assert ink(tmp_path / "scores.png", PPO) > 100


def test_score_histograms_take_lists_of_unequal_length_and_constants(tmp_path):
    draw_score_histograms([1.0, 1.0], [1.0], tmp_path / "scores.png")
    assert ink(tmp_path / "scores.png", PPO) > 100


def test_calibration_markers_grow_with_the_count(tmp_path):
    draw_calibration(RELIABILITY, 0.04, tmp_path / "few.png")
    even = [{**row, "count": 10} for row in RELIABILITY]
    draw_calibration(even, 0.04, tmp_path / "even.png")
    # Markers at 30 and 10 pairs have areas 3 : 1, at 10 and 10 they have 3 : 3.
    assert ink(tmp_path / "even.png", PPO) > ink(tmp_path / "few.png", PPO) + 200
    assert ink(tmp_path / "few.png", SFT) > 100


def test_accuracy_by_gap(tmp_path):
    draw_accuracy_by_gap(BY_GAP, tmp_path / "gap.png")
    assert ink(tmp_path / "gap.png", PPO) > 300
    assert ink(tmp_path / "gap.png", SFT) > 100
    draw_accuracy_by_gap([{**BY_GAP[0], "accuracy": 0.1}], tmp_path / "one.png")
    draw_accuracy_by_gap([{key: row[key] for key in row if key != "human"} for row in BY_GAP], tmp_path / "own.png")
    assert ink(tmp_path / "one.png", PPO) > 50
    assert ink(tmp_path / "own.png", PPO) > 300 and ink(tmp_path / "own.png", SFT) == 0  # nobody's ceiling


def test_drawing_leaves_the_global_style_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_accuracy_by_gap(BY_GAP, tmp_path / "gap.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "text, cell",
    [
        (" plain text ", "plain text"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("one\ntwo\r\nthree", "one<br>two<br>three"),
        ("<b>R&D</b>", "&lt;b&gt;R&amp;D&lt;/b&gt;"),
        ("*x* _y_ `z` [q](r) ~~s~~ $5", r"\*x\* \_y\_ \`z\` \[q\](r) \~\~s\~\~ \$5"),
        ("  ", "(empty)"),
    ],
)
def test_markdown_cell(text, cell):
    assert markdown_cell(text) == cell


def test_headline():
    headline = markdown_report(REPORT, SAMPLES).splitlines()[2]
    assert headline == (
        "The judge's mean score goes from 0.250 (SFT) to 0.625 (PPO), a gain of **+0.375** (95% interval +0.350 to "
        "+0.400); PPO beats SFT on **81.2%** (95% interval 79.0% to 83.5%) of the prompts, ties counting half; the KL "
        "to the reference is 11.93 nats a sequence."
    )


def test_metrics_table():
    text = markdown_report(REPORT, SAMPLES)
    assert (
        """
| metric | SFT | PPO |
| --- | ---: | ---: |
| reward model score | 0.100 | 1.700 |
| judge score | 0.250 | 0.625 |
| KL to the reference (nats a sequence) | 0.00 | 11.93 |
| distinct-1 | 0.300 | 0.200 |
| distinct-2 | 0.700 | 0.500 |
| perplexity | 50.0 | 35.2 |
| mean length (tokens) | 20.0 | 18.4 |
"""
        in text
    )
    assert "1,024 prompts, seed 0." in text


def test_reward_model_section():
    text = markdown_report(REPORT, SAMPLES)
    assert "On 4,000 held-out pairs" in text
    assert "**70.1%** (accuracy)" in text
    assert "Human ceiling: one rater agrees with the mean rating in **75.2%**" in text
    # 30 pairs of agreement 0.5 and 10 of 0.7: (15 + 7) / 40.
    assert "against one rater, the reward model reaches 55.0%" in text
    assert "(ECE): **0.041**" in text


def test_figures_are_embedded_by_file_name():
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown_report(REPORT, SAMPLES))
    assert sorted(names) == ["accuracy_by_gap.png", "ppo_curves.png", "reward_calibration.png", "score_histograms.png"]


def test_samples_table():
    text = markdown_report(REPORT, SAMPLES)
    assert (
        """
| prompt | SFT | score, judge | PPO | score, judge |
| --- | --- | ---: | --- | ---: |
| The film | is a\\|b<br>&lt;b&gt; | -0.50, 0.12 | is \\*great\\* | 2.00, 0.88 |
"""
        in text
    )


def test_tables_are_rectangular():
    text = markdown_report(REPORT, SAMPLES * 3)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1


def test_seconds_table():
    text = markdown_report(REPORT, SAMPLES)
    assert "| stage | seconds |\n| --- | ---: |\n| sft | 61.2 |\n| PPO | 1,800.0 |" in text


def test_report_without_reward_model_and_seconds():
    text = markdown_report(without(REPORT, "reward_model", "seconds"), SAMPLES)
    assert re.findall(r"^#+ .*", text, flags=re.MULTILINE) == ["# Evaluation", "## Samples"]
    assert "reward_calibration.png" not in text and "accuracy_by_gap.png" not in text
    assert "score_histograms.png" in text and "ppo_curves.png" in text


def test_report_without_judge():
    report = without(REPORT, "judge_gain", "win_rate") | {"score_win_rate": {"mean": 0.75, "low": 0.7, "high": 0.8}}
    report["score_gain"] = {"mean": 1.6, "low": 1.5, "high": 1.75}
    for model in ("sft", "policy"):
        del report[model]["judge"]
    text = markdown_report(report, [without(SAMPLES[0], "sft_judge", "policy_judge")])
    assert "judge" not in text
    assert text.splitlines()[2].startswith(
        "The reward model's mean score goes from 0.100 (SFT) to 1.700 (PPO), a gain of **+1.600** (95% interval +1.500 to "
        "+1.750); PPO beats SFT on **75"
    )
    assert "| prompt | SFT | score | PPO | score |" in text
    assert "| -0.50 |" in text


def test_report_of_the_least():
    text = markdown_report(
        {"sft": {"score": 0.0}, "policy": {"score": 1.0, "kl": None, "perplexity": float("inf")}}, []
    )
    assert text.splitlines()[2] == "The reward model's mean score goes from 0.000 (SFT) to 1.000 (PPO)."
    assert "| perplexity | – | – |" in text
    assert "KL to" not in text.split("![")[0]
    assert "##" not in text


def test_a_report_on_another_policy_names_it():
    text = markdown_report({**REPORT, "policy_name": "RLOO"}, SAMPLES, curves=False)
    assert "PPO" not in text and "ppo_curves" not in text
    assert "to 0.625 (RLOO), a gain" in text
    assert "RLOO beats SFT on **81.2%**" in text
    assert "| metric | SFT | RLOO |" in text
    assert "| prompt | SFT | score, judge | RLOO | score, judge |" in text


def test_a_pairwise_judge_is_named_with_its_wins_and_how_far_to_believe_it():
    interval = {"mean": 0.7, "low": 0.65, "high": 0.75}
    pairwise = {"judge": "my.judge", "win_rate": interval, "consistent": 0.875, "undecided": 1}
    text = markdown_report({**REPORT, "judge": "a.judge", "pairwise": pairwise}, SAMPLES)
    assert (
        "; the pairwise judge prefers PPO on **70.0%** (95% interval 65.0% to 75.0%) of the prompts, and says the same in "
        "both orders on 88% of them;"
    ) in text.splitlines()[2]
    assert "1,024 prompts, seed 0, judge `a.judge`, pairwise judge `my.judge`." in text


BEST_OF_N = [
    {
        "n": n,
        "score": n / 10,
        "judge": n / 20,
        "judge_gain": {"mean": 0.25, "low": 0.125, "high": 0.375},
        "win_rate": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "kl": kl,
        "distinct_2": 0.875,
        "mean_length": 18.25,
    }
    for n, kl in ((1, 0.0), (4, 0.636))
]


def test_best_of_n_plot(tmp_path):
    draw_best_of_n(BEST_OF_N, tmp_path / "alone.png")
    draw_best_of_n(BEST_OF_N, tmp_path / "both.png", REPORT)
    assert ink(tmp_path / "alone.png", SFT) > 100
    assert ink(tmp_path / "alone.png", PPO) == 0
    assert ink(tmp_path / "both.png", PPO) > 40


def test_best_of_n_without_judge(tmp_path):
    rows = [without(row, "judge", "judge_gain", "win_rate") for row in BEST_OF_N]
    first, _, _, last = best_of_n_table(rows).splitlines()
    assert first == "| n | score | KL, nats | distinct-2 | mean length |"
    assert last == "| 4 | +0.40 | 0.64 | 0.875 | 18.2 |"
    draw_best_of_n(rows, tmp_path / "alone.png", {"policy": {"score": 1.0, "kl": 2.0}})
    assert ink(tmp_path / "alone.png", SFT) > 50 and ink(tmp_path / "alone.png", PPO) > 20


def test_best_of_n_table():
    *_, last = best_of_n_table(BEST_OF_N).splitlines()
    assert last == "| 4 | +0.40 | +0.200 | +0.250 [+0.125, +0.375] | 50.0% [25.0%, 75.0%] | 0.64 | 0.875 | 18.2 |"


def test_an_older_report_calls_the_policy_ppo(tmp_path):
    older = {
        **without(REPORT, "policy"),
        "ppo": REPORT["policy"],
        "policy": "RLOO",
        "seconds": {"sft": 1.0, "ppo": 2.0},
    }
    (tmp_path / "report.json").write_text(json.dumps(older))
    found = read_report(tmp_path / "report.json")
    assert found["policy"] == REPORT["policy"] and found["policy_name"] == "RLOO" and "ppo" not in found
    assert found["seconds"] == {"sft": 1.0, "policy": 2.0}
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert read_report(tmp_path / "report.json") == found
