"""`data.saving`: whatever ends a save, its files are all old or all new, and nothing of anybody else is lost."""

import json
import logging
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from data import saving
from data.listing import LISTING, json_digest, read_listing
from data.saving import SAVED, SAVING, check_saved, complete, save
from tests.cuts import Cut, contents


# Files of a save over an earlier one: the same name, a new one, one that is no more.
KINDS = {
    "adapter": ({"adapter_model.safetensors": "a", "README.md": "b", "value/x.json": "c"}, {"adapter_model.safetensors": "d",
        "README.md": "b", "metrics.json": "e", "new/y.json": "f"}),
    "report": ({"report.json": "1", "report.md": "2", "ppo_curves.png": "3"}, {"report.json": "4", "report.md": "5"}),
    "data": ({"sft_train.jsonl": "1", "sft_test.jsonl": "2"}, {"sft_train.jsonl": "3", "sft_test.jsonl": "4"}),
}  # fmt: skip


def writes(files: dict[str, str]):
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    return write


@pytest.fixture(scope="module")
def cut() -> Cut:
    return Cut()


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "former"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_at_any_write_leaves_all_old_or_all_new(kind, listed, cut, tmp_path, monkeypatch):
    before, after = KINDS[kind]
    save(tmp_path / "old", kind, writes(before))
    save(tmp_path / "old", "other", writes({"other.txt": "o"}))
    if not listed:
        (tmp_path / "old" / LISTING).unlink()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    options = {"former": () if listed else tuple(before)}
    save(tmp_path / "new", kind, writes(after), **options)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert not any(".kept" in name for name in new) and new.keys() - {LISTING, "other.txt"} == after.keys()
    outcomes, number, folder = [], 0, tmp_path / "folder"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        number += 1
        if not cut(lambda: save(folder, kind, writes(after), **options), folder, number, monkeypatch):
            break
        check_saved(folder, kind)  # as the next stage does
        found = contents(folder)
        assert found in (old, new), number
        outcomes.append(found == new)
        assert not (folder / SAVED).exists()
        save(folder, kind, writes(after), **options)  # the stage is run again
        assert contents(folder, without="-") == new, number
    assert outcomes == sorted(outcomes)  # first old, then new
    assert outcomes.count(False) > 10 and outcomes.count(True) > 5


def test_who_completes_a_save_may_be_killed_too(cut, tmp_path, monkeypatch):
    before, after = KINDS["adapter"]
    save(tmp_path / "new", "adapter", writes(before))
    save(tmp_path / "new", "adapter", writes(after))
    new = contents(tmp_path / "new")
    save(tmp_path / "pending", "adapter", writes(before))
    (tmp_path / "pending" / "README.md").write_text("mine", encoding="utf-8")
    new["README.md.kept-1"] = b"mine"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "complete", lambda folder: None)
        save(tmp_path / "pending", "adapter", writes(after))
    assert (tmp_path / "pending" / SAVED).is_dir()
    number, folder = 1, tmp_path / "folder"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "pending", folder)
        if not cut(lambda: complete(folder), folder, number, monkeypatch):
            break
        check_saved(folder, "adapter")
        assert contents(folder) == new, number
        number += 1
    assert number > 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_keeps_the_old_files_and_the_new_ones_elsewhere(kind, cut, tmp_path, kept, monkeypatch):
    before, after = KINDS[kind]
    save(tmp_path / "old", kind, writes(before))
    save(tmp_path / "new", kind, writes(after))
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    number, folder, told = 0, tmp_path / "folder", set()
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        number += 1
        try:
            if not cut(lambda: save(folder, kind, writes(after)), folder, number, monkeypatch, full=True):
                break
        except OSError as error:
            text = str(error)
        if f"wait in {folder}/{SAVED}" in text:  # the rename was done, and a folder or a list could not be written
            check_saved(folder, kind)
            assert contents(folder) == new
            continue
        assert re.search(
            r"could not be saved \(No space left on device\)\. \S+ is as it was before\. The files are in", text
        )
        told.add(re.match(r"\S+", text)[0].removeprefix(f"{folder}/.saving/").removeprefix(f"{folder}/"))
        (other,) = kept.iterdir()
        assert f"The files are in {other} instead. Make room" in text
        check_saved(folder, kind)
        assert contents(folder) == old and not (folder / SAVING).exists()
        assert contents(other) == new
        shutil.copytree(other, folder, dirs_exist_ok=True)  # what the message asks for
        check_saved(folder, kind)
        shutil.rmtree(other)
    assert told >= set(after)  # the error names the file


def test_a_disk_that_is_full_everywhere(cut, tmp_path, kept, monkeypatch):
    save(tmp_path / "out", "report", writes({"report.json": "1"}))
    old = contents(tmp_path / "out")
    message = r"out/report\.json could not be saved \(No space left on device\).* Nor could the files be saved in .*Free some"
    with pytest.raises(OSError, match=message):
        cut(
            lambda: save(tmp_path / "out", "report", writes({"report.json": "2"})), tmp_path, 4, monkeypatch, full=True
        )
    assert contents(tmp_path / "out") == old and not list(kept.iterdir())


def test_an_error_in_the_code_is_no_full_disk(tmp_path, kept):
    def write(folder: Path) -> None:
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        save(tmp_path / "out", "report", write)
    assert not list(kept.iterdir()) and not (tmp_path / "out" / SAVING).exists()


# ------------------------------------------------------------------------------------------ whose files
def test_what_is_not_of_the_last_save_is_kept(tmp_path, caplog):
    """A file that was changed since, one of somebody else, a link, a folder; what is only beside stays as it is."""
    out = tmp_path / "out"
    save(out, "adapter", writes({"README.md": "1", "value/x.json": "1", "old.json": "1", "same.json": "1"}))
    (out / "README.md").write_text("my own words", encoding="utf-8")
    (out / "old.json").write_text("changed", encoding="utf-8")
    (out / "notes.txt").write_text("notes", encoding="utf-8")
    (out / "value" / "thesis.txt").write_text("thesis", encoding="utf-8")
    (tmp_path / "target").write_text("target", encoding="utf-8")
    (out / "link.json").symlink_to(tmp_path / "target")
    (out / "a folder").mkdir()
    (out / "a folder" / "deep.txt").write_text("deep", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        save(out, "adapter", writes({"README.md": "2", "link.json": "2", "a folder": "2", "same.json": "2"}))
    assert sorted(re.findall(r"kept as (\S+(?: \S+)?)\.\n", caplog.text)) == [
        "README.md.kept-1", "a folder.kept-1", "link.json.kept-1", "old.json.kept-1",
    ]  # fmt: skip
    found = contents(out)
    assert {name: found.pop(name) for name in ("README.md", "link.json", "a folder", "same.json")} == dict.fromkeys(
        ("README.md", "link.json", "a folder", "same.json"), b"2"
    )
    del found[LISTING]
    assert found == {
        "README.md.kept-1": b"my own words", "old.json.kept-1": b"changed", "notes.txt": b"notes",
        "value/thesis.txt": b"thesis", "a folder.kept-1/deep.txt": b"deep", "link.json.kept-1": b"target",
    }  # fmt: skip
    assert (tmp_path / "target").read_text(encoding="utf-8") == "target"


def test_several_kinds_share_a_folder(tmp_path):
    save(tmp_path, "adapter", writes({"a.json": "1", "b.json": "1"}))
    save(tmp_path, "report", writes({"report.json": "1"}))
    save(tmp_path, "adapter", writes({"a.json": "2"}))
    save(tmp_path, "adapter", writes({"scale.json": "2"}), adds=True)
    assert {name: entry["kind"] for name, entry in read_listing(tmp_path).items()} == {
        "a.json": "adapter", "scale.json": "adapter", "report.json": "report",
    }  # fmt: skip
    assert contents(tmp_path).keys() == {"a.json", "scale.json", "report.json", LISTING}


@pytest.mark.parametrize("name", [SAVING, SAVED])
def test_a_folder_of_the_same_name_as_ours(name, tmp_path, kept):
    """It is left alone, and the save goes elsewhere."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "thesis.txt").write_text("thesis", encoding="utf-8")
    before = contents(tmp_path / "out", without="-")
    check_saved(tmp_path / "out", "adapter")
    with pytest.raises(OSError, match="could not be saved .* The files are in"):
        save(tmp_path / "out", "adapter", writes({"a.json": "1"}))
    assert contents(tmp_path / "out", without="-").items() >= before.items()


# ------------------------------------------------------------------------------------------ reading
CHANGES = {
    "changed": (lambda out: (out / "a.json").write_text("[2]", encoding="utf-8"), ValueError, "a.json: not the file that was"),
    "shorter": (lambda out: (out / "a.json").write_text("", encoding="utf-8"), ValueError, "a.json: not the file that was"),
    "missing": (lambda out: (out / "a.json").unlink(), FileNotFoundError, "a.json: the file is missing, and saved_files.json"),
    "beneath": (lambda out: (out / "value" / "b.safetensors").unlink(), FileNotFoundError, "b.safetensors: the file is miss"),
    "listing": (lambda out: (out / LISTING).write_text('{"files": {}}', encoding="utf-8"), ValueError, "the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), CHANGES.values(), ids=CHANGES)
def test_a_mixture_made_by_a_copy_is_refused(change, kind, message, tmp_path):
    save(tmp_path, "adapter", writes({"a.json": "[1]", "README.md": "card", "value/b.safetensors": "b"}))
    (tmp_path / "README.md").write_text("my own words", encoding="utf-8")  # which nobody checks
    check_saved(tmp_path, "adapter")
    change(tmp_path)
    with pytest.raises(kind, match=message):
        check_saved(tmp_path, "adapter")
    if "safetensors" in message:
        with pytest.raises(kind, match=message):
            check_saved(tmp_path / "value", "adapter")
    (tmp_path / LISTING).unlink()  # the remedy
    check_saved(tmp_path, "adapter")


def test_a_reader_that_may_not_write_says_so(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saving, "complete", lambda folder: None)
        save(tmp_path / "out", "adapter", writes({"a.json": "1"}))

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        OSError, match=r"out: its files were saved, and wait in \S+\.saved .*\(Permission denied\)\. Make"
    ):
        check_saved(tmp_path / "out", "adapter")


@pytest.mark.parametrize("name", ["../stolen.json", "/stolen.json", "link/stolen.json", "value/../../stolen.json"])
@pytest.mark.parametrize("part", [LISTING, saving.REPLACED])
def test_a_forged_save_moves_and_removes_nothing_outside_its_folder(part, name, tmp_path):
    victim, out = tmp_path / "home", tmp_path / "out"
    victim.mkdir()
    (out / SAVED).mkdir(parents=True)
    for folder in (victim, tmp_path):
        (folder / "stolen.json").write_text("mine", encoding="utf-8")
    for folder in (out, out / SAVED):
        (folder / "link").symlink_to(victim)
    entry = {"kind": "adapter", "bytes": 4, "sha256": saving.file_digest(victim / "stolen.json")}
    for file in (LISTING, saving.REPLACED):
        content = {"files": {name: entry} if file == part else {}}
        (out / SAVED / file).write_text(json.dumps(content | {"sha256": json_digest(content)}), encoding="utf-8")
    try:
        complete(out)
    except ValueError as error:
        assert "damaged" in str(error)
    assert (victim / "stolen.json").read_text() == (tmp_path / "stolen.json").read_text() == "mine"


# ------------------------------------------------------------------------------------------ modes
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_has_the_mode_of_any_new_file(umask, mode, tmp_path):
    def write(folder: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(b"weights")
        os.rename(file.name, folder / "adapter_model.safetensors")
        writes({"README.md": "", "value/x.json": ""})(folder)

    before = os.umask(umask)
    try:
        save(tmp_path / "out", "adapter", write)
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(found.values()) == {mode} and len(found) == 4
