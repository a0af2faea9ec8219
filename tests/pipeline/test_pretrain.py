import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments

from data.human_ratings import load_split
from pipeline.pretrain import EOS, PAD, BackboneConfig, held_out_loss, main, tokenize


BACKBONE = Path(__file__).parents[2] / "data" / "backbone"


def stated_digest(folder: Path) -> str:
    return re.search(r"`model.safetensors` sha256 `(\w+)`", (folder / "README.md").read_text()).group(1)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_embedded_backbone_is_the_one_its_card_describes():
    assert stated_digest(BACKBONE) == digest(BACKBONE)
    assert (BACKBONE / "model.safetensors").stat().st_size <= 12 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert tokenizer.decode(tokenizer("It's a café ☕")["input_ids"]) == "It's a café ☕"  # bytes: nothing is unknown


def test_held_out_loss_is_over_every_token_that_is_predicted():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BACKBONE), AutoTokenizer.from_pretrained(BACKBONE)
    texts = ["A film.", "Too long by half, and then some more of it", "Café"]
    dataset = tokenize(texts, tokenizer, n_positions=128)
    nats, tokens, size = 0.0, 0, 0
    for row in dataset["input_ids"]:  # one at a time: no padding, no batches
        logprobs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        nats -= sum(logprobs[i, token].item() for i, token in enumerate(row[1:]))
        tokens += len(row) - 1
        size += len(tokenizer.decode(row[1:-1]).encode())
    for batch_size in (1, 2, 3):
        loss = held_out_loss(model, dataset, tokenizer, batch_size)
        assert loss == pytest.approx((nats / tokens, nats / size), rel=1e-5)


@pytest.mark.slow
def test_the_card_states_the_loss_of_the_weights_beside_it():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BACKBONE), AutoTokenizer.from_pretrained(BACKBONE)
    dataset = tokenize([snippet.text for snippet in load_split("validation")], tokenizer, n_positions=128)
    row = re.search(r"^\| validation \| (\S+) \| \S+ \| (\S+) \|$", (BACKBONE / "README.md").read_text(), re.MULTILINE)
    assert held_out_loss(model, dataset, tokenizer, 64) == pytest.approx([float(x) for x in row.groups()], abs=1e-3)


@pytest.mark.slow
def test_a_backbone_from_nothing(tmp_path):
    for name in ("one", "two"):
        shape = BackboneConfig(str(tmp_path / name), vocab_size=300, n_positions=32, n_layer=1, n_embd=16, n_head=2)
        options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 256, "max_steps": 2, "seed": 5}
        main(shape, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **options))
    folder = tmp_path / "one"
    assert digest(folder) == digest(tmp_path / "two") == stated_digest(folder)  # a seed fixes it
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.n_layer == 1 and model.config.use_cache
    assert model.config.vocab_size == len(tokenizer) == 300
    assert {model.config.eos_token_id, model.config.pad_token_id} == {tokenizer.eos_token_id, tokenizer.pad_token_id}


@pytest.mark.slow
def test_an_encoder_from_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.pretrain.load_split", lambda split: load_split(split)[:300])
    for name in ("one",):
        shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 1, "n_embd": 16, "n_head": 2, "model_type": "bert"}
        options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 256, "max_steps": 2, "seed": 5}
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **options)
        main(BackboneConfig(str(tmp_path / name), **shape), args)
    folder = tmp_path / "one"
    assert digest(folder) == stated_digest(folder)  # WordPiece breaks ties at random, so no seed fixes it
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 1
    ids = tokenizer("The FILM")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS] the film [SEP]" and model.config.vocab_size == len(tokenizer)
    dataset = tokenize([snippet.text for snippet in load_split("test")[:300]], tokenizer, n_positions=32)
    (stated,) = re.findall(r"(\S+) nats on the test split", (folder / "README.md").read_text())
    assert held_out_loss(model, dataset, tokenizer, 256)[0] == pytest.approx(float(stated), abs=1e-3)


@pytest.mark.slow
def test_a_resumed_run_takes_up_or_refuses_other_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.pretrain.load_split", lambda split: load_split(split)[:40])

    def run(**changes):
        shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 1, "n_embd": 16, "n_head": 2}
        shape |= {name: changes.pop(name) for name in shape.keys() & changes.keys()}
        options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 256, "max_steps": 1, "seed": 5}
        args = {**options, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **changes}
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **args)
        main(BackboneConfig(str(tmp_path / "out"), **shape), args)

    run()
    first = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1: this cannot change on resume: n_layer=2 instead of 1"):
        run(resume_from_checkpoint=first, n_layer=2)
    with pytest.raises(
        ValueError, match="checkpoint-1: written with seed=5, and this run has seed=6, which changes the"
    ):
        run(resume_from_checkpoint=first, seed=6)
    capsys.readouterr()
    run(resume_from_checkpoint=first, max_steps=2, learning_rate=0.0)
    said = capsys.readouterr().out
    assert "learning_rate: 0.0 instead of 5e-05 from here on.\nmax_steps: 2 instead of 1 from here on." in said
    ours, theirs = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 1))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
