"""Load prompts for PPO and evaluation, check them, and turn them into tokens."""

from datasets import Dataset

from data import human_ratings
from data.cells import CellError, check_cell, check_chat_template, check_no_tools, check_rows, require_columns, shorten
from data.files import load_rows
from data.layouts import suggestion
from data.preferences import check_preferences, explicit_prompts
from data.reading import dataset_of
from data.rows import Rows, left_out
from data.tokens import TEMPLATE_ERRORS, Counts, added_tokens, check_prompt_ids, write_turns
from data.turns import check_answerable


def load_prompts(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Load checked prompts of the embedded default (`human_ratings`), or of any data that `load_rows` reads.

    With `drop`, rows that cannot be used are left out.
    """
    if name == "human_ratings":
        return human_ratings.prompts(split)
    return check_prompts(load_rows(name, split), name, drop=drop)


def check_prompts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check prompts and return the rows with all their columns.

    The other columns stay, because TRL gives them to the reward functions. If the prompt is part of `chosen` and
    `rejected`, the rows get it as a column `prompt`.

    Raises:
        ValueError: there is no column `prompt`; or in some row the prompt is empty, is neither a text nor a conversation,
            is not of the kind in the first row, or ends in a turn that cannot be answered.
    """
    if _hold_prompts(rows):
        rows = rows if isinstance(rows, Rows) else Rows.of_file(rows, name)
        checked = explicit_prompts(check_preferences(rows, name, drop=drop), name, drop=drop)
        if len(checked) < len(rows):
            kept = set(zip(checked.of.tolist(), checked.numbers.tolist(), strict=True))
            places = zip(rows.of.tolist(), rows.numbers.tolist(), strict=True)
            rows = rows.select([number for number, where in enumerate(places) if where in kept])
            rows.left_out = checked.left_out
        others = {column: rows[column][:] for column in rows.column_names if column != "prompt"}
        made = dataset_of({"prompt": checked["prompt"][:]} | others, name)
        rows = rows.as_rows(made)
    if "prompt" not in rows.column_names and (remedy := suggestion(rows, name)):
        raise ValueError(f"{name}: no column 'prompt'. {remedy}")
    require_columns(rows, ("prompt",), name)
    check_no_tools(rows, name)

    def check(where: str, row: dict, kind: str | None) -> str:
        kind = check_cell(where, "prompt", row["prompt"], kind, filled=True)
        if kind == "conversation":
            check_answerable(where, "prompt", row["prompt"])
        return kind

    return check_rows(rows, ["prompt"], name, check, drop=drop)


def _hold_prompts(rows: Dataset) -> bool:
    """Tell whether the prompts are read from `chosen` and `rejected`.

    They are if there is no column `prompt`, or if it holds texts while `chosen` and `rejected` are conversations.
    """
    if not {"chosen", "rejected"} <= set(rows.column_names):
        return False
    return "prompt" not in rows.column_names or (
        isinstance(rows[0]["prompt"], str) and isinstance(rows[0]["chosen"], list)
    )


def check_prompt_lengths(
    rows: Dataset, tokenizer, context: float, max_completion_length: int, name: str, *, drop: bool = False
) -> tuple[Dataset, Counts]:
    """Check every prompt as tokens, and check that it leaves room for a completion of `max_completion_length`.

    Returns:
        The rows (with `drop`, only those that can be used) and their counts.

    Raises:
        ValueError: prompt and completion together exceed the model's `context`; a prompt is a conversation, and the
            tokenizer has no chat template or the template refuses it; or a prompt has no tokens, or ends with the
            end-of-text token.
    """
    check_chat_template(rows.select_columns(["prompt"]), tokenizer, name)
    try:
        known = iter(tokenize_prompts(rows["prompt"][:], tokenizer))
    except TEMPLATE_ERRORS:
        known = None  # `check` below finds the row
    lengths = []

    def check(where: str, row: dict, kind: str | None) -> None:
        prompt = row["prompt"]
        if known is None and isinstance(prompt, list):
            write_turns(where, "prompt", prompt, tokenizer, ask=True)
        ids = next(known) if known is not None else tokenize_prompts([prompt], tokenizer)[0]
        check_prompt_ids(where, prompt, ids, tokenizer)
        if len(ids) + max_completion_length > context:
            message = (
                f"{where}: 'prompt' {shorten(prompt)} has {len(ids)} tokens. With "
                f"max_completion_length={max_completion_length} it exceeds the model's context of {context} tokens. "
                f"Shorten the prompt, lower max_completion_length, or use a model with a longer context."
            )
            raise CellError(message, f"'prompt' leaves no room in the model's context of {context}")
        lengths.append(len(ids))

    found = check_rows(rows, ["prompt"], name, check, drop=drop)
    bad = left_out(rows)
    return found, Counts(len(rows) + bad, len(found), 0, len(rows) - len(found) + bad, max(lengths), bad)


def tokenize_prompts(prompts: list, tokenizer) -> list[list[int]]:
    """Return the token ids of prompts, ready for completions to follow.

    A prompt is a text, or a conversation that the tokenizer's chat template writes. The end-of-text token is left out, and
    the beginning-of-text token appears once. A conversation is followed by the opening of the answer. If it ends in an
    assistant turn, that turn is left open, so that the completion continues it.
    """
    if isinstance(prompts[0], str):
        before, after = added_tokens(tokenizer)
        rows = tokenizer(prompts)["input_ids"]
        if after:
            rows = [ids[: -len(after)] for ids in rows]
        size = len(before)
        return [ids[size:] if size and ids[: 2 * size] == before * 2 else ids for ids in rows]
    rows = [None] * len(prompts)
    for option, continued in (("add_generation_prompt", False), ("continue_final_message", True)):
        numbers = [n for n, prompt in enumerate(prompts) if (prompt[-1]["role"] == "assistant") == continued]
        if numbers:
            options = {option: True, "tokenize": True, "return_dict": True}
            found = tokenizer.apply_chat_template([prompts[number] for number in numbers], **options)["input_ids"]
            for number, ids in zip(numbers, found, strict=True):
                rows[number] = ids
    return rows
