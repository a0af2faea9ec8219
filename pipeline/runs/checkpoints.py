"""Write complete checkpoints, resume runs to the bit, and end a run on a signal without loss.

A checkpoint is written to a staging folder, forced to disk and then renamed, so that a run that is killed at any moment
never leaves an incomplete checkpoint. `manifest.json` lists the files with their SHA-256. Weights, rollouts and Spine's own
state are safetensors and JSON. Trainer's optimizer, scheduler and random states are read with torch's `weights_only`, which
executes nothing. Where FSDP or DeepSpeed shard the optimizer, each process writes its part as safetensors too, instead of
their pickles.
"""

import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data.json_files import write_json
from data.saving import open_to_umask, sync
from data.waiting import waiting_for
from pipeline.backbone.adapters import WEIGHTS
from pipeline.runs.agreement import check_same_rows
from pipeline.runs.divergence import EndsAtDivergence
from pipeline.runs.epochs import LOOP, ResumesEpochs
from pipeline.runs.manifest import (
    MANIFEST,
    STAGING,
    check_checkpoint,
    file_digest,
    files_in,
    launch_entries,
    manifest_digest,
    name_in,
    read_manifest,
)
from pipeline.runs.optimizer_shards import OptimizerShards, was_shared_out
from pipeline.runs.output_lock import release_all
from pipeline.runs.outputs import check_space, complete_card, seconds_running
from pipeline.runs.ownership import make_way
from pipeline.runs.resumed_options import ResumesOptions
from pipeline.runs.rotation import Rotates
from pipeline.runs.state_files import save_state
from pipeline.runs.stopping import StopsOnSignals
from pipeline.runs.terminal import write_lines
from pipeline.runs.training_log import KeepsLog
from pipeline.runs.whole_models import load_weights
from pipeline.runs.worlds import state_of
from reward_models.composite import RewardError


class Checkpointed(
    OptimizerShards, ResumesEpochs, ResumesOptions, EndsAtDivergence, StopsOnSignals, Rotates, KeepsLog
):
    """Mixin for one of TRL's trainers, as in `class SFT(Checkpointed, SFTTrainer)`: give it what this module describes.

    Trainer saves weights, optimizer, scheduler, its own state and random states, and finds its position among the batches
    again. `training_state` holds what Trainer and TRL would lose: the figures since the last log, the order of an epoch that
    has begun, and the completions that an update learns from.
    """

    seconds_before = 0.0  # time of the run before it was resumed
    _resumed: dict[str, Any] | None = None  # the state of the checkpoint that the run goes on from
    _staging = False  # whether a checkpoint is being written

    # -------------------------------------------------------------------------------------- writing
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Override `_save`: remove the pickle of the arguments that Trainer writes beside the weights."""
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _get_output_dir(self, trial) -> str:
        """Override `_get_output_dir`: return the staging folder while a checkpoint is being written."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Override `_save_checkpoint`: write to the staging folder, then rename; raise an OSError if writing fails."""
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
            if self._best() == staged:  # Trainer knows only the staging folder
                self.state.best_model_checkpoint = str(folder)
                if self.args.should_save:
                    self.state.save_to_json(staged / TRAINER_STATE_NAME)
            if not self.args.save_only_model:
                save_state(self.training_state(), staged / f"state_{self.args.process_index}")
            with waiting_for(f"all processes to write {name}"):
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(staged, folder)
            self._written = self.state.global_step
        except Exception as error:  # writers raise their own types, tokenizers a bare Exception
            self.state.best_model_checkpoint = best_before
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written: {error}. Earlier checkpoints are complete. If the disk is full, free some "
                f"space. Then resume with --resume_from_checkpoint auto."
            ) from error
        finally:
            self._staging = False
        with waiting_for(f"{name} to be forced to disk"):
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Override `_push_from_checkpoint`: upload only after the checkpoint has its name."""
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, staged: Path, folder: Path) -> None:
        """Force a written checkpoint to disk, give it its name, and remove checkpoints beyond `save_total_limit`."""
        manifest = {
            "run": self._run,
            "step": self.state.global_step,
            "written": time.time(),
            "holds": ["weights"] if self.args.save_only_model else ["weights", "optimizer"],
            **launch_entries(self.args),
            "options": self._options,
            "contents": self._contents,
            "files": {
                name_in(path, staged): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                for path in sorted(files_in(staged))
            },
        }
        manifest["sha256"] = manifest_digest(manifest)
        write_json(staged / MANIFEST, manifest)
        open_to_umask(staged)
        for path in staged.rglob("*"):
            sync(path)
        sync(staged)
        make_way(folder, staged.parent / "replaced")
        os.rename(staged, folder)
        sync(folder.parent)
        # If training has diverged, only the older checkpoints may be good.
        self._make_room(None if self.diverged else self.args.save_total_limit, folder.name)

    def training_state(self) -> dict:
        """Return what this process needs to resume and Trainer does not save: nested dicts and lists of tensors and JSON."""
        names = ("_total_train_tokens", "_step", "_current_train_step_time", "_buffered_inputs")
        state: dict[str, Any] = {
            "counters": {name: getattr(self, name) for name in names if hasattr(self, name)},
            "metrics": self._metrics,
            "loop": {name: getattr(self, name) for name in LOOP},
            "trained_for": self._trained_before + time.monotonic() - self._began,
            "epoch_start": self._epoch_start,
            "now": self._order_state(),
            "rows": self._rows(),
            "frozen": self._contents["frozen"],
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
    def train(
        self,
        resume_from_checkpoint: str | None = None,
        options: dict[str, Any] | None = None,
        preflight: list[dict[str, Any]] | None = None,
        **kwargs,
    ):
        """Override `train`: check the checkpoint first, stop on a signal, and keep the log in a file.

        On SIGTERM, SIGINT and SIGUSR1 the run finishes the current update, writes a checkpoint and exits with 128 + signal.
        The second of these ends it at once. `options` are all options of the stage (`options_of`), to be compared with the
        checkpoint's. `preflight` are the checks before training, for the log.
        """
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.args)
        self.check_changes(resume_from_checkpoint, options)
        check_same_rows({"train_dataset": (self._contents["rows"], self._contents["row_contents"])})
        self._say_changes(resume_from_checkpoint)
        check_space(self.args, self.model)
        if self.args.should_save:
            self._number_run(resume_from_checkpoint)
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)  # of a killed run
        self._trained = {name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        for config in getattr(
            self.model, "peft_config", {}
        ).values():  # peft writes a set in a different order in each process
            if isinstance(config.target_modules, set):
                config.target_modules = sorted(config.target_modules)
        self.diverged, self._loss, self._left_out = None, 0.0, False
        self._within_step, self._written = False, 0
        self._resumed, self._trained_before, self._began = None, 0.0, time.monotonic()
        write_lines(self)
        with self.listening(), self.keeping_log(preflight):
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Override `_load_from_checkpoint`: load the trained adapter, with its head if it has one, or the whole model."""
        model = self.accelerator.unwrap_model(model or self.model)
        if not isinstance(model, PeftModel):
            load_weights(model, resume_from_checkpoint)
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Name a checkpoint that has it, or start a new run.")
        weights = load_file(path)
        odd = sorted(weights.keys() ^ get_peft_model_state_dict(model).keys())
        if odd:
            raise ValueError(
                f"{path}: {len(odd)} tensors do not match the model's adapter, first {odd[0]!r}. Set the LoRA "
                f"options as they were, or start a new run."
            )
        set_peft_model_state_dict(model, weights)

    def _load_best_model(self) -> None:
        load = self._load_shards if self._shared_out else self._load_from_checkpoint
        load(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        ours = self._hyperparameters()
        if self._shared_out or was_shared_out(checkpoint):
            self._load_shards(checkpoint)
        else:  # not Trainer's own function: until transformers 5.17 it fails with several processes on CPUs
            for load, name in (
                (self.optimizer.load_state_dict, OPTIMIZER_NAME),
                (self._load_schedule, SCHEDULER_NAME),
            ):
                load(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))
        self._take_up_hyperparameters(ours)
        state = state_of(Path(checkpoint), read_manifest(Path(checkpoint)), self.args)
        pad_token = AutoTokenizer.from_pretrained(checkpoint).pad_token
        self._check_contents(checkpoint, state | {"pad_token": pad_token})  # an older manifest does not have them
        best = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
        if best:  # it is beside this checkpoint, also if the run's folder was moved
            best = Path(checkpoint).parent / Path(best).name
            if self.args.load_best_model_at_end and not best.is_dir():
                raise FileNotFoundError(
                    f"{best}: the best checkpoint so far is missing, and load_best_model_at_end needs it. Put it back, "
                    f"or set load_best_model_at_end: false."
                )
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        self.load_training_state(state)

    def load_training_state(self, state: dict) -> None:
        """Restore the state that `training_state` returned."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        if state["counters"].get("_buffered_inputs"):
            self._buffered_inputs = send_to_device(self._buffered_inputs, self.args.device)
        self._metrics = {mode: defaultdict(list, values) for mode, values in state["metrics"].items()}
        self.seconds_before = state["seconds"]
        self._trained_before, self._resumed = state["trained_for"], state
        self._take_up_state()
        logs = state.get("logs", {})
        if logs.get("rewards") and logs["rewards"].keys() != set(self.reward_func_names):
            logs = {}  # rows that other functions have scored do not fit into the table
        for name, values in logs.items():
            if isinstance(values, list):
                self._logs[name].extend(values)
            else:
                for column, entries in values.items():
                    self._logs[name][column].extend(entries)

    def _rows(self) -> int | None:
        return len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None

    def _run_epoch(self, **kwargs):
        """Override `_run_epoch`: begin at the position of the checkpoint, and add to an error what is kept."""
        if not self._begin_epoch(**kwargs):
            return
        self._tell_plan()
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
        """Save a checkpoint of the last complete step after rewards failed on all processes, and say where it is."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == 0:
            return "Nothing has been trained yet."
        if self._within_step:
            return f"Training ends in the middle of step {step + 1}. Earlier checkpoints are unchanged."
        if step != self._written:
            self._save_checkpoint(model, trial)
        return f"Correct the function and resume from {folder} with --resume_from_checkpoint auto."

    # -------------------------------------------------------------------------------------- logs and cards
    def create_model_card(self, *args, **kwargs) -> None:
        """Override `create_model_card`: name the base model also if it is a folder, and write no card for a checkpoint.

        TRL would write a checkpoint's card into `output_dir`, over the card of an earlier run's adapter.
        """
        if self._staging:
            return
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_card(self.args.output_dir, self.model.config._name_or_path, kwargs["model_name"])

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Override `_maybe_log_save_evaluate`, called after every step: also end training if a process was asked to stop."""
        self._stop_if_asked()
        self._within_step = False
        self._look_at_weights()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def end(self) -> None:
        """Finish the trackers, leave the process group, as Trainer does from transformers 5.18 on, and the output folder."""
        self.accelerator.end_training()
        release_all()

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
            self.exit_stopped()
        if self.args.should_save and self.state.best_model_checkpoint and self.args.save_total_limit == 1:
            self._make_room(1)
        if self._resumed and "loop" in self._resumed:  # no epoch was left to run
            self._take_up_loop()
        return super()._finalize_training(trial, num_train_samples, start_time - self._trained_before)
