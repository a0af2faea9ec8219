"""Prepare the rows of a stage as tokens, and say which of them are kept, cut and dropped."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

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
    """Check texts or pairs as TRL's trainers will tokenize them, and count what `max_length` leaves of each part.

    Args:
        parts: `train`, and `held_out` if any, each with where its rows come from (`DataArguments.load`).
        drops, needs_rest: what becomes of longer rows, as `data.tokens.Lengths.counts` has it.
        row: what the messages call a row.

    Returns:
        The rows of each part, and what `metrics.json` says of them.

    Raises:
        ValueError: what `prepare_tokens` raises; or fewer than the share `min_kept` of a part's rows are kept whole.
    """
    rows, counts = {}, {}
    for part, (source, found) in parts.items():
        rows[part], lengths = prepare_tokens(found, tokenizer, source, drop=data.drop_bad_rows)
        counts[part] = source, lengths.counts(max_length, drops=drops, needs_rest=needs_rest)
    report = rows_report(counts)
    for source, of_part in counts.values():
        of_part.check(source, max_length, data.min_kept, row)
    return rows, report
