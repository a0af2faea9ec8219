"""Ask a server for rewards: one of OpenRLHF's kind, or one that answers as OpenAI's API does (vLLM, SGLang, your own)."""

import json
import os
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from transformers import AutoTokenizer


STYLES = ("openrlhf", "openai")
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # states of a server that may pass


class _NoRedirects(HTTPRedirectHandler):
    """Refuse redirects: they would turn a POST into a GET."""

    def redirect_request(self, *args):
        return None


def get_remote(
    url: str,
    *,
    style: str = "openrlhf",
    model: str | None = None,
    tokenizer: str | None = None,
    batch_size: int = 64,
    timeout: float = 60.0,
    tries: int = 5,
    key_variable: str | None = None,
) -> Callable:
    """Make a reward function that asks a server, and ask it once to see that it answers.

    | style | what is sent | what is read |
    |---|---|---|
    | openrlhf | `{"query": texts, "prompts": prompts, "labels": []}` | `{"rewards": numbers}` |
    | openai | `{"model": model, "input": texts}` | `{"data": [{"index": 0, "score": number}, ...]}` |

    A text is the prompt and the completion. Under openai the number may also be a list of one, under `score`, `data` or
    `embedding`, as vLLM's /pooling and SGLang's reward models give it.

    Args:
        url: the whole address, such as http://localhost:5000/get_reward.
        style: the bodies of request and answer, of the table above.
        model: name of the model, for openai.
        tokenizer: hub id or folder of the tokenizer whose chat template writes conversations as texts.
        batch_size: texts a request.
        timeout: seconds to wait for an answer.
        tries: how often a request is sent, with growing pauses, until the server answers.
        key_variable: environment variable with a key, which is sent as `Authorization: Bearer <key>`.

    Raises:
        ValueError: an option is wrong; or the server refuses a request or answers in another form.
        ConnectionError: the server does not answer.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is not one of {', '.join(STYLES)}.")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"url={url!r} must begin with http:// or https://.")
    if batch_size < 1 or tries < 1 or timeout <= 0:
        raise ValueError(f"batch_size={batch_size}, tries={tries} and timeout={timeout} must be above 0.")
    headers = {"Content-Type": "application/json", **authorization(key_variable)}
    writer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False) if tokenizer else None

    def ask(prompts: list[str], completions: list[str]) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        body: dict[str, Any] = {"query": texts, "prompts": prompts, "labels": []}
        if style == "openai":
            body = {"input": texts} | ({"model": model} if model else {})
        answer = post(url, body, headers, timeout, tries)
        return read_rewards(answer, style, len(texts), url)

    def remote(prompts: list, completions: list, **kwargs) -> list[float]:
        pairs = [
            _as_texts(prompt, completion, writer) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rewards: list[float] = []
        for start in range(0, len(pairs), batch_size):
            rewards += ask(*map(list, zip(*pairs[start : start + batch_size], strict=True)))
        return rewards

    ask(["Hello,"], [" world!"])
    return remote


def authorization(key_variable: str | None) -> dict[str, str]:
    """Return the header that sends the key in an environment variable, or none.

    Raises:
        ValueError: there is no such environment variable.
    """
    if key_variable is None:
        return {}
    if not os.environ.get(key_variable):
        raise ValueError(f"key_variable={key_variable!r}: there is no such environment variable. Set it to the key.")
    return {"Authorization": f"Bearer {os.environ[key_variable]}"}


def _as_texts(prompt: str | list, completion: str | list, writer: Any) -> tuple[str, str]:
    """Return prompt and completion as texts; a conversation is written with the tokenizer's chat template."""
    if isinstance(completion, str):
        assert isinstance(prompt, str)
        return prompt, completion
    if writer is None or writer.chat_template is None:
        raise ValueError("conversations are sent as texts. Set tokenizer to one that has a chat template.")
    assert isinstance(prompt, list)
    opening = writer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = writer.apply_chat_template(prompt + completion, tokenize=False)
    # A template may write the turn before another way once a reply follows it.
    return (opening, whole[len(opening) :]) if whole.startswith(opening) else ("", whole)


def post(url: str, body: dict, headers: dict[str, str], timeout: float, tries: int) -> Any:
    """Send a request until the server answers, and return the JSON of its answer."""
    request, opener = Request(url, json.dumps(body).encode(), headers), build_opener(_NoRedirects)  # noqa: S310
    for number in range(1, tries + 1):
        try:
            with opener.open(request, timeout=timeout) as response:
                text = response.read()
            break
        except HTTPError as error:
            if error.code not in AGAIN:
                said = error.read(200).decode(errors="replace")
                raise ValueError(
                    f"{url}: the server refuses the request ({error.code} {error.reason}: {said!r}). Correct url or style."
                ) from error
            problem: Exception = error
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = error
        if number == tries:
            raise ConnectionError(
                f"{url}: no answer after {tries} tries ({problem}). Start the server, correct url, or raise timeout."
            ) from problem
        pause = min(2 ** (number - 1), 20)
        print(f"{url}: try {number} of {tries} failed ({problem}). The next is in {pause} s.", flush=True)
        time.sleep(pause)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{url}: the answer is not JSON: {text[:200]!r}. Name the address that gives rewards."
        ) from error


def read_rewards(answer: Any, style: str, count: int, url: str) -> list[float]:
    """Return the rewards in a server's answer, in the order of the texts.

    Raises:
        ValueError: the answer has another form, or not `count` numbers.
    """
    try:
        if style == "openrlhf":
            entries = answer["rewards"]
        else:
            ordered = sorted(answer["data"], key=lambda entry: entry["index"])
            if [entry["index"] for entry in ordered] != list(range(count)):
                raise ValueError("each text needs one entry of `data`")
            fields = ("score", "data", "embedding")
            entries = [next(entry[field] for field in fields if field in entry) for entry in ordered]
        rewards = [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in entries]
        if len(rewards) != count or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in rewards):
            raise ValueError(f"{count} numbers are wanted")
    except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
        raise ValueError(
            f"{url}: the answer is not of style {style!r} ({error!r}): {str(answer)[:200]}. Set style, or correct the server."
        ) from error
    return [float(reward) for reward in rewards]
