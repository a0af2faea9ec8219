"""`pipeline.loop` and `pipeline.pairs`: rounds of labels, reward model and PPO, which go on wherever they were cut off."""

import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from data.json_files import write_json
from data.saving import save
from pipeline import label, loop, pairs, tables
from pipeline.pages.label_answers import AnswerFile
from pipeline.pages.label_desk import Desk
from pipeline.pages.label_pairs import Pair, Pool, read_pairs
from pipeline.pages.loop_labels import preference
from pipeline.reports.rounds import (
    draw_study,
    per_100_labels,
    round_row,
    rounds_report,
    rounds_table,
    study_rows,
    study_table,
)
from pipeline.runs.command_line import parse


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipeline" / "recipes" / "loop"
TEXTS = ["The film", "A", "It's a", "One of the best", "This is", "An", "For all its", "Not"]


def letters(completions: list, **kwargs) -> list[float]:
    """Reward function that counts the letters of a completion."""
    return [float(len(text)) for text in completions]


def options(**given) -> loop.LoopArguments:
    stages = {name: "recipe.yaml" for name in ("pairs", "reward", "ppo", "evaluation")}
    return loop.LoopArguments(**{"output_dir": "out", **stages, **given})


# ------------------------------------------------------------------------------------------ the recipes
@pytest.mark.parametrize("name", ["loop", "study"])
def test_stages_understand_the_recipe(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"pipeline/recipes/loop/{name}.yaml"
    assert Path(path).read_text().startswith(f"# python -m pipeline.loop --config {path}\n")
    (args,) = parse(*loop.OPTIONS, args=["--config", path])
    stages = args.stages()
    assert loop.check_stages(args, stages)  # the reward model learns from agreement
    assert list(stages) == [*(["sft"] if name == "loop" else []), "pairs", "reward", "ppo", "evaluation"]
    if name == "study":  # who labels judges
        words = stages["evaluation"].words
        assert words[words.index("--judge") + 1] == args.labeller != loop.PEOPLE


def test_what_the_loop_tells_each_stage():
    words = loop.own_words(options(sft_adapter="sft", labels=300, seed=7), 1, str)
    assert words["pairs"] == shlex.split("--policies sft --first_prompt 0 --max_prompts 300 --seed 7")
    words = loop.own_words(options(sft="sft.yaml", labeller="a.b", datasets=[{"path": "x", "weight": 2}]), 3, str)
    assert words["pairs"] == shlex.split(
        "--policies round_2/ppo round_1/ppo --first_prompt 600 --max_prompts 300 --reward_adapter round_2/reward --judge a.b "
        "--seed 0"
    )
    at = words["reward"].index("--datasets")
    assert json.loads(words["reward"].pop(at + 1)) == [
        {"path": "x", "weight": 2},
        *({"path": f"round_{number}/labels/preferences.jsonl"} for number in (1, 2, 3)),
    ]
    assert words["reward"] == shlex.split("--sft_adapter sft --datasets --seed 0")
    assert words["ppo"] == shlex.split("--sft_adapter sft --reward_adapter round_3/reward --seed 0")
    assert words["evaluation"] == [*words["ppo"][:4], "--policy_adapter", "round_3/ppo", "--seed", "0"]


def test_without_sft_the_bare_backbone_is_the_first_policy():
    words = [loop.own_words(options(), number, str) for number in (1, 2)]
    assert [one["pairs"][:3] for one in words] == [
        ["--policies", "", "--first_prompt"],
        ["--policies", "round_1/ppo", ""],
    ]
    assert not any("--sft_adapter" in one[stage] for one in words for stage in ("reward", "ppo", "evaluation"))


# ------------------------------------------------------------------------------------------ rounds of stages that only write
class Stages:
    """Stands in for `subprocess.run`: each stage leaves files that its command line determines, and one may fail."""

    def __init__(self):
        self.run, self.failing = [], None

    def __call__(self, command, **given):
        module, words = command[command.index("-m", 3) + 1], command[command.index("-m", 3) + 2 :]
        folder = Path(words[words.index("--output_dir") + 1])
        self.run.append(folder.name if module != "pipeline.evaluation" else f"{folder.name} evaluation")
        if len(self.run) - 1 == self.failing:
            return subprocess.CompletedProcess(command, 1)
        number = int(folder.name[6:] if folder.name.startswith("round_") else folder.parent.name[6:])
        kind, write = {
            "pipeline.pairs": ("pairs", lambda staged: write_pairs(staged, number, "--judge" in words)),
            "pipeline.evaluation": ("report", lambda staged: write_json(staged / "report.json", report(number))),
        }.get(module, ("adapter", lambda staged: write_json(staged / "metrics.json", {"words": words})))
        save(folder, kind, write)
        return subprocess.CompletedProcess(command, 0)


def write_pairs(folder: Path, number: int, judged: bool) -> None:
    rows = [
        {"prompt": "A", "response_1": f" {number}{at}", "response_2": f" film {number}{at}", "policies": [0, at % 2]}
        | ({"scores": [1.0, 0.0]} if number > 1 else {})
        | ({"judged": [at % 3, 1]} if judged else {})
        for at in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def interval(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}


def report(number: int) -> dict:
    figures = {"score": 0.0, "kl": 8.0 + number, "distinct_2": 0.5, "mean_length": 20.0}
    return {
        "sft": figures,
        "policy": figures,
        "judge": "a.b",
        "judge_gain": interval(number / 4),
        "win_rate": interval(0.75),
    }


@pytest.fixture
def stages(tmp_path, monkeypatch) -> Stages:
    """Four recipes in a folder of their own, of which nothing is checked."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "cpu.yaml"):
        Path(name).write_text("seed: 0\n")
    stages = Stages()
    monkeypatch.setattr(subprocess, "run", stages)
    monkeypatch.setattr(loop, "check_stages", lambda args, stages: False)
    monkeypatch.setattr(loop, "draw_rounds", lambda rows, path: Path(path).write_bytes(b"drawn"))
    return stages


def go(**given) -> None:
    loop.main(options(**{"rounds": 2, "labels": 4, "labeller": "a.b", "launch": "cpu.yaml", **given}))


def left(folder: str) -> dict[str, bytes]:
    """Files of a loop, but for the seconds that it took and its lock."""
    names = {path: path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for path, name in names.items() if path.name not in ("finished.json", "_run.lock")}


ROUND = ["pairs", "reward", "ppo"]
ALL = [*ROUND, "round_1 evaluation", *ROUND, "round_2 evaluation"]


def test_a_loop_cut_off_at_every_stage_comes_to_the_same_bytes(stages):
    go(output_dir="whole")
    assert stages.run == ALL
    whole = {
        name: content.replace(b"whole/", b"out/") for name, content in left("whole").items() if "saved_" not in name
    }
    stages.run = []
    for cut in range(len(ALL)):
        stages.failing = len(stages.run) + (cut > 0)  # the stage that was cut off comes first, and then the next fails
        with pytest.raises(ChildProcessError, match=r"ended with exit code 1; its message stands above\."):
            go()
    go()
    assert stages.run == [name for name in ALL for _ in (0, 1)]  # each twice, and no other again
    assert {name: content for name, content in left("out").items() if "saved_" not in name} == whole


def test_a_finished_loop_runs_nothing_and_can_have_another_round(stages, capsys):
    go()
    before = left("out")
    go()
    assert stages.run == ALL and left("out") == before
    assert "round_2/ppo: finished before." in capsys.readouterr().out
    go(rounds=3, launch="cpu.yaml")
    assert stages.run == [*ALL, *ROUND, "round_3 evaluation"]
    assert len(json.loads(Path("out/report.json").read_text())["rounds"]) == 3


def test_preferences_are_what_the_judge_said(stages):
    go(rounds=1)
    rows = [json.loads(line) for line in Path("out/round_1/labels/preferences.jsonl").read_text().splitlines()]
    # It scored the first completions 0, 1, 2 and 0, and the second ones 1: the second pair is a tie.
    assert [row["chosen"] for row in rows] == [" film 10", " 12", " film 13"]
    assert rows[0] == {"prompt": "A", "chosen": " film 10", "rejected": " 10", "agreement": 1.0}


@pytest.mark.parametrize(
    ("votes", "ties", "expected"),
    [
        ([1.0], False, (" one", 1.0)),
        ([0.0, 0.0, 1.0], False, (" two", 2 / 3)),
        ([0.5, 0.0], False, (" two", 0.75)),
        ([1.0, 0.0], False, None),
        ([0.5], True, (" one", 0.5)),
        ([], True, None),
    ],
)
def test_a_preference_of_votes(votes, ties, expected):
    found = preference({"prompt": "A", "response_1": " one", "response_2": " two"}, votes, ties=ties)
    assert (found and (found["chosen"], found["agreement"])) == (
        expected and (expected[0], pytest.approx(expected[1]))
    )


# ------------------------------------------------------------------------------------------ people
def answer(row: dict, label: str, swapped: bool = False, annotator: str = "Ada") -> dict:
    """A line as `pipeline.label` writes it."""
    pair = Pair(row["prompt"], (row["response_1"], row["response_2"]), ("response_1", "response_2"))
    first, second = pair.completions[::-1] if swapped else pair.completions
    texts = {"prompt": pair.prompt, "first": first, "second": second, "first_from": "x", "second_from": "y"}
    given = {"pair": pair.id, "annotator": annotator, "label": label, "swapped": swapped, **texts}
    return given | {"number": 1, "shared": False, "disagreement": None}


def test_people_label_and_the_same_command_goes_on(stages, capsys):
    def stopped() -> str:
        with pytest.raises(SystemExit) as ended:
            go(labeller="people", rounds=1)
        assert ended.value.code == 3
        return capsys.readouterr().out

    said = stopped()
    assert "round_1: 0 of 4 pairs are labelled." in said and stages.run == ["pairs"]
    assert (
        "\n    python -m pipeline.label --pairs out/round_1/pairs/pairs.jsonl --output_dir out/round_1/answers --max_pairs 4\n"
        in said
    )
    rows = [json.loads(line) for line in Path("out/round_1/pairs/pairs.jsonl").read_text().splitlines()]
    Path("out/round_1/answers").mkdir()
    file = AnswerFile(Path("out/round_1/answers/answers.jsonl"))
    for line in (
        answer(rows[0], "1"),
        answer(rows[1], "1", swapped=True),  # the second completion, which stood first
        answer(rows[2], "2"),
        answer(rows[2], "undo"),
    ):
        file.append(line)
    assert "round_1: 2 of 4 pairs are labelled." in stopped() and stages.run == ["pairs"]
    for line in (answer(rows[2], "skip"), answer(rows[3], "tie"), answer(rows[3], "2", annotator="Bob")):
        file.append(line)
    go(labeller="people", rounds=1)
    assert stages.run == ALL[:4]
    votes = json.loads(Path("out/round_1/labels/votes.json").read_text())["votes"]
    assert votes == [[1.0], [0.0], [], [0.5, 0.0]]
    before = left("out/round_1/labels")
    file.append(answer(rows[2], "1"))  # too late
    file.close()
    go(labeller="people", rounds=1)
    assert stages.run == ALL[:4] and left("out/round_1/labels") == before
    (found,) = json.loads(Path("out/report.json").read_text())["rounds"]
    assert (found["pairs"], found["labels"], found["ties"]) == (4, 3, 0)
    assert found["annotators_agree"] == {"unanimous": 0.0, "two_agree": 0.0, "kappa": -1.0}


def test_the_page_shows_the_pairs_that_the_loop_waits_for(stages, capsys):
    """The command that the loop prints is one of `pipeline.label`, and its answers are all that the loop needs."""
    for _ in (1, 2):
        with pytest.raises(SystemExit):
            go(labeller="people")
        words = shlex.split(
            re.search(r"^ +python -m pipeline\.label (.*)$", capsys.readouterr().out, re.MULTILINE).group(1)
        )
        asked, _ = parse(*label.OPTIONS, args=words)
        Path(asked.output_dir).mkdir()
        file = AnswerFile(Path(asked.output_dir, "answers.jsonl"))
        desk = Desk(file, Pool(read_pairs(asked.pairs, "train")), seed=0, overlap=0, total=asked.max_pairs)
        while task := desk.next_task("Ada"):
            desk.answer("Ada", task.ticket, "2" if task.swapped else "1")  # always what was sampled first
        file.close()
    go(labeller="people")
    assert stages.run == ALL
    for number in (1, 2):
        assert json.loads(Path(f"out/round_{number}/labels/votes.json").read_text())["votes"] == [[1.0]] * 4


def test_a_round_of_ties_alone_is_refused(stages, monkeypatch):
    monkeypatch.setattr("pipeline.pages.loop_labels.judged", lambda row: [0.5])
    with pytest.raises(ValueError, match=r"out/round_1: none of its 4 pairs has a preference: all are ties"):
        go()
    assert stages.run == ["pairs"]


# ------------------------------------------------------------------------------------------ what users get wrong
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": 5}, "labels"),
        ({"labeller": "people"}, "labeller"),
        ({"seed": 1}, "seed"),
        ({"ppo": "recipe.yaml --max_steps 8"}, "ppo"),
        ({"datasets": [{"path": "x.jsonl"}]}, "datasets"),
    ],
)
def test_a_changed_recipe_is_refused(stages, changes, named):
    go(rounds=1)
    before = left("out")
    with pytest.raises(ValueError, match=rf"output_dir='out': {named} changed since the loop began there"):
        go(**changes)
    assert stages.run == ALL[:4] and left("out") == before


def test_a_stage_whose_recipe_changed_is_refused(stages):
    go(rounds=1)
    Path("recipe.yaml").write_text("seed: 0  # a comment changes nothing\n")
    go(rounds=1)
    Path("recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match="pairs, reward, ppo, evaluation changed since"):
        go(rounds=1)


@pytest.mark.parametrize("name", ["pairs/pairs.jsonl", "labels/preferences.jsonl"])
def test_changed_pairs_and_labels_are_refused(stages, name):
    go(rounds=1)
    path = Path("out/round_1", name)
    path.write_text(path.read_text().replace("A", "B"))
    with pytest.raises(ValueError, match=rf"{name}: not the file that was saved\. Labels belong to the pairs"):
        go()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"ppo": "recipe.yaml --reward-adapter x"},
            r"^ppo='recipe\.yaml --reward-adapter x': the loop sets reward_adapter ",
        ),
        (
            {"pairs": "recipe.yaml --seed=3"},
            r"^pairs='recipe\.yaml --seed=3': the loop sets seed itself\. Leave it out\.$",
        ),
        ({"reward": "none.yaml"}, r"^reward: none\.yaml: no such file"),
        (
            {"evaluation": "recipe.yaml --judge 'x"},
            r"^evaluation=.* cannot be read \(No closing quotation\)\. Write a stage as",
        ),
        (
            {"sft": "recipe.yaml", "sft_adapter": "x"},
            r"^sft='recipe\.yaml' and sft_adapter='x' both say where PPO begins",
        ),
        ({"datasets": [{"weight": 2}]}, r"^datasets: the entry .* must be a mapping with a path"),
    ],
)
def test_wrong_options(stages, given, message):
    with pytest.raises((ValueError, OSError), match=message):
        go(**given)
    assert not stages.run and not Path("out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"launch": "none.yaml"}, r"^launch: none\.yaml: no such file\. Name one of accelerate_configs\.$"),
        (
            {"ppo": "demo/ppo.yaml --kl_targt 6"},
            r"^ppo='demo/ppo\.yaml --kl_targt 6': .*'kl_targt'\. Did you mean kl_target\?$",
        ),
        ({"reward": "demo/ppo.yaml"}, r"^reward='demo/ppo\.yaml': .*ppo\.yaml: unknown key 'reward_adapter'"),
        (
            {"pairs": "loop/pairs.yaml --batch_size 0"},
            r"^pairs='loop/pairs\.yaml --batch_size 0': batch_size=0 must be 1 or more",
        ),
    ],
)
def test_stages_that_would_refuse_their_options(given, message, monkeypatch):
    monkeypatch.chdir(ROOT / "pipeline" / "recipes")
    own = {"pairs": "loop/pairs.yaml", "reward": "loop/reward.yaml", "ppo": "demo/ppo.yaml"}
    own |= {"evaluation": "demo/evaluation.yaml", "launch": str(ROOT / "accelerate_configs" / "cpu.yaml")}
    args = options(**{**own, **given})
    with pytest.raises((ValueError, OSError), match=message):
        loop.check_stages(args, args.stages())


def test_a_recipe_changes_no_environment(tmp_path, monkeypatch):
    (tmp_path / "ppo.yaml").write_text(
        (ROOT / "pipeline/recipes/demo/ppo.yaml").read_text() + "env: {SPINE_TEST: 1}\n"
    )
    args = options(ppo=str(tmp_path / "ppo.yaml"), launch=str(tmp_path / "ppo.yaml"))
    stages = {"ppo": loop._stage("ppo", args.ppo)}
    loop.check_stages(args, stages)
    assert "SPINE_TEST" not in loop.os.environ


# ------------------------------------------------------------------------------------------ the report
PAIRS = [
    {"policies": [0, 0], "scores": [2.0, 1.0]},  # right
    {"policies": [0, 1], "scores": [9.0, 0.0]},  # of two policies: says which one people prefer
    {"policies": [0, 0], "scores": [0.0, 3.0]},  # wrong
    {"policies": [0, 1], "scores": [0.0, 0.0]},
    {"policies": [0, 0], "scores": [0.0, 1.0]},  # a tie
    {"policies": [0, 0], "scores": [0.0, 1.0]},  # skipped
    {"policies": [0, 0], "scores": [1.0, 1.0]},  # scored alike: right by half
    {"policies": [0, 0], "scores": [0.0, 1.0]},  # the second is preferred: right
]


def test_what_a_round_measured():
    row = round_row(2, PAIRS, [[1, 1], [1], [1, 0.5], [0.5], [0.5], [], [0], [0]], report(2))
    assert (row["round"], row["pairs"], row["labels"], row["ties"]) == (2, 8, 7, 2)
    assert row["earlier_reward_model"]["mean"] == pytest.approx(2.5 / 4)
    assert row["prefer_newest"]["mean"] == pytest.approx(1.5 / 2)
    # Of two pairs with two votes one is unanimous; votes are 1 (three times) and 0.5: chance is 9/16 + 1/16.
    assert row["annotators_agree"] == {
        "unanimous": 0.5,
        "two_agree": 0.5,
        "kappa": pytest.approx((0.5 - 0.625) / 0.375),
    }
    assert (row["judge_gain"], row["kl"]) == (interval(0.5), 10.0)
    first = round_row(1, [{"policies": [0, 0]}], [[1]], report(1) | {"judge_gain": None})
    assert (
        first["earlier_reward_model"]
        is first["prefer_newest"]
        is first["annotators_agree"]
        is first["judge_gain"]
        is None
    )


def rows_of(*gains: float, labels: int = 300) -> list[dict]:
    return [
        round_row(number, PAIRS, [[1]] * len(PAIRS), report(number)) | {"labels": labels, "judge_gain": interval(gain)}
        for number, gain in enumerate(gains, 1)
    ]


def test_the_gain_for_100_labels():
    assert per_100_labels(rows_of(0.3, 0.45, 0.42)) == pytest.approx([0.1, 0.05, -0.01])
    assert per_100_labels([{"labels": 300, "judge_gain": None}]) == [None]


def test_the_report_over_rounds():
    rows = rows_of(0.3, 0.45)
    assert (
        rounds_table(rows)
        .splitlines()[3]
        .startswith("| 2 | 600 | +0.450 [+0.325, +0.575] | +0.050 | 75.0% [62.5%, 87.5%] | 10.0 | 0.50 | ")
    )
    text = rounds_report({"rounds": rows, "labeller": "people", "seed": 3})
    assert "# 2 rounds" in text and "Labels by people, seed 3, judge `a.b`." in text and "](round_2/report.md)" in text


def test_the_table_and_the_plot_of_a_study(tmp_path):
    def loops(*gains: float) -> dict:
        return {seed: {"rounds": rows_of(gain / 2, gain, labels=50)} for seed, gain in enumerate(gains)}

    found = {"one": {seed: {"rounds": rows_of(0.25, labels=100)} for seed in (0, 1)}, "two": loops(0.5, 0.25)}
    rows = study_rows(found)
    assert rows[1]["runs"][0]["labels_so_far"] == [50, 100] and rows[1]["runs"][0]["gains"] == [0.25, 0.5]
    one, two = study_table(rows).splitlines()[2:]
    assert one.startswith("| 1 | 2 | 100 | +0.250 [+0.250, +0.250] | 75.0% [75.0%, 75.0%] |") and one.endswith("| – |")
    assert two.startswith("| 2 | 2 | 100 | +0.375 [+0.250, +0.500] |")
    mean, low, high = map(float, re.findall(r"[+-][\d.]+", two.split("|")[-2]))
    assert mean == 0.125
    # The differences are 0.25 and 0: their deviation is 0.125 times the root of 2, and t of one degree of freedom is 12.706.
    assert high - mean == pytest.approx(12.706 * 0.125, rel=0.01) and mean - low == pytest.approx(high - mean)
    draw_study(rows, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_waits_for_loops_that_have_not_finished(tmp_path):
    for arm, seed, rounds in (("one", 0, 1), ("two", 0, 2), ("two", 1, 1)):
        folder = tmp_path / arm / str(seed)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"rounds": rows_of(*[0.25] * rounds)}))
    with pytest.raises(
        ValueError, match=r"two/1/report\.json: 1 of 2 rounds have finished\. Run `make loop-study` to its end"
    ):
        tables.loop_study(tmp_path, "one", "two")
    shutil.rmtree(tmp_path / "two" / "1")
    tables.loop_study(tmp_path, "one", "two")
    assert (tmp_path / "table.md").is_file() and (tmp_path / "loop_study.png").is_file()


# ------------------------------------------------------------------------------------------ pairs, and a whole loop
def run_pairs(tiny, tmp_path, **given) -> list[dict]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    flags = {
        "model_name_or_path": tiny,
        "dataset_name": prompts,
        "output_dir": tmp_path / "out",
        "max_completion_length": 4,
    }
    words = [
        word
        for key, value in {**flags, **given}.items()
        for word in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]
    pairs.main(*parse(*pairs.OPTIONS, args=words))
    return [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_pairs_of_two_policies(tiny, sft_adapter, reward_adapter, tmp_path, capsys):
    given = {
        "policies": [sft_adapter, ""],
        "reward_adapter": reward_adapter,
        "judge": f"{__name__}.letters",
        "max_prompts": 6,
    }
    rows = run_pairs(tiny, tmp_path, first_prompt=5, **given)
    assert [row["prompt"] for row in rows] == [*TEXTS[5:], *TEXTS[:3]]
    assert [row["policies"] for row in rows] == [[0, 0], [0, 1]] * 3
    assert all(row["response_1"].strip() != row["response_2"].strip() for row in rows)
    assert all(row["judged"] == [len(row["response_1"]), len(row["response_2"])] for row in rows)
    assert all(row["scores"][0] != row["scores"][1] for row in rows)
    assert rows != run_pairs(tiny, tmp_path, first_prompt=5, seed=1, **given)
    own = run_pairs(tiny, tmp_path, policies=[sft_adapter], max_prompts=4)
    assert [row["policies"] for row in own] == [[0, 0]] * 4 and not {"scores", "judged"} & own[0].keys()


def test_prompts_whose_completions_are_equal_are_left_out(tiny, sft_adapter, tmp_path, capsys, monkeypatch):
    drawn = []

    def sample(backbone, role, prompt_ids, tokenizer, *, share_seed, **given):
        drawn.append(share_seed)
        draw, side = share_seed[2:4]
        # The first prompt gets equal completions twice, the second always, the third never.
        texts = {3: [0, 0, side], 2: [side if draw == 2 else 0, 0], 1: [0]}[len(prompt_ids)]
        ids = [[5 + text] for text in texts]
        yield type("Batch", (), {"first": 0, "rows": lambda self: ids})()

    monkeypatch.setattr(pairs, "sample", sample)
    rows = run_pairs(tiny, tmp_path, policies=[sft_adapter], max_prompts=3)
    assert [row["prompt"] for row in rows] == [TEXTS[0], TEXTS[2]]
    assert (
        "1 of 3 prompts are left out: 8 times their completions were equal or empty. The first is 'A'."
        in capsys.readouterr().out
    )
    assert len(set(drawn)) == len(drawn) == 2 * pairs.DRAWS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policies": ["a", "b", "c"]}, r"policies=\['a', 'b', 'c'\] must name one policy or two"),
        ({"reward_weights": [1.0]}, r"reward_weights=\[1\.0\] has no effect on pairs"),
        ({"first_prompt": -1}, r"first_prompt=-1 must be 0 or more"),
        ({"policies": ["nowhere/adapter"]}, "nowhere/adapter"),
    ],
)
def test_wrong_options_of_pairs(tiny, tmp_path, given, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_pairs(tiny, tmp_path, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_loop_of_two_rounds(tiny, sft_adapter, tmp_path, monkeypatch, capsys):
    """Its stages run in this process. What it leaves are standard adapters, and it is the same when it was cut off."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    ran = []

    def run(command, **given):
        module = import_module(command[command.index("-m", 3) + 1])
        ran.append(module.__name__.removeprefix("pipeline."))
        module.main(*parse(*module.OPTIONS, args=command[command.index("-m", 3) + 2 :]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    common = f"--model_name_or_path {tiny} --max_completion_length 4"
    prompts = "--dataset_name prompts.jsonl"
    train = "--logging_steps 1 --max_steps 2"
    recipe = {
        "output_dir": "out",
        "rounds": 2,
        "labels": 6,
        "labeller": f"{__name__}.letters",
        "launch": str(ROOT / "accelerate_configs" / "cpu.yaml"),
        "sft_adapter": sft_adapter,
        "pairs": f"pipeline/recipes/loop/pairs.yaml {common} {prompts}",
        "reward": f"pipeline/recipes/loop/reward.yaml {common} {train} --lora_embeddings false --sft_completions 4",
        "ppo": f"pipeline/recipes/demo/ppo.yaml {common} {prompts} {train} --per_device_train_batch_size 4",
        "evaluation": f"pipeline/recipes/demo/evaluation.yaml {common} {prompts} --judge {__name__}.letters",
    }
    Path("loop.yaml").write_text(yaml.safe_dump(recipe))

    def go(*words: str) -> None:
        loop.main(*parse(*loop.OPTIONS, args=["--config", "loop.yaml", *words]))

    go()
    assert ran == ["pairs", "reward", "ppo", "evaluation"] * 2
    for number in (1, 2):
        for stage, name in (
            ("reward", "score_normalization.json"),
            ("ppo", "value"),
            ("ppo", "adapter_model.safetensors"),
        ):
            assert Path(f"out/round_{number}/{stage}/{name}").exists()
        sides = Path(f"out/round_{number}/labels/preferences.jsonl").read_text().splitlines()
        assert len(sides) == 6  # a tie has an agreement of 0.5
    rows = [json.loads(Path(f"out/round_{number}/reward/metrics.json").read_text())["rows"] for number in (1, 2)]
    assert [found["train"]["rows"] for found in rows] == [6, 12]
    found = json.loads(Path("out/report.json").read_text())["rounds"]
    assert [row["labels"] for row in found] == [6, 6] and found[0]["earlier_reward_model"] is None
    assert (
        found[1]["prefer_newest"] and found[1]["judge_gain"] and Path("out/rounds.png").read_bytes()[:4] == b"\x89PNG"
    )
    weights = Path("out/round_2/ppo/adapter_model.safetensors").read_bytes()
    assert weights != Path("out/round_1/ppo/adapter_model.safetensors").read_bytes()
    ran.clear()
    shutil.rmtree("out/round_2/reward")
    shutil.rmtree("out/round_2/ppo")
    go()
    assert ran == ["reward", "ppo"]
    assert Path("out/round_2/ppo/adapter_model.safetensors").read_bytes() == weights
