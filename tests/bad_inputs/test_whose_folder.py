"""What is not of a run is not written over or removed: it is refused at start, by its name; and paths that cannot be used."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from huggingface_hub import constants

from data.listing import LISTING, entry_of, write_listing
from data.pip_files import cache_dir
from data.saving import SAVED, SAVING, check_saved, save
from pipeline import tables
from pipeline.backbone.adapters import read_adapter
from pipeline.convert_hh import main as convert
from pipeline.runs.manifest import MANIFEST, STAGING, manifest_digest
from pipeline.runs.outputs import check_space
from pipeline.runs.ownership import FILES, former_files, holds_only_ours, make_way, not_ours
from tests.cuts import contents


THESIS = "my thesis"
ROWS = [{"prompt": "The film"}, {"prompt": "A"}]


def put(name: str, text: str = THESIS):
    def put(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")

    return put


# What stands in the output folder, and what is named in the error.
FOREIGN = {
    "card": ("sft", put("README.md"), "README.md"),
    "tokenizer": ("dpo", put("tokenizer.json"), "tokenizer.json"),
    "metrics": ("grpo", put("metrics.json", '{"accuracy": 0.9}'), "metrics.json"),
    "scale": ("reward", put("score_normalization.json"), "score_normalization.json"),
    "an adapter of peft": ("sft", put("adapter_config.json", '{"peft_type": "LORA"}'), "adapter_config.json"),
    "value": ("ppo", put("value/adapter_config.json"), "value/adapter_config.json"),
    "a file named value": ("ppo", put("value"), "value"),
    "a folder named as a file": ("rloo", lambda out: (out / "README.md").mkdir(parents=True), "README.md"),
    "a link": ("sft", lambda out: (out.mkdir(), (out / "README.md").symlink_to(out / "nowhere")), "README.md"),
    "staging": ("sft", put(f"{STAGING}/chapter.txt"), STAGING),
    "saving": ("sft", put(f"{SAVING}/chapter.txt"), SAVING),
    "saved": ("evaluation", put(f"{SAVED}/chapter.txt"), SAVED),
    "a checkpoint": ("sft", put("checkpoint-2/thesis.txt"), "checkpoint-2"),
    "a file named as a checkpoint": ("ppo", put("checkpoint-2"), "checkpoint-2"),
    "report": ("evaluation", put("report.json", '{"quarter": 3}'), "report.json"),
    "words": ("evaluation", put("report.md"), "report.md"),
    "a log": ("sft", put("training_log.jsonl", '{"step": 1, "loss": 0.5}\n'), "training_log.jsonl"),
    "plot": ("best_of_n", put("best_of_n.png"), "best_of_n.png"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "spoil", "named"), FOREIGN.values(), ids=FOREIGN)
def test_what_no_run_has_written_is_refused(stage, spoil, named, refuses, world):
    out = world.folder / "out"
    spoil(out)
    put("beside.txt")(out)
    refuses(
        stage,
        rf"^output_dir='\S+out' holds {named}, which no run of Spine .* Name another folder in output_dir, or move",
    )


def test_samples_that_no_run_has_written(refuses, world):
    put("samples.jsonl", json.dumps({"prompt": "mine"}) + "\n")(world.folder / "out")
    refuses("ppo", "holds samples.jsonl, which", sample_updates=1)


SAMPLE = {"step": 0, "prompt": "A", "completion": " film", "score": 0.5, "kl": 0.0, "judge": 0.0}
REPORT = dict.fromkeys(("sft", "policy"), {"score": 0.5, "kl": 0.0, "distinct_2": 1.0})
READ = {
    "the table of samples": ("ppo", "dataset_name", "samples.jsonl", {"sample_updates": 1}),
    "held-out rows": ("ppo", "eval_dataset_name", "samples.jsonl", {"sample_updates": 1}),
    "texts": ("ppo", "ptx_dataset_name", "samples.jsonl", {"sample_updates": 1, "ptx_coef": 0.1}),
    "in a checkpoint": ("sft", "dataset_name", "checkpoint-2/rows.jsonl", {}),
    "a report": ("best_of_n", "report", "best_of_n.json", {}),
    "its metrics": ("dpo", "dataset_name", "metrics.json", {}),
    "its log": ("reward", "dataset_name", "training_log.jsonl", {}),
    "the table of completions": ("grpo", "dataset_name", "completions/rows.jsonl", {}),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "key", "name", "options"), READ.values(), ids=READ)
def test_what_the_run_reads_is_not_written_over(stage, key, name, options, refuses, world):
    path = world.folder / "out" / name
    put(name, json.dumps(REPORT if key == "report" else SAMPLE) + "\n")(world.folder / "out")
    refuses(stage, rf"the run reads \S+{name} beneath this folder, and would overwrite", **{key: path}, **options)


@pytest.mark.parametrize("stage", ["sft", "evaluation"])
def test_a_folder_of_data_is_no_output_folder(stage, refuses, world):
    put("rows.jsonl", json.dumps({"prompt": "A", "text": "A"}) + "\n")(world.folder / "out")
    refuses(stage, "the run reads this folder and would write into it", dataset_name=world.folder / "out")


@pytest.mark.slow
def test_data_of_another_name_may_lie_beside(world):
    out = world.folder / "out"
    put("rows.jsonl", "".join(json.dumps({"text": f"A film {i}."}) + "\n" for i in range(8)))(out)
    put("notes/README.md")(out)
    before = contents(out)
    world.run("sft", dataset_name=out / "rows.jsonl", recipe="lora_target_modules: all-linear\n")
    assert contents(out).items() >= before.items()
    read_adapter(str(out))
    (out / "README.md").write_text("my own card", encoding="utf-8")
    world.run(
        "sft", dataset_name=out / "rows.jsonl", recipe="lora_target_modules: all-linear\n"
    )  # again, over our own
    assert contents(out)["README.md.kept-1"] == b"my own card" and b"sft" in contents(out)["README.md"].lower()
    assert contents(out).items() >= before.items()


# ------------------------------------------------------------------------------------------ former releases
OF_FORMER = {
    "adapter": {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "", "README.md": "",
        "metrics.json": "{}", "backbone.json": '{"fingerprint": ""}', "value/backbone.json": "{}"},
    "report": {"report.json": '{"sft": {}, "ppo": {}, "seconds": {}}', "report.md": ""},
    "best_of_n": {"best_of_n.json": '{"rows": [], "seconds": 1}', "best_of_n.png": ""},
    "table": {"table.json": '[{"method": "SFT"}]', "table.md": ""},
    "data": dict.fromkeys(FILES["data"], "{}"),
    "model": {"config.json": "{}", "README.md": "`make backbone`, that is `pipeline/recipes/backbone.yaml`: 24 epochs"},
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_FORMER)
def test_what_a_former_release_has_saved_is_known(kind, tmp_path):
    for name, text in OF_FORMER[kind].items():
        put(name, text)(tmp_path)
    assert set(former_files(tmp_path, kind)) == OF_FORMER[kind].keys()
    for name in list(OF_FORMER[kind])[:1] if kind != "model" else ["README.md"]:
        (tmp_path / name).write_text(THESIS, encoding="utf-8")
        if kind != "data":
            assert former_files(tmp_path, kind) == []
    (tmp_path / name).unlink()
    assert former_files(tmp_path, kind) == []


def test_a_link_and_a_name_beside_a_list_are_nobodys_save(tmp_path):
    """A release that wrote no list wrote no links either; where a list is, what it does not name is the user's."""
    for name, text in OF_FORMER["adapter"].items():
        put(name, text)(tmp_path)
    put("elsewhere")(tmp_path)
    (tmp_path / "vocab.json").symlink_to(tmp_path / "elsewhere")
    assert not_ours(tmp_path, ["README.md", "vocab.json"]) == ["vocab.json"]
    write_listing(tmp_path / LISTING, {"README.md": entry_of(tmp_path / "README.md", "adapter")})
    assert not_ours(tmp_path, ["README.md", "metrics.json"]) == ["metrics.json"]
    assert former_files(tmp_path, "adapter") == []  # so that no save removes them


# ------------------------------------------------------------------------------------------ checkpoints
def checkpoint(folder: Path) -> Path:
    put("weights")(folder)
    manifest = {"step": 2, "written": 1.0, "world_size": 1, "holds": ["weights"], "order": {}}
    manifest["files"] = {"weights": {"bytes": 1, "sha256": "0"}}
    put(MANIFEST, json.dumps({**manifest, "sha256": manifest_digest(manifest)}))(folder)
    return folder


def test_a_checkpoint_with_something_else_in_it_is_kept(tmp_path):
    ours, other = checkpoint(tmp_path / "checkpoint-2"), checkpoint(tmp_path / "checkpoint-4")
    put("thesis.txt")(other)
    assert holds_only_ours(ours) and not holds_only_ours(other)
    make_way(ours, tmp_path / "replaced")
    make_way(other, tmp_path / "replaced-4")
    make_way(tmp_path / "checkpoint-6", tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"replaced", "checkpoint-4.kept-1"}
    assert (tmp_path / "checkpoint-4.kept-1" / "thesis.txt").read_text() == THESIS


@pytest.mark.slow
def test_rotation_and_a_second_run_keep_what_is_not_theirs(make_trainer, tmp_path):
    """A thesis put into one of our checkpoints after it was written."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    make_trainer(output_dir=str(tmp_path / "out"), **options).train()
    put("checkpoint-2/thesis.txt")(tmp_path / "out")
    make_trainer(output_dir=str(tmp_path / "out"), **options).train()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint-2", "checkpoint-2.kept-1", "training_log.jsonl"}
    assert (tmp_path / "out" / "checkpoint-2.kept-1" / "thesis.txt").read_text() == THESIS


# ------------------------------------------------------------------------------------------ commands without a recipe
def test_tables_and_converted_data_write_over_nothing(tmp_path):
    put("table.md")(tmp_path)
    with pytest.raises(ValueError, match=r"holds table\.md, which no run of Spine has written"):
        tables.write(tmp_path, [{"method": "SFT"}], "| SFT |", "Note.")
    put("sft_train.jsonl")(tmp_path)
    (tmp_path / "hh.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds sft_train\.jsonl, which no run of Spine has written"):
        convert([str(tmp_path / "hh.jsonl"), str(tmp_path)])
    assert contents(tmp_path)["sft_train.jsonl"] == THESIS.encode()
    (tmp_path / "table.md").unlink()
    for note in ("Note.", "Another note."):
        tables.write(tmp_path, [{"method": "SFT"}], "| SFT |", note)
    assert contents(tmp_path)["table.md"] == b"| SFT |\n\nAnother note.\n"
    check_saved(tmp_path, "table")


# ------------------------------------------------------------------------------------------ paths and caches
def loop(world) -> str:
    (world.folder / "one").symlink_to(world.folder / "two")
    (world.folder / "two").symlink_to(world.folder / "one")
    return str(world.folder / "one" / "out")


def dangling(world) -> str:
    (world.folder / "link").symlink_to(world.folder / "nowhere")
    return str(world.folder / "link")


PATHS = {
    "a long name": (lambda world: str(world.folder / ("x" * 300)), r"cannot be used \(File name too long"),
    "a long name beneath a new folder": (lambda world: str(world.folder / "new" / ("x" * 300)), "the path is longer than"),
    "a long path": (lambda world: str(world.folder.joinpath(*["x" * 200] * 20)), "the path is longer than"),
    "not UTF-8": (lambda world: os.fsdecode(os.fsencode(world.folder) + b"/caf\xe9"), "the path is not UTF-8"),
    "a loop of links": (loop, r"the path cannot be used \(Too many levels"),
    "a link to nothing": (dangling, "is a link to nothing"),
    "a null": (lambda world: str(world.folder / "a\0b"), "zero byte"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "message"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluation", "best_of_n"])
def test_paths_that_no_file_can_have(stage, path, message, refuses, world):
    if message == "zero byte":  # no command line has one
        refuses(stage, rf"output_dir=.*{message}", recipe=f"output_dir: {json.dumps(path(world))}\n")
    else:
        refuses(stage, rf"^output_dir=.*{message}", output_dir=path)


def test_a_folder_that_may_not_be_looked_into(refuses, monkeypatch):
    original = Path.stat

    def refuse(path, **options):
        if path.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    refuses("sft", r"^output_dir=.*the path cannot be used \(Permission denied\)", output_dir="/tmp/secret/out")


def test_a_user_without_a_home(monkeypatch):
    for name in ("SPINE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    with pytest.raises(OSError, match=r"^This user has no home folder .* Set SPINE_CACHE"):
        cache_dir()


def test_a_cache_of_models_that_cannot_be_written(refuses, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/none")
    refuses(
        "sft",
        r"^/proc/none: the cache of the hub's models cannot be written .*HF_HOME",
        model_name_or_path="owner/name",
    )


def test_a_disk_without_room_for_what_is_trained(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(output_dir=str(tmp_path / "out"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        OSError, match=r"^output_dir=\S+out': its disk has 0 MiB left, and the run saves at least \d+ MiB"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(total=0, free=0)
    )  # a disk that does not tell
    check_space(trainer.args, trainer.model)


def test_adapters_can_be_read_by_others(tmp_path):
    def write(folder: Path) -> None:
        put("value/adapter_model.safetensors")(folder)
        (folder / "value" / "adapter_model.safetensors").chmod(0o600)

    save(tmp_path / "out", "adapter", write)
    umask = os.umask(0o022)
    os.umask(umask)
    for path in (tmp_path / "out" / LISTING, tmp_path / "out" / "value" / "adapter_model.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
