"""Keep as many checkpoints as `save_total_limit` says, by run and step. No clock decides: it may be set back."""

import os
import shutil
from pathlib import Path

from accelerate import PartialState

from pipeline.runs.manifest import STAGING, checkpoints_in, run_of
from pipeline.runs.ownership import holds_only_ours


class Rotates:
    """Mixin for a `Checkpointed` trainer: number the run, and remove old checkpoints."""

    _run = 0  # the number of this run among those that have written checkpoints in its folder

    def _number_run(self, resumes_from: str | None) -> None:
        """Take the number of the newest checkpoint if the run goes on from it, and the next number otherwise.

        A run that starts from the beginning, or goes back to an older checkpoint, finds checkpoints of later steps in its
        folder. They are an earlier run's: its own count as newer, and are those that `auto` resumes from.
        """
        found = checkpoints_in(self.args.output_dir)
        self._run = max(map(run_of, found), default=0)
        if found and resumes_from and os.path.samefile(found[-1], resumes_from):
            return
        self._run += 1
        if found:
            removed = " The earlier ones make room for them (save_total_limit)."
            PartialState().print(
                f"{self.args.output_dir} holds checkpoints of an earlier run, the newest {found[-1].name}. Those of this "
                f"run count as newer.{removed if (self.args.save_total_limit or 0) > 0 else ''}"
            )

    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return Path(best) if best else None

    def _make_room(self, limit: int | None, *kept: str) -> None:
        """Remove the oldest of Spine's checkpoints until `limit` are left, and the staging folder.

        As in Trainer, all stay if `limit` is not positive. The best checkpoint and the `kept` ones stay. A checkpoint is
        renamed before it is removed, so that an incomplete one never has its name.
        """
        staging, best = Path(self.args.output_dir) / STAGING, self._best()
        ours = [path for path in checkpoints_in(self.args.output_dir) if holds_only_ours(path)]
        spare = [path for path in ours if path.name not in (*kept, best and best.name)]
        staging.mkdir(exist_ok=True)
        if limit and limit > 0:
            for path in spare[: max(len(ours) - limit, 0)]:
                os.rename(path, staging / f"removed-{path.name}")
        shutil.rmtree(staging, ignore_errors=True)
