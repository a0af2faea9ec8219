"""The tools beside the stages, with random arguments and files."""

import json
import shutil

from tests.faults.verdicts import Verdict, judge
from tests.faults.world import PAIRS, Case, as_recipe, good_options


WORDS = (
    "",
    "0",
    "-1",
    "1e9",
    "nan",
    "a",
    "--",
    "-h",
    "é",
    "/dev/null",
    "..",
    "out",
    "seeds",
    "x=1",
    "[",
    "{",
    "1",
    "2",
    "ddp",
)


def plan_words(case: Case) -> list[str]:
    case.write("plan.yaml", as_recipe(good_options("ppo")))
    names = (
        "processes",
        "layouts",
        "gb",
        "model_name_or_path",
        "lora_r",
        "max_completion_length",
        "per_device_train_batch_size",
    )
    words = ["--config", "plan.yaml"]
    for _ in range(case.draw.choice((0, 1, 1, 2))):
        words += [f"--{case.draw.choice(names)}", case.draw.choice(WORDS)]
    return words


MIGRATE = {"batch_size": 64, "mini_batch_size": 32, "ppo_epochs": 3, "learning_rate": 1e-4, "steps": 1000, "model_name": "m",
           "per_device_train_batch_size": 4, "num_mini_batches": 2, "total_episodes": 100, "gradient_accumulation_steps": 2,
           "num_sample_generations": 1, "local_rollout_forward_batch_size": 8, "num_ppo_epochs": 4, "kl_coef": 0.05,
           "reward_model_path": "r", "response_length": 53, "stop_token": "eos", "cliprange": 0.2, "init_kl_coef": 0.1,
           "world_size": 1}  # fmt: skip
ODD = (0, -1, None, "", "a", [], {}, True, 1e30, -0.5, 7, 10**12, float("nan"), "0", "1e-5", [1, 2])


def migrate_words(case: Case) -> list[str]:
    old = dict(case.draw.sample(sorted(MIGRATE.items()), case.draw.randrange(1, 8)))
    for key in case.draw.sample(sorted(old), min(len(old), case.draw.choice((0, 1, 1, 2)))):
        old[key] = case.draw.choice(ODD)
    case.note(json.dumps(old)[:150])
    kind = case.draw.choice(("yaml", "json", "words", "words", "odd"))
    if kind == "words":
        return ["--", *(word for key, value in old.items() for word in (f"--{key}", str(value)))]
    text = (
        json.dumps(old)
        if kind != "odd"
        else case.draw.choice(("", "- a", "a: b: c", "{", "\0", "a: &x [*x]", "? [a]\n: 1\n", "1: 2"))
    )
    case.write(f"old.{kind}", text)
    return [case.draw.choice((f"old.{kind}",) * 5 + ("nowhere.yaml", "base"))]


def tables_words(case: Case) -> list[str]:
    (case.folder / "runs" / "seeds").mkdir(parents=True)
    for seed in ("0", "1"):
        for folder in (f"runs/seeds/{seed}", f"runs/ablations/x=1/{seed}"):
            shutil.copytree(case.folder / "evaluation", case.folder / folder)
            shutil.copytree(case.folder / "ppo", case.folder / folder / "ppo")
            shutil.copytree(case.folder / "reward", case.folder / folder / "reward")
    for path in case.draw.sample(sorted((case.folder / "runs").rglob("*.json")), case.draw.choice((0, 0, 1, 2))):
        path.write_text(case.draw.choice(("{}", "[]", "{", '{"judge_gain": 5}', "null", "")))
        case.note(f"spoiled {path.relative_to(case.folder)}")
    if case.draw.random() < 0.3:
        (case.folder / "runs/seeds/notes").mkdir()
    words = case.draw.choice(
        (["seeds", "runs/seeds"], ["ablations", "runs/ablations", "x=1"], ["baselines", "runs", "evaluation"])
    )
    for _ in range(case.draw.choice((0, 0, 1, 2))):
        words = words[: case.draw.randrange(len(words) + 1)] + case.draw.choice(([], [case.draw.choice(WORDS)]))
    return words


def hh_words(case: Case) -> list[str]:
    rows = [
        {side: f"\n\nHuman: {row['prompt']}?\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
        for row in PAIRS
    ]
    if case.draw.random() < 0.5:
        row = case.draw.choice(rows)
        row[case.draw.choice(("chosen", "rejected", "x"))] = case.draw.choice(
            ("", "Human: a", None, 5, "\n\nAssistant: a", "\ud800", [], "\n\nHuman: ")
        )
    name = case.draw.choice(("hh.jsonl", "hh.jsonl", "hh.jsonl", "hh.json", "hh.jsonl.gz"))
    case.write(name, rows)
    words = [name, "converted"]
    for _ in range(case.draw.choice((0, 1, 1, 2))):
        option = case.draw.choice(("held_out", "max_pairs", "max_tokens", "tokenizer", "data_dir"))
        words += [f"--{option}", case.draw.choice((*WORDS, "0.5", "0.3", "base", "4", "64"))]
    if case.draw.random() < 0.15:
        words = words[: case.draw.randrange(len(words) + 1)]
    return words


TOOLS = {"plan": plan_words, "migrate": migrate_words, "tables": tables_words, "convert_hh": hh_words}


def tools(case: Case) -> Verdict:
    """A tool gets random arguments and files."""
    tool = case.draw.choice(sorted(TOOLS))
    words = TOOLS[tool](case)
    case.note(f"{tool} {' '.join(map(ascii, words))}"[:150])
    before = case.files()
    ended = case.tool(tool, *words)
    names = [
        *words,
        *(word.lstrip("-") for word in words),
        *case.notes[0].split(),
        "usage",
        "arguments",
        "one file",
        "source",
        "folder",
        "held_out",
    ]
    if tool == "migrate":
        names += [*MIGRATE, "old."]
    if tool == "tables":
        names += ["seeds", "baselines", "ablations", "runs/", *(f"{word}/" for word in words)]

    def wrong() -> str | None:
        if not ended.out.strip():
            return "exit code 0, and it printed nothing"
        return "exit code 0, and nan in what it printed" if "nan" in ended.out.lower().split() else None

    writes = ("runs/ablations", "runs/table.md", "runs/table.json")
    lost = case.changed(before, but=() if ended.code else writes)
    return judge(ended, names=[name for name in names if len(name) > 1], lost=lost, wrong=wrong)
