"""Show the page on which people compare two completions: a thin layer of gradio over a desk."""

import hmac
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it as it is imported

import gradio as gr  # noqa: E402

from pipeline.pages.label_answers import SURE  # noqa: E402
from pipeline.pages.label_desk import Desk, checked_name  # noqa: E402
from pipeline.pages.label_style import CSS, HEAD  # noqa: E402
from pipeline.pages.label_view import Screen, answer, safe, screen, undo  # noqa: E402


Result = TypeVar("Result")
TITLE = "Which completion is better?"
BUTTONS = (("1", "First", "first"), ("tie", "Tie", "tie"), ("2", "Second", "second"))
REMEMBERED = {"storage_key": "spine-annotator", "secret": "not a secret"}  # so that a restarted page knows the name


def label_page(desk: Desk, guidelines: str, *, ties: bool = False) -> gr.Blocks:
    """Make the page.

    What the page must know of a pair comes back from the browser with each answer, so a page that is started again goes on
    with the windows that are open.

    Args:
        guidelines: text in Markdown.
        ties: whether the preferences that are written after each answer keep ties.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        name = gr.BrowserState("", **REMEMBERED)
        gr.HTML(f'<div class="spine-title"><h1>{TITLE}</h1></div>')
        with gr.Column(visible=False, elem_id="who") as who:
            typed = gr.Textbox(label="Your name", info="It is saved with your answers.", max_length=40, elem_id="name")
            start = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False) as work:
            progress = gr.HTML(elem_id="progress")
            with gr.Accordion("Guidelines", elem_id="guidelines"):
                gr.Markdown(guidelines)
            body = gr.HTML(elem_id="pair")
            with gr.Row(elem_id="answers") as answers:
                buttons = {
                    label: gr.Button(
                        text, variant="primary" if label in "12" else "secondary", elem_id=id, min_width=80
                    )
                    for label, text, id in BUTTONS
                }
            with gr.Row(elem_id="rest"):
                sure = gr.Radio(list(SURE), label="How sure are you?", elem_id="sure", scale=4, min_width=280)
                skip = buttons["skip"] = gr.Button("Skip", elem_id="skip", min_width=100)
                back = gr.Button("Undo", elem_id="undo", min_width=100)
            said = gr.HTML(elem_id="said")
            ticket = gr.Textbox(elem_id="ticket")  # hidden by the style

        outputs = [name, who, work, progress, body, answers, skip, sure, ticket, said]

        def shown(annotator: str, found: Screen) -> list[Any]:
            can_answer = gr.update(visible=bool(found.ticket))
            return [
                *(annotator, gr.update(visible=False), gr.update(visible=True), found.progress, found.body),
                *(can_answer, can_answer, gr.update(visible=bool(found.ticket), value=None), found.ticket),
                f'<div role="status">{safe(found.said)}</div>',
            ]

        def ask_name() -> list[Any]:
            return ["", gr.update(visible=True), gr.update(visible=False), *[gr.skip()] * (len(outputs) - 3)]

        def resume(kept: str, request: gr.Request) -> list[Any]:
            try:
                annotator = checked_name(request.username or kept or "")
            except ValueError:
                return ask_name()
            return shown(annotator, screen(desk, annotator))

        def begin(written: str, request: gr.Request) -> list[Any]:
            annotator = _told(lambda: checked_name(request.username or written))
            return shown(annotator, screen(desk, annotator))

        def record(label: str) -> Callable[..., list[Any]]:
            def given(kept: str, ticket: str, sure: str | None, request: gr.Request) -> list[Any]:
                annotator = _told(lambda: checked_name(request.username or kept or ""))
                return shown(annotator, _told(lambda: answer(desk, annotator, ticket, label, sure)))

            return given

        def take_back(kept: str, request: gr.Request) -> list[Any]:
            annotator = _told(lambda: checked_name(request.username or kept or ""))
            return shown(annotator, _told(lambda: undo(desk, annotator)))

        # Nobody waits for another annotator, whose pair may still be sampled.
        options: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        page.load(resume, name, outputs, **options)
        gr.on([start.click, typed.submit], begin, typed, outputs, **options)
        for label, button in buttons.items():
            done = button.click(record(label), [name, ticket, sure], outputs, **options)
            done.then(lambda: desk.write_preferences(ties=ties), None, None, **options)
        back.click(take_back, name, outputs, **options).then(
            lambda: desk.write_preferences(ties=ties), None, None, **options
        )
    return page


def _told(work: Callable[[], Result]) -> Result:
    """Return the result of `work`; show its error to the annotator, who loses nothing by it."""
    try:
        return work()
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


@contextmanager
def serving(
    desk: Desk, guidelines: str, *, host: str, port: int, password: str | None = None, ties: bool = False
) -> Iterator[str]:
    """Serve the page while the code inside runs, and give it the page's address.

    With a password, a browser asks for it and for a name, which is that of the annotator.
    """

    def may_enter(name: str, given: str) -> bool:
        try:
            checked_name(name)
        except ValueError:
            return False
        return hmac.compare_digest(given.encode(), (password or "").encode())

    page = label_page(desk, guidelines, ties=ties)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=may_enter if password else None,
        auth_message="Enter your name as the user name, and the password that you were given.",
        theme=gr.themes.Soft(
            primary_hue="indigo", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"]
        ),
        css=CSS,
        head=HEAD,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=1,  # nobody uploads a file here
    )
    try:
        yield url
    finally:
        page.close(verbose=False)
