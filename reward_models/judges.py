"""Compare two completions of a prompt: a judge reads both and prefers one.

A pairwise judge is a function `judge(prompts, first, second, **columns)`, with one entry a row in each list. It returns for
each row how sure it is that the first is better: 1 the first, 0.5 a tie, 0 the second, None if it cannot say. Judges, and
LLMs above all, prefer the place of a completion too (Zheng et al. 2023, arXiv 2306.05685). So each pair is judged twice, with
the places exchanged.
"""

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from transformers.utils.logging import tqdm

from reward_models.remote import authorization, post


QUESTION = """Two answers to the same prompt follow. Say which one is better: more helpful, true, harmless and well written.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one word: A, B or tie."""
VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Preferences(NamedTuple):
    """The verdict of a pairwise judge on `ours` against `theirs`, one entry a prompt."""

    wins: np.ndarray  # (prompts,) in 0..1, the mean of both orders; 0.5 is a tie
    consistent: np.ndarray  # (prompts,) bool, whether the judge prefers the same completion in both orders
    undecided: int  # answers that the judge did not give, of 2 a prompt; they count as ties


def prefer(judge: Callable, prompts: list, ours: list, theirs: list, columns: dict[str, list]) -> Preferences:
    """Judge each pair in both orders.

    Raises:
        ValueError: the judge returns something else than one number in 0..1, or None, for each row.
    """
    orders = [_judged(judge, prompts, first, second, columns) for first, second in ((ours, theirs), (theirs, ours))]
    undecided = int(sum(np.isnan(order).sum() for order in orders))
    forward, backward = (np.nan_to_num(order, nan=0.5) for order in orders)
    consistent = np.sign(forward - 0.5) == np.sign(0.5 - backward)
    return Preferences((forward + 1 - backward) / 2, consistent, undecided)


def _judged(judge: Callable, prompts: list, first: list, second: list, columns: dict[str, list]) -> np.ndarray:
    name = getattr(judge, "__name__", type(judge).__name__)
    found = judge(prompts=list(prompts), first=list(first), second=list(second), **columns)
    if not isinstance(found, (list, tuple, np.ndarray)) or len(found) != len(prompts):
        raise ValueError(
            f"pairwise judge {name!r} must return one number for each of {len(prompts)} pairs, not {str(found)[:100]}."
        )
    values = []
    for row, value in enumerate(found):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if value is not None and not 0 <= number <= 1:
            raise ValueError(
                f"pairwise judge {name!r} returned {value!r} for the pair of {prompts[row]!r}. Return a number from 0 (the "
                f"second is better) to 1 (the first is better), or None."
            )
        values.append(number)
    return np.array(values, dtype=float)


def get_llm(
    url: str,
    model: str,
    *,
    question: str = QUESTION,
    key_variable: str | None = None,
    timeout: float = 60.0,
    tries: int = 5,
    threads: int = 8,
) -> Callable:
    """Make a pairwise judge of a chat model on a server with OpenAI's API, and ask it once.

    Args:
        url: the address of its chat completions, such as http://localhost:8000/v1/chat/completions.
        model: name of the model.
        question: the question, with the places {prompt}, {first} and {second}. The last A, B or tie of the reply counts.
        key_variable: environment variable with a key, which is sent as `Authorization: Bearer <key>`.
        timeout, tries: as for `reward_models.remote.get_remote`.
        threads: questions that are asked at once.

    Raises:
        ValueError: an option is wrong; or the server refuses a request or answers in another form.
        ConnectionError: the server does not answer.
    """
    for place in ("{prompt}", "{first}", "{second}"):
        if place not in question:
            raise ValueError(f"question has no place {place}. Write it where the judge shall read it.")
    headers = {"Content-Type": "application/json", **authorization(key_variable)}

    def ask(prompt: str, first: str, second: str) -> float | None:
        places = {"prompt": prompt, "first": first, "second": second}
        text = re.sub(r"\{(prompt|first|second)\}", lambda found: places[found[1]], question)
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = post(url, body, headers, timeout, tries)
        try:
            return read_verdict(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{url}: the answer is not a chat completion ({error!r}): {str(answer)[:200]}. Name the address of the "
                f"server's chat completions."
            ) from error

    def llm(prompts: list, first: list, second: list, **kwargs) -> list[float | None]:
        rows = zip(*(map(_as_text, texts) for texts in (prompts, first, second)), strict=True)
        with ThreadPoolExecutor(threads) as pool:
            answers = pool.map(lambda row: ask(*row), rows)
            with tqdm(answers, total=len(prompts), desc="answers of the judge", unit="pair") as progress:
                return list(progress)

    ask("Say hello.", "Hello!", "Hello, world!")
    return llm


def read_verdict(reply: str) -> float | None:
    """Return 1 for A, 0 for B, 0.5 for a tie: the last of these words in a reply; None if there is none."""
    words = re.findall(r"\b(A|B|[Tt]ie|TIE)\b", reply)
    return VERDICTS[words[-1].lower()] if words else None


def _as_text(text: str | list[dict]) -> str:
    """Return a conversation as lines `role: content`, a reply as its content, and a text as it is."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return text[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)
