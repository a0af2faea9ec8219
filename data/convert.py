"""Convert preference data to files for every stage: HH, judgements, ratings, rankings, thumbs up and down.

    python -m data.convert judgements.json runs/data
    python -m data.convert ratings.tsv.gz runs/data --prompt question --text reply --rating stars --min_gap 1

The source is a file, a folder or a dataset on the hub. The columns tell what it is; options name those that do not. The
files written are `preferences_train.jsonl`, `sft_train.jsonl`, `prompts_train.jsonl`, and the same for `test`. No prompt of
`test` is one of `train`. The command prints how many rows are left out, and why.
"""

import argparse
from pathlib import Path

from data.commands import run
from data.conversion import CONVERSATION, TEXT, check_folder, in_form, make, write
from data.files import has_splits, load_rows, splits_of
from data.layouts import COLUMNS, recognise
from data.pairing import Options
from data.rows import short_place
from data.verdicts import word


WRITTEN = {"preferences": "pairs", "sft": "texts for SFT", "prompts": "prompts"}


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m data.convert", allow_abbrev=False)
    parser.add_argument("source", help="File, folder or hub id of the preference data.")
    parser.add_argument("folder", type=Path, help="Folder to write the files to.")
    parser.add_argument("--prompt", nargs="+", metavar="COLUMN", help="Columns of the prompt; several are joined.")
    parser.add_argument("--first", metavar="COLUMN", help="Judgements: the first response.")
    parser.add_argument("--second", metavar="COLUMN", help="Judgements: the second response.")
    parser.add_argument(
        "--label", nargs="+", metavar="COLUMN", help="Verdicts of one or several annotators, or thumbs up and down."
    )
    parser.add_argument("--text", metavar="COLUMN", help="Rated, ranked or liked text, or a list of texts.")
    parser.add_argument("--rating", nargs="+", metavar="COLUMN", help="Ratings of the text; higher is better.")
    parser.add_argument("--rank", metavar="COLUMN", help="Rank of the text; 1 is the best.")
    parser.add_argument(
        "--group", metavar="COLUMN", help="Equal in texts that belong together, if there is no prompt."
    )
    for option, what in (
        ("first_wins", "first is better"),
        ("second_wins", "second is better"),
        ("tie", "two are equal"),
    ):
        parser.add_argument(f"--{option}", metavar="LABELS", help=f"Labels, with commas, that say the {what}.")
    parser.add_argument(
        "--ties", choices=("drop", "keep"), default="drop", help="Leave ties out, or keep them with agreement 0.5."
    )
    parser.add_argument(
        "--pairs", choices=("all", "adjacent"), default="all", help="Pair all ratings or ranks, or only neighbours."
    )
    parser.add_argument(
        "--min_gap", type=float, default=0.0, help="Least difference of two ratings that makes a pair."
    )
    parser.add_argument(
        "--form",
        choices=(TEXT, CONVERSATION),
        help="Form of the rows; unset: text if completions continue their prompts.",
    )
    parser.add_argument("--between", metavar="TEXT", help="Text between prompt and completion; the form is then text.")
    parser.add_argument("--held_out", type=float, default=0.2, help="Share of the prompts that are not trained on.")
    parser.add_argument("--split", default="train", help="Split of a folder or of a dataset on the hub.")
    parser.add_argument("--data_dir", help="Folder of a dataset on the hub, such as harmless-base.")
    found = parser.parse_args(args)
    if not 0 < found.held_out < 1:
        parser.error(f"--held_out {found.held_out} must be a share between 0 and 1.")
    if not found.min_gap >= 0:
        parser.error(f"--min_gap {found.min_gap} must be 0 or more.")
    if found.between is not None and found.form == CONVERSATION:
        parser.error("--between is for --form text.")
    return found


def main(args: list[str]) -> None:
    given = arguments(args)
    check_folder(given.folder, given.source)
    if given.data_dir and Path(given.source).expanduser().exists():
        raise ValueError(f"--data_dir {given.data_dir} is for a dataset on the hub, but {given.source} is here.")
    rows = load_rows(given.source, given.split, data_dir=given.data_dir)
    if others := [split for split in splits_of(given.source) if split != given.split and has_splits(given.source)]:
        print(f"{given.source}: only the split {given.split} is read, not {', '.join(others)}.")
    columns = {option: getattr(given, option) for option in COLUMNS if getattr(given, option)}
    named = {option: [value] if isinstance(value, str) else value for option, value in columns.items()}
    layout = recognise(rows, given.source, named)
    labels = {
        option: [word(label) for label in getattr(given, option).split(",")]
        for option in ("first_wins", "second_wins", "tie")
        if getattr(given, option) is not None
    }
    options = Options(given.ties == "keep", given.pairs == "adjacent", given.min_gap, labels)
    made = make(rows, given.source, layout, options)
    print(f"{given.source}: {len(rows):,} rows, {layout}; {len(made.pairs):,} pairs.")
    for reason, indices in made.left_out.items():
        print(f"  left out {len(indices):,}: {reason}; the first is {short_place(rows, indices[0])}")
    if not (made.pairs or made.liked):
        raise ValueError(f"{given.source}: nothing can be made of these rows. Correct them, or name other data.")
    made, form = in_form(made, given.form, given.between)
    counts = write(made, given.folder, given.held_out)
    for split, stages in counts.items():
        said = ", ".join(f"{stages[stage]:,} {what}" for stage, what in WRITTEN.items())
        print(f"{given.folder}: {split}: {said}.")
    print(f"The rows are {form}s.")


if __name__ == "__main__":
    run(main)
