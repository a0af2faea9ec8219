"""`pipeline.reproduce`: protocols that stages understand, runs that go on, and verdicts that anyone can compute again."""

import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from transformers import TrainingArguments

from data.json_files import write_json
from data.listing import LISTING
from data.saving import save
from pipeline import reproduce
from pipeline.reports import reproduction
from pipeline.reports.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from pipeline.reports.reproduction import PAPERS, measured, papers, read_measured, read_protocol, report
from pipeline.runs.command_line import parse


ROOT = Path(__file__).parents[2]
PROTOCOLS = [
    (path.parent.name, path.stem) for path in sorted(PAPERS.glob("*/*.yaml")) if path.stem in ("mini", "full")
]
SAVED = [(path.parent.name, path.stem) for path in sorted(PAPERS.glob("*/*.json"))]


# ------------------------------------------------------------------------------------------ the protocols
@pytest.mark.parametrize(("paper", "scale"), PROTOCOLS)
def test_stages_understand_a_protocol(paper, scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    protocol = read_protocol(paper, scale)
    assert f"pipeline.reproduce {paper}" in (PAPERS / paper / f"{scale}.yaml").read_text().splitlines()[0]
    reproduce.check_stages(protocol["stages"], protocol["launch"])
    places = reproduce.places_of(protocol["stages"], Path("runs/papers"), 1)
    for stage, command in protocol["stages"].items():
        module, *words = shlex.split(command.format(seed=1, **places))
        kinds = {
            k: kind for k, kind in get_type_hints(import_module(f"pipeline.{module}").main).items() if k != "return"
        }
        trains = any(issubclass(kind, TrainingArguments) for kind in kinds.values())
        cpu = ["--use_cpu", "true", "--bf16", "false"] if trains else []  # no GPU is here to hear of bf16
        parts = parse(*kinds.values(), args=[*words, "--output_dir", places[stage], *cpu])
        assert any(getattr(part, "seed", None) == (1 if "{seed}" in command else 0) for part in parts), stage
        # Scores are in deviations of a policy, which a reward model has if its stage names one.
        for reward in re.findall(r"(?:--reward_adapter |folder=')\{(\w+)\}", command):
            assert "--sft_adapter {" in protocol["stages"][reward], f"{stage}: the scores of {reward} have no zero"
    for one in protocol["series"].values():
        for name in [one["file"]] if "file" in one else one["files"].values():
            assert Path(name.format(**places)).name in ("metrics.json", "report.json", "best_of_n.json")


def test_stages_of_one_name_are_one_stage():
    """Papers of a scale share the folder of their stages: another command of the same name would run it again and again."""
    commands: dict[tuple, set] = {}
    for paper, scale in PROTOCOLS:
        for stage, command in read_protocol(paper, scale)["stages"].items():
            commands.setdefault((scale, stage), set()).add(" ".join(command.split()))
    assert not {key: found for key, found in commands.items() if len(found) > 1}


def test_both_scales_ask_the_same():
    for paper in papers():
        mini, full = (read_protocol(paper, scale) for scale in ("mini", "full"))
        assert {key: mini[key] for key in ("paper", "claim", "numbers")} == {
            key: full[key] for key in ("paper", "claim", "numbers")
        }
        assert [one["statistic"] for one in mini["criterion"]] == [one["statistic"] for one in full["criterion"]]


# ------------------------------------------------------------------------------------------ the verdicts
@pytest.mark.parametrize(("paper", "scale"), SAVED)
def test_a_verdict_is_what_the_docs_say(paper, scale):
    saved, protocol = read_measured(PAPERS / paper / f"{scale}.json"), read_protocol(paper, scale)
    assert (saved["paper"], saved["scale"]) == (paper, scale)
    assert saved["criterion"] == protocol["criterion"]  # as it stood before the runs
    text, verdict = report(protocol, saved)
    assert protocol["claim"] in text and f"**Verdict**: **{verdict}**" in text and "changed after" not in text
    page = (ROOT / "docs" / "papers.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{paper}`") and f"| {scale} |" in line]
    assert f"**{verdict}**" in row


def test_the_docs_name_no_verdict_without_measurements():
    rows = re.findall(r"^\| `(\w+)` .*\| (mini|full) \|", (ROOT / "docs" / "papers.md").read_text(), re.MULTILINE)
    assert sorted(rows) == SAVED and SAVED


def test_the_docs_count_the_verdicts():
    found = [report(read_protocol(*of), read_measured(PAPERS / of[0] / f"{of[1]}.json"))[1] for of in SAVED]
    counts = [found.count(verdict) for verdict in (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)]
    said = "Of {} claims {} are reproduced, {} are not reproduced, and {} are inconclusive.".format(
        len(found), *counts
    )
    assert said in (ROOT / "docs" / "papers.md").read_text()


def test_report_only_runs_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    paper, scale = SAVED[0]
    reproduce.main([paper, "--report-only", "--output_dir", str(tmp_path)])
    folder = tmp_path / scale / "reports" / paper
    assert (folder / "figure.png").stat().st_size > 5_000
    assert read_measured(folder / "metrics.json") == read_measured(PAPERS / paper / f"{scale}.json")
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.md")
    reproduce.main([paper, "--report-only", "--output_dir", str(tmp_path)])  # over its own report


# ------------------------------------------------------------------------------------------ running
STAGES = {
    "first": "reward --config recipe.yaml --seed 0",
    "second": "ppo --config recipe.yaml --seed {seed} --reward_adapter {first}",
}
PROTOCOL = {
    **dict.fromkeys(("paper", "differs", "takes"), "words"),
    "claim": "The figure is 2 to 5.",
    "launch": "cpu.yaml",
    "numbers": [{"what": "a figure", "paper": "3"}],
    "stages": STAGES,
    "series": {"figure": {"file": "{second}/metrics.json", "rows": "history", "x": "step", "y": "kl"}},
    "criterion": [
        {"means": "the figure", "series": "figure", "statistic": "mean", "x_from": 2, "at_least": 2, "at_most": 5}
    ],
    "figure": [{"title": "A figure", "x": "step", "series": {"figure": "ours"}}],
}


class Launches:
    """Stand in for what would be launched: each stage leaves figures of its seed, and fails if its name is in `failing`."""

    def __init__(self):
        self.run, self.failing, self.factor = [], (), 1

    def __call__(self, command, **options):
        module, folder = command[command.index("-m", 3) + 1], Path(command[command.index("--output_dir") + 1])
        name = "/".join(folder.parts[folder.parts.index("mini") + 1 :])
        self.run.append((module.removeprefix("pipeline."), name))
        assert command[1:5] == ["-m", "accelerate.commands.launch", "--config_file", "cpu.yaml"]
        if name in self.failing:
            return subprocess.CompletedProcess(command, 3)
        seed = int(command[command.index("--seed") + 1])
        rows = [{"step": 1, "kl": 100}, {"step": 2, "kl": self.factor * (seed + 1)}, {"step": 3, "loss": 0.5}]
        save(folder, "adapter", lambda staged: write_json(staged / "metrics.json", {"history": rows}))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def launches(tmp_path, monkeypatch) -> Launches:
    """A paper `small2020` with two stages, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduction, "PAPERS", tmp_path / "papers")
    monkeypatch.setattr(reproduce, "PAPERS", tmp_path / "papers")
    (tmp_path / "papers" / "small2020").mkdir(parents=True)
    for name in ("recipe.yaml", "cpu.yaml"):
        (tmp_path / name).write_text("seed: 0\n")
    launches = Launches()
    monkeypatch.setattr(subprocess, "run", launches)
    monkeypatch.setattr(reproduce, "version", lambda name: "1")
    monkeypatch.setattr(reproduce, "draw", lambda *of: None)  # test_report_only_runs_nothing draws
    write_protocol()
    return launches


def write_protocol(**changes):
    Path("papers/small2020/mini.yaml").write_text(yaml.safe_dump({**PROTOCOL, **changes}, sort_keys=False))


def verdict_of(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1].split(":")[0]


ALL = [("reward", "first"), ("ppo", "second/0"), ("ppo", "second/1"), ("ppo", "second/2")]


def test_stages_run_once_and_give_a_verdict(launches, capsys):
    reproduce.main(["small2020"])
    assert launches.run == ALL
    assert verdict_of(capsys) == INCONCLUSIVE  # seeds 0 to 2 have 1, 2 and 3
    saved = json.loads(Path("runs/papers/mini/reports/small2020/metrics.json").read_text())
    assert saved["series"]["figure"][2] == {"seed": 2, "x": [1, 2], "y": [100, 3], "error": [0, 0]}
    assert saved["criterion"] == PROTOCOL["criterion"]
    reproduce.main(["small2020"])
    assert launches.run == ALL  # nothing again
    assert "second/1: finished before." in capsys.readouterr().out
    reproduce.main(["small2020", "--seeds", "4"])
    assert launches.run == [*ALL, ("ppo", "second/3")]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({"at_least": 1}, REPRODUCED), ({"at_least": 4}, NOT_REPRODUCED), ({}, INCONCLUSIVE)],
    ids=str,
)
def test_the_criterion_decides(launches, capsys, bounds, expected):
    write_protocol(criterion=[{**PROTOCOL["criterion"][0], **bounds}])
    reproduce.main(["small2020"])
    assert verdict_of(capsys) == expected
    reproduce.main(["small2020", "--seeds", "2"])
    assert verdict_of(capsys) == INCONCLUSIVE


def test_a_run_goes_on_where_it_was_cut_off(launches):
    launches.failing = ("second/1",)
    with pytest.raises(ChildProcessError, match=r"^second/1 ended with exit code 3; its message stands above\."):
        reproduce.main(["small2020"])
    assert launches.run == ALL[:3]
    launches.failing = ()
    reproduce.main(["small2020"])
    assert launches.run == [*ALL[:3], *ALL[2:]]


def test_a_stage_that_trains_resumes(launches, monkeypatch):
    said = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: said.append(command) or launches(command))
    write_protocol(
        stages={**STAGES, "third": "evaluation --config recipe.yaml --seed {seed} --policy_adapter {second}"}
    )
    reproduce.main(["small2020", "--seeds", "1"])
    assert [command[-2:] == ["--resume_from_checkpoint", "auto"] for command in said] == [True, True, False]


@pytest.mark.parametrize("what", ["command", "recipe", "earlier stage", "folder"])
def test_a_stage_that_is_no_longer_the_same_runs_again(launches, what):
    reproduce.main(["small2020", "--seeds", "1"])
    again = ALL[1:2]
    if what == "command":
        write_protocol(stages={**STAGES, "second": f"{STAGES['second']} --beta 1"})
    elif what == "recipe":
        Path("recipe.yaml").write_text("seed: 1\n")
        again = ALL[:2]
    elif what == "earlier stage":
        write_protocol(stages={**STAGES, "first": f"{STAGES['first']} --beta 1"})
        again = ALL[:2]
    else:
        shutil.rmtree("runs/papers/mini/second/0")
    reproduce.main(["small2020", "--seeds", "1"])
    assert launches.run == [*ALL[:2], *again]


def test_a_criterion_that_changed_after_the_runs_is_said(launches):
    reproduce.main(["small2020"])
    shutil.copy("runs/papers/mini/reports/small2020/metrics.json", "papers/small2020/mini.json")
    reproduce.main(["small2020", "--report_only"])
    assert "changed after" not in Path("runs/papers/mini/reports/small2020/report.md").read_text()
    write_protocol(criterion=[{**PROTOCOL["criterion"][0], "at_least": 1}])
    reproduce.main(["small2020", "--report_only"])
    assert (
        "The criterion was changed after the runs." in Path("runs/papers/mini/reports/small2020/report.md").read_text()
    )


# ------------------------------------------------------------------------------------------ what is measured
PLACES = {"stage": "stage"}


def write_metrics(kind="adapter", name="metrics.json", **figures):
    save("stage", kind, lambda staged: write_json(staged / name, figures))


def test_points_of_files_with_their_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_metrics(accuracy=0.8, pairs=400, gain={"mean": 0.5, "low": 0.304, "high": 0.696})
    files = {"files": {512: "{stage}/metrics.json", 1024: "{stage}/metrics.json"}}
    found = measured({**files, "y": "accuracy", "of": "pairs"}, tmp_path, PLACES, 7)
    assert found == {"seed": 7, "x": [512, 1024], "y": [0.8, 0.8], "error": [pytest.approx(0.02)] * 2}
    found = measured({"file": "{stage}/metrics.json", "y": "gain"}, tmp_path, PLACES, 0)
    assert found == {"seed": 0, "x": [0], "y": [0.5], "error": [pytest.approx(0.1)]}


def test_figures_of_figures_and_rows_without_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_metrics(
        "report", "report.json", gain=0.5, policy={"kl": 3}, rows=[{"n": 1, "s": 2}, {"n": 2}, {"n": 4, "s": None}]
    )
    assert measured({"file": "{stage}/report.json", "y": "policy.kl"}, tmp_path, PLACES, 0)["y"] == [3]
    by_kl = measured({"file": "{stage}/report.json", "x": "policy.kl", "y": "gain"}, tmp_path, PLACES, 0)
    assert (by_kl["x"], by_kl["y"]) == ([3], [0.5])
    rows = {"file": "{stage}/report.json", "rows": "rows", "x": "n", "y": "s"}
    assert measured(rows, tmp_path, PLACES, 0)["x"] == [1]
    with pytest.raises(ValueError, match=r"report\.json: no figure 'nothing'\. Correct the series"):
        measured({**rows, "y": "nothing"}, tmp_path, PLACES, 0)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_metrics(accuracy=0.8)
    assert Path("stage", LISTING).is_file()
    Path("stage/metrics.json").write_text('{"accuracy": 0.99}')
    with pytest.raises(ValueError, match="not the file that was saved"):
        measured({"file": "{stage}/metrics.json", "y": "accuracy"}, tmp_path, PLACES, 0)


# ------------------------------------------------------------------------------------------ what users get wrong
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": 3}, r"mini\.yaml: 'claim' is 3, but must be a text"),
        ({"criterion": []}, r"'criterion' is .*must be a list of 1 or more entries"),
        (
            {"criterion": [{**PROTOCOL["criterion"][0], "statistic": "eval"}]},
            r"\['statistic'\] is 'eval', but must be",
        ),
        ({"criterion": [{**PROTOCOL["criterion"][0], "series": "other"}]}, "other is no series"),
        ({"series": {"figure": {"y": "kl"}}}, "the series figure needs either file or files"),
        ({"stages": {"first": "rm --config recipe.yaml"}}, "stages: first: 'rm' is not one of sft, reward"),
        ({"stages": {"first": "ppo --seed 0"}}, "stages: first: name a --config"),
        (
            {"stages": {"first": "ppo --config recipe.yaml --a {second}"}},
            r"stages: first: \{second\} is no stage before it",
        ),
        (
            {"stages": {**STAGES, "third": "ppo --config recipe.yaml --a {second}"}},
            r"stages: third reads a stage of each seed, so it needs --seed \{seed\}",
        ),
        ({"launch": "other.yaml"}, r"launch: other\.yaml: no such file, and none of cpu, "),
    ],
)
def test_wrong_protocols(launches, changes, message):
    write_protocol(**changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        reproduce.main(["small2020"])
    assert not launches.run


def test_a_paper_that_is_not_there(launches):
    with pytest.raises(ValueError, match=r"paper='small202' has no protocol .* Did you mean small2020\?"):
        reproduce.main(["small202"])
    with pytest.raises(FileNotFoundError, match=r"mini\.json: no such file\. Run the paper's stages first"):
        reproduce.main(["small2020", "--report_only"])
    with pytest.raises(SystemExit):
        reproduce.main(["small2020", "--seeds", "0"])


def test_somebody_elses_report_stays(launches):
    Path("runs/papers/mini/reports/small2020").mkdir(parents=True)
    Path("runs/papers/mini/reports/small2020/report.md").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.md, which no run of Spine has written"):
        reproduce.main(["small2020"])
    assert not launches.run
