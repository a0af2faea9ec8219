"""`reward_models.judges`: pairs are judged in both orders; an LLM on a real server of this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from reward_models.judges import get_llm, prefer, read_verdict


PROMPTS, OURS, THEIRS = ["p", "q", "r"], ["long", "a", "same"], ["to", "abc", "same"]


def longer(prompts: list, first: list, second: list, **columns) -> list[float]:
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def test_a_fair_judge_says_the_same_in_both_orders():
    wins, consistent, undecided = prefer(longer, PROMPTS, OURS, THEIRS, {})
    assert wins.tolist() == [1.0, 0.0, 0.5] and consistent.tolist() == [True] * 3 and undecided == 0


def test_a_judge_that_likes_the_first_place_makes_ties():
    wins, consistent, _ = prefer(lambda prompts, first, second: [1] * len(prompts), PROMPTS, OURS, THEIRS, {})
    assert wins.tolist() == [0.5] * 3 and consistent.tolist() == [False] * 3


def test_what_a_judge_does_not_say_is_a_tie_and_counted():
    answers = iter([[1.0, None, 0.8], [None, None, 0.4]])
    wins, consistent, undecided = prefer(lambda **given: next(answers), PROMPTS, OURS, THEIRS, {})
    # (1 + 1 - 0.5) / 2; (0.5 + 1 - 0.5) / 2; (0.8 + 1 - 0.4) / 2
    assert wins.tolist() == pytest.approx([0.75, 0.5, 0.7]) and undecided == 3
    assert consistent.tolist() == [False, True, True]


def test_a_judge_reads_the_columns_and_cannot_change_the_lists():
    def judge(prompts, first, second, truth):
        found = [float(a == t) for a, t in zip(first, truth, strict=True)]
        first.clear()
        return found

    wins = prefer(judge, PROMPTS, OURS, THEIRS, {"truth": ["long", "abc", "x"]}).wins
    assert wins.tolist() == [1.0, 0.0, 0.5] and OURS == ["long", "a", "same"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 0.0], r"judge 'judge' must return one number for each of 3 pairs, not \[1.0, 0.0\]"),
        (None, "must return one number for each of 3 pairs, not None"),
        ({"p": 1, "q": 1, "r": 1}, "must return one number for each of 3 pairs"),
        ([1.0, 0.0, 2.0], "returned 2.0 for the pair of 'r'. Return a number from 0"),
        ([1.0, "A", 0.0], "returned 'A' for the pair of 'q'"),
        ([1.0, float("nan"), 0.0], "returned nan for the pair of 'q'"),
    ],
)
def test_a_judge_that_returns_something_else(returned, message):
    def judge(**given):
        return returned

    with pytest.raises(ValueError, match=message):
        prefer(judge, PROMPTS, OURS, THEIRS, {})


def test_numpy_is_welcome():
    assert prefer(lambda prompts, **given: np.ones(3), PROMPTS, OURS, THEIRS, {}).wins.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", 1.0),
        ("B.", 0.0),
        ("**tie**", 0.5),
        ("Answer A is good, but B is better.\n\nB", 0.0),
        ("B? No: A", 1.0),
        ("a good answer", None),
        ("Both", None),
        ("", None),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.fixture
def chat_server():
    """A chat model that prefers the longer answer, and keeps what it was asked."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            question = body["messages"][0]["content"]
            first, second = question.split("[Answer A]\n")[1].split("\n\nReply")[0].split("\n\n[Answer B]\n")
            word = "tie" if len(first) == len(second) else "AB"[len(first) < len(second)]
            answer = {"choices": [{"message": {"role": "assistant", "content": f"I prefer {word}."}}]}
            text = json.dumps(answer if body["model"] == "judge" else {"error": "no such model"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", seen
    server.shutdown()
    server.server_close()


def test_an_llm_judges_texts_and_conversations(chat_server):
    url, seen = chat_server
    judge = get_llm(url, "judge")
    assert prefer(judge, PROMPTS, OURS, THEIRS, {}).wins.tolist() == [1.0, 0.0, 0.5]
    prompts = [[{"role": "user", "content": "Hi {first}"}]]
    ours, theirs = [[{"role": "assistant", "content": "Good day"}]], [[{"role": "assistant", "content": "Hi"}]]
    assert prefer(judge, prompts, ours, theirs, {}).wins.tolist() == [1.0]
    asked = seen[-1]["messages"][0]["content"]
    assert "[Prompt]\nuser: Hi {first}\n" in asked and "[Answer B]\nGood day\n" in asked
    assert seen[-1]["temperature"] == 0


def test_an_llm_that_is_not_there(chat_server):
    url, _ = chat_server
    with pytest.raises(
        ValueError, match=r"the answer is not a chat completion \(KeyError\('choices'\)\).*no such model"
    ):
        get_llm(url, "another")
    with pytest.raises(ValueError, match=r"question has no place \{second\}"):
        get_llm(url, "judge", question="{prompt} {first}?")
