"""Write the dashboard of runs as one page of HTML.

Everything that a run has written, such as completions, is escaped. The page loads nothing: style and script stand in it, and
its security policy forbids anything else.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.pages.dashboard_charts import short
from pipeline.pages.dashboard_curves import HEADLINES, TARGETS, curves, headlines, judged, lower
from pipeline.pages.dashboard_tables import facts, preflight, samples
from pipeline.pages.escaping import words
from pipeline.reports.healthy import find, is_figure
from pipeline.reports.run_files import Run
from pipeline.runs.live_files import duration


MARKER = "<!-- written by python -m pipeline.dashboard -->"
HERE = Path(__file__).parent
STATES = {
    "running": ("going", "running"),
    "starting": ("going", "starting"),
    "finished": ("good", "finished"),
    "ended": ("fault", "ended early"),
    "broken off": ("fault", "broken off"),
}


# ------------------------------------------------------------------------------------------ the page
def page(runs: Sequence[tuple[str, Run | str]], title: str, *, live: bool) -> str:
    """Return the whole page.

    Args:
        runs: the name of each run, and the run, or a message if it cannot be read.
        title: the folder that was asked for.
        live: whether a server gives news; else the page is a file.
    """
    style, script = ((HERE / f"dashboard.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        f"connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    html = content(runs)
    pulse = '<span class="pulse"><i></i>follows the run</span>' if live else ""
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    about = "" if live else f" Written {escape(when)} by <code>python -m pipeline.dashboard</code>."
    return (
        f'<!doctype html>\n{MARKER}\n<html lang="en"><head><meta charset="utf-8"><title>{words(headline(runs, title))}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><style>{style}</style>'
        f"<noscript><style>section.run[hidden] {{ display: block !important }}</style></noscript></head>\n"
        f'<body><header><h1>{words(title)}</h1><span class="what">Spine</span>{pulse}</header>\n'
        f'<div id="content" data-version="{version_of(html)}">{html}</div>\n'
        f"<footer>A figure is outside of its healthy range if the median of its last three values is.{about}</footer>\n"
        f"<script>{script}</script></body></html>\n"
    )


def version_of(html: str) -> str:
    return hashlib.sha256(html.encode("utf-8", "replace")).hexdigest()[:16]


def headline(runs: Sequence[tuple[str, Run | str]], title: str) -> str:
    """Return the title of the browser's tab: how far the run is that is shown first."""
    run = runs[_shown(runs)][1]
    if isinstance(run, str) or not run.max_steps:
        return title
    return f"{run.step}/{run.max_steps} {run.stage or ''} {STATES[run.state][1]}: {title}"


def _shown(runs: Sequence[tuple[str, Run | str]]) -> int:
    """Return the place of the run that is shown first: one that is under way, or else the last of the first folder's."""
    for wanted in (("running",), ("starting",)):
        for place, (_, run) in enumerate(runs):
            if isinstance(run, Run) and run.state in wanted:
                return place
    for place, (_, run) in enumerate(runs):
        if isinstance(run, Run) and run.stage == "PPO":
            return place
    return len(runs) - 1


def content(runs: Sequence[tuple[str, Run | str]]) -> str:
    """Return what changes as runs go on: the list of runs, and a section for each."""
    shown = _shown(runs)
    links = "".join(
        f'<a href="#{words(name)}" class="{"chosen" if place == shown else ""}">{words(name)}'
        f"{'<i></i>' if isinstance(run, Run) and run.state == 'running' else ''}</a>"
        for place, (name, run) in enumerate(runs)
    )
    sections = "".join(
        f'<section class="run" id="{words(name)}"{"" if place == shown else " hidden"}>{_section(name, run)}</section>'
        for place, (name, run) in enumerate(runs)
    )
    return f"{f'<nav>{links}</nav>' if len(runs) > 1 else ''}<main>{sections}</main>"


def _section(name: str, run: Run | str) -> str:
    if isinstance(run, str):
        return f'<ul class="notes"><li class="fault">{words(run)}</li></ul>'
    return (
        _status(run)
        + _tiles(run)
        + _notes(run)
        + curves(run, name)
        + samples(run, name)
        + preflight(run, name)
        + facts(run)
    )


# ------------------------------------------------------------------------------------------ how it goes
def _status(run: Run) -> str:
    kind, word = STATES[run.state]
    parts = [f"Step {run.step:,} of {run.max_steps:,}." if run.max_steps else f"Step {run.step:,}."]
    if run.state == "starting":
        parts = ["A run has locked this folder and does not train yet: it reads its data and its model."]
        parts += ["Below is the run before it."] if run.history else []
    elif run.state == "running" and (left := run.seconds_left) is not None:
        parts.append(f"{duration(left)} left.")
    elif run.state == "ended":
        parts.append(f"{run.ended}.".replace("..", "."))
    elif run.state == "broken off":
        parts.append(
            "No process trains here any more, and the log has no end: the run was killed. If it has left a checkpoint, run "
            "the same command with --resume_from_checkpoint auto."
        )
    seconds = [row["train_runtime"] for row in run.history if is_figure(row.get("train_runtime"))]
    if run.state == "finished" and seconds:
        parts.append(f"Trained in {duration(seconds[-1])}.")
    times = [row["time"] for row in run.history if is_figure(row.get("time"))]
    if times and run.state == "running":
        parts.append(f"Last entry at {time.strftime('%H:%M:%S', time.localtime(times[-1]))}.")
    share = run.step / run.max_steps if run.max_steps else 0.0
    stage = f"<h3>{words(run.stage)}</h3>" if run.stage else ""
    return (
        f'<div class="card status">{stage}<span class="pill {kind}">{word}</span><p>{words(" ".join(parts))}</p>'
        f'<div class="progress"><i style="width:{min(share, 1):.1%}"></i></div></div>'
    )


def _tiles(run: Run) -> str:
    tiles = []
    for name, title in headlines(run):
        steps, values = run.points(name)
        kind, _ = judged(run, name, find(name, run.stage))
        target = run.options.get(TARGETS.get(name, ""))
        below = f"target {short(target)}" if is_figure(target) else f"from {short(values[0])} at step {steps[0]:,}"
        tiles.append(
            f'<div class="card tile"><span class="name"><i class="{kind}"></i>{title}</span><b>{short(values[-1])}</b>'
            f'<span class="from">{below}</span></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _notes(run: Run) -> str:
    """Return what needs a look: warnings of the run and of the preflight, and figures outside of their healthy range."""
    notes = [f"<b>Step {step:,}.</b> {words(text)}" for step, text in run.warnings]
    titles = dict(HEADLINES.get(run.stage or "", ()))
    for name in run.names():
        metric = find(name, run.stage)
        if metric is not None and judged(run, name, metric)[0] == "bad":
            now = short(run.points(name)[1][-1])
            notes.append(
                f"<b>{words(titles.get(name, name))} is {now}</b> ({metric.unit}). Healthy: {lower(metric.healthy)} "
                f"{escape(metric.remedy)}"
            )
    for check in run.preflight:
        if check["result"] == "warning":
            notes.append(f"<b>Preflight: {words(check['name'])}.</b> {words(check['why'])}")
    found = "".join(f'<li class="bad">{note}</li>' for note in notes)
    if not notes and run.history:
        found = '<li class="good">No warnings. Every figure that has a healthy range is inside of it.</li>'
    return f'<ul class="notes">{found}</ul>' if found else ""
