"""Convert Anthropic's HH preferences to files for every stage, in TRL's conversational format.

    python -m pipeline.convert_hh Anthropic/hh-rlhf runs/hh --data_dir harmless-base
    python -m pipeline.convert_hh test.jsonl.gz runs/hh --max_tokens 256 --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct

The source is a hub id, or a .jsonl or .jsonl.gz file. The files written are `preferences_train.jsonl`, `sft_train.jsonl`,
`prompts_train.jsonl`, and the same for `test`. No dialogue of `test` begins like one of `train`. The command prints how many
rows are left out, and why.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.hh import LONG, convert, read_rows, write_stages
from pipeline.backbone.gguf import model_source
from pipeline.runs.errors import report_errors
from pipeline.runs.folders import check_ours, check_output_dir, check_path
from pipeline.runs.ownership import FILES, former_files


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m pipeline.convert_hh", allow_abbrev=False)
    parser.add_argument("source", help="Hub id, or .jsonl or .jsonl.gz file, with the columns chosen and rejected.")
    parser.add_argument("folder", type=Path, help="Folder to write the files to.")
    parser.add_argument(
        "--data_dir", help="Folder of a dataset on the hub, such as harmless-base; unset: the whole dataset."
    )
    parser.add_argument("--held_out", type=float, default=0.2, help="Share of the dialogues that are not trained on.")
    parser.add_argument("--max_pairs", type=int, help="Keep only this many sound pairs, the first ones; unset: all.")
    parser.add_argument("--max_tokens", type=int, help="Leave longer dialogues out; needs --tokenizer.")
    parser.add_argument("--tokenizer", help="Model whose tokenizer counts the tokens: hub id or folder.")
    found = parser.parse_args(args)
    for name, least in (("max_pairs", 2), ("max_tokens", 1)):
        value = getattr(found, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be {least} or more.")
    if not 0 < found.held_out < 1:
        parser.error(f"--held_out {found.held_out} must be a share between 0 and 1.")
    if (found.max_tokens is None) != (found.tokenizer is None):
        parser.error("--max_tokens and --tokenizer belong together. Give both or neither.")
    return found


def load_chat_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, which must have a chat template.

    Raises:
        ValueError: there is no such tokenizer, or it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(name))
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--tokenizer {name}: cannot be loaded ({said}). Correct the name.") from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--tokenizer {name}: the tokenizer has no chat template. Name the tokenizer of a chat model."
        )
    return tokenizer


def main(args: list[str]) -> None:
    given = arguments(args)
    check_path(str(given.folder))
    check_output_dir(str(given.folder))
    check_ours(str(given.folder), FILES["data"], (given.source,))
    rows = read_rows(given.source, given.data_dir)
    tokenizer = load_chat_tokenizer(given.tokenizer) if given.tokenizer else None

    def length(conversation: list[dict]) -> int:
        assert tokenizer is not None  # --max_tokens comes with --tokenizer
        return len(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"])

    pairs, dropped = convert(rows, length, given.max_tokens)
    print(f"{given.source}: {len(rows):,} rows, {len(pairs):,} of them sound pairs.")
    for kind, numbers in sorted(dropped.items(), key=lambda item: -len(item[1])):
        longer = f" (over {given.max_tokens} tokens)" if kind == LONG else ""
        print(f"  left out {len(numbers):,}: {kind}{longer}; the first is row {numbers[0]:,}")
    counts = write_stages(pairs[: given.max_pairs], given.folder, given.held_out, former_files(given.folder, "data"))
    print(f"{given.folder}: {counts['train']:,} pairs to train on, {counts['test']:,} held out.")


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
