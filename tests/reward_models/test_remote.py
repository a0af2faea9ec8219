"""`reward_models.remote`: against a real server on this machine, which answers well, late, wrongly or not at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reward_models import remote
from reward_models.functions import load_function
from reward_models.remote import get_remote, read_rewards


PROMPTS, COMPLETIONS = ["one", "two", "three"], [" a", " bb", " cccc"]
LENGTHS = [5.0, 6.0, 10.0]  # of prompt and completion


class Server:
    """A reward server whose reward is the length of a text. `faults` are answers (status, body) to give first."""

    def __init__(self, style: str = "openrlhf"):
        self.style, self.faults, self.seen, self.delay = style, [], [], 0.0

    def answer(self, body: dict) -> dict:
        if self.style == "openrlhf":
            return {"rewards": [len(text) for text in body["query"]]}
        entries = [{"index": i, "score": len(text)} for i, text in enumerate(body["input"])]
        return {"data": entries[::-1]}  # the order does not count

    def __enter__(self) -> "Server":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((body, dict(self.headers)))
                threading.Event().wait(outer.delay)
                status, answer = outer.faults.pop(0) if outer.faults else (200, outer.answer(body))
                text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Location", "http://localhost/")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/get_reward"
        threading.Thread(
            target=self.http.serve_forever, args=[0.01], daemon=True
        ).start()  # asks so often whether to end
        return self

    def __exit__(self, *args):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("style", ["openrlhf", "openai"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_rewards_in_the_order_of_the_texts(style, batch_size):
    with Server(style) as server:
        score = get_remote(server.url, style=style, batch_size=batch_size, model="my-rm")
        assert score(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[]) == LENGTHS
        bodies = [body for body, _ in server.seen[1:]]  # the first request tries the server
    texts = [text for body in bodies for text in body["query" if style == "openrlhf" else "input"]]
    assert texts == ["one a", "two bb", "three cccc"] and len(bodies) == -(-3 // batch_size)
    if style == "openrlhf":
        assert [prompt for body in bodies for prompt in body["prompts"]] == PROMPTS
    else:
        assert all(body["model"] == "my-rm" for body in bodies)


def test_a_recipe_names_it_in_one_line():
    with Server() as server:
        function = load_function(f"reward_models.remote.get_remote(url={server.url!r}, timeout=5)")
        assert function(prompts=PROMPTS, completions=COMPLETIONS) == LENGTHS


def test_a_server_that_comes_back(pauses, capsys):
    with Server() as server:
        score = get_remote(server.url)
        server.faults += [(503, "starting"), (500, "")]
        assert score(prompts=PROMPTS, completions=COMPLETIONS) == LENGTHS
    assert pauses == [1, 2]
    assert "try 1 of 5 failed (HTTP Error 503: Service Unavailable). The next is in 1 s." in capsys.readouterr().out


def test_no_server(pauses):
    with Server() as server:
        pass
    with pytest.raises(ConnectionError, match=r"get_reward: no answer after 3 tries .*refused.*Start the server"):
        get_remote(server.url, tries=3)
    assert pauses == [1, 2]


def test_a_server_that_does_not_answer_in_time(monkeypatch):
    with Server() as server:
        score = get_remote(server.url, timeout=0.2, tries=1)
        server.delay = 1.0
        with pytest.raises(ConnectionError, match=r"no answer after 1 tries .*timed out.*raise timeout"):
            score(prompts=PROMPTS, completions=COMPLETIONS)


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, "no such page", r"refuses the request \(404 Not Found: 'no such page'\)"),
        (302, "", r"refuses the request \(302 Found"),
        (200, "<html>", r"the answer is not JSON: b'<html>'"),
        (200, "[" * 5000, r"the answer is not JSON"),
        (200, {"scores": [1.0]}, r"not of style 'openrlhf' \(KeyError\('rewards'\)\)"),
        (200, {"rewards": [1.0, 2.0]}, r"1 numbers are wanted"),
        (200, {"rewards": ["good"]}, r"1 numbers are wanted"),
        (200, {"rewards": [True]}, r"1 numbers are wanted"),
        (200, {"rewards": [None]}, r"1 numbers are wanted"),
        (200, [1.0], r"not of style 'openrlhf' \(TypeError"),
    ],
)
def test_an_answer_of_another_form_is_an_error_before_training(status, answer, message, pauses):
    with Server() as server:
        server.faults.append((status, answer))
        with pytest.raises(ValueError, match=message):
            get_remote(server.url)
    assert not pauses


@pytest.mark.parametrize("field", ["score", "data", "embedding"])
def test_the_forms_of_openais_kind(field):
    entries = [{"index": 1, field: [2.5]}, {"index": 0, field: [-1.0]}]
    assert read_rewards({"data": entries}, "openai", 2, "url") == [-1.0, 2.5]
    for wrong in ([entries[0]], [*entries, entries[0]], [{"index": 0, "x": 1}, entries[0]], [{}], None, "data"):
        with pytest.raises(ValueError, match="not of style 'openai'"):
            read_rewards({"data": wrong}, "openai", 2, "url")
    with pytest.raises(ValueError, match="not of style 'openai'"):  # all hidden states, not one score
        read_rewards({"data": [{"index": 0, field: [1.0, 2.0]}]}, "openai", 1, "url")


def test_a_key_comes_from_the_environment(monkeypatch):
    with pytest.raises(ValueError, match="key_variable='REWARD_KEY': there is no such environment variable"):
        get_remote("http://localhost/", key_variable="REWARD_KEY")
    monkeypatch.setenv("REWARD_KEY", "secret")
    with Server() as server:
        get_remote(server.url, key_variable="REWARD_KEY")
        assert server.seen[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "verl"}, "style='verl' is not one of openrlhf, openai"),
        ({"url": "localhost:5000"}, "url='localhost:5000' must begin with http"),
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"batch_size": 0}, "batch_size=0, tries=5 and timeout=60.0 must be above 0"),
        ({"tries": 0}, "must be above 0"),
        ({"timeout": 0}, "must be above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_remote(**{"url": "http://localhost/"} | options)


def test_conversations_need_a_template(tokenizer, tmp_path):
    prompts = [[{"role": "user", "content": "Hi"}]]
    completions = [[{"role": "assistant", "content": "there"}]]
    with Server() as server:
        with pytest.raises(ValueError, match="conversations are sent as texts. Set tokenizer"):
            get_remote(server.url)(prompts=prompts, completions=completions)
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        tokenizer.save_pretrained(tmp_path)
        get_remote(server.url, tokenizer=str(tmp_path))(prompts=prompts, completions=completions)
        body = server.seen[-1][0]
    assert body["query"] == ["<user>Hi<assistant>there"] and body["prompts"] == ["<user>Hi<assistant>"]
