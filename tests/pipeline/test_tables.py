import json
import runpy
import sys

import pytest

from pipeline import tables
from pipeline.reports.seeds import judges_table, seeds_table
from pipeline.tables import comparison_table, kl_held


def interval(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}


def test_comparison_table_has_dashes_for_what_is_missing():
    full = {"method": "RLOO", "completions": 2048, "seconds": 119.6, "kl": 0.64, "distinct_2": 0.875, "score": 0.4}
    full |= {"judge_gain": interval(0.25), "win_rate": interval(0.5)}
    assert comparison_table([{"method": "SFT", "kl": 0.0}, full]).splitlines()[2:] == [
        "| SFT | – | – | – | 0.00 | – | – | – |",
        "| RLOO | 2,048 | +0.250 [+0.125, +0.375] | 50.0% [37.5%, 62.5%] | 0.64 | 0.875 | +0.40 | 120 |",
    ]


def test_seeds_table_is_in_the_order_of_the_seeds():
    def report(seed: int, judge: float) -> dict:
        roles = {role: {"score": 0.5, "judge": judge, "kl": 9.06, "distinct_2": 0.75} for role in ("sft", "policy")}
        gains = {"judge_gain": interval(0.25), "win_rate": interval(0.5)}
        return {"seed": seed, "kl_held": 8.04, **roles, **gains, "reward_model": {"accuracy": 0.7444}}

    _, _, zero, one, _, *chart = seeds_table([report(1, 0.5), report(0, 0.25)]).splitlines()
    assert zero == (
        "| 0 | +0.50 → +0.50 | +0.25 → +0.25 | +0.25 [+0.12, +0.38] | 50% [38%, 62%] | 9.1 | 8.0 | 0.75 → 0.75 | 0.744 |"
    )
    assert one.startswith("| 1 | +0.50 → +0.50 | +0.50 → +0.50 |")
    assert '    x-axis "seed" [0, 1]' in chart and chart.count("    bar [0.25, 0.50]") == 2


def test_judges_stand_side_by_side_in_the_order_of_the_seeds():
    first, second = ({"judge_gain": interval(gain), "win_rate": interval(gain / 2)} for gain in (0.25, 1.5))
    _, _, zero, ten = judges_table({10: (second, first), 0: (first, second)}).splitlines()
    assert zero == "| 0 | +0.25 [+0.12, +0.38] | 12% [0%, 25%] | +1.50 [+1.38, +1.62] | 75% [62%, 88%] |"
    assert ten.startswith("| 10 | +1.50 [+1.38, +1.62] | 75%")


def test_judges_are_read_from_two_folders(tmp_path, capsys):
    def write(judge: str, seed: int, gain: float) -> None:
        of = {"judge": 0.5, "score": 1.0, "kl": 9.0, "distinct_2": 0.75, "mean_length": 8.0}
        report = {"sft": of, "policy": of, "judge_gain": interval(gain), "win_rate": interval(0.5)}
        folder = tmp_path / judge / str(seed)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))

    write("second", 3, 1.5)
    with pytest.raises(FileNotFoundError, match="first/3/report.json: no such file. Run `make seeds`"):
        tables.judges(tmp_path / "first", str(tmp_path / "second"))
    write("first", 3, 0.25)
    write("first", 4, 0.75)  # which the second has not judged
    tables.judges(tmp_path / "first", str(tmp_path / "second"))
    half = "50% [38%, 62%]"
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| 3 | +0.25 [+0.12, +0.38] | {half} | +1.50 [+1.38, +1.62] | {half} |"]


def test_kl_is_held_over_the_second_half_of_the_updates():
    history = [{"kl": 1.0}, {"kl": 2.0}, {"eval_score": 0.5}, {"kl": 4.0}, {"kl": 8.0}, {"train_runtime": 3.0}]
    assert kl_held(history) == 6.0  # of 4 and 8
    assert kl_held(history[1:]) == 6.0  # an odd number: the one in the middle counts
    assert kl_held([{"kl": 3.0}]) == 3.0


def test_a_table_that_there_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tables", "seed", str(tmp_path)])
    with pytest.raises(SystemExit, match="'seed' is not one of seeds, judges, baselines"):
        runpy.run_path("pipeline/tables.py", run_name="__main__")
    assert not any(tmp_path.iterdir())
