"""Check rows as the model reads them: chat templates, special tokens written twice, and lengths in tokens."""

import logging
import math
from typing import NamedTuple

from datasets import Dataset
from jinja2.exceptions import TemplateError

from data.cells import cell_error, check_chat_template, check_rows
from data.reading import dataset_of
from data.rows import Rows, left_out, place


logger = logging.getLogger(__name__)

CHUNK = 1024  # rows whose tokens are in memory at a time
# Errors that a chat template raises for turns that it refuses.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)


class Counts(NamedTuple):
    """Counts of the rows of a dataset that `max_length` keeps, cuts and drops."""

    rows: int
    kept: int  # whole
    cut: int  # without their end, or without their beginning
    dropped: int
    longest: int  # tokens
    bad: int = 0  # how many of the dropped rows `drop_bad_rows` left out

    def __str__(self) -> str:
        said = f"{self.kept:,} of {self.rows:,} rows kept"
        for word, number in (("cut", self.cut), ("dropped", self.dropped)):
            said += f", {number:,} {word}" if number else ""
        return f"{said}; the longest has {self.longest:,} tokens"

    def check(self, name: str, max_length: int, min_kept: float, row: str = "row") -> None:
        """Raise a ValueError if fewer than the share `min_kept` of the rows are kept whole, or if all rows are dropped."""
        if self.bad:  # `max_length` did not drop these rows, so they do not count here
            good = self._replace(rows=self.rows - self.bad, dropped=self.dropped - self.bad, bad=0)
            return good.check(name, max_length, min_kept, row)
        if self.dropped == self.rows:
            raise ValueError(
                f"{name}: every {row} is longer than max_length={max_length} tokens. Shorten them, or raise max_length (the "
                f"longest has {self.longest:,} tokens)."
            )
        if self.kept < min_kept * self.rows:
            raise ValueError(
                f"{name}: max_length={max_length} leaves {self}. Only {self.kept / self.rows:.0%} are whole, but "
                f"min_kept={min_kept:g}. Raise max_length or shorten the rows. To train on the other rows, lower min_kept."
            )


class Lengths(NamedTuple):
    """Lengths of rows in tokens.

    `rows` has the length of each row (for a pair, of its longer side). `prompts` has the length of its prompt, 0 if it has
    no prompt. `bad` is the number of rows that `drop_bad_rows` left out.
    """

    rows: list[int]
    prompts: list[int]
    bad: int = 0

    def counts(self, max_length: int, *, drops: bool = False, needs_rest: bool = False) -> Counts:
        """Count the rows that `max_length` keeps, cuts and drops.

        A longer row is cut. With `drops` it is dropped instead. With `needs_rest` it is dropped if its prompt alone has
        `max_length` tokens or more.
        """
        long = [number for number, length in enumerate(self.rows) if length > max_length]
        lost = [number for number in long if drops or (needs_rest and self.prompts[number] >= max_length)]
        whole = len(self.rows) - len(long)
        cut, dropped = len(long) - len(lost), len(lost) + self.bad
        return Counts(len(self.rows) + self.bad, whole, cut, dropped, max(self.rows), self.bad)


def added_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer writes before and after every text."""
    if getattr(tokenizer, "bos_token_id", None) is None and getattr(tokenizer, "eos_token_id", None) is None:
        return [], []
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return (full[: starts[0]], full[starts[0] + len(bare) :]) if starts else ([], [])


def prepare_tokens(rows: Dataset, tokenizer, name: str, *, drop: bool = False) -> tuple[Dataset, Lengths]:
    """Check texts or pairs as TRL's trainers will tokenize them, and measure their lengths.

    The tokenizer may write a token before every text. If a text begins with this token, the token is removed from the text:
    it would appear twice.

    Returns:
        The rows (with `drop`, without those that the chat template refuses) and their lengths.

    Raises:
        ValueError: the tokenizer itself ends every text; a row is a conversation, and the tokenizer has no chat template;
            or the template refuses a row, or writes its beginning token twice.
    """
    columns = [
        column
        for column in ("prompt", "completion", "text", "messages", "chosen", "rejected")
        if column in rows.column_names
    ]
    sides = [column for column in columns if column != "prompt"]
    check_chat_template(rows.select_columns(sides), tokenizer, name)
    if isinstance(rows[0][sides[0]], str):
        rows, options = _once_begun(rows, sides, tokenizer, name), {}
        end = tokenizer.eos_token

        def check_end(where: str, row: dict, kind: str | None) -> None:
            if row["prompt"].endswith(end):
                problem = f"must not end with {end!r}, which ends texts"
                raise cell_error(where, "prompt", row["prompt"], problem, "Remove it from the prompt.")

        if "prompt" in columns and any(prompt.endswith(end) for prompt in rows["prompt"]):
            rows = check_rows(rows, columns, name, check_end, drop=drop)
        written = {column: rows[column][:] for column in columns}
        for side in sides:
            texts = written[side]
            if "prompt" in written:
                texts = [a + b for a, b in zip(written["prompt"], texts, strict=True)]
            written[side] = [text if text.endswith(end) else text + end for text in texts]
    else:
        written, options = {column: [] for column in columns}, {"add_special_tokens": False}

        def check(where: str, row: dict, kind: str | None) -> None:
            texts = {side: write_turns(where, side, row.get("prompt", []) + row[side], tokenizer) for side in sides}
            if "prompt" in row:
                texts["prompt"] = write_turns(where, "prompt", row["prompt"], tokenizer, ask=True)
            for column, text in texts.items():
                written[column].append(text)

        rows = check_rows(rows, columns, name, check, drop=drop)
    found, parted = Lengths([], [], left_out(rows)), []
    for start in range(0, len(rows), CHUNK):
        texts = {column: cells[start : start + CHUNK] for column, cells in written.items()}
        ids = {column: _ids(chunk, tokenizer, options) for column, chunk in texts.items()}
        asked = ids.pop("prompt", None)
        for number, wholes in enumerate(zip(*ids.values(), strict=True), start):
            prompt = asked[number - start] if asked else []
            if any(whole[: len(prompt)] != prompt for whole in wholes):
                parted.append(number)
            if options:
                _check_one_beginning(rows, number, wholes[0], tokenizer, sides[0], name)
            found.rows.append(max(map(len, wholes)))
            found.prompts.append(len(prompt))
    if parted:
        logger.warning(
            f"{name}: in {len(parted):,} of {len(rows):,} rows the tokens of the whole row do not begin with those of the "
            f"prompt (first: {place(rows, parted[0], name)}). The completion starts where they first differ. End each prompt "
            f"where a token ends: white space belongs to the text after it."
        )
    return rows, found


def _ids(texts: list[str], tokenizer, options: dict) -> list[list[int]]:
    """Tokenize texts, each distinct text once: the pairs of a ranking share texts."""
    once = list(dict.fromkeys(texts))
    found = dict(zip(once, tokenizer(once, **options)["input_ids"], strict=True))
    return [found[text] for text in texts]


def _once_begun(rows: Dataset, sides: list[str], tokenizer, name: str) -> Dataset:
    """Check that the tokenizer does not end texts, and remove from texts the beginning that it writes itself."""
    before, after = added_tokens(tokenizer)
    if after:
        raise ValueError(
            f"{name}: the tokenizer ends every text with {tokenizer.decode(after)!r}, even prompts, but the trainer ends "
            f"texts itself. Save the tokenizer with add_eos_token=False, or remove the token from the post-processor of "
            f"tokenizer.json."
        )
    opens = tokenizer.decode(before) if before else ""
    first = ["prompt"] if "prompt" in rows.column_names else sides
    cells = {column: rows[column][:] for column in rows.column_names}
    begun = [number for number in range(len(rows)) if opens and any(cells[c][number].startswith(opens) for c in first)]
    if not begun:
        return rows
    logger.warning(
        f"{name}: {len(begun):,} of {len(rows):,} texts begin with {opens!r} (first: {place(rows, begun[0], name)}). The "
        f"tokenizer writes it itself, so it is removed from them."
    )
    made = dataset_of(cells | {column: [text.removeprefix(opens) for text in cells[column]] for column in first}, name)
    return rows.as_rows(made) if isinstance(rows, Rows) else made


def write_turns(where: str, field: str, turns: list[dict], tokenizer, *, ask: bool = False) -> str:
    """Write a conversation with the tokenizer's chat template.

    With `ask`, the text ends with the opening of an answer. If the last turn is the assistant's, that turn is left open.

    Raises:
        CellError: the template refuses the conversation.
    """
    options = {}
    if ask:
        options["continue_final_message" if turns[-1]["role"] == "assistant" else "add_generation_prompt"] = True
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TEMPLATE_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        remedy = "Correct or delete the row."
        if turns[0]["role"] in ("system", "developer"):
            remedy = "If the template takes no system turn, put its words at the beginning of the first user turn."
        raise cell_error(where, field, turns, f"is refused by the chat template ({reason})", remedy) from error


def _check_one_beginning(rows: Dataset, number: int, ids: list[int], tokenizer, field: str, name: str) -> None:
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        problem = f"must not begin with {tokenizer.bos_token!r} twice"
        remedy = "Remove it from the message or from the chat template."
        raise cell_error(place(rows, number, name), field, rows[number][field], problem, remedy)


def check_prompt_ids(where: str, prompt: str | list, ids: list[int], tokenizer) -> None:
    """Raise a CellError for a prompt without tokens, or one that ends with the end-of-text token."""
    if not ids:
        raise cell_error(where, "prompt", prompt, "must have tokens")
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and ids[-1] == end and len(ids) > 1:
        remedy = "Remove it from the prompt." if isinstance(prompt, str) else "Correct the chat template."
        raise cell_error(
            where, "prompt", prompt, f"must not end with {tokenizer.eos_token!r}, which ends texts", remedy
        )


def check_max_length(max_length: int | None, context: float) -> None:
    """Check that `max_length` is set and fits the model's context.

    TRL cuts longer rows (SFT) or drops them (reward), so no row exceeds the context.

    Raises:
        ValueError: `max_length` is None, or exceeds the model's context.
    """
    if max_length is None:
        bound = f" (the model's context has {context})" if context < math.inf else ""
        raise ValueError(f"max_length={max_length} allows rows of any length. Set it to a number of tokens{bound}.")
    if max_length > context:
        raise ValueError(f"max_length={max_length} exceeds the model's context of {context} tokens. Lower it.")
