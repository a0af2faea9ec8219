"""What every stage leaves behind beside its adapter: a model card, a metrics file, the backbone's identity."""

import time
from pathlib import Path

import psutil
from accelerate import PartialState
from huggingface_hub import upload_folder
from transformers import Trainer, TrainingArguments

from data.json_files import write_json
from data.tokens import Counts
from pipeline.backbone.identity import write_identity
from pipeline.runs.folders import open_to_umask


FIGURES = ("rows", "kept", "cut", "dropped", "longest")  # of `Counts`, those that are reported


def seconds_running() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def completions_sampled(trainer: Trainer) -> int:
    """How many completions one of TRL's online trainers, or PPO, has sampled to learn from, over all processes."""
    args = trainer.args
    passes = trainer.state.global_step * args.gradient_accumulation_steps
    return -(-passes // (args.steps_per_generation * args.num_iterations)) * args.generation_batch_size


def complete_card(card: Path, base: str) -> None:
    """Name the base model and the trained one in a model card, where TRL writes "None" of what is in a folder. Of the base's
    path it gives the last name alone: the rest is of this machine."""
    text = card.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{Path(base).name}`")
    card.write_text(text.replace('model="None"', f'model="{card.parent.name}"'), encoding="utf-8")


def finish_stage(trainer: Trainer, fingerprint: str, metrics: dict, *, complete: bool = True) -> None:
    """Save the trained adapter with model card, backbone identity and `metrics.json`, and push them to the hub with
    `push_to_hub`, unless the folder is not `complete` yet. The stage calls `trainer.end` once nothing more needs the
    other processes."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # else Trainer would push before the rest is there
    if trainer.is_world_process_zero():
        trainer.create_model_card(model_name=folder.name)
        add_rows_to_card(folder, metrics.get("rows", {}))
        write_identity(folder, trainer.model.config, fingerprint)
        metrics = {**metrics, "seconds": round(trainer.seconds_before + seconds_running(), 1)}
        write_json(folder / "metrics.json", metrics)
        for adapter in (folder, folder / "value"):
            open_to_umask(adapter)
        if complete:
            push(trainer.args, trainer.hub_model_id)
    trainer.accelerator.wait_for_everyone()  # what is read next, by whichever process, is there


def rows_report(counts: dict[str, tuple[str, Counts]]) -> dict[str, dict]:
    """Say, before training, how many rows of each dataset are read, and return it for `metrics.json`.

    Args:
        counts: for `train`, `held_out` and so on, where the rows come from and how many there are.
    """
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
    """Return what `rows_report` returned as a markdown table."""
    lines = [
        "| rows | source | read | kept whole | cut | dropped | longest (tokens) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part, of_part in rows.items():
        figures = (f"{of_part[name]:,}" for name in FIGURES)
        lines.append(f"| {part} | {of_part['source']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def push(args: TrainingArguments, repository: str | None) -> None:
    """With `push_to_hub`, upload the output folder as it is, but for pickles, and for checkpoints, which are Trainer's to
    push as `hub_strategy` says."""
    if args.push_to_hub:
        upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            commit_message="End of training",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*", "*.bin", "*.pt"],
        )
