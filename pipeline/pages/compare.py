"""The page of `pipeline.compare`: a prompt or a conversation, several policies, and what PPO sees in each token they write."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from pipeline.pages.compare_cards import CSS, WORDS, Card, draw_cards, draw_error, draw_head, draw_turns
from pipeline.pages.compare_models import KL, PREFIX, Comparison, Completion, Sampling


PAUSE = 0.1  # seconds between two drawings of a text that grows
TEXT, CONVERSATION = "text", "conversation"
HINTS = {TEXT: "The beginning of a text, such as: The film", CONVERSATION: "A message to the policies"}
# Errors that a user can do something about; any other is a bug, and gradio logs it.
SHOWN = (ValueError, OSError, FloatingPointError)


def prompt_of(mode: str, message: str, system: str, turns: list[dict]) -> str | list[dict]:
    """Return what the policies are asked: a text, or the turns so far with the new message."""
    if mode == TEXT:
        return message
    before = [{"role": "system", "content": system}] if system.strip() and not turns else []
    return [*before, *turns, {"role": "user", "content": message}]


def compared(
    comparison: Comparison, names: list[str], prompt: str | list[dict], sampling: Sampling
) -> Iterator[list[Card]]:
    """Sample from one policy after another, and yield all cards as their texts grow, at most every `PAUSE` seconds.

    Every policy samples with the same seed.

    Raises the errors of `Comparison.complete`, and:
        ValueError: no policy is named.
    """
    if not names:
        raise ValueError("No policy is chosen. Choose one or more.")
    cards = {name: Card(comparison.policies[name]) for name in names}
    drawn = 0.0
    for name in names:
        cards[name] = Card(comparison.policies[name], "")
        with closing(comparison.complete(name, prompt, sampling)) as completing:
            for shown in completing:
                cards[name] = Card(comparison.policies[name], shown)
                if isinstance(shown, Completion) or time.monotonic() - drawn > PAUSE:
                    yield list(cards.values())
                    drawn = time.monotonic()


def layers_of(comparison: Comparison) -> tuple[list[str], str]:
    """Return the figures to choose from, and the one that is chosen at first: what the reward model likes, or the KL."""
    first = next((layer for layer in comparison.layers if layer.startswith(PREFIX)), KL)
    return [WORDS, *comparison.layers], first


def build(comparison: Comparison, about: str, *, sampling: Sampling, chosen: list[str]) -> gr.Blocks:
    """Build the page.

    Args:
        about: sentence for the head of the page.
        sampling: settings at first; `chosen`: policies that are chosen at first.
    """
    layers, first = layers_of(comparison)
    chats = comparison.tokenizer.chat_template is not None
    with gr.Blocks(title="Spine: compare policies", analytics_enabled=False) as page:
        gr.HTML(draw_head(about), elem_id="head")
        turns, result = gr.State([]), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                history = gr.HTML("", elem_id="history")
                with gr.Group():
                    mode = gr.Radio(
                        [TEXT, CONVERSATION], value=TEXT, label="Prompt: in the form that they were trained on",
                        elem_id="mode", visible=chats,
                    )  # fmt: skip
                    message = gr.Textbox(
                        label="Prompt", show_label=not chats, lines=1, max_lines=8, elem_id="prompt", autofocus=True,
                        placeholder=HINTS[TEXT],
                    )  # fmt: skip
                with gr.Row(elem_id="buttons"):
                    go = gr.Button("Sample", variant="primary", elem_id="sample", min_width=90)
                    again = gr.Button("Next seed", elem_id="again", min_width=90)
                    stop = gr.Button("Stop", elem_id="stop", min_width=70)
            with gr.Column(scale=2, min_width=320):
                names = gr.CheckboxGroup(list(comparison.policies), value=chosen, label="Policies", elem_id="policies")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    with gr.Row():
                        temperature = gr.Number(sampling.temperature, label="temperature", step=0.1, min_width=110)
                        length = gr.Number(
                            sampling.max_completion_length, label="most tokens", precision=0, min_width=110
                        )
                        seed = gr.Number(sampling.seed, label="seed", precision=0, min_width=110, elem_id="seed")
                    with gr.Row():
                        top_p = gr.Number(sampling.top_p, label="top p", step=0.05, min_width=110)
                        top_k = gr.Number(sampling.top_k, label="top k (0: all)", precision=0, min_width=110)
                    system = gr.Textbox(
                        label="system turn", visible=chats, placeholder="Unset: that of the chat template"
                    )
        layer = gr.Radio(layers, value=first, label="Under the words", elem_id="layer")
        cards = gr.HTML("", elem_id="cards")
        with gr.Row(visible=False, elem_id="go-on") as go_on:
            answer = gr.Radio([], label="Go on with the answer of", elem_id="answer", scale=3)
            take = gr.Button("Go on", elem_id="take", min_width=100)
            new = gr.Button("New conversation", elem_id="new", min_width=100)

        def run(
            mode: str, message: str, system: str, turns: list[dict], names: list[str], layer: str, *settings: Any
        ) -> Iterator[dict]:
            quiet = {result: None, go_on: gr.update(visible=bool(turns))}
            found: list[Card] = []
            try:
                prompt = prompt_of(mode, message or "", system or "", turns)
                for found in compared(comparison, ordered(comparison, names), prompt, Sampling(*settings)):
                    yield {cards: draw_cards(found, prompt, layer), **quiet}
            except SHOWN as error:
                yield {cards: draw_error(error), **quiet}
                return
            choices = [card.policy.name for card in found]
            chat = mode == CONVERSATION
            yield {
                result: (found, prompt),
                go_on: gr.update(visible=chat),
                answer: gr.update(choices=choices, value=choices[-1]),
            }

        def draw(result: tuple | None, layer: str) -> Any:
            if not result:
                return gr.skip()
            found, prompt = result
            return draw_cards(found, prompt, layer)

        def take_answer(result: tuple | None, answer: str | None) -> tuple:
            if not result or answer is None:
                return (gr.skip(),) * 5
            found, prompt = result
            completion = next(card.shown for card in found if card.policy.name == answer)
            longer = [*prompt, {"role": "assistant", "content": completion.answer}]
            return longer, draw_turns(longer), "", "", None

        def forget() -> tuple:
            return [], "", "", "", None, gr.update(visible=False)

        def hint(mode: str) -> Any:
            return gr.update(placeholder=HINTS[mode])

        asked = [mode, message, system, turns, names, layer, temperature, length, top_p, top_k, seed]
        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        running = [
            gr.on([go.click, message.submit], run, asked, [cards, result, go_on, answer], **options),
            again.click(lambda seed: (seed or 0) + 1, seed, seed, **options).then(
                run, asked, [cards, result, go_on, answer], **options
            ),
        ]
        still = "() => document.querySelectorAll('.caret').forEach(caret => caret.remove())"
        stop.click(None, cancels=running, api_visibility="private").then(None, js=still, api_visibility="private")
        layer.change(draw, [result, layer], cards, **options)
        take.click(take_answer, [result, answer], [turns, history, message, cards, result], **options)
        new.click(forget, None, [turns, history, message, cards, result, go_on], **options)
        mode.change(forget, None, [turns, history, message, cards, result, go_on], **options).then(
            hint, mode, message, **options
        )
    return page


def ordered(comparison: Comparison, names: list[str]) -> list[str]:
    """Return the chosen policies in the order of the page, whatever the order of the clicks."""
    return [name for name in comparison.policies if name in names]


def launch(page: gr.Blocks, *, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page, print its address and return it; with `wait`, only after Ctrl-C.

    Nothing is sent anywhere else: no fonts, no telemetry, no share link.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="stone", radius_size="lg", font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_700", block_title_text_color="*neutral_700",
        checkbox_label_background_fill="*neutral_50", checkbox_label_background_fill_hover="*neutral_100",
        checkbox_label_background_fill_selected="*primary_50", checkbox_label_border_color="*neutral_200",
        checkbox_label_border_color_selected="*primary_300", checkbox_label_border_width="1px",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_secondary_background_fill="*neutral_100", button_secondary_background_fill_hover="*neutral_200",
    )  # fmt: skip
    _, address, _ = page.queue(api_open=False).launch(
        server_name=host, server_port=port, theme=theme, css=CSS, share=False, quiet=True, footer_links=[],
        run_history=False, enable_monitoring=False, inbrowser=False, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"{address} shows the page. Ctrl-C ends it.", flush=True)
    if wait:
        page.block_thread()
    return address
