"""Train in rounds: people label pairs of the newest policy, the reward model learns from all labels so far, PPO goes on.

    python -m pipeline.loop --config pipeline/recipes/loop/loop.yaml

Round r samples pairs from the policies of rounds r-1 and r-2; the first samples from SFT. People label them with
`pipeline.label`: until they have, the command ends with a line that says what to run, and exit code 3. The same command goes
on. A reward function can stand in for people (`labeller`). Then a reward model is trained on the labels of all rounds, PPO
trains a policy against it, and the policy is evaluated. docs/online.md explains the recipe, and why PPO begins with SFT anew.

Each round is a folder, with what `make demo` leaves in one. A stage that has finished is not run again; one that was cut off
goes on from its last checkpoint, if its recipe leaves any. Writes report.md, report.json and rounds.png.
"""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from data.json_files import read_json, write_json
from data.listing import file_digest, json_digest
from data.mixture import entries_of
from data.saving import check_saved, save
from data.schemas import OBJECT
from pipeline.backbone.adapter_tensors import WEIGHTS
from pipeline.backbone.adapters import check_adapter
from pipeline.pages.loop_labels import PREFERENCES, labels_of, read_pairs_file, read_votes_file
from pipeline.reports.report import read_report
from pipeline.reports.rounds import draw_rounds, round_row, rounds_report, rounds_table
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_ours, check_output_dir, check_path
from pipeline.runs.mixture import listed
from pipeline.runs.output_lock import lock_output
from pipeline.runs.ownership import FILES
from pipeline.runs.recipe_file import find_recipe, read_recipe
from pipeline.runs.stages import run_stage


PEOPLE = "people"
RECIPE = "loop.json"
WAITS = 3  # exit code while people have not labelled all pairs
# Options that the loop sets in each stage.
SET = {
    "sft": (),
    "pairs": ("policies", "reward_adapter", "first_prompt", "max_prompts", "judge"),
    "reward": ("sft_adapter", "datasets"),
    "ppo": ("sft_adapter", "reward_adapter"),
    "evaluation": ("sft_adapter", "reward_adapter", "policy_adapter"),
}
SET_IN_ALL = ("config", "output_dir", "seed", "resume_from_checkpoint")
Place = Callable[[str], str]  # from a folder beneath output_dir to its path


class Stage(NamedTuple):
    """A stage as the recipe of the loop names it: the words of its command line, and what its own recipe says."""

    words: list[str]
    recipe: dict[str, Any]


@dataclass
class LoopArguments:
    """Options of the loop.

    A stage is the path of its recipe, and options after it: `pipeline/recipes/demo/ppo.yaml --max_steps 64`.
    """

    output_dir: str = field(metadata={"help": "Folder of all rounds."})
    pairs: str = field(metadata={"help": "Recipe of pipeline.pairs: prompts, and how they are sampled."})
    reward: str = field(metadata={"help": "Recipe of pipeline.reward, without datasets."})
    ppo: str = field(metadata={"help": "Recipe of pipeline.ppo."})
    evaluation: str = field(metadata={"help": "Recipe of pipeline.evaluation. Its judge measures the gain."})
    sft: str | None = field(default=None, metadata={"help": "Recipe of pipeline.sft. Unset: SFT was done before."})
    sft_adapter: str | None = field(
        default=None,
        metadata={"help": "SFT adapter to begin with, instead of the stage sft. Both unset: the bare backbone."},
    )
    rounds: int = field(default=3, metadata={"help": "Number of rounds; more can be asked for later."})
    labels: int = field(default=300, metadata={"help": "Pairs that are labelled in a round."})
    labeller: str = field(
        default=PEOPLE,
        metadata={
            "help": "people, who label with pipeline.label; or a reward function that answers for them, as in reward_funcs."
        },
    )
    datasets: list[dict] | str | None = field(
        default=None,
        metadata={
            "help": "Pairs that there were before the first round, as the reward stage's datasets. Unset: none."
        },
    )
    launch: str = field(
        default="accelerate_configs/cpu.yaml",
        metadata={"help": "Config file with which accelerate starts each stage."},
    )
    seed: int = 0

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())
        if self.sft and self.sft_adapter:
            raise ValueError(
                f"sft={self.sft!r} and sft_adapter={self.sft_adapter!r} both say where PPO begins. Leave one unset."
            )
        self.datasets = listed(self.datasets)
        if self.datasets is not None:
            entries_of(self.datasets, "train")

    def stages(self) -> dict[str, Stage]:
        """Read the stages that the recipe names.

        Raises the errors of `read_recipe`, and:
            ValueError: a stage has an option that the loop sets, or words that are no options.
        """
        return {name: _stage(name, text) for name in SET if (text := getattr(self, name))}


def _stage(name: str, text: str) -> Stage:
    remedy = "Write a stage as the path of its recipe and options after it."
    try:
        path, *words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} cannot be read ({error}). {remedy}") from None
    recipe = read_recipe(find_recipe(path), option=f"{name}: ")
    for word in words:
        key = word.lstrip("-").split("=")[0].replace("-", "_")
        if word.startswith("--") and key in (*SET[name], *SET_IN_ALL):
            raise ValueError(f"{name}={text!r}: the loop sets {key} itself. Leave it out.")
    return Stage(["--config", path, *words], recipe)


# ------------------------------------------------------------------------------------------ the commands of a round
def own_words(args: LoopArguments, number: int, place: Place) -> dict[str, list[str]]:
    """Return what the loop adds to the command line of each stage of a round, without output_dir."""
    start = place("sft") if args.sft else args.sft_adapter or ""

    def policy(of: int) -> str:
        return place(f"round_{of}/ppo") if of else start

    sft = ["--sft_adapter", start] if start else []
    reward, seed = ["--reward_adapter", place(f"round_{number}/reward")], ["--seed", str(args.seed)]
    newest = [policy(number - 1), *([policy(number - 2)] if number > 1 else [])]
    pairs = [
        "--policies",
        *newest,
        "--first_prompt",
        str((number - 1) * args.labels),
        "--max_prompts",
        str(args.labels),
    ]
    if number > 1:
        pairs += ["--reward_adapter", place(f"round_{number - 1}/reward")]
    if args.labeller != PEOPLE:
        pairs += ["--judge", args.labeller]
    labelled = [{"path": place(f"round_{of}/{PREFERENCES}")} for of in range(1, number + 1)]
    return {
        "sft": seed,
        "pairs": [*pairs, *seed],
        "reward": [*sft, "--datasets", json.dumps([*(args.datasets or []), *labelled]), *seed],
        "ppo": [*sft, *reward, *seed],
        "evaluation": [*sft, *reward, "--policy_adapter", policy(number), *seed],
    }


def check_stages(args: LoopArguments, stages: dict[str, Stage]) -> bool:
    """Check the options of all stages as the stages will, so that no typo is found after people have labelled.

    Return whether the reward model learns from agreement, and so from ties.

    Raises:
        FileNotFoundError: there is no such config of accelerate.
        ValueError: a stage would refuse its options.
    """
    if not Path(args.launch).is_file():
        raise FileNotFoundError(f"launch: {args.launch}: no such file. Name one of accelerate_configs.")
    words, ties = own_words(args, 1, lambda at: str(Path(args.output_dir, at))), False
    for name, stage in stages.items():
        options = import_module(f"pipeline.{name}").OPTIONS
        trains = any(issubclass(kind, TrainingArguments) for kind in options)
        # This process need not have the GPUs that `launch` names.
        given = [
            *stage.words,
            *words[name],
            "--output_dir",
            args.output_dir,
            *(["--use_cpu", "true"] if trains else []),
        ]
        with _environment_kept():
            try:
                parts = parse(*options, args=given)
            except (ValueError, OSError) as error:
                raise ValueError(f"{name}={getattr(args, name)!r}: {error}") from error
        ties |= any(getattr(part, "use_agreement", False) for part in parts)
    return ties


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Take back what a recipe's `env` sets."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_same_recipe(args: LoopArguments, stages: dict[str, Stage]) -> None:
    """Keep the recipe of a new loop in loop.json; check that a loop that goes on has the same.

    Labels belong to the policies that wrote the pairs. Another recipe would make others, and the labels would be lost.

    Raises:
        ValueError: an option changed that changes what a round is. `rounds` and `launch` may change.
    """
    folder = Path(args.output_dir)
    now: dict[str, Any] = {
        name: getattr(args, name) for name in ("sft_adapter", "labels", "labeller", "datasets", "seed")
    }
    start = Path(args.sft_adapter or "").expanduser() / WEIGHTS
    now["start"] = file_digest(start) if args.sft_adapter and start.is_file() else None
    now |= {name: {"words": stage.words, "recipe": json_digest(stage.recipe)} for name, stage in stages.items()}
    check_saved(folder, "loop_recipe")
    if not (folder / RECIPE).is_file():
        save(folder, "loop_recipe", lambda staged: write_json(staged / RECIPE, now))
        return
    before = read_json(folder / RECIPE, OBJECT)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"output_dir={args.output_dir!r}: {', '.join(changed)} changed since the loop began there, and labels belong to "
            f"the policies of one recipe. Change it back ({folder / RECIPE} says what it was), or name another folder."
        )


# ------------------------------------------------------------------------------------------ the rounds
def write_report(args: LoopArguments, number: int) -> dict[str, Any]:
    """Write report.md, report.json and rounds.png of the first rounds, `number` of them, and return report.json."""
    root, rows = Path(args.output_dir), []
    for of in range(1, number + 1):
        folder = root / f"round_{of}"
        rows.append(
            round_row(of, read_pairs_file(folder), read_votes_file(folder), read_report(folder / "report.json"))
        )
    found = {"seed": args.seed, "labeller": args.labeller, "rounds": rows}

    def write(staged: Path) -> None:
        write_json(staged / "report.json", found)
        (staged / "report.md").write_text(rounds_report(found), encoding="utf-8")
        draw_rounds(rows, staged / "rounds.png")

    save(root, "loop", write)
    return found


OPTIONS = (LoopArguments,)


def main(args: LoopArguments) -> None:
    root, stages = Path(args.output_dir), args.stages()
    check_path(args.output_dir)
    check_output_dir(args.output_dir)
    check_ours(args.output_dir, (*FILES["loop"], *FILES["loop_recipe"]))
    if args.sft_adapter:
        check_adapter(args.sft_adapter, needs_head=False)
    ties = check_stages(args, stages)
    lock_output(args.output_dir, writes=True)
    check_same_recipe(args, stages)

    def run(name: str, at: str, number: int, before: str) -> str:
        """Run a stage of a round after all that was `before`, and return the digest of both."""
        own, placed = (own_words(args, number, place)[name] for place in (str, lambda at: str(root / at)))
        digest = json_digest([name, *stages[name], own, before])
        run_stage(root, at, name, [*stages[name].words, *placed], digest=digest, launch=args.launch)
        return digest

    digest = run("sft", "sft", 1, "") if args.sft else ""
    for number in range(1, args.rounds + 1):
        at = f"round_{number}"
        digest = run("pairs", f"{at}/pairs", number, digest)
        if not labels_of(root / at, by_judge=args.labeller != PEOPLE, ties=ties):
            raise SystemExit(WAITS)
        digest = json_digest([digest, file_digest(root / at / PREFERENCES)])
        digest = run("reward", f"{at}/reward", number, digest)
        digest = run("ppo", f"{at}/ppo", number, digest)
        digest = run("evaluation", at, number, digest)
        found = write_report(args, number)
    print(f"{rounds_table(found['rounds'])}\n{root / 'report.md'}")


if __name__ == "__main__":
    main(*parse(*OPTIONS))
