"""Write the pages of docs/ that are made from code: the options of all commands, and the figures of the logs.

python -m docs.pages
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any, get_type_hints

from transformers import TrainingArguments

from pipeline.reports.markdown import markdown_table
from pipeline.reports.metric_table import METRICS, Metric
from pipeline.rl.config import UNSUPPORTED
from pipeline.runs.changed_options import COMPARED, effect
from pipeline.runs.recipe import RANGES, _words


ROOT = Path(__file__).parents[1]
OURS = ("pipeline", "reward_models", "data")
STAGES = ("sft", "reward", "ppo", "evaluation")  # come first
INHERITED = "## Options of TRL and transformers"
RANGE = {name: words for names, words, _ in RANGES for name in names}

OPTIONS_INTRO = """# Options

Which options does a command take, what is each one's default, and where does it come from?

An option is a key of a recipe, such as `learning_rate: 1e-4`. On the command line it is `--learning_rate 1e-4`, which
overrides the recipe. `python -m docs.pages` writes this page from the dataclasses that the commands parse.

- *Values*: a value outside of them is an error. Any option whose default is unset may be `null`.
- *On resume*: what a change does when a run goes on from a checkpoint. It is *taken up* and said, or *refused* by name.
  *Compared* options are refused where what they name has other contents. No word: it changes nothing that is learned.
  [stopping-and-resuming.md](stopping-and-resuming.md#other-options-on-resume) has more.
"""

INHERITED_INTRO = """
Spine's commands take the options of TRL's configs, and these take those of transformers' `TrainingArguments`. The tables are
of {versions}. The words are the first sentence of their own help; their documentation has the rest. Some are refused here, and
the error says why.
"""

CURVES_INTRO = """# Reading the curves

What does each figure of a run mean, how should it look, and what do I do if it does not?

A run logs every `logging_steps` optimizer steps; the recipes log once an update of PPO. The terminal shows a few of the
figures ([after-training.md](after-training.md#what-a-terminal-shows)). All are in `metrics.json` when the run ends, in
`trainer_state.json` of each checkpoint, and in the trackers of `--report_to` (trackio, wandb, tensorboard). A figure is the
mean since the entry before, over all processes. On held-out rows its name begins with `eval_`.

Four figures tell most of a run of PPO: `score` should rise and level off, `kl` should come to its target and stay,
`explained_variance` should rise above 0, and `completions/mean_length` should stay near where it began.

![Mean score, KL and value loss during PPO: the score rises from 0 to 2.4 deviations, the KL to 10 nats](ppo_curves.png)

*A healthy run: 24 updates of `make smollm2`.*

The healthy ranges below are those that the code draws and checks (`pipeline/reports/metric_table.py`). They are rules of thumb
for policies of this kind, not laws: a run outside of one deserves a look at its samples. Symptoms and their causes are in
[troubleshooting.md](troubleshooting.md). `python -m docs.pages` writes this page.
"""


# ------------------------------------------------------------------------------------------------------------- options
def commands() -> dict[str, tuple[type, ...]]:
    """Return the dataclasses that each command at the top of pipeline/ is given, by the command's name."""
    found = {}
    names = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")
    for name in (*STAGES, *(name for name in names if name not in STAGES)):
        hints = get_type_hints(import_module(f"pipeline.{name}").main)
        kinds = tuple(kind for argument, kind in hints.items() if argument != "return")
        if kinds and all(map(is_dataclass, kinds)):
            found[name] = kinds
    return found


def resumes(kinds: tuple[type, ...]) -> bool:
    """Tell whether a command trains, and so can resume."""
    return any(issubclass(kind, TrainingArguments) for kind in kinds)


def with_parents(kind: type) -> list[type]:
    """Return a dataclass and those that it inherits options from, the dataclass first."""
    return [each for each in kind.__mro__ if is_dataclass(each) and own_options(each)]


def own_options(kind: type) -> list[Field]:
    """Return the options that a dataclass adds to its parents', or whose default it changes."""
    named = inspect.get_annotations(kind)
    return [option for option in fields(kind) if option.name in named]


def shown_default(option: Field) -> str:
    """Return a default as a recipe has it."""
    value = option.default if option.default_factory is MISSING else option.default_factory()
    if value is MISSING:
        return "must be set"
    value = value.value if isinstance(value, Enum) else value
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!r}`" if value in ("", []) else f"`{value}`"


def shown_values(option: Field, hint: Any) -> str:
    """Return what an option may be, in words."""
    if choices := option.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    words, bounds = _words(hint).replace(" or null", ""), RANGE.get(option.name, "finite")
    return words if bounds == "finite" else f"{words}, {bounds}"


def on_resume(kind: type, name: str) -> str:
    """Return what a change of an option does to a resumed run, in a word or two."""
    found = effect(kind.__name__, name)
    if found is None:
        return "compared" if name in COMPARED.split() else ""
    return "taken up" if found == "applied" else "refused"


def sentence(text: str, *, first: bool) -> str:
    """Return a help text for a cell of a table: on one line, of another project only its `first` sentence."""
    text = " ".join(text.split())
    if first:
        text = re.split(r"(?<=[a-z`)\]]\.)\s+(?=[A-Z`])", text)[0]
    return text


def table_of(kind: type, *, trains: bool) -> str:
    """Return the table of a dataclass's own options; those of a command that `trains` say what they do on resume."""
    ours, hints = kind.__module__.startswith(OURS), get_type_hints(kind)
    rows = []
    for option in own_options(kind):
        said = sentence(option.metadata.get("help", ""), first=not ours)
        if kind.__name__ == "RLOOConfig" and option.name in UNSUPPORTED:
            said += " PPO refuses it."
        cells = [f"`{option.name}`", shown_default(option), shown_values(option, hints[option.name])]
        rows.append([*cells, *([on_resume(kind, option.name)] if trains else []), said])
    return markdown_table(["option", "default", "values", *(["on resume"] if trains else []), "meaning"], rows)


def section(kind: type, *, trains: bool) -> str:
    """Return the section of a dataclass: its source, what it is, and its options."""
    title, module = f"### {kind.__name__}", kind.__module__
    if module.startswith(OURS):
        path = module.replace(".", "/") + ".py"
        about = f"{sentence((kind.__doc__ or '').split(chr(10))[0], first=False)} Source: [`{path}`](../{path})."
    else:
        about = f"Source: `{module}` of {module.split('.')[0]}."
    return f"{title}\n{about}\n\n{table_of(kind, trains=trains)}\n"


def options_page() -> tuple[str, str]:
    """Return docs/options.md in two parts: Spine's own options, and those that TRL and transformers have in this release."""
    found = commands()
    rows = []
    for command, kinds in found.items():
        names = dict.fromkeys(each for kind in kinds for each in with_parents(kind))
        rows.append(
            [f"`pipeline.{command}`", ", ".join(f"[{each.__name__}](#{each.__name__.lower()})" for each in names)]
        )
    trains: dict[type, bool] = {}
    for command, kinds in found.items():
        for each in (each for kind in kinds for each in with_parents(kind)):
            trains[each] = trains.get(each, False) or (resumes(kinds) and command != "plan")
    ours, theirs = [], []
    for each, resuming in trains.items():
        (ours if each.__module__.startswith(OURS) else theirs).append(section(each, trains=resuming))
    overview = f"## Which command takes which\n{markdown_table(['command', 'options of'], rows)}\n"
    own = "\n".join([OPTIONS_INTRO, overview, "## Options of Spine", *ours])
    versions = f"TRL {version('trl')} and transformers {version('transformers')}"
    return own, "\n".join([INHERITED, INHERITED_INTRO.format(versions=versions).strip(), "", *theirs])


# -------------------------------------------------------------------------------------------------------------- curves
def of_metric(metric: Metric) -> Iterator[str]:
    """Yield the lines of a figure: its name and stages, its meaning, its healthy range, and what to do outside of it."""
    twice = sum(other.name == metric.name for other in METRICS) > 1
    stages = ", ".join(metric.stages)
    yield f"### `{metric.name}`" + (f" ({stages})" if twice else "")
    yield wrapped(f"*{stages}; {metric.unit}.* {metric.meaning}")
    yield ""
    settles = f" Its first {metric.settles} entries may be outside." if metric.settles else ""
    yield wrapped(f"- *Healthy.* {metric.healthy}{settles}")
    yield wrapped(f"- *If not.* {metric.remedy}")
    yield ""


def wrapped(text: str) -> str:
    """Return a paragraph, or an entry of a list, in lines of 120 characters."""
    indent = "  " if text.startswith("- ") else ""
    return fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def curves_page() -> str:
    """Return docs/reading-the-curves.md: the table of metrics, a section for each group."""
    lines = [CURVES_INTRO]
    for group in dict.fromkeys(metric.group for metric in METRICS):
        lines.append(f"## {group[0].upper()}{group[1:]}")
        for metric in METRICS:
            if metric.group == group:
                lines += of_metric(metric)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    for name, text in {"options.md": "\n".join(options_page()), "reading-the-curves.md": curves_page()}.items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
