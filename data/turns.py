"""Check the turns of conversations and of dialogues in one text, and find where the prompt ends."""

import os
import re
from typing import NamedTuple

from data.cells import cell_error


USERS = ("user", "tool", "function", "ipython")  # roles whose turns an assistant answers
DROP_PROMPT = "Delete the column 'prompt': 'chosen' and 'rejected' hold it."

# Markers that begin a turn in a text: those of HH, and those of chat templates that were already applied.
TURN = re.compile(
    r"(?:^|\n\n)(?P<hh>Human|Assistant):"
    r"|<\|im_start\|>(?P<chatml>\w+)\n"
    r"|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\n\n"
    r"|<start_of_turn>(?P<gemma>\w+)\n"
    r"|<\|(?P<zephyr>user|assistant|system)\|>\n"
)
ASSISTANTS = ("Assistant", "assistant", "model")


class Parts(NamedTuple):
    """A pair with its prompt split from both sides: three texts, or three lists of messages."""

    prompt: str | list
    chosen: str | list
    rejected: str | list


def check_answered(where: str, field: str, turns: list[dict]) -> None:
    """Raise a CellError for a conversation that does not end in an assistant turn."""
    if turns[-1]["role"] != "assistant":
        raise cell_error(where, field, turns[-1], "must end in an assistant turn, which the model learns from")


def check_answerable(where: str, field: str, turns: list[dict]) -> None:
    """Raise a CellError for a prompt whose last turn can be neither answered nor continued."""
    if turns[-1]["role"] not in (*USERS, "assistant"):
        problem = "must end in a turn that can be answered, or in an assistant turn, which is continued"
        raise cell_error(where, field, turns[-1], problem)


def begins_with(prompt: str, side: str) -> bool:
    """Tell whether a text begins with the prompt and continues after it."""
    prompt = prompt.rstrip()
    return bool(prompt) and side.startswith(prompt) and bool(side[len(prompt) :].strip())


def split_pair(where: str, row: dict, *, doubled: bool = False) -> Parts:
    """Split the prompt of a pair from its two completions.

    The prompt is the column of that name, or the common beginning of `chosen` and `rejected`: whole messages, or the turns
    of a dialogue up to the marker of the last answer, or whole words. If the sides repeat the prompt of a column `prompt`,
    it is removed from them. If texts without turns begin with different words, the prompt is empty.

    Args:
        where: the row's name.
        row: the cells `chosen` and `rejected`, and `prompt` if there is one.
        doubled: True if the texts of both sides begin with the prompt.

    Raises:
        CellError: the sides answer different prompts; a side has no answer; or `prompt` does not fit the sides.
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
            raise cell_error(where, "prompt", prompt, "must be a user turn of 'chosen' and 'rejected'", DROP_PROMPT)
        return parts
    if not whole:
        check_answerable(where, "prompt", prompt)
        if prompt[-1]["role"] == "assistant":
            raise cell_error(where, "prompt", prompt[-1], "must end in a turn that 'chosen' and 'rejected' answer")
        return Parts(prompt, chosen, rejected)
    size = len(prompt)
    if not (chosen[:size] == rejected[:size] == prompt):
        raise cell_error(where, "prompt", prompt, "must be the beginning of 'chosen' and 'rejected'", DROP_PROMPT)
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
    """Raise a CellError if both sides repeat a prompt: they begin with a turn, or with the words of `prompt`."""
    opened = [TURN.match(side.lstrip("\n ") if side[:1] != "\n" else side) for side in (chosen, rejected)]
    if all(turn and _speaker(turn) not in ASSISTANTS for turn in opened):
        raise cell_error(where, "prompt", prompt, "must not be given when both sides hold the prompt", DROP_PROMPT)
    if len(prompt.split()) > 1 and begins_with(prompt, chosen) and begins_with(prompt, rejected):
        problem = "must not be repeated at the beginning of both sides (other rows do not repeat it)"
        raise cell_error(where, "prompt", prompt, problem, "Remove it from both sides.")


def _split_turns(where: str, chosen: list[dict], rejected: list[dict]) -> Parts:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    prompt, sides = chosen[:common], {"chosen": chosen[common:], "rejected": rejected[common:]}
    for field, side in sides.items():
        if not side:
            raise cell_error(where, field, chosen[-1], "must have an answer after the turns that both sides share")
    first = [side[0]["role"] for side in sides.values()]
    if not prompt or prompt[-1]["role"] not in USERS or first != ["assistant", "assistant"]:
        problem = (
            "must answer the same prompt as 'chosen' (the same turns before the answer, with a user turn as the last)"
        )
        raise cell_error(where, "rejected", rejected, problem)
    for field, side in sides.items():
        if any(turn["role"] in ("user", "system") for turn in side):
            raise cell_error(where, field, side, "must hold no user or system turn after the prompt")
    return Parts(prompt, *sides.values())


def _split_texts(where: str, chosen: str, rejected: str) -> Parts:
    common = len(os.path.commonprefix([chosen, rejected]))
    turns = [(turn, side) for side in (chosen, rejected) for turn in TURN.finditer(side)]
    if any(_speaker(turn) in ASSISTANTS for turn, _ in turns):
        shared = [turn for turn in TURN.finditer(chosen) if turn.end() <= common]
        end = shared[-1].end() if shared else 0
        answers = bool(shared) and _speaker(shared[-1]) in ASSISTANTS
        if not answers or any(turn.end() > end for turn, _ in turns):
            problem = "must answer the same prompt as 'chosen' (the same dialogue up to the last answer)"
            raise cell_error(where, "rejected", rejected[max(0, common - 20) :], problem)
    else:
        # The prompt ends before white space: no word is cut, and completions begin with it, as the model writes them.
        ends = [at for at in range(1, common + 1) if chosen[at : at + 1].isspace() and rejected[at : at + 1].isspace()]
        ends = [at for at in ends if chosen[at:].strip() and rejected[at:].strip()]
        end = ends[-1] if ends and chosen[: ends[-1]].strip() else 0
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if not side[end:].strip():
            raise cell_error(where, field, side[end:], "must not be empty after the common prompt")
    return Parts(chosen[:end], chosen[end:], rejected[end:])
