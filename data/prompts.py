"""Prompts for PPO and evaluation."""

from datasets import Dataset

from data import human_ratings
from data.files import check_cell, load_rows, require_columns, row_name, shorten


def load_prompts(name: str, split: str) -> Dataset:
    """Checked prompts of the embedded default (`human_ratings`), or of whatever `load_rows` can read."""
    if name == "human_ratings":
        return human_ratings.prompts(split)
    return check_prompts(load_rows(name, split), name)


def check_prompts(rows: Dataset, name: str) -> Dataset:
    """The `rows` themselves, with all their columns, since TRL hands those to the reward functions.

    Raises:
        ValueError: there is no column `prompt`; or in some row it is empty, neither text nor a conversation, or not of
            the kind that the first row has.
    """
    require_columns(rows, ("prompt",), name)
    kind = None
    for number, row in enumerate(rows.select_columns(["prompt"]), 1):
        kind = check_cell(row_name(name, number), "prompt", row["prompt"], kind, filled=True)
    return rows


def check_prompt_lengths(rows: Dataset, tokenizer, context: int, max_completion_length: int, name: str) -> None:
    """Check that every prompt leaves the model room for a completion of `max_completion_length` tokens.

    Raises:
        ValueError: prompt and completion together exceed the model's `context`, or a prompt is a conversation and
            the tokenizer has no chat template.
    """
    for number, row in enumerate(rows.select_columns(["prompt"]), 1):
        where, prompt = row_name(name, number), row["prompt"]
        if not isinstance(prompt, str) and tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: 'prompt' is a conversation ({shorten(prompt)}), but the tokenizer has no chat template. "
                f"Give prompts as text, or take a model whose tokenizer has one."
            )
        tokens = _count_tokens(prompt, tokenizer)
        if tokens + max_completion_length > context:
            raise ValueError(
                f"{where}: 'prompt' {shorten(prompt)} has {tokens} tokens, and with max_completion_length="
                f"{max_completion_length} that exceeds the model's context of {context}. Shorten the prompt, lower "
                f"max_completion_length, or take a model with a longer context."
            )


def _count_tokens(prompt: str | list[dict], tokenizer) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return len(tokenizer.apply_chat_template(prompt, **options)["input_ids"])
