"""Pages of docs/ that must keep up with the code: options, figures of the logs, checks of the preflight, examples of code."""

import ast
import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from docs.pages import INHERITED, curves_page, options_page
from pipeline import reward
from pipeline.rl.policy_checks import WITHOUT_EFFECT
from pipeline.runs.command_line import parse
from reward_models.composite import Composite
from reward_models.functions import load_functions


ROOT = Path(__file__).parents[1]
REMEDY = "run `python -m docs.pages`"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}$\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^### (.+)$", text, re.MULTILINE)


# --------------------------------------------------------------------------------------------- pages made from code
def test_the_options_are_up_to_date():
    ours, theirs = options_page()
    found = page("options.md").partition(INHERITED)
    assert found[0] == f"{ours}\n", REMEDY
    skip_other_releases(found[2], theirs)
    assert "".join(found[1:]) == theirs, REMEDY


def skip_other_releases(text: str, made: str) -> None:
    """Skip the test if the page is of other releases of TRL and transformers, which have other options, than those here."""
    page_of, made_of = (re.search(r"TRL \S+ and transformers \d\S+\d", part)[0] for part in (text, made))
    if page_of != made_of:
        pytest.skip(f"the page is of {page_of}, and {made_of} are installed")


def test_the_options_of_every_command_are_there():
    text = page("options.md")
    skip_other_releases(text, options_page()[1])
    for command in ("sft", "reward", "reward_eval", "ppo", "evaluation", "best_of_n", "rloo", "grpo", "dpo", "plan"):
        row = re.search(rf"^\| `pipeline\.{command}` \| (.+) \|$", text, re.MULTILINE)
        names = re.findall(r"\[(\w+)\]", row[1])
        tables = "".join(text.partition(f"### {name}\n")[2].partition("\n### ")[0] for name in names)
        hints = get_type_hints(import_module(f"pipeline.{command}").main)
        for kind in (hint for name, hint in hints.items() if name != "return"):
            missing = [name for name in kind.__dataclass_fields__ if f"\n| `{name}` | " not in tables]
            assert not missing, f"{command}: {missing}"


def test_the_curves_are_up_to_date():
    assert page("reading-the-curves.md") == curves_page(), REMEDY


# ------------------------------------------------------------------------------------------------- troubleshooting
def names_of_checks() -> set[str]:
    """Return the names of all checks of the preflight, from the calls that make them."""
    found: set[str] = set()
    for module in ("preflight", "policy_checks", "score_checks"):
        for node in ast.walk(ast.parse((ROOT / "pipeline" / "rl" / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("held", "Check"):
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    found.add(name.value)
                else:  # one of each option of sampling
                    assert ast.unparse(name) == "f'{name} is unset'"
                    found |= {f"{option} is unset" for option in WITHOUT_EFFECT}
    return found


def test_every_check_of_the_preflight_has_a_section():
    sections = page("troubleshooting.md").partition("## Refused by the preflight")[2]
    assert len(names_of_checks()) > 15
    assert sorted(headings(sections)) == sorted(names_of_checks())


# Warnings of `pipeline.rl.health`, and the sections on them.
SYMPTOMS = {
    "negative KL": "The KL is negative",
    "exploding KL": "The KL explodes",
    "still policy": "The policy does not move",
    "flat reward": "The score never differs",
    "collapsed entropy": "Completions repeat themselves",
}


def test_every_warning_during_ppo_has_a_section():
    text = (ROOT / "pipeline" / "rl" / "health.py").read_text(encoding="utf-8")
    assert set(re.findall(r'found\["(.+?)"\] = ', text)) == SYMPTOMS.keys()
    assert set(SYMPTOMS.values()) <= set(headings(page("troubleshooting.md")))


# --------------------------------------------------------------------------------------------- tutorial, extending
FEW = {"max_steps": 2, "logging_steps": 1, "warmup_steps": 0}
SHORT = {"max_completion_length": 6}
# Options that make each stage of the tutorial short.
SIZES = {
    "sft": FEW,
    "reward": FEW | SHORT | {"sft_completions": 16, "per_device_train_batch_size": 8},
    "ppo": FEW
    | SHORT
    | {"per_device_train_batch_size": 4, "min_reward_accuracy": 0, "sample_updates": 1, "judge": ""},
    "evaluation": SHORT | {"max_prompts": 16},
}


def run(stage: str, *words: str) -> None:
    """Run a stage in this process with the options of a command line."""
    main = import_module(f"pipeline.{stage}").main
    kinds = [kind for name, kind in get_type_hints(main).items() if name != "return"]
    main(*parse(*kinds, args=[*words]))


@pytest.mark.slow
def test_the_tutorial(tiny, tmp_path, monkeypatch, capsys):
    """All its commands in their order: those of the shell, its two programs, and the stages with a tiny model and few steps.

    The texts of that model are random, so the program that makes pairs looks for a letter.
    """
    text = page("tutorial.md")
    monkeypatch.chdir(tmp_path)
    for folder in ("pipeline", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    make_pairs, write = fences(text, "python")
    lines = "".join(fences(text, "bash")).splitlines()
    shell = [line for line in lines if line.split()[0] in ("mkdir", "cp", "sed")]
    subprocess.run(["bash", "-ec", "\n".join(shell)], check=True)
    rule = re.search(r're\.compile\(r"(.+?)", re\.IGNORECASE\)', make_pairs)[1]
    programs = {
        "make_pairs": make_pairs.replace(rule, "z").replace("NUMBER, BATCH = 3072", "NUMBER, BATCH = 96"),
        "write": write,
    }
    assert programs["make_pairs"].count("96, 128") == programs["make_pairs"].count('r"z"') == 1
    done = []
    for line in (line for line in lines if line not in shell):
        words = shlex.split(line)
        if "accelerate" in words:
            stage = words[words.index("-m") + 1].removeprefix("pipeline.")
            small = [str(word) for key, value in SIZES[stage].items() for word in (f"--{key}", value)]
            run(stage, *words[words.index("-m") + 2 :], *small, "--model_name_or_path", tiny)
            done.append(stage)
        elif words[:2] == ["python", "-m"]:
            module = words[2]
            if module.startswith("my."):
                exec(compile(programs[module.removeprefix("my.")], module, "exec"), {"__name__": "__main__"})
            else:
                import_module(module).main(words[3:])
            done.append(module)
        else:
            assert line in ("make .venv/installed", "source .venv/bin/activate"), line
    assert done == ["sft", "my.make_pairs", "data.inspect", "reward", "ppo", "evaluation", "my.write"]
    assert "The film" in capsys.readouterr().out.splitlines()[-1]

    parts = [[json.loads(line) for line in Path(f"my/{name}.jsonl").open()] for name in ("pairs", "held_out")]
    assert all(map(len, parts))
    for pair in sum(parts, []):
        assert "z" in pair["chosen"].lower() and "z" not in pair["rejected"].lower()
    report = json.loads(Path("my/report.json").read_text())
    assert re.search(r"pattern=r'(.+?)'\)", report["judge"])[1] == f"(?i){rule}"
    assert 0 <= report["sft"]["judge"] <= 1 and report["prompts"] == 16
    assert Path("my/ppo/samples.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_extending(tmp_path, monkeypatch, tiny):
    """The code of the page, block after block; then its rewards by name, and its loss of the reward model in the stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = page("extending.md")
    space: dict = {"__name__": "extending"}
    for number, block in enumerate(fences(text, "python")):
        exec(compile(block.replace("data/backbone", tiny), f"block {number} of extending.md", "exec"), space)
    trainer = space["trainer"]
    assert trainer.state.global_step == 4 and type(trainer).__mro__[1].__name__ == "PPOTrainer"
    saved = load_file("runs/only_better/policy/adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) > 0

    rewards, judge = fences(text, "python")[0], fences(text, "python")[2]
    Path("my_rewards.py").write_text(rewards + "\n\n" + judge)
    recipe, judges = fences(text, "yaml")
    rows = Dataset.from_dict({"prompt": ["A", "B"]})
    named = yaml.safe_load(recipe)
    functions = load_functions(named["reward_funcs"], rows, "rows")
    composite = Composite(functions, named["reward_weights"])
    assert composite.names == ["brevity", "contains_word", "patient"]
    for name, path in yaml.safe_load(judges).items():
        assert load_functions([path], rows, "rows", name) if name == "judge" else path == "my_rewards.shorter"

    monkeypatch.setattr(reward, "RewardModel", space["Hinge"])
    pairs = [{"prompt": "The film", "chosen": " is good." * n, "rejected": " is bad." * n} for n in range(1, 9)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {
        "model_name_or_path": tiny,
        "dataset_name": "pairs.jsonl",
        "output_dir": "out",
        "max_steps": 2,
        "max_length": 64,
    }
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    run("reward", *[str(word) for key, value in options.items() for word in (f"--{key}", value)])
    history = json.loads(Path("out/metrics.json").read_text())["history"]
    assert history[0]["loss"] == pytest.approx(max(0.0, 1 - history[0]["margin"]), abs=0.05)
