"""`pipeline.pages.label_view`: what models and people write is text, and every outcome has words."""

from html.parser import HTMLParser

import pytest

from pipeline.pages.label_answers import AnswerFile
from pipeline.pages.label_desk import Desk, Progress, Task
from pipeline.pages.label_pairs import Pair, Pool
from pipeline.pages.label_view import answer, progress_html, screen, task_html, undo


HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp; ${alert(1)} {{value}} `x` </div>"


class Reader(HTMLParser):
    """Collects the tags and the text that a browser would see."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "content", [HOSTILE, [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": HOSTILE}]]
)
def test_hostile_text_is_shown_as_it_is(content):
    prompt, sides = content, (content, HOSTILE + "!") if isinstance(content, str) else (content, content[1:])
    html = task_html(Task(Pair(prompt, sides, ("a", "b")), 1, False))
    read = Reader(html)
    assert read.tags <= {"section", "div", "h2", "kbd", "span"}
    assert read.text.count(HOSTILE) == (3 if isinstance(content, str) else 7)
    assert not {"${", "{{", "`"} & {html[at : at + size] for at in range(len(html)) for size in (1, 2)}


def test_hostile_names_are_escaped():
    read = Reader(progress_html(Progress(3, 1, 1, 0, 1, 0, None), HOSTILE))
    assert read.tags <= {"div", "span", "b"} and HOSTILE in read.text


def test_the_figures():
    read = Reader(progress_html(Progress(40, 12, 7, 2, 3, 5, (0.6, 0.8, 0.613)), "Ana")).text
    for words in (
        "12 of 40 pairs",
        "7 by you, Ana, 2 skipped",
        "3 annotators",
        "80% agreement on 5 shared pairs, kappa 0.61",
    ):
        assert words in read
    assert "annotators" not in Reader(progress_html(Progress(40, 1, 1, 0, 1, 0, None), "Ana")).text


@pytest.fixture
def desk(tmp_path) -> Desk:
    pairs = [Pair("The film", (f" is good {number}", f" is bad {number}"), ("ppo", "sft")) for number in range(2)]
    return Desk(AnswerFile(tmp_path / "answers.jsonl"), Pool(pairs), seed=0, overlap=0, total=2)


def test_a_whole_visit(desk):
    first = screen(desk, "Ana")
    assert first.ticket and "The film" in first.body and " is good 0" in first.body
    second = answer(desk, "Ana", first.ticket, "2", "certain")
    assert second.said == "Saved: the second is better." and " is good 1" in second.body
    again = answer(desk, "Ana", first.ticket, "1", None)
    assert again.said.startswith("You had answered this pair already") and again.ticket == second.ticket
    other = screen(desk, "Ben")
    assert not other.ticket and "1 pair is open in the windows of others" in other.body
    done = answer(desk, "Ana", second.ticket, "skip", None)
    assert not done.ticket and "All pairs are labelled" in done.body and done.said == "Saved: skipped."
    back = undo(desk, "Ana")
    assert back.ticket == second.ticket and back.said.startswith("Taken back")
    undo(desk, "Ana")
    assert undo(desk, "Ana").said == "There is nothing to undo."


def test_a_ticket_of_another_page_is_told(desk):
    found = answer(desk, "Ana", "", "1", None)
    assert found.said.startswith("The page was started again") and found.ticket


def test_the_end_of_the_sampling_is_told(tmp_path):
    pool = Pool()
    pool.close(FloatingPointError("The policy gives logits that are not finite"))
    desk = Desk(AnswerFile(tmp_path / "answers.jsonl"), pool, seed=0, overlap=0, total=5)
    found = screen(desk, "Ana")
    assert "No more pairs can be sampled" in found.body and "not finite" in found.body and not found.ticket
