"""`pipeline.overoptimization`: where a gold score turns, from what runs logged; what is no gold reward is refused."""

import json
import re

import numpy as np
import pytest

from data.json_files import write_json
from data.saving import save
from pipeline import overoptimization


D = np.linspace(0, 8, 33)


def run_of(folder, gold, *, name="reward_2", weights=(1.0, 0.0), rows=33) -> str:
    """A run of PPO whose log has a proxy score that rises with d, and a gold score for each rollout."""
    history = [{"step": 4, "loss": 0.1}]
    for at, d in enumerate(D[:rows]):
        history.append({"step": 4 * (at + 1), "kl": d**2, "score": 0.4 * d, "rewards/reward/mean": 0.4 * d})
        history[-1][f"rewards/{name}/mean"] = gold[at]
    metrics = {"history": history, "options": {"reward_weights": list(weights)}}
    save(folder, "adapter", lambda staged: write_json(staged / "metrics.json", metrics))
    return str(folder)


TURNS = (0.2 + D * (1 - 0.5 * np.log(np.maximum(D, 1e-9)))).tolist()  # at d = e, so at a KL of e^2 = 7.4
RISES = (0.2 + 0.3 * D).tolist()


def report_of(tmp_path, *words):
    overoptimization.main([*words, "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "overoptimization.md").read_text()
    assert (tmp_path / "out" / "overoptimization.png").read_bytes()[:4] == b"\x89PNG"
    return text, json.loads((tmp_path / "out" / "overoptimization.json").read_text())


def test_where_the_gold_score_turns(tmp_path, capsys):
    runs = [run_of(tmp_path / "0", TURNS), run_of(tmp_path / "1", RISES)]
    text, found = report_of(tmp_path, *runs, "--gold", "reward_2")
    first, second = found["runs"]
    assert first["turns"] and first["kl"] == pytest.approx(np.e**2, abs=0.2)
    assert first["gold"] == pytest.approx(0.2 + np.e / 2, abs=0.01) and first["end"] == pytest.approx(TURNS[-1])
    assert first["step"] == 4 * (1 + int(np.argmax(D >= first["kl"] ** 0.5)))
    assert first["proxy"] == [0, pytest.approx(3.2)] and first["error"] < 1e-6 < 0.1 < first["error_of_line"]
    assert not second["turns"]
    said = "The gold score turns in 1 of 2 runs, at a KL of 7.4 nats. Hold the policy there with `kl_target: 7.4`"
    assert said in text and said in capsys.readouterr().out
    assert "| the end |" in text and "+1.56" in text


def test_a_turn_within_a_nat_is_no_target_of_0(tmp_path):
    """The peak of d (1 - 2 ln d) is at d = e^-0.5, which is a KL of 0.37."""
    gold = (D * (1 - 2 * np.log(np.maximum(D, 1e-9)))).tolist()
    text, _ = report_of(tmp_path, run_of(tmp_path / "0", gold), "--gold", "reward_2")
    assert re.search(r"at a KL of 0\.4 nats\. Hold the policy there with `kl_target: 0\.3[5-9]`", text)


def test_a_gold_score_that_rises_is_no_over_optimisation(tmp_path):
    text, _ = report_of(tmp_path, run_of(tmp_path / "0", RISES), "--gold", "reward_2")
    assert "rises to the end: these runs do not over-optimise yet" in text


def test_best_of_n_stands_beside(tmp_path):
    rows = [{"n": n, "score": 0.1 * n, "kl": 0.1 * n, "distinct_2": 0.8, "judge": 0.2} for n in (1, 2, 4)]
    save(tmp_path / "best", "best_of_n", lambda staged: write_json(staged / "best_of_n.json", {"rows": rows}))
    run = run_of(tmp_path / "0", TURNS)
    report_of(tmp_path, run, "--gold", "reward_2", "--best_of_n", str(tmp_path / "best"))
    found = overoptimization.read_best_of_n(tmp_path / "best")
    assert found.gold.tolist() == [0.2] * 3 and found.distance == pytest.approx(np.sqrt([0.1, 0.2, 0.4]))
    del rows[1]["judge"]
    save(tmp_path / "best", "best_of_n", lambda staged: write_json(staged / "best_of_n.json", {"rows": rows}))
    with pytest.raises(
        ValueError, match=r"best_of_n\.json: no judge scored it\. Run pipeline\.best_of_n with the gold"
    ):
        overoptimization.read_best_of_n(tmp_path / "best")


REFUSED = {
    "another name": ({}, "nothing", r"--gold nothing: .*metrics\.json logged reward, reward_2\. Name one of these"),
    "a weight": (
        {"weights": (1.0, 0.5)},
        "reward_2",
        r"its weight was 0\.5, so PPO raised it\. Run PPO with a weight of 0",
    ),
    "a short run": ({"rows": 5}, "reward_2", r"5 rollouts have a gold score, and 6 are needed\. Train longer"),
}


@pytest.mark.parametrize(("changes", "gold", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_gold_score_is_refused(tmp_path, changes, gold, message):
    run = run_of(tmp_path / "0", TURNS, **changes)
    with pytest.raises(ValueError, match=message):
        overoptimization.main([run, "--gold", gold, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_rollouts_without_a_gold_score_are_left_out(tmp_path):
    gold = [None if at % 4 == 0 else score for at, score in enumerate(TURNS)]
    run_of(tmp_path / "0", gold)
    assert len(overoptimization.read_run(tmp_path / "0", "reward_2").kl) == 24
