"""`pipeline.reports.value_study`: gains at equal KL and differences over seeds by hand, the table and its plots."""

import json
import math

import pytest

from pipeline import tables
from pipeline.reports.metrics import interval_over_seeds
from pipeline.reports.value_study import VALUE_NOTE, gain_at, group_of, quarter, run_figures, value_rows, value_table


def run_of(seed: int, gain: float, explained: list[float]) -> dict:
    loss = [1.0] * len(explained)
    figures = {"judge_gain": gain, "kl": 9.0, "gain_at_nats": gain, "distinct_2": 0.75}
    return {"seed": seed, **figures, "explained_variance": explained, "value_loss": loss}


def test_a_gain_at_equal_kl_by_hand():
    assert gain_at(0.25, 9.0) == 0.25
    assert gain_at(0.25, 2.25) == 0.5  # half the root of the KL
    assert math.isnan(gain_at(0.25, 0.0)) and math.isnan(gain_at(0.25, -0.5))


def test_an_interval_over_seeds_is_that_of_students_t():
    # Five seeds: t is 2.776 (two-sided, 95%, 4 degrees of freedom); the deviation of 1..5 is sqrt(2.5).
    found = interval_over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found["high"] - 3.0 == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.01)
    assert found["low"] == pytest.approx(6.0 - found["high"])
    alone = interval_over_seeds([2.0])
    assert alone["mean"] == 2.0 and math.isnan(alone["low"]) and math.isnan(alone["high"])


def test_figures_of_a_run():
    history = [
        {"explained_variance": 0.1, "loss/value": 4.0},
        {"eval_score": 1.0},
        {"explained_variance": 0.3, "loss/value": 2.0},
    ]
    found = run_figures({"judge_gain": {"mean": 0.5}, "policy": {"kl": 2.25, "distinct_2": 0.75}}, history)
    assert found["gain_at_nats"] == 1.0 and found["judge_gain"] == 0.5 and found["kl"] == 2.25
    assert found["explained_variance"] == [0.1, 0.3] and found["value_loss"] == [4.0, 2.0]
    with pytest.raises(KeyError, match="explained_variance"):
        run_figures({"judge_gain": {"mean": 0.5}, "policy": {"kl": 2.25, "distinct_2": 0.75}}, [{"kl": 1.0}])


def test_quarters_by_hand():
    assert quarter([1.0, 2.0, 3.0, 4.0, 5.0], "first") == 1.5  # five updates: two of them
    assert quarter([1.0, 2.0, 3.0, 4.0, 5.0], "last") == 4.5
    assert quarter([7.0], "first") == quarter([7.0], "last") == 7.0


def test_what_a_setting_is_about():
    assert group_of("critic=head") == "start"
    assert group_of("value_lam=1.0") == group_of("lam=0.9") == "lambda"
    assert group_of("critic_warmup_updates=2+value_learning_rate=5e-3") == "several"
    assert group_of("value_init=policy+critic=adapter") == "start"


def test_a_difference_is_taken_seed_by_seed():
    runs = {
        "value_init=auto": [run_of(0, 0.1, [0.0]), run_of(1, 0.9, [0.0])],
        "critic=head": [run_of(1, 0.8, [0.0]), run_of(0, 0.0, [0.0]), run_of(2, 0.5, [0.0])],
    }
    recipe, head = value_rows(runs)
    assert recipe["difference"] is None
    assert head["difference"]["mean"] == pytest.approx(-0.1)  # of seeds 0 and 1, which both have
    assert head["difference"]["high"] - head["difference"]["low"] == pytest.approx(0.0, abs=1e-9)
    assert len(head["runs"]) == 3
    alone = value_rows({setting: of[:1] for setting, of in {**runs, "critic=head": [run_of(0, 0.0, [0.0])]}.items()})
    assert value_table(alone).splitlines()[-1].split(" | ")[6] == "-0.10"  # of one seed no interval is known


def test_the_study_as_a_table_and_two_plots(tmp_path, capsys):
    settings = {"value_init=auto": (0.25, 0.5), "lam=1.0": (0.5, 0.75), "value_clip=1000": (0.5, 0.25)}
    for setting, (gain, explained) in settings.items():
        for seed in (0, 1):
            folder = tmp_path / setting / str(seed)
            (folder / "ppo").mkdir(parents=True)
            of = {"judge": 0.5, "score": 1.0, "kl": 9.0, "distinct_2": 0.75, "mean_length": 8.0}
            interval = {"mean": gain + seed / 8, "low": 0.0, "high": 1.0}
            report = {"sft": of, "policy": of, "judge_gain": interval, "win_rate": interval}
            (folder / "report.json").write_text(json.dumps(report))
            history = [{"explained_variance": explained, "loss/value": 2.0, "step": step} for step in (1, 2)]
            (folder / "ppo" / "metrics.json").write_text(json.dumps({"history": history}))
    with pytest.raises(
        FileNotFoundError, match="critic=head: the folder has no <seed>/report.json. Run `make value-study`"
    ):
        tables.value_study(tmp_path, *settings, "critic=head")
    tables.value_study(tmp_path, *settings)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| `value_init=auto` | 2 | +0.31 | 9.0 | 0.75 | +0.31 | – | 0.50 | 0.50 | 2.00 |"
    assert lines[3] == "| `lam=1.0` | 2 | +0.56 | 9.0 | 0.75 | +0.56 | +0.25 [+0.25, +0.25] | 0.75 | 0.75 | 2.00 |"
    assert lines[-1] == VALUE_NOTE and lines[2] in capsys.readouterr().out
    assert [row["group"] for row in json.loads((tmp_path / "table.json").read_text())] == [
        "start",
        "lambda",
        "clip range",
    ]
    for name in ("value_study.png", "value_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
