"""Resume with other options: refuse what cannot change before any long work, say what takes effect, and have it do so.

Models, adapters and data are compared by their contents, since a folder may have been moved or filled anew.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from data.listing import json_digest
from pipeline.backbone.identity import digest
from pipeline.runs.changed_options import OPTIMIZER, SCHEDULE, changed_options, options_of, shown
from pipeline.runs.manifest import read_manifest


MOST_ROWS = 10_000  # rows that are compared: of more, evenly spaced ones
# Messages for contents that are not those of the checkpoint, in the order in which they are compared.
OTHER = {
    "rows": "written with {then} rows to train on, and this run has {now}. Resume on the same data",
    "frozen": "written with another backbone, SFT adapter or reward adapter. Name the same ones (model_name_or_path, "
    "sft_adapter, reward_adapter), with the same normalize_scores",
    "tokenizer": "written with another tokenizer: its vocabulary or its chat template differ. Restore the tokenizer of "
    "model_name_or_path",
    "pad_token": "written with {then!r} as padding, and this run pads with {now!r}. Set --pad_token {then!r}",
    "row_contents": "written with other rows to train on, of the same number. Restore the rows of dataset_name",
    "texts": "written with other texts for ptx_coef. Restore the rows of ptx_dataset_name",
}


class ResumesOptions:
    """Mixin for one of TRL's trainers: take up the options that have changed since the checkpoint."""

    _options: dict[str, dict[str, Any]]  # of this run, as the manifest records them
    _contents: dict[str, Any]  # what is compared by its contents, as the manifest records it
    # Options that have changed since the checkpoint, each with its old and new value; None if the checkpoint has no record.
    _changed: dict[str, tuple[Any, Any]] | None = {}  # noqa: RUF012 (never written to)

    def contents(self) -> dict[str, Any]:
        """Return what identifies the frozen weights, the tokenizer and the rows of this run."""
        tokenizer, rows = self.processing_class, self.train_dataset
        return {
            "rows": self._rows(),
            "row_contents": rows_digest(rows) if isinstance(rows, Dataset) else None,
            "frozen": digest((n, p) for n, p in sorted(self.model.named_parameters()) if not p.requires_grad),
            "tokenizer": json_digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]),
            "pad_token": tokenizer.pad_token,
        }

    def check_changes(self, checkpoint: str | None, options: dict[str, dict[str, Any]] | None = None) -> None:
        """Compare options and contents of this run with those of the checkpoint to resume from, if there is one.

        `train` does this too. A stage calls it first if it works for long between making the trainer and training.

        Raises:
            ValueError: an option, or what it names, cannot change on resume.
        """
        self._options = options_of(self.args) if options is None else options
        self._contents = self.contents()
        self._changed = {}
        if checkpoint:
            self._changed = changed_options(checkpoint, self.args, self._options)
            self._check_contents(checkpoint, (read_manifest(Path(checkpoint)) or {}).get("contents", {}))

    def _check_contents(self, checkpoint: str, before: dict[str, Any]) -> None:
        for name, message in OTHER.items():
            then, now = before.get(name), self._contents.get(name)
            if then is not None and now is not None and then != now:
                raise ValueError(f"{checkpoint}: {message.format(then=then, now=now)}, or start a new run.")

    def _say_changes(self, checkpoint: str | None) -> None:
        if self._changed is None:
            PartialState().print(
                f"{checkpoint}: written by an earlier release, which recorded no options, so they cannot be compared. The "
                f"learning rate and the options of the optimizer are those of this run."
            )
        for name, (then, now) in (self._changed or {}).items():
            PartialState().print(f"{name}: {shown(now)} instead of {shown(then)} from here on.")

    def _has_changed(self, names: frozenset[str]) -> bool:
        """Return whether one of these options has changed, or may have."""
        return self._changed is None or not names.isdisjoint(self._changed)

    def _load_schedule(self, state: dict[str, Any]) -> None:
        """Load the scheduler, or have a new schedule begin at the checkpoint's step."""
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR) and self._has_changed(SCHEDULE):
            # Not the global step, where it counts something else: float16 skips steps.
            schedule.last_epoch = state["last_epoch"] if "lr_lambdas" in state else self.state.global_step
        elif self._changed is None or self.is_deepspeed_enabled or not self._has_changed(SCHEDULE):
            schedule.load_state_dict(state)
        # Otherwise the rate follows from what the schedule has seen (reduce_lr_on_plateau, greedy): it begins anew.

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [{name: x for name, x in group.items() if name != "params"} for group in self.optimizer.param_groups]

    def _take_up_hyperparameters(self, ours: list[dict[str, Any]]) -> None:
        """Give the optimizer the options of this run, `ours`, in place of those that came with its state."""
        if not self._has_changed(OPTIMIZER):
            return
        schedule, groups = self.lr_scheduler, self.optimizer.param_groups
        by_formula = isinstance(schedule, LambdaLR)
        kept = () if by_formula or (self._changed and self._has_changed(SCHEDULE)) else ("lr", "initial_lr")
        for group, values in zip(groups, ours, strict=True):
            group.update({name: x for name, x in values.items() if name not in kept})
        if by_formula:
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in groups]

    def _take_up_state(self) -> None:
        """Have Trainer's state follow this run: how often it logs, saves and evaluates, and what is the best."""
        self.state.compute_steps(self.args, self.state.max_steps)
        if self._changed and not self._changed.keys().isdisjoint({"metric_for_best_model", "greater_is_better"}):
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None


def rows_digest(rows: Dataset) -> str:
    """Return the hex digest of up to `MOST_ROWS` evenly spaced rows.

    Logprobs that DPO computes beforehand are left out: another machine may round them differently.
    """
    result = hashlib.sha256()
    names = sorted(name for name in rows.column_names if not name.startswith("ref_"))
    chosen = rows.select(range(0, len(rows), max(-(-len(rows) // MOST_ROWS), 1))).select_columns(names)
    for batch in chosen.with_format("arrow").iter(1000):
        result.update(json.dumps(batch.to_pydict(), default=str).encode())
    return result.hexdigest()
