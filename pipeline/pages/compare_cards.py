"""Draw completions and their figures as HTML: a card for each policy, a heat map under the words, a table of all numbers.

All text comes from models, files and users. So every text is escaped here, and nothing else makes HTML.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.pages.compare_models import ADVANTAGE, KL, PREFIX, REWARD, VALUE, Completion
from pipeline.pages.compare_runs import Policy


WORDS = "words only"
# What a figure says, by the beginning of its name.
MEANINGS = {
    KL: "How much likelier this policy finds the token than the reference does, in nats. Where it is high, training changed "
    "what is written.",
    REWARD: "What PPO pays for the token: minus beta times the KL, and the score at the last token.",
    VALUE: "What the value model expects of the whole completion before it sees the token.",
    ADVANTAGE: "How much better the token turned out than the value expected (GAE, before whitening). PPO makes tokens "
    "with a high one likelier.",
    PREFIX: "The reward model's score of the text up to and with the token. A leap shows which word earns the reward.",
}
CSS = """
#head, #cards, #history { padding: 0; }
#head > div, #cards > div, #history > div { padding: 0 !important; }
#history:not(:has(.turn)) { display: none; }
#buttons button { white-space: nowrap; padding-inline: 8px; font-size: .95rem; }
.compare-head h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; margin: 0 0 .1rem; }
.compare-head p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; overflow-wrap: anywhere; }
.cards { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.card { border: 1px solid var(--border-color-primary); border-radius: 14px; padding: 14px 16px 12px; min-width: 0;
  background: var(--block-background-fill); box-shadow: 0 1px 2px rgb(0 0 0 / .04); }
.card.best { border-color: #0d9488; box-shadow: 0 0 0 1px #0d9488; }
.card header { display: flex; gap: 8px; align-items: baseline; justify-content: space-between; margin-bottom: 8px; }
.card h2 { font-size: 1rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.card .score { font-size: 1.25rem; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .score small { font-size: .72rem; font-weight: 400; color: var(--body-text-color-subdued); margin-right: 5px; }
.chips { display: flex; flex-wrap: wrap; gap: 5px; margin: 10px 0 0; }
.chip { font-size: .75rem; padding: 1px 8px; border-radius: 99px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.chip.warn { background: #fef3c7; border-color: #f59e0b; color: #78350f; }
.text { font-size: 1.02rem; line-height: 1.55; min-height: 2.6em; overflow-wrap: anywhere; }
.text .asked { color: var(--body-text-color-subdued); white-space: pre-wrap; }
.text .plain { white-space: pre-wrap; }
.text .caret { display: inline-block; width: .5em; height: 1.05em; background: #0d9488; vertical-align: -.18em;
  animation: caret 1s steps(2) infinite; }
@keyframes caret { 50% { opacity: 0; } }
.token { display: inline-flex; flex-direction: column; vertical-align: top; margin: 1px 1px 5px 0; border-radius: 5px;
  min-width: .5em; max-width: 100%; }
.token.apart { margin-left: .28em; }
.token .word { padding: 0 2px; text-align: center; white-space: pre-wrap; overflow-wrap: anywhere; }
.token .figure { font-size: .67rem; line-height: 1.3; text-align: center; padding: 0 3px 1px; opacity: .85;
  font-variant-numeric: tabular-nums; }
.token .mark { color: var(--body-text-color-subdued); font-size: .8em; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; font-size: .82rem; margin: 2px 0 12px;
  color: var(--body-text-color-subdued); }
.legend .scale { display: inline-flex; align-items: center; gap: 6px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.legend .bar { width: 130px; height: 10px; border-radius: 5px; border: 1px solid var(--border-color-primary);
  background: linear-gradient(90deg, rgb(234 88 12 / .75), transparent 50%, rgb(13 148 136 / .75)); }
.legend .why { flex: 1 1 280px; }
.card details { margin-top: 10px; font-size: .8rem; }
.card summary { cursor: pointer; color: var(--body-text-color-subdued); }
.card .numbers { overflow: auto; max-height: 320px; margin-top: 6px; }
.card table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.card table :is(tr, th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary); }
.card th { font-weight: 500; text-align: right; padding: 2px 6px; position: sticky; top: 0;
  background: var(--block-background-fill); }
.card td { text-align: right; padding: 1px 6px; white-space: nowrap; }
.card th:first-child, .card td:first-child { text-align: left; max-width: 9em; overflow: hidden; text-overflow: ellipsis; }
.card .made { margin: 6px 0 0; font-size: .75rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.alert { border: 1px solid #ef4444; background: rgb(239 68 68 / .08); border-radius: 12px; padding: 10px 14px;
  overflow-wrap: anywhere; }
.turns { display: flex; flex-direction: column; gap: 8px; }
.turn { max-width: 85%; padding: 7px 12px; border-radius: 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); align-self: flex-start; }
.turn.user { align-self: flex-end; background: rgb(13 148 136 / .12); }
.turn b { display: block; font-size: .72rem; font-weight: 500; color: var(--body-text-color-subdued); }
"""


@dataclass(frozen=True)
class Card:
    """State of a policy's card: its completion, or the text so far; None is one that waits for its turn."""

    policy: Policy
    shown: Completion | str | None = None


def draw_cards(cards: Sequence[Card], prompt: str | list[dict], layer: str) -> str:
    """Draw the cards of all policies, with one figure under the words; its colours have one scale over all cards."""
    done = [card.shown for card in cards if isinstance(card.shown, Completion)]
    largest = max((abs(x) for each in done for x in each.layers.get(layer, [])), default=0.0)
    scores = [each.score for each in done if each.score is not None]
    finished = len(done) == len(cards) and len(scores) > 1
    best = max(scores) if finished and len({round(score, 6) for score in scores}) > 1 else None
    asked = prompt if isinstance(prompt, str) else ""
    drawn = "".join(_card(card, asked, layer, largest, best) for card in cards)
    return f'{_legend(layer, largest) if done else ""}<div class="cards">{drawn}</div>'


def draw_error(error: Exception) -> str:
    """Draw the message of an error."""
    return f'<div class="alert" role="alert">{escape(str(error) or type(error).__name__)}</div>'


def draw_turns(turns: list[dict]) -> str:
    """Draw the turns of a conversation so far."""
    drawn = "".join(
        f'<div class="turn {"user" if turn["role"] == "user" else "other"}"><b>{escape(turn["role"])}</b>'
        f"{escape(turn['content'])}</div>"
        for turn in turns
    )
    return f'<div class="turns">{drawn}</div>' if turns else ""


def draw_head(about: str) -> str:
    """Draw the head of the page, with a sentence about the runs and their backbone."""
    return f'<div class="compare-head"><h1>Compare policies</h1><p>{escape(about)}</p></div>'


def _card(card: Card, asked: str, layer: str, largest: float, best: float | None) -> str:
    shown, name = card.shown, escape(card.policy.name)
    title = f'<h2 title="{escape(card.policy.folder or "the model without an adapter")}">{name}</h2>'
    prompt = f'<span class="asked">{escape(asked)}</span>'
    if not isinstance(shown, Completion):
        text = f'<span class="plain">{escape(shown)}</span><span class="caret"></span>' if shown is not None else ""
        return f'<article class="card"><header>{title}</header><div class="text">{prompt}{text}</div></article>'
    score, won = "", ""
    if shown.score is not None:
        won = " best" if best is not None and shown.score == best else ""
        score = f'<span class="score"><small>{"highest " if won else ""}score</small>{shown.score:+.2f}</span>'
    figures = shown.layers.get(layer)
    words = "".join(
        _token(shown, i, None if figures is None else figures[i], largest) for i in range(len(shown.pieces))
    )
    return (
        f'<article class="card{won}"><header>{title}{score}</header><div class="text">{prompt}{words}</div>'
        f'<div class="chips">{_chips(card.policy, shown, layer)}</div>{_numbers(card.policy, shown)}</article>'
    )


def _token(shown: Completion, i: int, figure: float | None, largest: float) -> str:
    """Draw a token with its figure beneath; all its figures are in its title."""
    piece = shown.pieces[i]
    apart = " apart" if piece[:1].isspace() else ""
    word = escape(piece.strip(" ")).replace("\n", '<span class="mark">↵</span>') or '<span class="mark">·</span>'
    if shown.ended and i == len(shown.pieces) - 1:
        word = '<span class="mark">end</span>'
    title = "; ".join(f"{name} {values[i]:+.3f}" for name, values in shown.layers.items())
    if figure is None:
        return f'<span class="token{apart}" title="{escape(title)}"><span class="word">{word}</span></span>'
    fill = colour(figure, largest)
    return (
        f'<span class="token{apart}" title="{escape(title)}" style="background:{fill}"><span class="word">{word}</span>'
        f'<span class="figure">{figure:+.2f}</span></span>'
    )


def colour(figure: float, largest: float) -> str:
    """Return the colour of a figure: teal above 0, orange below, and the stronger the nearer to the `largest` of all."""
    strength = 0.75 * min(abs(figure) / largest, 1) if largest else 0.0
    return f"rgb({'13 148 136' if figure >= 0 else '234 88 12'} / {strength:.2f})"


def _chips(policy: Policy, shown: Completion, layer: str) -> str:
    chips = [(f"{name} {'none' if value is None else f'{value:+.2f}'}", "") for name, value in shown.rewards.items()]
    chips.append((f"KL {sum(shown.layers[KL]):.1f} nats", ""))
    count = len(shown.pieces)
    chips.append((f"{count} token{'' if count == 1 else 's'}", ""))
    if not shown.ended:
        penalty = policy.options["missing_eos_penalty"] if policy.options else None
        chips.append((f"cut off{f', penalty {penalty:g}' if penalty and shown.score is not None else ''}", " warn"))
    if REWARD in shown.layers and policy.options and policy.options.source is None:
        chips.append(("PPO's default options", " warn"))
    if layer != WORDS and layer not in shown.layers:
        chips.append((f"no {layer}: {_lacks(policy, layer)}", " warn"))
    return "".join(f'<span class="chip{kind}">{escape(text)}</span>' for text, kind in chips)


def _lacks(policy: Policy, layer: str) -> str:
    """Say why a completion has not a figure."""
    if layer in (VALUE, ADVANTAGE) and not policy.value:
        return "there is no value adapter"
    if layer == ADVANTAGE and policy.options and policy.options["whiten_rewards"]:
        return "whiten_rewards needs a whole rollout"
    return "there is no score"


def _numbers(policy: Policy, shown: Completion) -> str:
    """Draw the table of all figures of all tokens, each column with its own scale, and say how they were made."""
    largest = {name: max(map(abs, values), default=0.0) for name, values in shown.layers.items()}
    head = "".join(f"<th>{escape(name)}</th>" for name in shown.layers)
    rows = "".join(
        f"<tr><td>{escape(piece.strip() or repr(piece)[1:-1])}</td>"
        + "".join(
            f'<td style="background:{colour(values[i], largest[name])}">{values[i]:+.3f}</td>'
            for name, values in shown.layers.items()
        )
        + "</tr>"
        for i, piece in enumerate(shown.pieces)
    )
    return (
        f'<details><summary>All numbers, and how they were made</summary><p class="made">'
        f'{escape(made_with(policy, shown))}</p><div class="numbers"><table><thead><tr><th>token</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def made_with(policy: Policy, shown: Completion) -> str:
    """Say which adapters and options made the figures of a card."""
    options = policy.options
    assert options is not None
    parts = [f"KL to {policy.reference or 'the bare backbone'}"]
    if VALUE in shown.layers:
        parts.append(f"value of {policy.value}")
    if REWARD in shown.layers:
        where = (
            f"from {options.source}" if options.source else "PPO's defaults; --config RECIPE takes those of a recipe"
        )
        last = ", that of the last update" if options.last_beta is not None else ""
        parts.append(f"beta {options.beta:.3g}{last}; gamma {options['gamma']:g}, lambda {options['lam']:g} ({where})")
    return "; ".join(parts) + "."


def _legend(layer: str, largest: float) -> str:
    meaning = next((words for name, words in MEANINGS.items() if layer.startswith(name)), None)
    if meaning is None:
        return ""
    scale = f'{-largest:+.2f}<span class="bar"></span>{largest:+.2f}' if largest else "0 everywhere"
    return (
        f'<div class="legend"><span class="scale">{scale}</span>'
        f'<span class="why"><b>{escape(layer)}</b>. {escape(meaning)}</span></div>'
    )
