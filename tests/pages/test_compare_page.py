"""`pipeline.compare` in a browser: two policies on one prompt, a heat map under the words, a conversation, and errors."""

import json
import re
import shutil
import socket
import threading
import urllib.request

import pytest
from transformers import AutoTokenizer

from pipeline import compare
from pipeline.pages.compare_models import KL
from pipeline.pages.compare_tokens import Tokens
from tests.pages.compare_run import OPTIONS, make_run


ENTER = "\ue007"  # as selenium calls it
# gradio counts its events with an option of pandas that pandas calls old.
pytestmark = pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated")
CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, tiny, sft_adapter, reward_adapter):
    """A run whose tokenizer has a chat template, beside a copy of the model."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(tiny, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    run = make_run(folder / "demo", sft_adapter, reward_adapter)
    metrics = {"options": OPTIONS | {"max_completion_length": 40}}
    (run / "ppo" / "metrics.json").write_text(json.dumps(metrics))
    return run, folder / "model"


@pytest.fixture(scope="module")
def address(chat_run):
    """The page of the command, served until the tests of this file are done."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'spine-rlhf[pages]'")
    from pipeline.pages import compare as page

    run, model = chat_run
    served, built, original, build = [], [], page.launch, page.build

    def launch(blocks, **options):
        served.append((blocks, original(blocks, **options, wait=False)))

    def keep(comparison, *args, **options):
        built.append(comparison)
        return build(comparison, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "launch", launch)
        patch.setattr(page, "build", keep)
        compare.main([str(run), "--model_name_or_path", str(model), "--port", str(free_port())])
    ((blocks, found),) = served
    yield found
    blocks.close()
    vars(built[0]).clear()  # gradio keeps the page, and other tests count the backbones in memory


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def choose(browser, group: str, *labels: str) -> None:
    """Click on the choices with these labels."""
    for label in labels:
        browser.wait(
            lambda label=label: next((x for x in browser.find_all(f"#{group} label") if x.text == label), None), label
        ).click()


def ask(browser, text: str) -> None:
    field = browser.there("#prompt textarea")
    field.clear()
    field.send_keys(text)
    browser.there("#sample").click()


def scored(browser, count: int) -> list:
    """Wait until this many cards are done, and return them."""
    browser.wait(
        lambda: len(browser.find_all("#cards .card .made")) == count and not browser.find_all(".caret"), "cards"
    )
    return browser.find_all("#cards .card")


@pytest.mark.slow
def test_two_policies_side_by_side(browser, address):
    browser.width(1280)
    browser.open(address)
    browser.wait_for("4 policies on one backbone, model.", ".compare-head")
    ask(browser, "The film")
    left, right = scored(browser, 2)
    assert [card.find_element("css selector", "h2").text for card in (left, right)] == ["sft", "ppo"]
    assert abs(left.location["y"] - right.location["y"]) < 2 < right.location["x"] - left.location["x"]  # side by side
    for card in (left, right):
        assert "The film" in card.text and re.search(r"score\s*[+-]\d\.\d\d", card.text)
        assert len(card.find_elements("css selector", ".figure")) == len(card.find_elements("css selector", ".token"))
    assert "The reward model's score of the text up to and with the token" in browser.there(".legend").text
    choose(browser, "layer", KL)
    browser.wait_for("How much likelier this policy finds the token", ".legend")
    figures = browser.wait(lambda: browser.find_all(".card:first-child .figure"), "figures")
    assert {figure.text for figure in figures} <= {"+0.00", "-0.00"}  # SFT is its own reference
    choose(browser, "layer", "words only")
    browser.wait(lambda: not browser.find_all(".figure"), "no figures")
    first = browser.there(".card:last-child .text").text
    browser.there("#again").click()
    browser.wait(lambda: browser.there(".card:last-child .text").text != first, "another text")
    scored(browser, 2)
    browser.there("#sampling button").click()
    browser.wait(lambda: browser.there("#seed input").get_attribute("value") == "1", "the next seed")
    choose(browser, "policies", "ppo/checkpoint-4", "bare backbone")
    browser.there("#prompt textarea").send_keys(ENTER)
    assert len(scored(browser, 4)) == 4
    browser.width(390)
    cards = browser.find_all("#cards .card")
    browser.wait(lambda: len({card.location["x"] for card in cards}) == 1, "one column")
    assert browser.overflow <= 0


@pytest.mark.slow
def test_a_conversation_goes_on_with_one_answer(browser, address):
    browser.width(1280)
    browser.open(address)
    choose(browser, "mode", "conversation")
    ask(browser, "Is it good? <b id=bad>${7*7} {{value}}</b>")
    scored(browser, 2)
    choose(browser, "answer", "sft")
    browser.there("#take").click()
    browser.wait(lambda: len(browser.find_all("#history .turn")) == 2, "two turns")
    assert browser.there("#history .turn").text.endswith("Is it good? <b id=bad>${7*7} {{value}}</b>")
    assert not browser.find_all("#bad") and not browser.find_all("#cards .card")
    ask(browser, "Why?")
    scored(browser, 2)
    browser.there("#take").click()
    browser.wait(lambda: len(browser.find_all("#history .turn")) == 4, "four turns")
    browser.there("#new").click()
    browser.wait(lambda: not browser.find_all("#history .turn"), "no turns")


@pytest.mark.slow
def test_what_a_model_writes_is_shown_and_not_run(browser, address, monkeypatch):
    attack = "<img src=x onerror=\"document.title='run'\">${document.title='run'}{{title}}"
    monkeypatch.setattr("pipeline.pages.compare_models.pieces", lambda ids, tokenizer: [attack] * len(ids))
    browser.open(address)
    ask(browser, "The film")
    left, _ = scored(browser, 2)
    assert attack in left.find_element("css selector", ".token").text
    assert not browser.find_all("#cards img") and browser.driver.title == "Spine: compare policies"


@pytest.mark.slow
def test_a_wrong_input_is_one_message_and_the_next_one_runs(browser, address):
    browser.open(address)
    ask(browser, "")
    browser.wait_for("The prompt is empty. Write the beginning of a text, or a message.", "#cards [role=alert]")
    ask(browser, "A" * 300)
    browser.wait_for("exceeds the model's context of 128 tokens. Shorten the prompt", "#cards [role=alert]")
    ask(browser, "The film")
    scored(browser, 2)
    choose(browser, "policies", "sft", "ppo")
    browser.there("#sample").click()
    browser.wait_for("No policy is chosen. Choose one or more.", "#cards [role=alert]")


@pytest.mark.slow
def test_a_text_streams_and_can_be_stopped(browser, address, monkeypatch):
    """The model waits before each token until the test lets it go on."""
    going, original = threading.Semaphore(1), Tokens.put  # the prompt

    def slow(self, value):
        assert going.acquire(timeout=60)
        original(self, value)

    monkeypatch.setattr(Tokens, "put", slow)
    monkeypatch.setattr(
        "pipeline.backbone.sampling.end_tokens", lambda *args: [1]
    )  # the pad token, which is not drawn
    browser.open(address)
    ask(browser, "The film")
    texts = [""]

    def grown() -> bool:
        going.release()
        for field in browser.find_all(".card:first-child .plain"):
            texts.extend([field.text] if field.text != texts[-1] else [])
        return len(texts) > 3

    browser.wait(grown, "a text that grows")
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    browser.there("#stop").click()
    browser.wait(lambda: not browser.find_all(".caret"), "the end of the caret")
    going.release(1000)
    assert not browser.find_all(".made")
    monkeypatch.undo()
    ask(browser, "The film")
    scored(browser, 2)


@pytest.mark.slow
def test_the_page_is_only_here_and_sends_nothing_elsewhere(address):
    """Its text names no other server: no fonts, no telemetry, no share link."""
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", text, re.DOTALL)[1])
    assert config["analytics_enabled"] is False and not config.get("share_url")
    assert not re.findall(r"https?://fonts\.[^\"' ]+", text)
