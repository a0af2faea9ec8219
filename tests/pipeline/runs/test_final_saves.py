"""The final save of each stage over an earlier one, cut short at each write: the next stage reads all old or all new files."""

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, RewardConfig, SFTConfig

from data.saving import save
from pipeline.backbone.adapters import read_adapter, read_metrics
from pipeline.backbone.roles import Backbone
from pipeline.dpo import DPO
from pipeline.rl.sample_table import SampleTable
from pipeline.runs import outputs
from pipeline.runs.outputs import finish_stage
from pipeline.runs.ownership import is_table_of_samples
from pipeline.runs.reward_training import RewardModel
from pipeline.sft import SFT
from reward_models.normalization import Normalization, read_normalization
from tests.cuts import Cut, contents


pytestmark = pytest.mark.slow


COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
PAIRS = Dataset.from_dict({"prompt": ["A"] * 2, "chosen": [" film."] * 2, "rejected": [" play."] * 2})


@pytest.fixture(scope="module")
def cut() -> Cut:
    return Cut()


@pytest.fixture
def trainers(tiny, tokenizer, make_trainer, sft_adapter, tmp_path):
    """Makes the trainer of a stage, which is not going to train."""

    def make(stage: str, folder: Path):
        options = {**COMMON, "output_dir": str(folder)}
        if stage == "ppo":
            return make_trainer(output_dir=str(folder))
        if stage == "dpo":
            base = AutoModelForCausalLM.from_pretrained(tiny)
            backbone = Backbone(base, read_adapter(sft_adapter, base=base))
            backbone.train_only("policy")
            return DPO(model=backbone, args=DPOConfig(**options), train_dataset=PAIRS, processing_class=tokenizer)
        head = stage == "reward"
        kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        base = kind.from_pretrained(tiny, **({"num_labels": 1} if head else {}))
        config = LoraConfig(
            **LORA, task_type="SEQ_CLS" if head else "CAUSAL_LM", modules_to_save=["score"] if head else None
        )
        common = {"model": base, "processing_class": tokenizer, "peft_config": config}
        if head:
            return RewardModel(args=RewardConfig(**options), train_dataset=PAIRS, **common)
        return SFT(args=SFTConfig(**options), train_dataset=Dataset.from_dict({"text": ["A film."] * 2}), **common)

    return make


def change(trainer) -> None:
    """As training would."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_the_next_stage_reads_all_old_or_all_new_files(stage, trainers, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "seconds_running", lambda: 1.0)
    folder, head = tmp_path / "out", stage == "reward"
    trainer = trainers(stage, folder)
    scales = [Normalization(mean=0.0, std=float(n), completions=8) for n in (1, 2)]

    def finish(number: int) -> None:
        finish_stage(trainer, "backbone", {"accuracy": number / 2})
        if head:
            save(folder, "adapter", scales[number].save, adds=True)

    finish(0)
    old = contents(folder)
    shutil.copytree(folder, tmp_path / "old")
    change(trainer)
    finish(1)
    new = contents(folder)
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "metrics.json",
        "backbone.json",
        "tokenizer.json",
    }
    names |= {"value/adapter_model.safetensors"} if stage == "ppo" else set()
    assert new.keys() == old.keys() >= names | ({"score_normalization.json"} if head else set())
    between = {
        name: data for name, data in new.items() if name not in ("score_normalization.json", "saved_files.json")
    }
    assert all(new[name] != old[name] for name in names if "model.safetensors" in name or name == "metrics.json")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}

    number, outcomes = 0, []
    while True:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        number += 1
        if not cut(lambda: finish(1), folder, number, monkeypatch):
            break
        read_adapter(str(folder), needs_head=head)
        accuracy = read_metrics(folder)["accuracy"]
        if stage == "ppo":
            read_adapter(str(folder / "value"), needs_head=True)
        found = contents(folder)
        if head and "score_normalization.json" not in found:  # its measurement is no part of the adapter, and follows
            assert {name: data for name, data in found.items() if name != "saved_files.json"} == between
            with pytest.raises(ValueError, match="has no score_normalization.json. Train the reward model"):
                read_normalization(folder)
            continue
        assert found in (old, new), number
        assert accuracy == (found == new) / 2
        outcomes.append(found == new)
    assert outcomes == sorted(outcomes) and outcomes.count(False) > 10 and outcomes.count(True) > 5


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_what_does_not_fit_the_disk_is_named_and_kept_elsewhere(stage, trainers, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    trainer, folder = trainers(stage, tmp_path / "out"), tmp_path / "out"
    finish_stage(trainer, "backbone", {"accuracy": 0.5})
    old, write_json = contents(folder), outputs.write_json

    def full_here(path, value):
        if folder in Path(path).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_json(path, value)

    def full_disk(*args, **options):  # as safetensors tells it, without a name
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(outputs, "write_json", full_here)
    with pytest.raises(OSError, match=r"out/metrics\.json could not be saved \(No space left on device\)") as caught:
        finish_stage(trainer, "backbone", {"accuracy": 1.0})
    assert contents(folder) == old
    (other,) = (tmp_path / "tmp").iterdir()
    assert f"out is as it was before. The files are in {other} instead" in str(caught.value)
    read_adapter(str(other))
    assert read_metrics(other)["accuracy"] == 1.0
    assert contents(other)["README.md"] == old["README.md"]  # it has the name of the folder, not of the temporary one

    monkeypatch.setattr(safetensors.torch, "serialize_file", full_disk)
    with pytest.raises(
        OSError, match=r"out/\*\.safetensors could not be saved .* Nor could the files be saved in .*Free"
    ):
        finish_stage(trainer, "backbone", {"accuracy": 1.0})
    assert contents(folder) == old and list((tmp_path / "tmp").iterdir()) == [other]


def test_the_table_of_samples_replaces_nothing_of_another_name(trainers, tmp_path):
    """It is a log of training: rows are added as the run goes on."""
    trainer = trainers("ppo", tmp_path)
    (tmp_path / "samples.new").write_text("mine", encoding="utf-8")
    table = SampleTable(trainer, Dataset.from_dict({"prompt": ["A", "The film"]}))
    trainer.state.is_world_process_zero = True
    table.on_train_begin(trainer.args, trainer.state, None)
    assert is_table_of_samples(tmp_path / "samples.jsonl")
    rows = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert rows.count("\n") == 2
    for cut_off, known in ((rows[:20], True), ("", True), ('{"prompt": ', False), ('{"prompt": "A"}\n', False)):
        (tmp_path / "samples.jsonl").write_text(cut_off, encoding="utf-8")
        assert is_table_of_samples(tmp_path / "samples.jsonl") == known
    assert {path.name for path in tmp_path.iterdir()} >= {"samples.new", "samples.jsonl"}
    assert (tmp_path / "samples.new").read_text(encoding="utf-8") == "mine" and not (tmp_path / ".staging").exists()
