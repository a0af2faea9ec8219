"""Write the files that every stage saves with its adapter: a model card, a metrics file, the backbone's identity."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from accelerate import PartialState
from huggingface_hub import upload_folder
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from data.json_files import write_json
from data.listing import LISTING
from data.saving import SAVING, save
from data.tokens import Counts
from pipeline.backbone.identity import write_identity
from pipeline.backbone.sharding import kind_of
from pipeline.runs.agreement import check_same_rows
from pipeline.runs.manifest import STAGING
from pipeline.runs.ownership import UNFINISHED, former_files


FIGURES = ("rows", "kept", "cut", "dropped", "longest")  # the reported fields of `Counts`


def seconds_running() -> float:
    """Return the seconds since this process was started, imports included; 0 if the clock was set back beyond that."""
    return max(time.time() - psutil.Process().create_time(), 0.0)


def completions_sampled(trainer: Trainer) -> int:
    """Count the completions that PPO or one of TRL's online trainers has sampled to learn from, over all processes."""
    args = trainer.args
    passes = trainer.state.global_step * args.gradient_accumulation_steps
    return -(-passes // (args.steps_per_generation * args.num_iterations)) * args.generation_batch_size


def complete_card(folder: str | Path, base: str, name: str) -> None:
    """Name the base model and the trained model, `name`, in the model card: TRL writes "None" for a model in a folder.

    Only the last part of the base's path is given, since the rest belongs to this machine.
    """
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{Path(base).name}`")
    card.write_text(text.replace('model="None"', f'model="{name}"'), encoding="utf-8")


def check_space(args: TrainingArguments, model: nn.Module) -> None:
    """Check, before training, that the disk has room for the weights that the run trains.

    Raises:
        OSError: it has not.
    """
    needed = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    folder = Path(args.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    disk = shutil.disk_usage(there)
    if disk.total and disk.free < needed:
        raise OSError(
            f"output_dir={args.output_dir!r}: its disk has {disk.free / 2**20:,.0f} MiB left, and the run saves at least "
            f"{needed / 2**20:,.0f} MiB there. Free some space, or name a folder on another disk."
        )


def finish_stage(trainer: Trainer, fingerprint: str, metrics: dict, *, folder: Path | None = None) -> None:
    """Save the trained adapter with model card, backbone identity and `metrics.json`, all at once.

    A model without an adapter is saved whole, and is its own identity.

    With `push_to_hub` they are pushed to the hub. The stage calls `trainer.end` when it no longer needs the other processes.

    Args:
        folder: where to save them, if more is to be saved with them later (`add_to_unfinished`); nothing is pushed then.

    Raises the errors of `save`.
    """
    args, output_dir = trainer.args, trainer.args.output_dir
    complete, folder = folder is None, folder or Path(output_dir)
    kind = "adapter" if isinstance(trainer.model, PeftModel) else "model"
    metrics = {**metrics, "seconds": round(trainer.seconds_before + seconds_running(), 1)}

    def write(staged: Path) -> None:
        trainer.save_model(str(staged), _internal_call=True)  # else Trainer would push before the rest is written
        if not trainer.is_world_process_zero():
            return
        args.output_dir = str(staged)  # where TRL writes the card
        try:
            trainer.create_model_card(model_name=Path(output_dir).name)
        finally:
            args.output_dir = output_dir
        add_rows_to_card(staged, metrics.get("rows", {}))
        if kind == "adapter":
            write_identity(staged, trainer.model.config, fingerprint)
        write_json(staged / "metrics.json", metrics)

    if args.should_save:
        # Other processes take part in gathering sharded weights, and would not do so twice.
        sharded = kind_of(args.distributed_state) in ("FSDP", "ZeRO-3")
        save(folder, kind, write, former=former_files(folder, kind), retry=not sharded)
    else:
        write(folder / SAVING)
    if complete and trainer.is_world_process_zero():
        push(args, trainer.hub_model_id)
    trainer.accelerator.wait_for_everyone()  # any process may read the files next


def unfinished(args: TrainingArguments) -> Path:
    """Return the folder, beneath the output folder, of an adapter that something is still to be measured of."""
    return Path(args.output_dir) / STAGING / UNFINISHED


def add_to_unfinished(args: TrainingArguments, write: Callable[[Path], None], repository: str | None) -> None:
    """Save what `finish_stage` left in `unfinished`, with what `write` adds, all at once; push it if `push_to_hub` is set.

    Raises the errors of `save`.
    """
    folder = unfinished(args)

    def write_all(staged: Path) -> None:
        shutil.copytree(folder, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LISTING))
        write(staged)

    save(args.output_dir, "adapter", write_all, former=former_files(args.output_dir, "adapter"))
    shutil.rmtree(folder, ignore_errors=True)
    push(args, repository)


def rows_report(counts: dict[str, tuple[str, Counts]]) -> dict[str, dict]:
    """Print, before training, how many rows of each dataset are read, and return the numbers for `metrics.json`.

    Args:
        counts: source and number of the rows of `train`, `held_out` and so on.
    """
    check_same_rows({f"{part} ({source})": of_part for part, (source, of_part) in counts.items()})
    for part, (source, of_part) in counts.items():
        PartialState().print(f"{part} ({source}): {of_part}.")
    return {
        part: {"source": source, **dict(zip(FIGURES, found, strict=False))} for part, (source, found) in counts.items()
    }


def add_rows_to_card(folder: Path, rows: dict[str, dict]) -> None:
    """Write into the model card how many rows were trained on."""
    card = folder / "README.md"
    if rows and card.is_file():
        with card.open("a", encoding="utf-8") as file:
            file.write("\n## Data\n" + rows_table(rows) + "\n")


def rows_table(rows: dict[str, dict]) -> str:
    """Return the result of `rows_report` as a markdown table."""
    lines = [
        "| rows | source | read | kept whole | cut | dropped | longest (tokens) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part, of_part in rows.items():
        figures = (f"{of_part[name]:,}" for name in FIGURES)
        lines.append(f"| {part} | {of_part['source']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def push(args: TrainingArguments, repository: str | None) -> None:
    """Upload the output folder if `push_to_hub` is set, without pickles and checkpoints.

    Trainer itself pushes checkpoints, as `hub_strategy` says.
    """
    if args.push_to_hub:
        assert repository is not None  # Trainer has made it
        upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            commit_message="End of training",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*", ".sav*", "*.kept-*", "*.bin", "*.pt"],
        )
