"""Turns of conversations, and of dialogues that are one text: who speaks, what can be answered, where a prompt ends."""

import os
import re
from typing import NamedTuple

from data.cells import cell_error


USERS = ("user", "tool", "function", "ipython")  # an assistant answers their turns
DROP_PROMPT = "Drop the column 'prompt': 'chosen' and 'rejected' hold it."

# What opens a turn in a text: of HH's dialogues, and of chat templates that were applied before.
TURN = re.compile(
    r"(?:^|\n\n)(?P<hh>Human|Assistant):"
    r"|<\|im_start\|>(?P<chatml>\w+)\n"
    r"|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\n\n"
    r"|<start_of_turn>(?P<gemma>\w+)\n"
    r"|<\|(?P<zephyr>user|assistant|system)\|>\n"
)
ASSISTANTS = ("Assistant", "assistant", "model")


class Parts(NamedTuple):
    """A pair with its prompt apart: texts, or lists of messages."""

    prompt: str | list
    chosen: str | list
    rejected: str | list


def check_answered(where: str, field: str, turns: list[dict]) -> None:
    """Raise a CellError for a conversation that does not end in an assistant's turn."""
    if turns[-1]["role"] != "assistant":
        raise cell_error(where, field, turns[-1], "must end in a turn of the assistant, from which is learned")


def check_answerable(where: str, field: str, turns: list[dict]) -> None:
    """Raise a CellError for a prompt whose last turn can be neither answered nor continued."""
    if turns[-1]["role"] not in (*USERS, "assistant"):
        problem = "must end in a turn that can be answered, or in one of the assistant, which is continued"
        raise cell_error(where, field, turns[-1], problem)


def begins_with(prompt: str, side: str) -> bool:
    """Tell whether a text begins with the prompt and goes on after it."""
    prompt = prompt.rstrip()
    return bool(prompt) and side.startswith(prompt) and bool(side[len(prompt) :].strip())


def split_pair(where: str, row: dict, *, doubled: bool = False) -> Parts:
    """Take the prompt of a pair apart from its two completions.

    The prompt is the column of that name, or what `chosen` and `rejected` have in common: whole messages, or the turns
    of a dialogue up to the words that open the last answer, or else whole words. Sides that hold the prompt beside a
    column `prompt` lose it. Where texts without turns begin with different words, the prompt is empty.

    Args:
        where: the row's name.
        row: cells `chosen`, `rejected` and perhaps `prompt`.
        doubled: texts of both sides begin with the prompt.

    Raises:
        CellError: the sides answer different prompts, or one of them does not answer; or `prompt` is not theirs.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        if prompt is None:
            return _split_texts(where, chosen, rejected)
        if doubled:
            prompt = prompt.rstrip()
            return Parts(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
        _check_own_texts(where, prompt, chosen, rejected)
        return Parts(prompt, chosen, rejected)
    whole = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if prompt is None:
        return _split_turns(where, chosen, rejected)
    if isinstance(prompt, str):
        parts = _split_turns(where, chosen, rejected)
        assert isinstance(parts.prompt, list)  # of turns
        if prompt.strip() not in [turn["content"].strip() for turn in parts.prompt if turn["role"] in USERS]:
            raise cell_error(
                where, "prompt", prompt, "must be the user's turn in 'chosen' and 'rejected'", DROP_PROMPT
            )
        return parts
    if not whole:
        check_answerable(where, "prompt", prompt)
        if prompt[-1]["role"] == "assistant":
            raise cell_error(where, "prompt", prompt[-1], "must end in a turn that 'chosen' and 'rejected' answer")
        return Parts(prompt, chosen, rejected)
    size = len(prompt)
    if not (chosen[:size] == rejected[:size] == prompt):
        raise cell_error(where, "prompt", prompt, "must be how 'chosen' and 'rejected' begin", DROP_PROMPT)
    parts = _split_turns(where, chosen, rejected)
    if len(parts.prompt) != size:
        raise cell_error(
            where, "prompt", prompt, "must be all that 'chosen' and 'rejected' have in common", DROP_PROMPT
        )
    return parts


def _speaker(turn: re.Match[str]) -> str:
    assert turn.lastgroup is not None  # each alternative of `TURN` is one named group
    return turn[turn.lastgroup]


def _check_own_texts(where: str, prompt: str, chosen: str, rejected: str) -> None:
    """Raise a CellError where both sides hold a prompt beside the column: they open with a turn, or with its words."""
    opened = [TURN.match(side.lstrip("\n ") if side[:1] != "\n" else side) for side in (chosen, rejected)]
    if all(turn and _speaker(turn) not in ASSISTANTS for turn in opened):
        raise cell_error(where, "prompt", prompt, "must not stand beside sides that hold a prompt", DROP_PROMPT)
    if len(prompt.split()) > 1 and begins_with(prompt, chosen) and begins_with(prompt, rejected):
        problem = "must not begin both sides too, as it does not in other rows"
        raise cell_error(where, "prompt", prompt, problem, "Take it out of them.")


def _split_turns(where: str, chosen: list[dict], rejected: list[dict]) -> Parts:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    prompt, sides = chosen[:common], {"chosen": chosen[common:], "rejected": rejected[common:]}
    for field, side in sides.items():
        if not side:
            raise cell_error(where, field, chosen[-1], "must have an answer after what both sides have in common")
    first = [side[0]["role"] for side in sides.values()]
    if not prompt or prompt[-1]["role"] not in USERS or first != ["assistant", "assistant"]:
        problem = (
            "must answer the prompt that 'chosen' answers: all turns before the answer the same, a user's the last"
        )
        raise cell_error(where, "rejected", rejected, problem)
    for field, side in sides.items():
        if any(turn["role"] in ("user", "system") for turn in side):
            raise cell_error(where, field, side, "must hold no other turn of a user after the prompt that both answer")
    return Parts(prompt, *sides.values())


def _split_texts(where: str, chosen: str, rejected: str) -> Parts:
    common = len(os.path.commonprefix([chosen, rejected]))
    turns = [(turn, side) for side in (chosen, rejected) for turn in TURN.finditer(side)]
    if any(_speaker(turn) in ASSISTANTS for turn, _ in turns):
        shared = [turn for turn in TURN.finditer(chosen) if turn.end() <= common]
        end = shared[-1].end() if shared else 0
        answers = bool(shared) and _speaker(shared[-1]) in ASSISTANTS
        if not answers or any(turn.end() > end for turn, _ in turns):
            problem = "must answer the prompt that 'chosen' answers: the dialogue the same up to the last answer"
            raise cell_error(where, "rejected", rejected[max(0, common - 20) :], problem)
    else:
        # Before white space, so that no word is cut and the completions begin as the model writes them.
        ends = [at for at in range(1, common + 1) if chosen[at : at + 1].isspace() and rejected[at : at + 1].isspace()]
        ends = [at for at in ends if chosen[at:].strip() and rejected[at:].strip()]
        end = ends[-1] if ends and chosen[: ends[-1]].strip() else 0
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if not side[end:].strip():
            raise cell_error(where, field, side[end:], "must not be empty after the prompt that both sides begin with")
    return Parts(chosen[:end], chosen[end:], rejected[end:])
