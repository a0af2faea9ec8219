"""Data files: rows with columns that are missing, retyped, huge or empty, in every format, and files that are damaged."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.json_files import read_json
from tests.faults.verdicts import RIGHT, SILENT, Verdict, judge
from tests.faults.world import PAIRS, PROMPTS, TEXTS, Case, unsound


# What a stage reads, as TRL's formats have it.
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
    for row in PAIRS
]
CHAT_PAIRS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}]}
    | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    for row in PAIRS
]
COMPLETED = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
FORMATS = {
    "sft": (TEXTS, CHATS, COMPLETED),
    "reward": (
        PAIRS,
        CHAT_PAIRS,
        [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS],
    ),
    "dpo": (PAIRS, CHAT_PAIRS),
    "ppo": (PROMPTS, [{"prompt": row["prompt"]} for row in CHAT_PAIRS], PAIRS),
    "evaluation": (PROMPTS, [{"prompt": row["prompt"]} for row in CHAT_PAIRS], PAIRS),
}
NEVER = (None, 5, 1.5, True, {})  # no text, and no conversation
CELLS = (
    *NEVER, "", " ", "\n", [], [[]], "\ud800", "\0", "nan", "NULL", "x" * 5000, "é" * 300, "👩‍👩‍👧‍👦",
    "<|end|>", "<|pad|>a",
    "\u202eabc", "\x1b[2J", "{'a': 1}", "2020-01-01", "007", [{"role": "user"}], [{"content": "a"}],
    [{"role": "user", "content": None}], [{"role": "human", "content": "a"}], [{"from": "human", "value": "a"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [{"role": "system", "content": "a"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "assistant", "content": ""}], [5], ["a"],
)  # fmt: skip
COLUMNS = (
    "completions",
    "prompts",
    "completion_ids",
    "label",
    "margin",
    "images",
    "text",
    "id",
    "",
    "tools",
    "input_ids",
)


def spoil(case: Case, rows: list[dict]) -> tuple[list[dict], list[str]]:
    """Return rows with a few faults, and what they must make a run refuse."""
    draw, refused = case.draw, []
    needed = list(rows[0])
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        if not rows:
            break
        kind = draw.choice(
            (
                "cell",
                "cell",
                "cell",
                "column",
                "missing",
                "rename",
                "twice",
                "extra",
                "empty",
                "none",
                "swap",
                "shuffle",
            )
        )
        number, column = draw.randrange(len(rows)), draw.choice(needed)
        if kind == "cell":
            value = draw.choice(CELLS)
            rows[number][column] = value
            if value is None or (value in NEVER and value.__class__ in (int, float, bool, dict)):
                refused.append(f"row {number}, {column}: {value!r}")
        elif kind == "column":
            value = draw.choice(CELLS)
            for row in rows:
                row[column] = value
        elif kind == "missing":
            rows[number].pop(column, None)
        elif kind == "rename":
            rows = [{f"{key}s" if key == column else key: cell for key, cell in row.items()} for row in rows]
        elif kind == "twice":
            rows = rows * draw.choice((2, 40))
        elif kind == "extra":
            name, value = draw.choice(COLUMNS), draw.choice(CELLS)
            for row in rows[:: draw.choice((1, 2))]:
                row.setdefault(name, value)
        elif kind == "empty":
            rows.insert(number, {})
        elif kind == "none":
            rows = rows[: draw.choice((0, 1, 2))]
        elif kind == "swap" and "chosen" in needed:
            rows[number]["chosen"], rows[number]["rejected"] = (
                rows[number].get("rejected"),
                rows[number].get("rejected"),
            )
        elif kind == "shuffle":
            rows = [dict(draw.sample(list(row.items()), len(row))) for row in rows]
        case.note(kind + (f" {ascii(value)[:40]}" if kind in ("cell", "column", "extra") else ""))
    return rows, refused


def as_csv(rows: list[dict], mark: str) -> bytes:
    file = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, names, delimiter=mark, restval="")
    writer.writeheader()
    writer.writerows(
        [{key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in row.items()} for row in rows]
    )
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: as_csv(rows, ","),
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet,
}


def damage(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """Return the name of a damage to a file, and the damaged file."""
    at = draw.randrange(len(content) + 1)
    return draw.choice(
        (
            ("cut", content[:at]),
            ("a byte flipped", content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]),
            ("bytes put in", content[:at] + draw.randbytes(8) + content[at:]),
            ("a hole", content[:at] + b"\0" * 64 + content[at + 64 :]),
            ("UTF-16", content.decode("utf-8", "ignore").encode("utf-16")),
            ("a BOM", b"\xef\xbb\xbf" + content),
            ("CRLF", content.replace(b"\n", b"\r\n")),
            ("twice", content + content),
            ("a line of text", content + b"\nand so on\n"),
            ("gzip", gzip.compress(content)),
        )
    )


def rows(case: Case) -> Verdict:
    """A stage reads a data file that is drawn."""
    stage = case.draw.choice(sorted(FORMATS))
    good = json.loads(json.dumps(case.draw.choice(FORMATS[stage])))
    texts = all(isinstance(cell, str) for row in good for cell in row.values())
    suffix = case.draw.choice((".jsonl", ".jsonl", ".json", ".parquet", *((".csv", ".tsv") if texts else ())))
    drop = case.draw.random() < 0.3
    case.note(f"{stage} {suffix}{' drop_bad_rows' if drop else ''}")
    drawn, refused = spoil(case, good)
    try:
        content = WRITERS[suffix](drawn)
    except (pa.ArrowException, UnicodeError, csv.Error):  # a format that cannot hold these rows
        suffix, content = ".jsonl", WRITERS[".jsonl"](drawn)
    if suffix in (".csv", ".tsv"):
        refused = []  # every cell is text
    if stage in ("ppo", "evaluation") and "prompt" in good[0]:  # of pairs, only the prompts are read
        refused = [fault for fault in refused if ", prompt: " in fault]
    damaged = ""
    if case.draw.random() < 0.25:
        damaged, content = damage(case.draw, content)
        case.note(damaged)
    if case.draw.random() < 0.1:
        suffix, content = f"{suffix}.gz", gzip.compress(content)
    name = f"drawn{suffix}"
    case.write(name, content)
    before = case.files()
    ended = case.run(stage, dataset_name=name, drop_bad_rows=drop)

    def wrong() -> str | None:
        if refused and not drop and not damaged:
            return f"was taken: {refused[0]}"
        out = case.folder / "out"
        return unsound(stage, out) or miscounted(stage, read_json(out / LEFT[stage]), drawn, drop, damaged)

    return judge(ended, names=[name], lost=case.changed(before, but=() if ended.code else ("out",)), wrong=wrong)


LEFT = {"evaluation": "report.json"} | dict.fromkeys(("sft", "reward", "ppo", "dpo"), "metrics.json")


def miscounted(stage: str, metrics: dict, drawn: list[dict], drop: bool, damaged: str) -> str | None:
    """Say whether a stage has read other rows than there are."""
    found = metrics["rows"]["prompts" if stage == "evaluation" else "train"]
    if found["kept"] + found["cut"] + found["dropped"] != found["rows"]:
        return f"rows do not add up: {found}"
    if stage == "evaluation":
        drawn = drawn[:6]
        if metrics["prompts"] != found["kept"]:
            return f"prompts {metrics['prompts']}, rows {found}"
    if not damaged and not drop and found["rows"] != len(drawn):
        return f"{len(drawn)} rows were given, and it read {found}"
    return None


# ------------------------------------------------------------------------------------ folders of data
def has_whole_rows(path: Path) -> bool:
    """Tell whether a text file that was cut holds whole rows alone, so that nobody can see that it was cut."""
    text = path.read_bytes().decode("utf-8", "replace")
    if path.suffix == ".csv":
        return all(len(row) == len(PAIRS[0]) for row in csv.reader(text.splitlines()))
    try:
        return path.suffix == ".jsonl" and all(json.loads(line) for line in text.splitlines())
    except ValueError:
        return False


def folders(case: Case) -> Verdict:
    """A stage reads a folder of files, or a saved dataset that is damaged."""
    from datasets import Dataset, DatasetDict

    draw, given = case.draw, case.folder / "drawn"
    kind = draw.choice(("shards", "saved", "splits"))
    if kind == "shards":
        for split in draw.sample(("train", "test", "validation", "", "train-00000-of-00002"), draw.choice((1, 2, 3))):
            suffix = draw.choice((".jsonl", ".jsonl", ".csv", ".parquet"))
            case.write(f"drawn/{split or 'data'}{suffix}", WRITERS[suffix](PAIRS))
    else:
        saved = Dataset.from_list(PAIRS)
        (saved if kind == "saved" else DatasetDict(train=saved, test=saved)).save_to_disk(str(given))
    fewer = False  # rows are missing, which the file does not show
    for _ in range(draw.choice((0, 1, 1, 2))):
        files = sorted(path for path in given.rglob("*") if path.is_file())
        path = draw.choice(files)
        how = draw.choice(("cut", "gone", "link", "readme", "json", "odd", "empty"))
        case.note(f"{how} {path.name}")
        if how == "cut":
            path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size + 1)])
            fewer = fewer or has_whole_rows(path)
        elif how == "gone" and len(files) > 1:
            path.unlink()
        elif how == "link":
            path.unlink()
            path.symlink_to(draw.choice((path, "/nowhere", case.folder / "base", "/dev/null")))
            break
        elif how == "readme":
            case.write("drawn/README.md", "---\nconfigs:\n- config_name: default\n  data_files: ../pairs.jsonl\n---\n")
        elif how == "json" and path.suffix == ".json":
            path.write_text(
                draw.choice(
                    ("{}", "[]", "null", '{"splits": 5}', '{"_data_files": [{"filename": "../../texts.jsonl"}]}', "{")
                )
            )
        elif how == "odd":
            case.write(
                f"drawn/{draw.choice(('a.txt', '.hidden', 'é.jsonl', 'train.json', 'x/y/test.jsonl'))}",
                draw.choice((b"", b"{}", b"[")),
            )
        elif how == "empty":
            path.write_bytes(b"")
    stage = draw.choice(("reward", "ppo", "dpo"))
    case.note(f"{stage} {kind}")
    before = case.files()
    ended = case.run(stage, dataset_name="drawn", eval_dataset_name="")

    def wrong() -> str | None:
        return unsound(stage, case.folder / "out")

    verdict = judge(ended, names=["drawn"], lost=case.changed(before, but=() if ended.code else ("out",)), wrong=wrong)
    if verdict.name == RIGHT:
        read = read_json(case.folder / "out" / "metrics.json")["rows"]["train"]["rows"]
        if read % len(PAIRS) and not fewer:
            return Verdict(SILENT, f"a damaged folder was read: {read} rows of files that have {len(PAIRS)} each")
    return verdict
