"""Prompts for PPO and evaluation."""

from datasets import Dataset

from data import human_ratings
from data.cells import CellError, check_cell, check_chat_template, check_no_tools, check_rows, require_columns, shorten
from data.files import load_rows
from data.preferences import check_preferences, explicit_prompts
from data.reading import dataset_of
from data.rows import Rows, left_out
from data.tokens import TEMPLATE_ERRORS, Counts, added_tokens, check_prompt_ids, write_turns
from data.turns import check_answerable


def load_prompts(name: str, split: str, *, drop: bool = False) -> Dataset:
    """Checked prompts of the embedded default (`human_ratings`), or of whatever `load_rows` can read; with `drop`,
    without the rows that cannot be used."""
    if name == "human_ratings":
        return human_ratings.prompts(split)
    return check_prompts(load_rows(name, split), name, drop=drop)


def check_prompts(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """The `rows` themselves, with all their columns, since TRL hands those to the reward functions. Rows of `chosen` and
    `rejected` that hold the prompt get it as a column.

    Raises:
        ValueError: there is no column `prompt`; or in some row it is empty, neither text nor a conversation, not of the
            kind that the first row has, or ends in a turn that cannot be answered.
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
    require_columns(rows, ("prompt",), name)
    check_no_tools(rows, name)

    def check(where: str, row: dict, kind: str | None) -> str:
        kind = check_cell(where, "prompt", row["prompt"], kind, filled=True)
        if kind == "conversation":
            check_answerable(where, "prompt", row["prompt"])
        return kind

    return check_rows(rows, ["prompt"], name, check, drop=drop)


def _hold_prompts(rows: Dataset) -> bool:
    """Tell whether the prompts stand in `chosen` and `rejected`: alone, or as conversations beside a text."""
    if not {"chosen", "rejected"} <= set(rows.column_names):
        return False
    return "prompt" not in rows.column_names or (
        isinstance(rows[0]["prompt"], str) and isinstance(rows[0]["chosen"], list)
    )


def check_prompt_lengths(
    rows: Dataset, tokenizer, context: float, max_completion_length: int, name: str, *, drop: bool = False
) -> tuple[Dataset, Counts]:
    """Check every prompt as tokens, and that it leaves the model room for a completion of `max_completion_length`.

    Returns:
        The rows, with `drop` those that can be used, and how many they are.

    Raises:
        ValueError: prompt and completion together exceed the model's `context`; a prompt is a conversation and the
            tokenizer has no chat template, or the template refuses it; or it has no tokens, or ends where texts end.
    """
    check_chat_template(rows.select_columns(["prompt"]), tokenizer, name)
    try:
        known = iter(tokenize_prompts(rows["prompt"][:], tokenizer))
    except TEMPLATE_ERRORS:
        known = None  # the row is looked for below
    lengths = []

    def check(where: str, row: dict, kind: str | None) -> None:
        prompt = row["prompt"]
        if known is None and isinstance(prompt, list):
            write_turns(where, "prompt", prompt, tokenizer, ask=True)
        ids = next(known) if known is not None else tokenize_prompts([prompt], tokenizer)[0]
        check_prompt_ids(where, prompt, ids, tokenizer)
        if len(ids) + max_completion_length > context:
            message = (
                f"{where}: 'prompt' {shorten(prompt)} has {len(ids)} tokens, and with "
                f"max_completion_length={max_completion_length} that exceeds the model's context of {context}. "
                f"Shorten the prompt, lower max_completion_length, or take a model with a longer context."
            )
            raise CellError(message, f"'prompt' leaves no room in the model's context of {context}")
        lengths.append(len(ids))

    found = check_rows(rows, ["prompt"], name, check, drop=drop)
    bad = left_out(rows)
    return found, Counts(len(rows) + bad, len(found), 0, len(rows) - len(found) + bad, max(lengths), bad)


def tokenize_prompts(prompts: list, tokenizer) -> list[list[int]]:
    """Token ids of texts, or of conversations through the tokenizer's chat template, as completions go on from them.

    A tokenizer's end of text is left out, and its beginning stands once. A conversation is followed by what opens the
    answer; one that ends in the assistant's turn is left open there, so that the completion continues the turn.
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
