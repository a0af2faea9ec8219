"""The page of `pipeline.label` in a real browser: keys, undo, reload, a server that is killed, two annotators, hostile text.

The server runs in a forked process, so that it can be killed as a machine would kill it.
"""

import json
import multiprocessing
import socket
import time
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from pipeline.label import LabelArguments, ModelConfig, open_desk
from pipeline.pages.label_answers import current, read_answers
from tests.pages.browser import PATIENCE, missing


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
HOSTILE = "<img src=x onerror=\"document.title='run'\"> ${document.title='run'} {{value}} <b>bold</b>"


def serve(args: LabelArguments) -> None:
    """The page, until this process is killed."""
    from pipeline.pages.label_page import serving

    with open_desk(args, ModelConfig()) as desk:
        with serving(desk, "Be **fair**.", host=args.host, port=args.port, password=args.password()):
            time.sleep(600)


class Server:
    """A page in a process of its own, on a port that stays the same when it is started again."""

    def __init__(self, folder, rows: list[dict], **options):
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.answers = folder / "out" / "answers.jsonl"
        self.answers.parent.mkdir()
        self.args = LabelArguments(str(folder / "out"), pairs=str(folder / "pairs.jsonl"), port=port, **options)
        self.process = None

    def url(self, host: str = "127.0.0.1") -> str:
        """The page's address; a browser keeps what it remembers of each host apart, as those of two people."""
        return f"http://{host}:{self.args.port}/"

    def start(self) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=serve, args=(self.args,), daemon=True)
        self.process.start()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(self.url(), timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.is_alive()
                time.sleep(0.05)
        pytest.fail("the page did not open")

    def kill(self) -> None:
        if self.process and self.process.is_alive():
            self.process.kill()
            self.process.join()

    def labels(self) -> list[str]:
        return [line["label"] for line in current(read_answers(self.answers))]


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(rows: list[dict], **options) -> Server:
        servers.append(Server(tmp_path, rows, **options))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def rows(count: int) -> list[dict]:
    return [
        {"prompt": f"The film {n}", "response_1": f" is a quiet triumph {n}.", "response_2": f" is a long yawn {n}."}
        for n in range(count)
    ]


def enter(browser, name: str) -> None:
    browser.wait(lambda: browser.find("#name textarea, #name input").is_displayed())
    browser.find("#name textarea, #name input").send_keys(name)
    browser.find("#start").click()
    browser.wait_for("First")


def ticket(browser) -> str:
    return browser.find("#ticket textarea, #ticket input").get_attribute("value")


def press(browser, key: str) -> None:
    """Press a key and wait until the page has answered it with another pair."""
    before = ticket(browser)
    browser.press(key)
    browser.wait(lambda: ticket(browser) != before)


def test_labelling_by_keyboard(browser, make_server):
    """Two pairs and a tie, undone, reloaded and done again; a letter that is written into a field presses nothing."""
    server = make_server(rows(4), overlap=1)
    browser.open(server.url())
    enter(browser, "Ana st 12")
    assert server.labels() == []
    browser.wait_for("0 of 4 pairs")
    press(browser, "1")
    press(browser, "2")
    browser.wait_for("2 of 4 pairs")
    assert server.labels() == ["1", "2"]
    browser.press("c")
    browser.wait(lambda: browser.find("#sure input:checked").is_selected())
    press(browser, "t")
    browser.wait_for("Saved: a tie.")
    press(browser, "u")
    browser.wait_for("Taken back.")
    assert server.labels() == ["1", "2"]
    lines = read_answers(server.answers)
    assert [line["label"] for line in lines] == ["1", "2", "tie", "undo"]
    assert [line["sure"] for line in lines] == [None, None, "certain", None]
    before, shown = ticket(browser), browser.find("#pair").text
    browser.open(server.url())  # the name and the pair are there again
    browser.wait_for("2 of 4 pairs")
    assert (ticket(browser), browser.find("#pair").text) == (before, shown)
    press(browser, "s")
    browser.press("1")
    browser.wait_for("All pairs are labelled")
    assert server.labels() == ["1", "2", "skip", "1"]
    browser.wait(lambda: (server.answers.parent / "preferences.jsonl").read_text().count("\n") == 3)


def test_a_server_killed_in_mid_answer_and_two_annotators(browser, make_server):
    server = make_server(rows(6), overlap=2)
    browser.open(server.url())
    enter(browser, "Ana")
    press(browser, "1")
    shown = ticket(browser)
    server.kill()
    with server.answers.open("ab") as file:  # the answer that was being written
        file.write(server.answers.read_bytes()[:50])
    browser.press("2")
    time.sleep(0.3)
    server.start()
    assert ticket(browser) == shown  # the window is as it was
    browser.open(server.url())
    browser.wait_for("1 of 6 pairs")
    assert server.labels() == ["1"]
    press(browser, "2")
    # Another person comes, and gets the pair that all are to answer, and then pairs of their own.
    browser.open(server.url("localhost"))
    enter(browser, "Ben")
    press(browser, "1")
    press(browser, "1")
    browser.wait_for("agreement on 1 shared pair, kappa")
    browser.open(server.url())
    browser.wait_for("by you, Ana")
    browser.wait_for("3 of 6 pairs")
    for _ in range(2):
        press(browser, "1")
    lines = read_answers(server.answers)
    assert [line["annotator"] for line in lines] == ["Ana"] * 2 + ["Ben"] * 2 + ["Ana"] * 2
    pairs = {name: [line["pair"] for line in lines if line["annotator"] == name] for name in ("Ana", "Ben")}
    assert pairs["Ana"][1] == pairs["Ben"][0] and set(pairs["Ana"]) & set(pairs["Ben"]) >= {pairs["Ana"][1]}


def test_hostile_text_and_a_password(browser, make_server, monkeypatch):
    monkeypatch.setenv("SPINE_LABEL_PASSWORD", "open sesame")
    turns = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": "Hi\n\n  there"}]
    server = make_server([{"prompt": turns, "response_1": HOSTILE, "response_2": f"{HOSTILE}\nשלום"}])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url()}config", timeout=5)
    browser.width(390)
    browser.open(server.url())
    browser.wait(lambda: len(browser.driver.find_elements("css selector", "input")) >= 2)
    for field, text in zip(
        browser.driver.find_elements("css selector", "input"), ("Zoë", "open sesame"), strict=False
    ):
        field.send_keys(text)
    browser.find("button").click()
    browser.wait_for("by you, Zoë")
    assert browser.find("#pair").text.count(HOSTILE) == 3
    assert browser.driver.title == "Which completion is better?"
    assert browser.driver.find_elements("css selector", "#pair img, #pair b") == []
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 390
    browser.find("#second").click()
    browser.wait_for("All pairs are labelled")
    (line,) = read_answers(server.answers)
    assert (line["annotator"], line["label"]) == ("Zoë", "2")
    browser.width(1280)
