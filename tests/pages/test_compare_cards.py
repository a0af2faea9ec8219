"""`pipeline.pages.compare_cards`: what is drawn of a completion, and that no text can be more than a text."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pipeline.pages.compare_cards import WORDS, Card, colour, draw_cards, draw_error, draw_head, draw_turns, made_with
from pipeline.pages.compare_models import ADVANTAGE, KL, REWARD, VALUE, Completion
from pipeline.pages.compare_runs import DEFAULTS, Options, Policy


ATTACK = """<script>alert(1)</script><img src=x onerror=alert(1)>"'&"""
POLICY = Policy("ppo", "runs/ppo", 0, "ppo", "runs/sft", "runs/ppo/value", Options(DEFAULTS, None, 0.3))
FOUND = Completion(
    pieces=[" a", " fine", "\n", "<end>"],
    answer=" a fine\n",
    ended=True,
    layers={KL: [0.5, -1.0, 0.0, 2.0], REWARD: [-0.1, 0.2, 0.0, 1.5], VALUE: [1.0] * 4, ADVANTAGE: [0.0] * 4},
    rewards={"reward": 1.75},
    score=1.75,
)


class Parts(HTMLParser):
    """Elements, attributes and texts of HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.names, self.texts, self.open = set(), set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_what_models_and_users_write_stays_text():
    attacked = replace(
        FOUND,
        pieces=[ATTACK] * 4,
        rewards={ATTACK: 1.0},
        layers={name + ATTACK: x for name, x in FOUND.layers.items()},
    )
    attacked.layers[KL] = FOUND.layers[KL]
    policy = replace(POLICY, name=ATTACK, folder=ATTACK, reference=ATTACK, value=ATTACK)
    cards = [Card(policy, attacked), Card(policy, ATTACK), Card(policy)]
    html = [draw_cards(cards, ATTACK, KL + ATTACK), draw_error(ValueError(ATTACK)), draw_head(ATTACK)]
    html += [draw_turns([{"role": ATTACK, "content": ATTACK}])]
    for drawn in map(Parts, html):
        assert drawn.tags <= set(
            "div span article header h1 h2 p b small details summary table thead tbody tr th td".split()
        )
        assert drawn.names <= {"class", "title", "style", "role"}
        assert ATTACK in "".join(drawn.texts)
        assert not drawn.open


def test_a_heat_map_has_one_scale_over_all_cards():
    other = replace(FOUND, layers={KL: [4.0, 0.0, 0.0, -4.0]})
    html = draw_cards([Card(POLICY, FOUND), Card(POLICY, other)], "It is", KL)
    assert "-4.00" in html and "+4.00" in html  # the legend
    fills = re.findall(r'style="background:([^"]*)"><span class="word">([^<]*)', html)
    assert fills[0] == (colour(0.5, 4.0), "a") and fills[1] == (colour(-1.0, 4.0), "fine")
    assert (
        "".join(re.findall(r"<p class=\"made\">(.*?)</p>", html)).count("beta 0.3") == 1
    )  # that of the card with rewards
    assert colour(4.0, 4.0) == "rgb(13 148 136 / 0.75)" and colour(-2.0, 4.0) == "rgb(234 88 12 / 0.38)"
    assert colour(0.0, 0.0).endswith("0.00)")


def test_a_card_says_what_is_not_there():
    policy = replace(POLICY, value=None)
    cut = replace(FOUND, ended=False, layers={KL: FOUND.layers[KL]}, score=None, rewards={"rule": None})
    html = draw_cards([Card(policy, cut)], "It is", ADVANTAGE)
    for text in ("no advantage: there is no value adapter", "cut off", "rule none", "KL 1.5 nats", "4 tokens"):
        assert text in html
    assert 'class="figure"' not in html and "score</small>" not in html
    assert 'class="figure"' not in draw_cards([Card(POLICY, FOUND)], "It is", WORDS)
    whitened = replace(POLICY, options=Options(DEFAULTS | {"whiten_rewards": True}))
    assert "whiten_rewards needs a whole rollout" in draw_cards([Card(whitened, cut)], "It is", ADVANTAGE)
    penalised = replace(POLICY, options=Options(DEFAULTS | {"missing_eos_penalty": 0.5}))
    assert "cut off, penalty 0.5" in draw_cards([Card(penalised, replace(cut, score=1.0))], "It is", KL)


def test_the_highest_score_is_marked_once_all_are_done():
    better = replace(FOUND, score=2.0)
    done = [Card(POLICY, FOUND), Card(POLICY, better)]
    assert draw_cards(done, "", KL).count("highest score") == 1
    assert "highest score" not in draw_cards([*done, Card(POLICY, "so far")], "", KL)
    assert "highest score" not in draw_cards([done[0], done[0]], "", KL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            Options(DEFAULTS, None, 0.3),
            "beta 0.3, that of the last update; gamma 1, lambda 0.95 (PPO's defaults; --config",
        ),
        (Options(DEFAULTS, "ppo.yaml"), "beta 0.05; gamma 1, lambda 0.95 (from ppo.yaml)"),
    ],
)
def test_a_card_says_how_its_figures_were_made(options, words):
    made = made_with(replace(POLICY, options=options), FOUND)
    assert made.startswith("KL to runs/sft; value of runs/ppo/value; ") and words in made
    assert made_with(replace(POLICY, reference=None), replace(FOUND, layers={})) == "KL to the bare backbone."
