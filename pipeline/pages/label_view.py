"""Write what an annotator sees as HTML: a pair, the progress, messages.

Everything that a model or a person has written is escaped.
"""

import html
from typing import Any, NamedTuple

from pipeline.pages.label_desk import Desk, Progress, Task


SAID = {"1": "the first is better", "2": "the second is better", "tie": "a tie", "skip": "skipped"}
# gradio fills templates with `${...}` and `{{...}}`, so these characters are written as entities too.
TEMPLATE = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})


def safe(text: str) -> str:
    """Return a text as HTML that shows it, whatever it holds."""
    return html.escape(text).translate(TEMPLATE)


def text_html(text: str, before: str = "") -> str:
    """Return a text as a block that keeps its lines, and is written from the side that its letters ask for.

    `before` is HTML that stands in front of it.
    """
    return f'<div class="spine-text" dir="auto">{before}{safe(text)}</div>'


def turns_html(content: Any) -> str:
    """Return a text, or the turns of a conversation, each with its role."""
    if isinstance(content, str):
        return text_html(content)
    return "".join(
        f'<div class="spine-turn" data-role="{safe(turn["role"])}"><span class="spine-role">{safe(turn["role"])}</span>'
        f"{text_html(turn['content'])}</div>"
        for turn in content
    )


def _side_html(content: Any) -> str:
    """Return a completion: a text goes on where the prompt ended, and the role of a single answer goes without saying."""
    if isinstance(content, str):
        return text_html(content, before='<span class="spine-dots">…</span>')
    return text_html(content[0]["content"]) if len(content) == 1 else turns_html(content)


def task_html(task: Task) -> str:
    """Return the prompt and both completions, in the order of the task."""
    sides = "".join(
        f'<section class="spine-card spine-side" aria-label="{name} completion"><h2>{name}<kbd>{key}</kbd></h2>'
        f"{_side_html(side)}</section>"
        for name, key, side in zip(("First", "Second"), "12", task.sides, strict=True)
    )
    return (
        f'<section class="spine-card spine-prompt" aria-label="Prompt"><h2>Prompt</h2>{turns_html(task.pair.prompt)}</section>'
        f'<div class="spine-sides">{sides}</div>'
    )


def message_html(title: str, text: str) -> str:
    """Return a message in the place of a pair."""
    return f'<section class="spine-card spine-message" role="status"><h2>{safe(title)}</h2>{text_html(text)}</section>'


def progress_html(progress: Progress, annotator: str) -> str:
    """Return a bar, and in words how far all have come, how far this annotator, and how well annotators agree."""
    share = 100 * min(1.0, progress.done / progress.total) if progress.total else 100
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    parts = [
        f"<b>{progress.done}</b> of {progress.total} pairs",
        f"<b>{progress.mine}</b> by you, {safe(annotator)}{skipped}",
    ]
    if progress.annotators > 1:
        parts.append(f"<b>{progress.annotators}</b> annotators")
    if progress.agreement is not None:
        _, same, kappa = progress.agreement
        parts.append(
            f"<b>{same:.0%}</b> agreement on {progress.several} shared pair{'s' * (progress.several > 1)}, "
            f"kappa <b>{kappa:.2f}</b>"
        )
    said = "".join(f"<span>{part}</span>" for part in parts)
    return (
        f'<div class="spine-bar" role="progressbar" aria-label="Pairs labelled" aria-valuenow="{progress.done}" '
        f'aria-valuemax="{progress.total}"><div style="width:{share:.1f}%"></div></div><div class="spine-figures">{said}</div>'
    )


class Screen(NamedTuple):
    """A page as one annotator sees it.

    Attributes:
        progress, body: HTML.
        ticket: that of the pair which is shown; empty if none is.
        said: a sentence about what was done last.
    """

    progress: str
    body: str
    ticket: str
    said: str


def screen(desk: Desk, annotator: str, said: str = "") -> Screen:
    """Return what an annotator sees next; wait while the pair is sampled."""
    try:
        task = desk.next_task(annotator)
        ticket, body = (task.ticket, task_html(task)) if task else ("", "")
    except Exception as error:  # of the sampling, which has ended; the terminal has the whole of it
        task, ticket, body = None, "", message_html("No more pairs can be sampled", str(error))
    progress = desk.progress(annotator)
    if not body and progress.done >= progress.total:
        body = message_html("All pairs are labelled", "Thank you! You can close this window.")
    elif not body:
        rest = progress.total - progress.done
        body = message_html(
            "Nothing is left for you",
            f"{rest} pair{'s are' if rest > 1 else ' is'} open in the windows of others. Reload this page later: a pair "
            f"that nobody answers for ten minutes is given to the next annotator.",
        )
    return Screen(progress_html(progress, annotator), body, ticket, said)


def answer(desk: Desk, annotator: str, ticket: str, label: str, sure: str | None) -> Screen:
    """Record an answer, and return what the annotator sees next.

    Raises the OSErrors of `Desk.answer`: nothing was recorded, and the pair stays.
    """
    try:
        recorded = desk.answer(annotator, ticket, label, sure)
    except ValueError as error:
        return screen(desk, annotator, str(error))
    said = f"Saved: {SAID[label]}." if recorded else "You had answered this pair already. The first answer counts."
    return screen(desk, annotator, said)


def undo(desk: Desk, annotator: str) -> Screen:
    """Take back the last answer of an annotator, and return the pair again. Raises the errors of `Desk.undo`."""
    return screen(
        desk, annotator, "Taken back. Answer this pair again." if desk.undo(annotator) else "There is nothing to undo."
    )
