"""Read a paper's protocol, gather what its runs measured, and write the report with its figure.

A protocol is `pipeline/recipes/papers/<paper>/<scale>.yaml`; docs/papers.md says what stands in it. What the runs measured is
`<scale>.json` beside it, from which `pipeline.reports.claims` computes the verdict again.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from data.json_files import check_object, read_json
from data.saving import check_saved
from data.schemas import NUMBER, TEXT, list_of, mapping, one_of, record
from pipeline.reports.claims import FEWEST_SEEDS, SCALES, STATISTICS, Points, decide
from pipeline.reports.markdown import markdown_table, number
from pipeline.reports.plots import DASHES, INK, PPO, SFT, STYLE, row_of_panels
from pipeline.runs.recipe_file import read_recipe


PAPERS = Path(__file__).parents[1] / "recipes" / "papers"
SCALES_OF_RUNS = ("mini", "full")
COLOURS = (PPO, SFT, "#3f8f5f", "#8a5fa8")
SCALE = one_of(*SCALES)
# One series: `file`, perhaps a list `rows` in it, and `x`, a field of each row or of the file; or `files`, one for each x.
SERIES = record(
    {"y": TEXT},
    {"file": TEXT, "files": mapping(TEXT), "rows": TEXT, "x": TEXT, "of": TEXT},
)
CRITERION = record(
    {"means": TEXT, "statistic": one_of(*STATISTICS), "series": TEXT},
    {
        **dict.fromkeys(("minus", "over"), TEXT),
        **dict.fromkeys(("x_from", "x_to", "at_least", "at_most"), NUMBER),
        "x_scale": SCALE,
    },
)
PANEL = record(
    {"title": TEXT, "x": TEXT, "series": mapping(TEXT)},
    {"x_scale": SCALE, "paper": list_of(record({"label": TEXT, "x": list_of(NUMBER, 2), "y": list_of(NUMBER, 2)}))},
)
PROTOCOL = record(
    {
        **dict.fromkeys(("paper", "claim", "differs", "takes", "launch"), TEXT),
        "numbers": list_of(record({"what": TEXT, "paper": TEXT})),
        "stages": mapping(TEXT),
        "series": mapping(SERIES),
        "criterion": list_of(CRITERION, 1),
        "figure": list_of(PANEL, 1),
    }
)
_OF_SEED = record({"seed": NUMBER, **dict.fromkeys(("x", "y", "error"), list_of(NUMBER, 1))})
MEASURED = record(
    {
        "paper": TEXT,
        "scale": one_of(*SCALES_OF_RUNS),
        "seeds": list_of(NUMBER, 1),
        "criterion": list_of(CRITERION, 1),
        "series": mapping(list_of(_OF_SEED, 1)),
    }
)


# ------------------------------------------------------------------------------------------ protocols
def papers() -> list[str]:
    """Return the names of the papers that have a protocol."""
    return sorted({path.parent.name for scale in SCALES_OF_RUNS for path in PAPERS.glob(f"*/{scale}.yaml")})


def read_protocol(paper: str, scale: str) -> dict[str, Any]:
    """Read and check a paper's protocol.

    Raises the errors of `read_recipe`, and:
        ValueError: there is no such paper, or a field of the protocol is not what it must be.
    """
    if paper not in papers():
        near = difflib.get_close_matches(paper, papers(), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Name one of {', '.join(papers())}."
        raise ValueError(f"paper={paper!r} has no protocol in {PAPERS}. {hint}")
    path = PAPERS / paper / f"{scale}.yaml"
    found = read_recipe(str(path), option="")
    check_object(found, str(path), PROTOCOL, remedy="Correct the protocol.")
    names = {name for one in found["criterion"] for key in ("series", "minus", "over") if (name := one.get(key))}
    names |= {name for panel in found["figure"] for name in panel["series"]}
    if unknown := names - found["series"].keys():
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} is no series. Correct the protocol.")
    for name, one in found["series"].items():
        if ("file" in one) == ("files" in one):
            raise ValueError(f"{path}: the series {name} needs either file or files. Correct the protocol.")
    return found


# ------------------------------------------------------------------------------------------ what was measured
def _field(row: Mapping[str, Any], name: str) -> Any:
    """Return a field of an object, or a field of a field (`policy.kl`), or None."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _point(row: Mapping[str, Any], x: float | None, one: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return x, y and the standard error of y that a row says, or None if it lacks one of the first two."""
    y = _field(row, one["y"])
    error = 0.0
    if isinstance(y, dict):  # a mean with its 95% interval over prompts
        y, error = y["mean"], (y["high"] - y["low"]) / (2 * 1.96)
    if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
        return None
    if "of" in one:  # y is a share of so many
        error = math.sqrt(max(y * (1 - y), 0) / _field(row, one["of"]))
    return float(x), float(y), float(error)


def measured(one: Mapping[str, Any], folder: str | PathLike, places: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Return the points of one series of one seed: `seed`, `x`, `y` and `error`.

    Args:
        one: the series, as the protocol describes it.
        folder: the folder of the stages.
        places: folder of each stage of this seed, which the files of the series name.

    Raises the errors of `check_saved` and `read_json`, and:
        ValueError: the files have no such point.
    """
    points = []
    for x, name in one["files"].items() if "files" in one else [(0, one["file"])]:
        path = Path(folder, name.format(**places))
        check_saved(path.parent, "adapter" if path.name == "metrics.json" else path.stem)
        content = read_json(path, remedy="Run the stage again.")
        if "rows" not in one:
            points.append(_point(content, _field(content, one["x"]) if "x" in one else float(x), one))
            continue
        rows = [row for row in content.get(one["rows"]) or [] if isinstance(row, dict)]
        points += [_point(row, _field(row, one["x"]) if "x" in one else at, one) for at, row in enumerate(rows)]
    kept = [point for point in points if point is not None]
    if not kept:
        raise ValueError(
            f"{path}: no figure {one['y']!r}. Correct the series in the protocol, or run the stage again."
        )
    x_values, y_values, errors = zip(*kept, strict=True)
    return {"seed": seed, "x": list(x_values), "y": list(y_values), "error": list(errors)}


def as_points(saved: Mapping[str, Any]) -> dict[str, list[Points]]:
    """Return the series of saved measurements as arrays."""
    return {
        name: [Points(one["seed"], *(np.array(one[key], dtype=float) for key in ("x", "y", "error"))) for one in seeds]
        for name, seeds in saved["series"].items()
    }


def read_measured(path: Path) -> dict[str, Any]:
    """Read saved measurements.

    Raises the errors of `read_json`.
    """
    return read_json(path, MEASURED, remedy="Run the paper's stages first, without --report_only.")


# ------------------------------------------------------------------------------------------ the report
def _range(one: Mapping[str, Any]) -> str:
    low, high = (number(one[key], "g") if key in one else None for key in ("at_least", "at_most"))
    if low and high:
        return f"{low} to {high}"
    return f"at least {low}" if low else f"at most {high}"


def report(protocol: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, str]:
    """Return report.md and the verdict.

    Raises the errors of `decide`.
    """
    decided, verdict = decide(protocol["criterion"], as_points(saved), len(saved["seeds"]))
    rows = [
        [
            one["means"],
            f"{number(one['value'], '.4g')} [{number(one['low'], '.4g')}, {number(one['high'], '.4g')}]",
            _range(one),
            one["outcome"],
        ]
        for one in decided
    ]
    changed = saved["criterion"] != protocol["criterion"]
    parts = [
        f"# {protocol['paper']}",
        f"**Claim**: {protocol['claim']}",
        f"**Verdict**: **{verdict}**, at {saved['scale']} scale with seeds {', '.join(map(str, saved['seeds']))}.",
        *(["The criterion was changed after the runs."] if changed else []),
        "![Our runs beside the paper's numbers](figure.png)",
        "## Criterion",
        markdown_table(["what is asked", "measured, 95% interval", "range", "outcome"], rows),
        f"Intervals are over seeds and prompts. The claim is reproduced if each lies within its range, not reproduced if one "
        f"lies outside, and inconclusive otherwise, or with fewer than {FEWEST_SEEDS} seeds.",
        "## The paper's numbers",
        markdown_table(["what", "paper"], [[one["what"], one["paper"]] for one in protocol["numbers"]]),
        f"**What differs from the paper**: {protocol['differs']}",
        "## Protocol",
        f"Each stage is launched with {protocol['launch']}. {protocol['takes']}",
        "```\n" + "\n".join(f"{name}: {command}" for name, command in protocol["stages"].items()) + "\n```",
    ]
    return "\n\n".join(parts) + "\n", verdict


def draw(protocol: Mapping[str, Any], saved: Mapping[str, Any], path: str | PathLike) -> None:
    """Draw each panel of the protocol's figure as a PNG: a line for each seed, and the paper's numbers dashed."""
    series = as_points(saved)
    with matplotlib.rc_context(STYLE):
        figure, axes = row_of_panels(7.5, 3.4, len(protocol["figure"]))
        for axis, panel in zip(axes, protocol["figure"], strict=True):
            scale = panel.get("x_scale", "linear")
            for colour, (name, label) in zip(COLOURS, panel["series"].items(), strict=False):
                _draw_series(axis, series[name], scale, colour, label)
            for line in panel.get("paper", []):
                axis.plot(
                    SCALES[scale](np.array(line["x"])), line["y"], color=INK, linestyle=DASHES, label=line["label"]
                )
            axis.set_title(panel["title"])
            axis.set_xlabel(panel["x"])
            axis.margins(0.06)
            axis.legend(loc="best", fontsize=8)
            if scale == "log2":
                ticks = sorted({float(x) for name in panel["series"] for points in series[name] for x in points.x})
                axis.set_xticks(np.log2(ticks).tolist(), [f"{tick:g}" for tick in ticks])
        figure.savefig(path)


def _draw_series(axis: Any, series: Sequence[Points], scale: str, colour: str, label: str) -> None:
    for number_of, points in enumerate(series):
        order = np.argsort(points.x)
        x, y, error = (values[order] for values in (SCALES[scale](points.x), points.y, points.error))
        few = len(x) <= 12
        axis.errorbar(
            x,
            y,
            yerr=1.96 * error if error.any() else None,
            color=colour,
            alpha=0.8,
            linewidth=1.2,
            marker="o" if few else None,
            markersize=3,
            label=label if not number_of else None,
        )
