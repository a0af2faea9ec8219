"""What every stage leaves behind beside its adapter: a model card, a metrics file, the backbone's identity."""

import json
import time
from pathlib import Path

import psutil
from huggingface_hub import upload_folder
from transformers import Trainer, TrainingArguments

from pipeline.folders import adapter_folder, read_json
from pipeline.loading import stamp


def seconds_running() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def read_metrics(folder: str | Path) -> dict:
    """The metrics file beside an adapter, empty when there is none (an adapter made elsewhere)."""
    path = adapter_folder(str(folder)) / "metrics.json"
    return read_json(path) if path.is_file() else {}


def completions_sampled(trainer: Trainer) -> int:
    """How many completions one of TRL's online trainers, or PPO, has sampled to learn from, over all processes."""
    args = trainer.args
    passes = trainer.state.global_step * args.gradient_accumulation_steps
    return -(-passes // (args.steps_per_generation * args.num_iterations)) * args.generation_batch_size


def finish_stage(trainer: Trainer, fingerprint: str, metrics: dict, *, complete: bool = True) -> None:
    """Save the trained adapter with model card, backbone identity and `metrics.json`, and push them to the hub with
    `push_to_hub`, unless the folder is not `complete` yet. The stage calls `trainer.end` once nothing more needs the
    other processes."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # else Trainer would push before the rest is there
    if trainer.is_world_process_zero():
        trainer.create_model_card(model_name=folder.name)
        stamp(folder, trainer.model.config, fingerprint)
        metrics = {**metrics, "seconds": round(trainer.seconds_before + seconds_running(), 1)}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if complete:
            push(trainer.args, trainer.hub_model_id)
    trainer.accelerator.wait_for_everyone()  # what is read next, by whichever process, is there


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
