"""Show the samples, the preflight and the options of a run."""

import json
from typing import Any

from pipeline.pages.dashboard_charts import short
from pipeline.pages.escaping import words
from pipeline.reports.healthy import is_figure
from pipeline.reports.run_files import Run
from pipeline.runs.live_files import SAMPLES, duration


UPDATES = 4  # updates of which samples are shown at once
PROMPTS = 12  # prompts of which samples are shown at once


def samples(run: Run, key: str) -> str:
    """Return the completions of the same prompts, update by update; `key` tells its folded parts from those of other runs."""
    if not run.samples:
        if run.stage != "PPO":
            return ""
        return (
            f'<h2>Samples</h2><div class="card">None: <code>--sample_updates 4</code> has PPO write completions of the same '
            f"prompts to <code>{SAMPLES}</code> every four updates. Curves do not show what a policy writes.</div>"
        )
    of_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples:
        of_prompt.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append(row)
    cards = [_asked(rows, f"{key} {number}") for number, rows in enumerate(of_prompt.values())]
    shown, hidden = cards[:PROMPTS], cards[PROMPTS:]
    rest = (
        f'<details class="more" data-key="{words(key)} prompts"><summary>{len(hidden)} more prompts</summary>'
        f'<div class="asked">{"".join(hidden)}</div></details>'
        if hidden
        else ""
    )
    return f'<h2>Samples</h2><div class="asked">{"".join(shown)}</div>{rest}'


def _asked(rows: list[dict[str, Any]], key: str) -> str:
    """Return a prompt and its completions: the first, the last and two between; the others on demand."""
    last = len(rows) - 1
    chosen = {round(last * part / (UPDATES - 1)) for part in range(UPDATES)}
    shown = "".join(_answer(row) for place, row in enumerate(rows) if place in chosen)
    others = "".join(_answer(row) for place, row in enumerate(rows) if place not in chosen)
    more = (
        f'<details data-key="{words(key)}"><summary>{len(rows) - len(chosen)} more updates</summary>{others}</details>'
        if others
        else ""
    )
    return f'<div class="card">{_prompt(rows[0]["prompt"])}{shown}{more}</div>'


def _prompt(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return f'<p class="prompt"><bdi>{words(prompt)}</bdi></p>'
    return "".join(
        f'<p class="prompt"><span class="role">{words(turn.get("role", ""))}</span>'
        f"<bdi>{words(turn.get('content', ''))}</bdi></p>"
        for turn in prompt
    )


def _answer(row: dict[str, Any]) -> str:
    figures = (("score", "score"), ("judge", "judge"), ("kl", "KL"), ("disagreement", "disagreement"))
    found = "".join(
        f"<span>{word} <b>{short(row[name])}</b></span>" for name, word in figures if is_figure(row.get(name))
    )
    said = words(row["completion"].removeprefix(" "))  # the one between prompt and completion
    return (
        f'<div class="answer"><span class="at">step {row["step"]:,}</span><bdi class="said">{said}</bdi>'
        f'<span class="figures">{found}</span></div>'
    )


def preflight(run: Run, key: str) -> str:
    """Return the checks before PPO, folded if all have passed."""
    if not run.preflight:
        return ""
    kinds = {"passed": "good", "warning": "bad", "refused": "fault"}
    rows = "".join(
        f'<tr><td>{words(check["name"])}<br><span class="why">{words(check["why"])}</span></td>'
        f'<td class="number" data-name="measured">{_measured(check["measured"])}</td>'
        f'<td class="bound" data-name="bound">{words(check["bound"])}</td>'
        f'<td><span class="chip {kinds.get(check["result"], "bad")}">{words(check["result"])}</span></td></tr>'
        for check in run.preflight
    )
    passed = sum(check["result"] == "passed" for check in run.preflight)
    table = (
        f'<div class="card wide"><table class="stacks"><thead><tr><th>check</th><th class="number">measured</th><th>bound</th>'
        f"<th>result</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    heading = f"{passed} of {len(run.preflight)} checks passed"
    opened = "" if passed == len(run.preflight) else " open"
    return (
        f'<h2>Before training</h2><details class="more" data-key="{words(key)} preflight"{opened}><summary>{heading}</summary>'
        f"{table}</details>"
    )


def _measured(value: float | None) -> str:
    return short(value) if is_figure(value) else "unknown"


def facts(run: Run) -> str:
    """Return options, rows and results."""
    found: list[tuple[str, str]] = [("folder", f"<code>{words(run.folder)}</code>")]
    for part, rows in run.metrics.get("rows", {}).items():
        found.append(
            (f"rows: {part}", f"{rows['kept'] + rows['cut']:,} of {rows['rows']:,} of {words(rows['source'])}"
             + (f", {rows['cut']:,} cut" if rows["cut"] else ""))
        )  # fmt: skip
    named = (
        ("accuracy", "accuracy on held-out pairs", ".1%"), ("human_ceiling", "one rater agrees with the mean in", ".1%"),
        ("ece", "calibration error (ECE)", ".3f"), ("completions", "completions sampled", ",d"),
    )  # fmt: skip
    found += [(word, f"{run.metrics[name]:{form}}") for name, word, form in named if is_figure(run.metrics.get(name))]
    if is_figure(run.metrics.get("seconds")):
        found.append(("whole command", duration(run.metrics["seconds"])))
    found += [
        (name, f"{value:,g}" if is_figure(value) else words(value))
        for name, value in run.options.items()
        if value is not None
    ]
    if run.resumed:
        found.append(("resumed at step", ", ".join(map(str, run.resumed))))
    rows = "".join(f'<tr><td class="key">{words(name)}</td><td>{text}</td></tr>' for name, text in found)
    return f'<h2>This run</h2><div class="card wide"><table>{rows}</table></div>'
