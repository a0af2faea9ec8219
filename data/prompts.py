"""Prompts for PPO and evaluation."""

from datasets import Dataset

from data import human_ratings
from data.files import check_cell, check_chat_template, check_rows, load_rows, require_columns, shorten
from data.preferences import check_preferences, explicit_prompts
from data.reading import dataset_of
from data.rows import Rows, place
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
        checked = explicit_prompts(check_preferences(rows, name, drop=drop), name, drop=drop)
        if len(checked) < len(rows):
            kept = set(zip(checked.of.tolist(), checked.numbers.tolist(), strict=True))
            places = zip(rows.of.tolist(), rows.numbers.tolist(), strict=True)
            rows = rows.select([number for number, where in enumerate(places) if where in kept])
        others = {column: rows[column][:] for column in rows.column_names if column != "prompt"}
        made = dataset_of({"prompt": checked["prompt"][:]} | others, name)
        rows = Rows(made, rows.files, rows.of, rows.numbers) if isinstance(rows, Rows) else made
    require_columns(rows, ("prompt",), name)

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


def check_prompt_lengths(rows: Dataset, tokenizer, context: int, max_completion_length: int, name: str) -> None:
    """Check that every prompt leaves the model room for a completion of `max_completion_length` tokens.

    Raises:
        ValueError: prompt and completion together exceed the model's `context`, or a prompt is a conversation and
            the tokenizer has no chat template.
    """
    prompts = rows["prompt"][:]
    check_chat_template(rows.select_columns(["prompt"]), tokenizer, name)
    for number, (prompt, ids) in enumerate(zip(prompts, tokenize_prompts(prompts, tokenizer), strict=True), 1):
        if len(ids) + max_completion_length > context:
            raise ValueError(
                f"{place(rows, number - 1, name)}: 'prompt' {shorten(prompt)} has {len(ids)} tokens, and with "
                f"max_completion_length={max_completion_length} that exceeds the model's context of {context}. "
                f"Shorten the prompt, lower max_completion_length, or take a model with a longer context."
            )


def tokenize_prompts(prompts: list, tokenizer) -> list[list[int]]:
    """Token ids of texts, or of conversations through the tokenizer's chat template, as TRL's trainers make them."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(prompts, **options)["input_ids"]
