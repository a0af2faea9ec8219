"""Which checkpoint is the newest, and which make room: by run and step, whatever the clock says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data.json_files import write_json
from pipeline.runs.manifest import MANIFEST, checkpoints_in, manifest_digest, other_checkpoint
from pipeline.runs.rotation import Rotates


# What else a manifest has.
EMPTY = {"files": {}, "world_size": 1, "holds": ["weights"], "order": {}}


class Run(Rotates):
    """A trainer, as far as it keeps checkpoints. Each is written an hour before the one before: the clock goes back."""

    clock = 1e9

    def __init__(self, folder: Path, limit: int | None = None, resume: str | None = None, best: str | None = None):
        self.args = SimpleNamespace(output_dir=str(folder), save_total_limit=limit)
        self.state = SimpleNamespace(best_model_checkpoint=best and str(folder / best))
        self._number_run(resume and str(folder / resume))

    def write(self, *steps: int) -> "Run":
        for step in steps:
            Run.clock -= 3600
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {"run": self._run, "step": step, "written": Run.clock, **EMPTY}
            write_json(folder / MANIFEST, manifest | {"sha256": manifest_digest(manifest)})
            self._make_room(self.args.save_total_limit, folder.name)
        return self


def names(folder: Path) -> list[int]:
    """Steps of the checkpoints, the newest last."""
    return [int(path.name.split("-")[1]) for path in checkpoints_in(folder)]


def older_release(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        manifest = {"step": step, "written": 2e9 - step, **EMPTY}
        write_json(folder / f"checkpoint-{step}" / MANIFEST, manifest | {"sha256": manifest_digest(manifest)})


@pytest.mark.parametrize("limit", [None, -1, 0])
def test_without_a_positive_limit_all_stay(limit, tmp_path):
    Run(tmp_path, limit).write(2, 9, 10, 100)
    assert names(tmp_path) == [2, 9, 10, 100]


def test_of_a_run_the_highest_steps_stay(tmp_path):
    Run(tmp_path, 2).write(2, 9, 10)
    assert names(tmp_path) == [9, 10]
    Run(tmp_path, 2, resume="checkpoint-10").write(11)
    assert names(tmp_path) == [10, 11]


def test_the_best_stays(tmp_path):
    Run(tmp_path, 2, best="checkpoint-2").write(2, 4, 6)
    assert names(tmp_path) == [2, 6]
    Run(tmp_path, 1, "checkpoint-6", best="checkpoint-2").write(8)
    assert names(tmp_path) == [2, 8]


def test_a_new_run_over_an_earlier_longer_one(tmp_path, capsys):
    """Its own are never removed for those of the earlier run, and are those to resume from."""
    Run(tmp_path).write(20, 40)
    assert capsys.readouterr().out == ""
    run = Run(tmp_path, 2).write(2)
    said = capsys.readouterr().out
    assert (
        "holds checkpoints of an earlier run, the newest checkpoint-40. Those of this run count as newer. The" in said
    )
    assert names(tmp_path) == [40, 2]
    assert other_checkpoint(tmp_path / "checkpoint-2").endswith("checkpoint-40")
    run.write(4, 6)
    assert names(tmp_path) == [4, 6]
    Run(tmp_path, 2, resume="checkpoint-6").write(40)
    assert names(tmp_path) == [6, 40]


def test_a_run_that_goes_back_leaves_what_came_after(tmp_path):
    Run(tmp_path).write(2, 4, 6)
    Run(tmp_path, resume="checkpoint-2").write(3)
    assert names(tmp_path) == [2, 4, 6, 3]
    Run(tmp_path, 3, resume="checkpoint-3").write(4)  # takes the place of the other 4
    assert names(tmp_path) == [6, 3, 4]


def test_checkpoints_of_an_older_release_go_by_step_too(tmp_path):
    older_release(tmp_path, 2, 10, 9)
    assert names(tmp_path) == [2, 9, 10]
    Run(tmp_path, 2, resume="checkpoint-10").write(12)
    assert names(tmp_path) == [10, 12]
    Run(tmp_path).write(1)
    assert names(tmp_path) == [10, 12, 1]


def test_a_checkpoint_without_a_manifest_is_noticed_where_it_would_be_the_newest(tmp_path):
    Run(tmp_path).write(8)
    Run(tmp_path).write(2, 4)
    (tmp_path / "checkpoint-3").mkdir()
    assert names(tmp_path) == [8, 2, 3, 4]
    (tmp_path / "checkpoint-5").mkdir()
    assert names(tmp_path)[-1] == 5
    (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-mine")
    Run(tmp_path, 1, resume="checkpoint-4").write(6)
    assert names(tmp_path) == [3, 6] and (tmp_path / "checkpoint-mine").is_dir()  # what is not ours stays
