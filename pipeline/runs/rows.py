"""Prepare the rows of a stage as tokens, and count those that are kept, cut and dropped."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data.rankings import prepare_rankings
from data.tokens import prepare_tokens
from pipeline.runs.arguments import DataArguments
from pipeline.runs.outputs import rows_report


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
