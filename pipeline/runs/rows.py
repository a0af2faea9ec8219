"""Prepare the rows of a stage as tokens, and count those that are kept, cut and dropped."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data.cells import check_chat_template, check_rows
from data.rankings import prepare_rankings
from data.rows import left_out
from data.tokens import Lengths, prepare_tokens, write_turns
from pipeline.runs.arguments import DataArguments
from pipeline.runs.outputs import rows_report
from reward_models.pretrained import text_rows


def prepare_rows(
    parts: dict[str, tuple[str, Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    *,
    max_length: int,
    drops: bool = False,
    needs_rest: bool = False,
    row: str = "row",
) -> tuple[dict[str, Dataset], dict[str, dict]]:
    """Check texts, pairs or rankings in the tokens of TRL's trainers, and count the rows of each part that `max_length` keeps.

    Args:
        parts: `train`, and `held_out` if any, each with the source of its rows (`DataArguments.load`).
        drops, needs_rest: the treatment of longer rows, as in `data.tokens.Lengths.counts`.
        row: the messages' word for a row.

    Returns:
        The rows of each part, and their counts for `metrics.json`.

    Raises:
        ValueError: an error of `prepare_tokens`; or a smaller share than `min_kept` of a part's rows is kept uncut.
    """
    rows, counts = {}, {}
    for part, (source, found) in parts.items():
        prepare = prepare_rankings if "ranking" in found.column_names else prepare_tokens
        rows[part], lengths = prepare(found, tokenizer, source, drop=data.drop_bad_rows)
        counts[part] = source, lengths.counts(max_length, drops=drops, needs_rest=needs_rest)
    report = rows_report(counts)
    for source, of_part in counts.values():
        of_part.check(source, max_length, data.min_kept, row)
    return rows, report


def prepare_own_pairs(
    parts: dict[str, tuple[str, Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    *,
    max_length: int,
) -> tuple[dict[str, Dataset], dict[str, dict]]:
    """Write pairs as the tokens of a classifier of its own, as `reward_models.pretrained` writes what it scores.

    Args:
        parts: `train`, and `held_out` if any, each with the source of its pairs (`DataArguments.load`).

    Returns:
        Rows of `chosen_ids` and `rejected_ids`, with `margin` and `agreement` where the pairs have them, and their counts
        for `metrics.json`. TRL's trainer drops those that are longer than `max_length`.

    Raises:
        ValueError: pairs are conversations, and the tokenizer has no chat template or refuses a row; or a smaller share than
            `min_kept` of a part's pairs is kept.
    """
    rows, counts = {}, {}
    for part, (source, pairs) in parts.items():
        pairs = _checked_turns(pairs, tokenizer, source, drop=data.drop_bad_rows)
        empty: str | list = "" if isinstance(pairs[0]["chosen"], str) else []
        prompts = pairs["prompt"][:] if "prompt" in pairs.column_names else [empty] * len(pairs)
        sides = {side: pairs[side][:] for side in ("chosen", "rejected")}
        if isinstance(empty, str) and tokenizer.eos_token:  # the tokenizer writes it
            sides = {side: [text.removesuffix(tokenizer.eos_token) for text in texts] for side, texts in sides.items()}
        ids = {
            f"{side}_ids": text_rows(tokenizer, prompts, texts, completion_only=False, name=source)
            for side, texts in sides.items()
        }
        others = {column: pairs[column][:] for column in ("margin", "agreement") if column in pairs.column_names}
        rows[part] = Dataset.from_dict(ids | others)
        lengths = [max(map(len, pair)) for pair in zip(*ids.values(), strict=True)]
        counts[part] = source, Lengths(lengths, [0] * len(lengths), left_out(pairs)).counts(max_length, drops=True)
    report = rows_report(counts)
    for source, of_part in counts.values():
        of_part.check(source, max_length, data.min_kept, "pair")
    return rows, report


def _checked_turns(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, name: str, *, drop: bool) -> Dataset:
    """Return pairs whose conversations the chat template takes; pairs of texts as they are."""
    if isinstance(pairs[0]["chosen"], str):
        return pairs
    check_chat_template(pairs.select_columns(["chosen", "rejected"]), tokenizer, name)

    def check(where: str, row: dict, kind: str | None) -> None:
        for side in ("chosen", "rejected"):
            write_turns(where, side, row.get("prompt", []) + row[side], tokenizer)

    return check_rows(
        pairs,
        [column for column in ("prompt", "chosen", "rejected") if column in pairs.column_names],
        name,
        check,
        drop=drop,
    )
