"""Tell whose the files in an output folder are, so that a run replaces and removes only what a run of Spine has written.

`saved_files.json` lists what a stage has saved, and `manifest.json` what a checkpoint holds. Folders of releases that wrote no
such list are known by what is in them.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.listing import read_listing
from data.saving import SAVED, SAVING, is_ours, put_aside
from pipeline.backbone.adapters import ADAPTER_CONFIG, WEIGHTS
from pipeline.backbone.identity import IDENTITY
from pipeline.backbone.members import MANIFEST as ENSEMBLE
from pipeline.runs.live_files import LOG, SAMPLES
from pipeline.runs.manifest import MANIFEST, NAME, STAGING, checkpoints_in, files_in, name_in, read_manifest
from reward_models.normalization import FILE as SCALE


VALUE = tuple(f"value/{name}" for name in (ADAPTER_CONFIG, WEIGHTS, IDENTITY))
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# The files that each kind of save may write.
FILES = {
    "adapter": (ADAPTER_CONFIG, WEIGHTS, "README.md", "metrics.json", IDENTITY, *TOKENIZER),
    "report": (
        "report.json", "report.md", "ppo_curves.png", "score_histograms.png", "reward_calibration.png",
        "accuracy_by_gap.png",
    ),
    "ensemble": (ENSEMBLE, "metrics.json"),
    "best_of_n": ("best_of_n.json", "best_of_n.md", "best_of_n.png"),
    "labels": ("preferences.jsonl",),
    "reward_eval": (
        "reward_eval.json", "reward_eval.md", "reward_eval_reliability.png", "reward_eval_gap.png", "reward_eval_length.png",
        "reward_eval_domain.png",
    ),
    "pairs": ("pairs.jsonl",),
    "round_labels": ("preferences.jsonl", "votes.json"),
    "loop": ("report.md", "report.json", "rounds.png"),
    "loop_recipe": ("loop.json",),
    "table": (
        "table.json", "table.md", "trade_off.png", "value_study.png", "value_curves.png", "loop_study.png",
    ),
    "overoptimization": ("overoptimization.md", "overoptimization.json", "overoptimization.png"),
    "reproduction": ("report.md", "figure.png", "metrics.json"),
    "data": tuple(
        f"{stage}_{split}.jsonl" for stage in ("preferences", "sft", "prompts") for split in ("train", "test")
    ),
    "model": (
        "config.json", "generation_config.json", "model.safetensors", "README.md", "metrics.json", *TOKENIZER,
    ),
}  # fmt: skip
# A file of which an earlier release wrote each kind, and the keys that it has. Later kinds have always been listed.
FORMER = {
    "adapter": ((IDENTITY, "fingerprint"), ("metrics.json", None), (ADAPTER_CONFIG, "peft_type")),
    "report": (("report.json", "sft"), ("report.json", "seconds")),
    "best_of_n": (("best_of_n.json", "rows"), ("best_of_n.json", "seconds")),
    "reproduction": (("metrics.json", "criterion"),),
    "ensemble": ((ENSEMBLE, "members"),),
}
ROW = {"step", "prompt", "completion", "score", "kl"}  # keys of a row of the table of samples
UNFINISHED = "unfinished"  # an adapter of which something is still to be measured
IN_STAGING = re.compile(
    NAME.pattern + f"|replaced|removed-.*|{UNFINISHED}|" + f"{re.escape(SAMPLES)}|{re.escape(LOG)}"
)


def former_files(folder: str | Path, kind: str) -> list[str]:
    """Return the files of a kind in a folder in which an earlier release of Spine saved them, without a list."""
    folder = Path(folder)
    with suppress(ValueError):  # a damaged list: whoever saves says so
        if any(entry["kind"] == kind for entry in (read_listing(folder) or {}).values()):
            return []
    if kind == "table":
        rows = _json(folder / "table.json")
        known = isinstance(rows, list) and all(
            isinstance(row, dict) and {"method", "setting"} & set(row) for row in rows
        )
    elif kind == "data":
        known = all((folder / name).is_file() for name in FILES[kind])
    elif kind == "model":
        card = folder / "README.md"
        known = card.is_file() and "pipeline/recipes/backbone.yaml" in card.read_text(
            encoding="utf-8", errors="replace"
        )
    else:
        contents = [(_json(folder / name), key) for name, key in FORMER.get(kind, ())]
        known = bool(contents) and all(
            isinstance(content, dict) and (key is None or key in content) for content, key in contents
        )
    names = (*FILES[kind], *VALUE, SCALE) if kind == "adapter" else FILES[kind]
    return [name for name in names if known and (folder / name).is_file() and not (folder / name).is_symlink()]


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def is_table_of_samples(path: Path) -> bool:
    """Tell whether PPO wrote this table of samples: the first row has its keys, or was cut off in writing."""
    row = _first_row(path)
    return row is not None and (not row or row.keys() - {"judge", "disagreement"} == ROW)


def is_training_log(path: Path) -> bool:
    """Tell whether a run wrote this log: the first row has its keys, or was cut off in writing."""
    row = _first_row(path)
    return row is not None and (not row or row.keys() == {"step", "time", "started"})


def _first_row(path: Path) -> dict | None:
    """Return the first row of a file that a run writes line by line, empty if it was cut off; None if it is no such row."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        if not first.endswith("\n"):
            return {} if first.startswith('{"step": ') or not first else None
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row else None


LIVE = {SAMPLES: is_table_of_samples, LOG: is_training_log}  # written while a run trains, and never listed


def not_ours(folder: Path, names: Iterable[str]) -> list[str]:
    """Return those of the names in a folder at which something stands that no run of Spine has written.

    Raises the errors of `read_listing`.
    """
    listed = set(read_listing(folder) or {})
    for kind in FILES:
        listed.update(former_files(folder, kind))
    found = []
    for name in names:
        path = folder / name
        inside = [folder / parent for parent in Path(name).parents if parent != Path(".")]
        if odd := [parent for parent in inside if os.path.lexists(parent) and not parent.is_dir()]:
            found.append(odd[0].relative_to(folder).as_posix())
        elif name in LIVE:
            if os.path.lexists(path) and not LIVE[name](path):
                found.append(name)
        elif os.path.lexists(path) and (name not in listed or not path.is_file()):
            found.append(name)
    found += [name for name in (SAVING, SAVED) if not is_ours(folder / name)]
    staging = folder / STAGING
    if os.path.lexists(staging) and (
        not staging.is_dir() or not all(IN_STAGING.fullmatch(path.name) for path in staging.iterdir())
    ):
        found.append(STAGING)
    return list(dict.fromkeys(found))


def foreign_checkpoints(folder: Path) -> list[str]:
    """Return the names of what is called like a checkpoint, and is none of Spine's."""
    ours = {path.name for path in checkpoints_in(folder) if read_manifest(path)}
    named = sorted(path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if NAME.fullmatch(path.name))
    return [name for name in named if name not in ours]


def holds_only_ours(checkpoint: Path) -> bool:
    """Tell whether all that is in a checkpoint folder is what its manifest lists."""
    manifest = read_manifest(checkpoint)
    if manifest is None or checkpoint.is_symlink():
        return False
    return {name_in(path, checkpoint) for path in files_in(checkpoint)} <= {MANIFEST, *manifest["files"]}


def make_way(folder: Path, room: Path) -> None:
    """Move an earlier run's checkpoint of the same name away, to `room`; rename and keep what is none."""
    if holds_only_ours(folder):
        os.rename(folder, room)
    elif os.path.lexists(folder):
        put_aside(folder)
