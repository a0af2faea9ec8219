"""Checkpoints that are whole or not there, runs that resume to the bit, and signals that end a run without loss.

A checkpoint is written to a staging folder, forced to disk and renamed, so that a run killed at any moment leaves no
half of one. `manifest.json` lists its files with their SHA-256. Weights, rollouts and our own state are safetensors and
JSON; Trainer's optimizer, scheduler and random states it reads with torch's `weights_only`, which executes nothing.
Where FSDP or DeepSpeed share out the optimizer, each process writes its part as safetensors too: theirs are pickles.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import compare_versions, send_to_device
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.json_files import write_json
from pipeline.backbone.adapters import WEIGHTS
from pipeline.backbone.architecture import all_finite
from pipeline.backbone.identity import digest
from pipeline.backbone.sharding import kind_of
from pipeline.runs.divergence import first_problem, learns_from, remedy
from pipeline.runs.folders import open_to_umask
from pipeline.runs.outputs import complete_card, seconds_running
from pipeline.runs.state_files import load_state, local_part, save_state
from reward_models.composite import RewardError


MANIFEST = "manifest.json"
STAGING = ".staging"
NAME = re.compile(PREFIX_CHECKPOINT_DIR + r"-\d+")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A place among the batches means something only while these stay as they were.
ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
)
# What Trainer starts anew with each call of `train`: sums of the loss since the last log and since the beginning.
LOOP = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_num_input_tokens_seen",
    # Until 5.19 Trainer divided the loss of a run by all its steps.
    *(["_initial_global_step"] if compare_versions("transformers", ">=", "5.19.0") else []),
)
# What DeepSpeed's optimizers call their part of torch's optimizer state and of the weights in float32: ZeRO-2, ZeRO-3.
ZERO = (
    ("base_optimizer_state", "single_partition_of_fp32_groups"),
    ("optimizer_state_dict", "fp32_flat_groups"),
)


# ------------------------------------------------------------------------------------------ what is there to resume
def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, checked, or None to start anew.

    `auto` is the newest in `output_dir`. A damaged one is an error, never passed over: which other one to go back to
    is the user's choice.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: it is damaged, or of a launch or a recipe that this one cannot go on from.
    """
    asked = args.resume_from_checkpoint
    if not asked:
        return None
    if asked == "auto":
        found = _checkpoints(args.output_dir)
        if not found:
            PartialState().print(f"{args.output_dir} holds no checkpoint: training starts anew.")
            return None
        asked = str(found[-1])
    check(asked, args)
    PartialState().print(f"Training resumes from {asked}.")
    return asked


def check(folder: str | Path, args: TrainingArguments) -> None:
    """Read a checkpoint through, and see that it fits this launch; raises what `find_checkpoint` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(folder)!r}: no such folder. Name a {PREFIX_CHECKPOINT_DIR}-<step> folder, or "
            f"auto for the newest of output_dir."
        )
    manifest = _read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder / MANIFEST}: missing or damaged, so the checkpoint cannot be trusted. {_other(folder)}"
        )
    names = {_name(path, folder) for path in _files(folder)} - {MANIFEST}
    for name, expected in manifest["files"].items():
        path = folder / name
        if name not in names:
            raise FileNotFoundError(f"{path}: the checkpoint's manifest lists it and it is missing. {_other(folder)}")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, written with {expected['bytes']}: it is cut off or was changed. "
                f"{_other(folder)}"
            )
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"{path}: its SHA-256 is not the manifest's: the file is damaged. {_other(folder)}")
    unlisted = sorted(names - manifest["files"].keys())
    if unlisted:
        raise ValueError(f"{folder / unlisted[0]}: not a file of this checkpoint (its manifest has none). Remove it.")
    if "optimizer" not in manifest["holds"]:
        raise ValueError(
            f"{folder}: written with save_only_model, so it holds no state to resume from. {_other(folder)}"
        )
    if manifest["world_size"] != args.world_size:
        raise ValueError(
            f"{folder}: written by {manifest['world_size']} processes, and this launch has {args.world_size}. Random "
            f"states, rollouts and the order of prompts belong to a process each: launch with --num_processes "
            f"{manifest['world_size']}."
        )
    kind = kind_of(args.distributed_state)
    if manifest.get("kind", kind) != kind:
        raise ValueError(
            f"{folder}: written under {manifest['kind']}, and this launch runs as {kind}. The optimizer's state lies "
            f"otherwise there: launch as then, or start anew."
        )
    for name, then in manifest["order"].items():
        now = getattr(args, name, None)
        if now != then:
            raise ValueError(
                f"{folder}: written with {name}={then!r}, and {name}={now!r} would put its step elsewhere among the "
                f"batches. Set {name} as it was, or start anew."
            )


def _other(folder: Path) -> str:
    """The remedy for a checkpoint of no use: the newest of the others."""
    others = [path for path in _checkpoints(folder.parent) if path.name != folder.name and _read_manifest(path)]
    return f"Go on from another: --resume_from_checkpoint {others[-1]}" if others else "There is no other: start anew."


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders in the order they were written; those that do not say when come last, so that they are
    noticed."""
    folders = [path for path in Path(output_dir).glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    written = {path: (_read_manifest(path) or {}).get("written", float("inf")) for path in folders}
    return sorted(folders, key=lambda path: (written[path], len(path.name), path.name))


def _read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest, None if there is none or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["sha256"] == _sha256_of(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256_of(manifest: dict) -> str:
    """Of all that a manifest says, but for this itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


# ------------------------------------------------------------------------------------------ state as files


def _shard_like(parameter: Tensor, value: Any) -> Any:
    """What an optimizer keeps for a sharded parameter, in this process: a moment is sharded as it is, a count is not."""
    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, Tensor)
        or value.shape != local_part(parameter).shape
    ):
        return value
    place = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(value.to(parameter.device), parameter.device_mesh, parameter.placements, **place)


def check_zero(optimizer: Any) -> None:
    """Refuse an optimizer of DeepSpeed's that does not keep its part of the state in memory, flat.

    Raises:
        ValueError: the DeepSpeed config asks for one.
    """
    flat = any(
        hasattr(optimizer, name) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    )
    on_disk = any(getattr(optimizer, name, False) for name in ("swap_optimizer", "params_in_nvme_and_cpu"))
    if not flat or on_disk or optimizer.elastic_checkpoint:
        raise ValueError(
            f"the DeepSpeed config makes the optimizer a {type(optimizer).__name__} of which no checkpoint can be "
            f"written: take stage 1, 2 or 3 without nvme and elastic_checkpoint, as accelerate_configs/zero2.json."
        )


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------ trainers
class Checkpointed:
    """Put before one of TRL's trainers, `class SFT(Checkpointed, SFTTrainer)`, it gives it what the module says.

    Trainer saves weights, optimizer, scheduler, its own state and random states, and finds its place among the batches
    again. What it and TRL would lose is in `training_state`: what has been measured since the last log, the order of an
    epoch that has begun, and the completions that an update is learning from.
    """

    seconds_before = 0.0  # that the run took before it was resumed
    _staging = False
    _sampler = None
    _signal = 0  # the last one that asked to stop, on this process
    _stopped_by = 0  # the one that this run stops for, on all processes
    diverged: str | None = None  # what is not finite, once something is
    _loss = 0.0  # of the optimizer step under way, where it is not finite
    _within_step = False  # whether a part of an optimizer step is done
    _written = 0  # the step of the last checkpoint that this run wrote
    _left_out = False  # whether that step was not taken, and the weights before it are still to be saved

    # -------------------------------------------------------------------------------------- writing
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, without the pickle of its arguments that it leaves beside the weights."""
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _get_output_dir(self, trial) -> str:
        """Where Trainer puts checkpoints: while it writes one, the staging folder."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, staged = output_dir / name, output_dir / STAGING / name
        best_before = self.state.best_model_checkpoint
        self._staging = True
        try:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self._best() == staged:  # where Trainer found it
                self.state.best_model_checkpoint = str(folder)
                if self.args.should_save:
                    self.state.save_to_json(staged / TRAINER_STATE_NAME)
            if not self.args.save_only_model:
                save_state(self.training_state(), staged / f"state_{self.args.process_index}")
            self.accelerator.wait_for_everyone()  # all files are there
            if self.args.should_save:
                self._publish(staged, folder)
            self._written = self.state.global_step
        except Exception as error:  # writers raise their own kinds, tokenizers a bare Exception
            self.state.best_model_checkpoint = best_before
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written: {error}. Checkpoints before it are whole. Free some space if the disk "
                f"is full, and resume with --resume_from_checkpoint auto."
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, once the checkpoint has its name: it uploads in the background."""
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, staged: Path, folder: Path) -> None:
        """Force a written checkpoint to disk, give it its name, and remove what `save_total_limit` leaves no room for."""
        manifest = {
            "step": self.state.global_step,
            "written": time.time(),
            "world_size": self.args.world_size,
            "kind": kind_of(self.args.distributed_state),
            "holds": ["weights"] if self.args.save_only_model else ["weights", "optimizer"],
            "order": {name: getattr(self.args, name) for name in ORDER if hasattr(self.args, name)},
            "files": {
                _name(path, staged): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(_files(staged))
            },
        }
        manifest["sha256"] = _sha256_of(manifest)
        write_json(staged / MANIFEST, manifest)
        open_to_umask(staged)
        for path in staged.rglob("*"):
            _sync(path)
        _sync(staged)
        if folder.exists():  # of an earlier run
            os.rename(folder, staged.parent / "replaced")
        os.rename(staged, folder)
        _sync(folder.parent)
        # Where training has diverged, the older ones may be all that is left of a good run.
        self._make_room(None if self.diverged else self.args.save_total_limit, folder.name)

    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return Path(best) if best else None

    def _make_room(self, limit: int | None, *kept: str) -> None:
        """Remove the oldest checkpoints of ours until `limit` are left, but not the best nor those that are `kept`, and
        what is staged. A checkpoint loses its name first, so that none is ever half there."""
        staging, best = Path(self.args.output_dir) / STAGING, self._best()
        ours = [path for path in _checkpoints(self.args.output_dir) if _read_manifest(path)]
        spare = [path for path in ours if path.name not in (*kept, best and best.name)]
        staging.mkdir(exist_ok=True)
        for path in spare[: max(len(ours) - (limit or len(ours)), 0)]:
            os.rename(path, staging / f"removed-{path.name}")
        shutil.rmtree(staging, ignore_errors=True)

    def training_state(self) -> dict:
        """What this process needs to go on, beside what Trainer saves: nested dicts and lists of tensors and JSON."""
        names = ("_total_train_tokens", "_step", "_current_train_step_time", "_buffered_inputs")
        state = {
            "counters": {name: getattr(self, name) for name in names if hasattr(self, name)},
            "metrics": self._metrics,
            "loop": {name: getattr(self, name) for name in LOOP},
            "trained_for": self._trained_before + time.time() - self._began,
            "epoch_start": self._epoch_start,
            "now": self._order_state(),
            "rows": self._rows(),
            "frozen": self._frozen,
            "seconds": self.seconds_before + seconds_running(),
        }
        if hasattr(self, "_logs"):  # the table of completions
            state["logs"] = {name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")}
            state["logs"] |= {
                "rewards": {name: list(column) for name, column in self._logs["rewards"].items()},
                "extra": {name: list(map(str, column)) for name, column in self._logs["extra"].items()},
            }
        return state

    # -------------------------------------------------------------------------------------- resuming
    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer's, from a checkpoint that is read through before, and until a signal asks to stop.

        SIGTERM, SIGINT and SIGUSR1 finish the update that is under way, write a checkpoint and exit with 128 + signal.
        """
        if resume_from_checkpoint:
            check(resume_from_checkpoint, self.args)
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)  # of a run that was killed
        self._frozen = digest((n, p) for n, p in sorted(self.model.named_parameters()) if not p.requires_grad)
        self._trained = {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        for config in self.model.peft_config.values():  # peft writes a set in an order that differs between processes
            if isinstance(config.target_modules, set):
                config.target_modules = sorted(config.target_modules)
        self._signal = self._stopped_by = 0
        self.diverged, self._loss, self._left_out = None, 0.0, False
        self._within_step, self._written = False, 0
        self._resumed, self._trained_before, self._began = None, 0.0, time.time()
        handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other may set them
            handlers = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The trained adapter, with its head if it has one."""
        model = self.accelerator.unwrap_model(model or self.model)
        path = Path(resume_from_checkpoint) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        weights = load_file(path)
        odd = sorted(weights.keys() ^ get_peft_model_state_dict(model).keys())
        if odd:
            raise ValueError(f"{path}: {len(odd)} tensors do not match the model's adapter, first {odd[0]!r}.")
        set_peft_model_state_dict(model, weights)

    def _load_best_model(self) -> None:
        load = self._load_shards if self._shared_out else self._load_from_checkpoint
        load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._shared_out:
            self._load_shards(checkpoint)
        else:  # Trainer's would do, but until transformers 5.17 several processes on CPUs cannot read with it
            for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))
        state = load_state(Path(checkpoint) / f"state_{self.args.process_index}")
        if state["rows"] != self._rows():
            raise ValueError(
                f"{checkpoint}: written with {state['rows']} rows to train on, and there are {self._rows()}. Resume on "
                f"the same data, or start anew."
            )
        if state["frozen"] != self._frozen:
            raise ValueError(
                f"{checkpoint}: written on another backbone, SFT adapter or reward adapter than these. Name the same "
                f"ones (model_name_or_path, sft_adapter, reward_adapter), or start anew."
            )
        then, now = AutoTokenizer.from_pretrained(checkpoint).pad_token, self.processing_class.pad_token
        if then != now:
            raise ValueError(
                f"{checkpoint}: written with {then!r} as padding, and this run pads with {now!r}. Set --pad_token {then!r}, "
                f"or start anew."
            )
        best = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
        if best:  # it lies beside this one, wherever the run's folder has been moved
            best = Path(checkpoint).parent / Path(best).name
            if self.args.load_best_model_at_end and not best.is_dir():
                raise FileNotFoundError(
                    f"{best}: the best checkpoint so far is missing, and load_best_model_at_end needs it. Put it back, "
                    f"or set load_best_model_at_end: false."
                )
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        self.load_training_state(state)

    def load_training_state(self, state: dict) -> None:
        """Take up what `training_state` gave."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        if state["counters"].get("_buffered_inputs"):
            self._buffered_inputs = send_to_device(self._buffered_inputs, self.args.device)
        self._metrics = {mode: defaultdict(list, values) for mode, values in state["metrics"].items()}
        self.seconds_before = state["seconds"]
        self._trained_before, self._resumed = state["trained_for"], state
        for name, values in state.get("logs", {}).items():
            if isinstance(values, list):
                self._logs[name].extend(values)
            else:
                for column, entries in values.items():
                    self._logs[name][column].extend(entries)

    # -------------------------------------------------------------------------------------- FSDP and DeepSpeed
    @property
    def _shared_out(self) -> bool:
        """Whether processes hold a part each of the optimizer's state."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Trainer's, but it would have accelerate and DeepSpeed unpickle a checkpoint of theirs, where this has ours."""
        theirs = None if self._shared_out else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, theirs)
        if self.is_deepspeed_enabled:
            check_zero(self.optimizer.optimizer)
        if self._shared_out and resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            if self.accelerator.scaler is not None:
                self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's; where processes share the optimizer out, each writes its part, with the weights that it steps."""
        if not self._shared_out:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"trained": self._trained, "scheduler": self.lr_scheduler.state_dict()}
        if self.is_deepspeed_enabled:
            zero, (of_optimizer, of_weights) = self._zero_state()
            scale = {
                name: x for name, x in vars(self.optimizer.optimizer.loss_scaler).items() if type(x) in (int, float)
            }
            state |= {"optimizer": zero[of_optimizer], "weights": zero[of_weights], "loss_scaler": scale}
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            state |= {"optimizer": self.optimizer.state_dict(), "weights": parameters}
        save_state(state, Path(output_dir) / f"optimizer_{self.args.process_index}")

    def _zero_state(self) -> tuple[dict, tuple[str, str]]:
        """The state of DeepSpeed's optimizer in this process, and the names of what is saved of it."""
        state = self.optimizer.optimizer.state_dict()
        return state, next(names for names in ZERO if names[0] in state)

    def _load_shards(self, checkpoint: str) -> None:
        """This process's part of the optimizer and of the weights, with the scheduler."""
        path = Path(checkpoint) / f"optimizer_{self.args.process_index}"
        state = load_state(path)
        then, now = state["trained"], self._trained
        odd = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if odd:
            raise ValueError(f"{path}.json: {len(odd)} tensors do not match the model's adapter, first {odd[0]!r}.")
        # JSON has no integers for keys.
        state["optimizer"]["state"] = {int(index): entry for index, entry in state["optimizer"]["state"].items()}
        if self.is_deepspeed_enabled:
            zero = self.optimizer.optimizer
            vars(zero.loss_scaler).update(state["loss_scaler"])
            whole, (of_optimizer, of_weights) = self._zero_state()
            whole |= {of_optimizer: state["optimizer"], of_weights: state["weights"]}
            if hasattr(zero, "checkpoint_event_prologue"):
                zero.checkpoint_event_prologue()
            zero.load_state_dict({self.args.process_index: whole}, load_from_fp32_weights=True)
            if hasattr(zero, "checkpoint_event_epilogue"):
                zero.checkpoint_event_epilogue()
            else:
                zero.update_lp_params()
        else:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for index, entry in state["optimizer"]["state"].items():
                state["optimizer"]["state"][index] = {
                    name: _shard_like(parameters[index], x) for name, x in entry.items()
                }
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, saved in zip(parameters, state["weights"], strict=True):
                local_part(parameter.detach()).copy_(saved)
        self.lr_scheduler.load_state_dict(state["scheduler"])

    # -------------------------------------------------------------------------------------- the place in an epoch
    def _take_up_loop(self) -> None:
        for name, value in self._resumed.pop("loop").items():
            setattr(self, name, send_to_device(value, self.args.device))

    def _rows(self) -> int | None:
        return len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None

    # -------------------------------------------------------------------------------------- the order of batches
    def _get_train_sampler(self, *args):
        self._sampler = super()._get_train_sampler(*args)
        return self._sampler

    def _order_state(self) -> dict[str, Tensor | None]:
        """Random states that an epoch's order is drawn from: torch's, or that of the sampler's own generator, which moves
        on with every epoch."""
        generator = getattr(self._sampler, "generator", None)
        return {"torch": torch.get_rng_state(), "sampler": None if generator is None else generator.get_state()}

    def _run_epoch(self, **kwargs):
        """Trainer's, with the batches in the order that they had when the epoch began.

        It skips those that were trained on, but samplers draw their order when an epoch begins, from random states
        that are then no longer those of the checkpoint.
        """
        checkpoint, skipped = kwargs["resume_from_checkpoint"], kwargs["steps_trained_in_current_epoch"]
        sampler = None
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            self._take_up_loop()
            if skipped:
                torch.set_rng_state(self._resumed["epoch_start"]["torch"])
            sampler = self._resumed["epoch_start" if skipped else "now"]["sampler"]
            if not skipped:
                self._load_rng_state(checkpoint)
        if self.state.global_step >= self.state.max_steps:  # Trainer would take one more step before it looks
            self.control.should_training_stop = True
            return
        if sampler is not None:
            self._sampler.generator.set_state(sampler)
        self._epoch_start = self._order_state()
        try:
            super()._run_epoch(**kwargs)
        except RewardError as error:
            raise RewardError(f"{error} {self._keep(kwargs['model'], kwargs['trial'])}") from error
        except FloatingPointError as error:
            if self.diverged:
                raise
            self.diverged = f"{error} after step {self.state.global_step}"
            raise self.divergence() from error

    def _keep(self, model, trial) -> str:
        """Save a checkpoint of the last whole step, where rewards failed on all processes, and say where it is."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == 0:
            return "Nothing has been trained yet."
        if self._within_step:
            return f"Training ends in the middle of step {step + 1}, and earlier checkpoints are as they were."
        if step != self._written:
            self._save_checkpoint(model, trial)
        return f"Correct the function and go on from {folder}: --resume_from_checkpoint auto."

    # -------------------------------------------------------------------------------------- logs and cards
    def create_model_card(self, *args, **kwargs) -> None:
        """Override `create_model_card`: name the base model also where it is a folder. With a checkpoint TRL would write it
        into `output_dir`, over that of an earlier run's adapter."""
        if self._staging:
            return
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_card(Path(self.args.output_dir) / "README.md", self.model.config._name_or_path)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Override `log`: leave out of the history what is not finite and so was not measured, such as the mean of a reward
        that applied to no completion. The history goes into JSON."""
        super().log(logs, *args, **kwargs)
        row = self.state.log_history[-1]
        for name in [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
            del row[name]

    # -------------------------------------------------------------------------------------- divergence
    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Override `training_step`: note a loss that is not finite. Trainer would log the mean of those before it."""
        learns = learns_from(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._within_step = True
        if learns and not loss.isfinite():
            self._loss = loss.item()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Override `_get_grad_norm`, which Trainer calls just before the optimizer steps: where the loss or a gradient is
        not finite on any process, that step is not taken and training ends.

        DeepSpeed steps as one with the backward pass. With float16, a gradient that is not finite lowers the loss's scale,
        and is no divergence until nothing is left of the scale.

        Raises:
            FloatingPointError: under DeepSpeed; elsewhere `_finalize_training` raises it, once a checkpoint is written.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        ignored = norm is None or (scaler is not None and scaler.get_scale() >= 1)
        step = torch.tensor([[self._loss, 0.0 if ignored else float(norm)]], device=self.args.device)
        problems = [first_problem(*row) for row in self.accelerator.gather(step).tolist()]
        problem = next(filter(None, problems), None)
        if problem is None:
            return norm
        self.diverged = f"{problem} at step {self.state.global_step + 1}"
        if self.is_deepspeed_enabled:
            if not self.accelerator.optimizer_step_was_skipped:
                self.diverged += ", which DeepSpeed has taken"
            raise self.divergence()
        model.zero_grad(set_to_none=True)  # so that the optimizer leaves weights and its own state as they are
        self._tr_loss.nan_to_num_(0.0)  # it and the metrics since the last log go into the checkpoint
        self._metrics["train"].clear()
        self._left_out = self.control.should_training_stop = True
        return 0.0

    def _look_at_weights(self) -> None:
        """Before Trainer saves or evaluates: refuse weights that are not finite. Where a step was left out, save the weights
        before it, once, and log nothing of it."""
        control = self.control
        if not self.diverged and not (control.should_save or control.should_evaluate or control.should_training_stop):
            return
        mine = torch.tensor([int(all_finite(p for p in self.model.parameters() if p.requires_grad))])
        finite = bool(self.accelerator.gather(mine.to(self.args.device)).all())
        if not self.diverged and not finite:
            self.diverged = f"A trained weight is not finite after step {self.state.global_step}"
        if self.diverged:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = False
            control.should_save, self._left_out = self._left_out and finite, False

    def _look_at_outputs(self) -> None:
        """After the last step: refuse weights that are finite and give a token logits that are not."""
        model, ids = self.model_wrapped, torch.ones(1, 1, dtype=torch.long, device=self.args.device)
        training = model.training  # TRL's logs go by it
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=ids, attention_mask=ids).logits
        model.train(training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the best checkpoint, which may be loaded next, goes into the shards
        if not self.accelerator.gather(logits.isfinite().all().int().view(1)).all():
            self.diverged = f"An output of the model is not finite after step {self.state.global_step}"

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Override `evaluate`: raise a FloatingPointError where no batch has a finite loss."""
        metrics = super().evaluate(*args, **kwargs)
        losses = [value for name, value in metrics.items() if name.endswith("_loss") and not math.isfinite(value)]
        if losses:
            self.diverged = f"The loss on held-out rows is {losses[0]} after step {self.state.global_step}"
            raise self.divergence()
        return metrics

    def divergence(self) -> FloatingPointError:
        """Say what is not finite, what is left, and what to do."""
        folder = Path(self.args.output_dir)
        kept = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        left = f"{kept} has the weights before that step. " if self._written == self.state.global_step > 0 else ""
        return FloatingPointError(
            f"{self.diverged}: training has diverged and ends. {left}No adapter is saved, so that one of an earlier run in "
            f"{folder} is as it was. {remedy(self.args)}"
        )

    # -------------------------------------------------------------------------------------- stopping
    @property
    def between_updates(self) -> bool:
        """Whether a signal may end training after this step."""
        return True

    def _ask_to_stop(self, number, frame) -> None:
        self._signal = number

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Trainer's, after every step; here it also ends training and saves, if any process was asked to stop."""
        if not self._stopped_by and (self.between_updates or self.control.should_training_stop):
            asked = torch.tensor([self._signal], device=self.args.device)
            self._stopped_by = int(self.accelerator.gather(asked).max())
            if self._stopped_by:
                self.control.should_training_stop = self.control.should_save = True
        self._within_step = False
        self._look_at_weights()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def end(self) -> None:
        """Finish the trackers and leave the process group; Trainer has this from transformers 5.18 on."""
        self.accelerator.end_training()

    def _finalize_training(self, trial, num_train_samples, start_time):
        if not self.diverged and not self._stopped_by:
            self._look_at_outputs()
        if self.diverged:
            self._finish_current_push()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise self.divergence()
        if self._stopped_by:
            self._finish_current_push()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            PartialState().print(
                f"{signal.Signals(self._stopped_by).name}: stopped after step {self.state.global_step}; "
                f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step} is in {self.args.output_dir}. Go on with the same "
                f"command and --resume_from_checkpoint auto."
            )
            self.end()
            raise SystemExit(128 + self._stopped_by)
        if self.args.should_save and self.state.best_model_checkpoint and self.args.save_total_limit == 1:
            self._make_room(1)
        if self._resumed and "loop" in self._resumed:  # there was no epoch left
            self._take_up_loop()
        return super()._finalize_training(trial, num_train_samples, start_time - self._trained_before)
