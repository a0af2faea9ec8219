"""Find what a data file holds, and what each stage would do with it."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from data.conversion import in_form, make
from data.judgements import disagreement
from data.layouts import HH, JUDGEMENTS, PAIRS, THUMBS, Layout, command, recognise, suggestion
from data.pairing import Made, Options, apart, key_of
from data.preferences import check_preferences, explicit_prompts
from data.prompts import check_prompts, tokenize_prompts
from data.rows import short_place
from data.sifting import Check, Problems, merged, sift
from data.texts import FORMATS, check_texts
from data.tokens import prepare_tokens


def check_dpo(rows: Dataset, name: str, *, drop: bool = False) -> Dataset:
    """Check pairs as the stages do that need a prompt."""
    return explicit_prompts(check_preferences(rows, name, drop=drop), name, drop=drop)


STAGES: dict[str, Check] = {
    "pipeline.sft": check_texts,
    "pipeline.reward": check_preferences,
    "pipeline.ppo": check_prompts,
    "pipeline.dpo": check_dpo,
}
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
REPEATED, LEAKED = "the row repeats an earlier one", "its prompt is also in the other data"


class Use(NamedTuple):
    """Outcome of a stage's check: the rows that it would take (None: none), the problems of the others, or why it stops."""

    rows: Dataset | None
    problems: Problems
    refusal: str | None = None


def uses(rows: Dataset, name: str) -> dict[str, Use]:
    """Return what each stage would do with the rows."""
    found = {}
    for stage, check in STAGES.items():
        try:
            kept, problems = sift(rows, name, check)
            found[stage] = Use(kept, problems)
        except ValueError as error:
            found[stage] = Use(None, {}, str(error).removeprefix(f"{name}: "))
    return found


def format_of_rows(rows: Dataset, name: str) -> tuple[str, Layout | None]:
    """Return what the rows are in words, and their layout if `data.convert` makes pairs of them."""
    try:
        layout = recognise(rows, name)
    except ValueError:
        layout = None
    if layout is not None and layout.kind not in (PAIRS, HH):
        return str(layout), layout
    columns = set(rows.column_names)
    first = next((field for field in ("prompt", "chosen", "messages") if field in columns), None)
    kind = "conversations" if first and isinstance(rows[0][first], list) else "texts"
    if layout is not None:
        return f"{layout.kind} ({kind}{'' if 'prompt' in columns else ', implicit prompts'})", layout
    known = [of for of in FORMATS if set(of) <= columns] + ([("prompt",)] if "prompt" in columns else [])
    if known:
        words = {"prompt": "prompts", "text": "texts", "messages": "conversations"}
        return f"{words.get('_'.join(known[0]), 'prompts and completions')} ({kind})", None
    return "not recognised", None


def repeated(rows: Dataset, columns: list[str] | None = None) -> list[int]:
    """Return the indices of rows that are equal to an earlier one in all columns."""
    seen: set[str] = set()
    found = []
    for index, row in enumerate(rows if columns is None else rows.select_columns(columns)):
        text = json.dumps(row, sort_keys=True, default=str)
        if text in seen:
            found.append(index)
        seen.add(text)
    return found


def prompts_of(rows: Dataset) -> list[str]:
    """Return the letters of each checked row's prompt, or of the text if there is no prompt."""
    found = []
    for row in rows:
        if "chosen" in row and "prompt" not in row:
            row = row | apart("", row)
        prompt = row.get("prompt") or row.get("chosen") or row.get("messages") or row.get("text") or ""
        found.append("".join(letter for letter in key_of(prompt).lower() if letter.isalnum()))
    return found


def swapped(made: Made) -> int:
    """Count the pairs that also stand there the other way round."""
    seen = {json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]]) for pair in made.pairs}
    return sum(json.dumps([pair["prompt"], pair["rejected"], pair["chosen"]]) in seen for pair in made.pairs)


def noise(made: Made, layout: Layout) -> list[str]:
    """Return lines about the noise of the labels: how far annotators agree, and pairs that contradict each other."""
    lines = []
    agreed = disagreement(made.votes)
    if agreed is not None:
        unanimous, same, kappa = agreed
        lines.append(f"annotators: unanimous on {unanimous:.1%}; two of them agree on {same:.1%} (kappa {kappa:.2f})")
    if made.votes:
        ties = sum(float(np.mean(votes)) == 0.5 for votes in made.votes)
        lines.append(f"ties: {ties:,} of {len(made.votes):,} judged pairs")
    shares = [pair["agreement"] for pair in made.pairs if pair.get("agreement") is not None]
    if shares:
        low = sum(share < 0.7 for share in shares)
        lines.append(
            f"agreement with the label: {np.mean(shares):.1%} on average, the most that a reward model can reach against "
            f"one annotator; below 70% on {low:,} of {len(shares):,} pairs"
        )
    if layout.kind != JUDGEMENTS and layout.kind != THUMBS and (number := swapped(made)):
        lines.append(f"contradictions: {number:,} pairs stand there in both orders")
    return lines


def quantiles(lengths: list[int]) -> str:
    """Return least, median, 90% and 99% quantile, and greatest length."""
    names = ("least", "median", "90%", "99%", "most")
    values = np.quantile(lengths, QUANTILES, method="higher").astype(int)
    return ", ".join(f"{name} {value:,}" for name, value in zip(names, values, strict=True))


def lengths(rows: Dataset, name: str, tokenizer: Any) -> dict[str, list[int]]:
    """Return the lengths of checked rows in tokens: whole rows (of a pair the longer side), and prompts.

    Without a tokenizer the lengths are in words.

    Raises:
        ValueError: the tokenizer cannot write the rows, for example because it has no chat template.
    """
    if tokenizer is None:
        return _words(rows)
    if set(rows.column_names) & {"chosen", "completion", "text", "messages"}:
        _, found = prepare_tokens(rows, tokenizer, name, drop=True)
        prompts = found.prompts if "prompt" in rows.column_names else []
        return {"rows": found.rows} | ({"prompts": prompts} if prompts else {})
    return {"prompts": [len(ids) for ids in tokenize_prompts(rows["prompt"][:], tokenizer)]}


def _words(rows: Dataset) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"rows": [], "prompts": []}
    for row in rows:
        count = {column: len(_text(cell).split()) for column, cell in row.items() if column in READ}
        sides = [number for column, number in count.items() if column != "prompt"]
        if sides:
            found["rows"].append(count.get("prompt", 0) + max(sides))
        if "prompt" in count:
            found["prompts"].append(count["prompt"])
    return {part: of for part, of in found.items() if of}


READ = ("prompt", "completion", "text", "messages", "chosen", "rejected")


def _text(cell: Any) -> str:
    return cell if isinstance(cell, str) else " ".join(turn["content"] for turn in cell or [])


def said(rows: Dataset, problems: Problems) -> list[str]:
    """Return a line for each problem: how many rows, why, and the first of them."""
    return [
        f"{len(indices):,} because {problem} (first: {short_place(rows, indices[0])})"
        for problem, indices in merged(problems).items()
    ]


def inspect(
    rows: Dataset, name: str, tokenizer: Any, tell: Callable[[str], None], other: tuple[Dataset, str] | None = None
) -> None:
    """Tell line by line what the rows are, what is wrong with them, and what each stage would do with them.

    Args:
        other: rows of another split and their name; prompts that are in both are counted.
    """
    words, layout = format_of_rows(rows, name)
    tell(f"{name}: {len(rows):,} rows, {words}.")
    again = repeated(rows)
    if again:
        tell(f"  duplicates: {len(again):,} rows repeat an earlier one (first: {short_place(rows, again[0])})")
    converts = layout is not None and (layout.kind != PAIRS or bool(layout.prompt))
    made = None
    if layout is not None:
        try:
            made = make(rows, name, layout, Options())
        except ValueError as error:
            tell(f"  {str(error).removeprefix(f'{name}: ')}")
    if made is not None and layout is not None:
        for line in noise(made, layout):
            tell(f"  {line}")
    found = uses(rows, name)
    for stage, use in found.items():
        if stage == "pipeline.dpo" and _are_alike(use, found["pipeline.reward"]):
            tell(f"  {stage} does the same as pipeline.reward")
        else:
            _tell_use(rows, name, stage, use, tokenizer, tell)
    if converts and layout is not None:
        tell(f"  convert it: {command(name)}")
        if made is not None:
            tell(f"    {len(made.pairs):,} pairs and {len(made.liked):,} texts for SFT")
            for line in said(rows, made.left_out):
                tell(f"    left out: {line}")
            if made.pairs:
                pairs, form = in_form(made)
                columns = [{side: pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs.pairs]
                _tell_lengths(Dataset.from_list(columns), f"{form}s", tokenizer, tell)
    elif all(use.rows is None for use in found.values()):
        tell("  no stage reads it, and data.convert does not recognise it: name the columns, see its --help")
    if other is not None:
        leaks = leaked(rows, name, *other)
        where = f" (first: {short_place(rows, leaks[0])})" if leaks else ""
        tell(f"  leakage: the prompts of {len(leaks):,} rows are also in {other[1]}{where}")


def _are_alike(one: Use, other: Use) -> bool:
    kept = [None if use.rows is None else use.rows.column_names for use in (one, other)]
    return one[1:] == other[1:] and kept[0] == kept[1]


def _tell_use(rows: Dataset, name: str, stage: str, use: Use, tokenizer: Any, tell: Callable[[str], None]) -> None:
    if use.refusal is not None:
        tell(f"  {stage} stops: {use.refusal.replace(suggestion(rows, name) or '.', '.').replace('. .', '.')}")
        return
    kept = 0 if use.rows is None else len(use.rows)
    tell(f"  {stage} takes {kept:,} of {len(rows):,} rows{'' if kept == len(rows) else ' with drop_bad_rows: true'}")
    for line in said(rows, use.problems):
        tell(f"    not {line}")
    if use.rows is not None:
        read = [column for column in READ if column in use.rows.column_names]
        read = ["prompt"] if stage == "pipeline.ppo" else read
        _tell_lengths(use.rows.select_columns(read), name, tokenizer, tell)


def _tell_lengths(rows: Dataset, name: str, tokenizer: Any, tell: Callable[[str], None]) -> None:
    try:
        for part, of in lengths(rows, name, tokenizer).items():
            tell(f"    {'words' if tokenizer is None else 'tokens'}, {part}: {quantiles(of)}")
    except ValueError as error:  # conversations, and a tokenizer without a chat template
        tell(f"    {str(error).removeprefix(f'{name}: ')}")


def checked(rows: Dataset, name: str) -> tuple[str, Dataset | None, Problems] | None:
    """Return the first stage whose format the rows have, with the rows that it takes and the problems of the others."""
    order = ("pipeline.reward", "pipeline.sft", "pipeline.ppo")
    found = uses(rows, name)
    stage = next((stage for stage in order if found[stage].refusal is None), None)
    return None if stage is None else (stage, found[stage].rows, found[stage].problems)


def leaked(rows: Dataset, name: str, other: Dataset, other_name: str) -> list[int]:
    """Return the indices of rows whose prompts differ from one of the other rows in case and punctuation at most."""
    sides = [checked(rows, name), checked(other, other_name)]
    kept = [None if side is None else side[1] for side in sides]
    if kept[0] is None or kept[1] is None:
        return []
    known = Counter(prompts_of(kept[1]))
    indices = (kept[0].numbers - 1).tolist()
    return [index for index, prompt in zip(indices, prompts_of(kept[0]), strict=True) if prompt and prompt in known]


def unfit(rows: Dataset, name: str, other: tuple[Dataset, str] | None = None) -> Problems | None:
    """Return the rows that a clean copy leaves out, by the reason; None if the rows have to be converted first.

    These are the rows that the stage of their format cannot use, repetitions, and those whose prompt is in the other data.
    """
    layout = format_of_rows(rows, name)[1]
    of_sft = any(set(of) <= set(rows.column_names) for of in FORMATS)  # which may be rated too
    found = checked(rows, name)
    if found is None or (layout and layout.kind not in (PAIRS, HH) and (layout.kind == THUMBS or not of_sft)):
        return None
    problems = dict(found[2])
    bad = {index for indices in problems.values() for index in indices}
    leaks = [] if other is None else leaked(rows, name, *other)
    for problem, indices in ((REPEATED, repeated(rows)), (LEAKED, leaks)):
        fresh = [index for index in indices if index not in bad]
        bad.update(fresh)
        if fresh:
            problems[problem] = fresh
    return merged(problems)
