"""Rows as a model reads them: what a chat template refuses, special tokens written twice, and how many tokens rows have."""

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
# What a chat template raises for turns that it does not take.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)


class Counts(NamedTuple):
    """Rows of a dataset, by what `max_length` leaves of them."""

    rows: int
    kept: int  # whole
    cut: int  # short of their end, or of their beginning
    dropped: int
    longest: int  # tokens
    bad: int = 0  # of those that are dropped, by `drop_bad_rows`

    def __str__(self) -> str:
        said = f"{self.kept:,} of {self.rows:,} rows kept"
        for word, number in (("cut", self.cut), ("dropped", self.dropped)):
            said += f", {number:,} {word}" if number else ""
        return f"{said}; the longest has {self.longest:,} tokens"

    def check(self, name: str, max_length: int, min_kept: float, row: str = "row") -> None:
        """Raise a ValueError if fewer than the share `min_kept` of the rows are kept whole, or none is trained on."""
        if self.bad:  # which is not for `max_length` to answer for
            good = self._replace(rows=self.rows - self.bad, dropped=self.dropped - self.bad, bad=0)
            return good.check(name, max_length, min_kept, row)
        if self.dropped == self.rows:
            raise ValueError(
                f"{name}: every {row} is longer than max_length={max_length} tokens. Shorten them, or raise max_length (the "
                f"longest has {self.longest:,})."
            )
        if self.kept < min_kept * self.rows:
            raise ValueError(
                f"{name}: max_length={max_length} leaves {self}: {self.kept / self.rows:.0%} are whole, and "
                f"min_kept={min_kept:g}. Raise max_length or shorten the rows; to go on as it is, lower min_kept."
            )


class Lengths(NamedTuple):
    """Tokens of each row, of a pair's longer side, and of its prompt (0: it has none); and rows that are left out."""

    rows: list[int]
    prompts: list[int]
    bad: int = 0

    def counts(self, max_length: int, *, drops: bool = False, needs_rest: bool = False) -> Counts:
        """Count the rows, where longer ones are cut, or with `drops` left out; with `needs_rest`, those whose prompt alone
        is as long as `max_length` are left out too."""
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
    """Check texts or pairs as TRL's trainers will tokenize them, and measure them.

    Texts that open with the token that the tokenizer writes before every text lose it: it would stand there twice.

    Returns:
        The rows, with `drop` without those that the chat template refuses, and their tokens.

    Raises:
        ValueError: the tokenizer ends every text itself; a conversation is given and it has no chat template; or the
            template refuses a row, or begins it twice.
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
                raise cell_error(where, "prompt", row["prompt"], problem, "Take it out of the prompt.")

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
            f"{name}: in {len(parted):,} of {len(rows):,} rows the tokens of the prompt are not those that the whole row begins "
            f"with (first: {place(rows, parted[0], name)}); the completion is taken to start where they part. End prompts "
            f"where a token ends: white space belongs to what follows it."
        )
    return rows, found


def _ids(texts: list[str], tokenizer, options: dict) -> list[list[int]]:
    """Tokenize texts, each once however often it stands there: pairs of a ranking share theirs."""
    once = list(dict.fromkeys(texts))
    found = dict(zip(once, tokenizer(once, **options)["input_ids"], strict=True))
    return [found[text] for text in texts]


def _once_begun(rows: Dataset, sides: list[str], tokenizer, name: str) -> Dataset:
    """Check that the tokenizer ends no text, and take from texts the beginning that it writes itself."""
    before, after = added_tokens(tokenizer)
    if after:
        raise ValueError(
            f"{name}: the tokenizer ends every text with {tokenizer.decode(after)!r}, prompts too, and the trainer ends texts "
            f"itself. Save the tokenizer with add_eos_token=False, or without it in the post-processor of tokenizer.json."
        )
    opens = tokenizer.decode(before) if before else ""
    first = ["prompt"] if "prompt" in rows.column_names else sides
    cells = {column: rows[column][:] for column in rows.column_names}
    begun = [number for number in range(len(rows)) if opens and any(cells[c][number].startswith(opens) for c in first)]
    if not begun:
        return rows
    logger.warning(
        f"{name}: {len(begun):,} of {len(rows):,} texts begin with {opens!r} (first: {place(rows, begun[0], name)}), which the "
        f"tokenizer writes itself; it is taken out of them."
    )
    made = dataset_of(cells | {column: [text.removeprefix(opens) for text in cells[column]] for column in first}, name)
    return rows.as_rows(made) if isinstance(rows, Rows) else made


def write_turns(where: str, field: str, turns: list[dict], tokenizer, *, ask: bool = False) -> str:
    """Write a conversation by the tokenizer's chat template; to `ask`, with what opens the answer, or with the end left
    open if the last turn is the assistant's.

    Raises:
        CellError: the template refuses it.
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
            remedy = "If it takes no system turn, put its words at the head of the user's first turn."
        raise cell_error(where, field, turns, f"is refused by the chat template ({reason})", remedy) from error


def _check_one_beginning(rows: Dataset, number: int, ids: list[int], tokenizer, field: str, name: str) -> None:
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        problem = f"is written with {tokenizer.bos_token!r} twice at its beginning"
        remedy = "Take it out of the message or of the chat template."
        raise cell_error(place(rows, number, name), field, rows[number][field], problem, remedy)


def check_prompt_ids(where: str, prompt: str | list, ids: list[int], tokenizer) -> None:
    """Raise a CellError for a prompt without tokens, or one that ends where a text ends."""
    if not ids:
        raise cell_error(where, "prompt", prompt, "must have tokens")
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and ids[-1] == end and len(ids) > 1:
        remedy = "Take it out of the prompt." if isinstance(prompt, str) else "Correct the chat template."
        raise cell_error(
            where, "prompt", prompt, f"must not end with {tokenizer.eos_token!r}, which ends texts", remedy
        )


def check_max_length(max_length: int | None, context: float) -> None:
    """Rows longer than `max_length` tokens are TRL's to cut (SFT) or drop (reward); none may outgrow the model.

    Raises:
        ValueError: rows longer than the model's context could reach it; or no length is set.
    """
    if max_length is None:
        bound = f"; the model's context is {context} tokens" if context < math.inf else ""
        raise ValueError(f"max_length={max_length} leaves rows of any length. Set it to a number of tokens{bound}.")
    if max_length > context:
        raise ValueError(f"max_length={max_length} exceeds the model's context of {context} tokens; lower it.")
