"""Reward models of their own architecture: encoders and decoders, LoRA or all weights. What a run leaves scores as in it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from distributed_worker import KillAt, Killed
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
)

from data.tokens import added_tokens
from pipeline import reward
from pipeline.backbone.classifier_adapters import classifier_lora
from pipeline.backbone.classifiers import RewardModelConfig, end_texts, has_own_head, load_classifier
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.rewards import get_reward_adapter
from pipeline.runs.command_line import parse
from reward_models.pretrained import get_model, longest_text
from tests.reward_models.test_pretrained import DECODERS, FAMILIES, WORDS, make_tokenizer


ENDS = {"eos_token": "[SEP]"}  # of the decoders' tokenizers
# The modules that training must learn: the head, and what the files of a language model lack.
LEARNED = {
    "bert": {"bert.pooler.dense", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier"},
    "electra": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "modernbert": {"head", "classifier"},
    "gpt2": {"score"},
    "llama": {"score"},
}
ENCODERS = ("bert", "distilbert", "roberta", "deberta-v2", "modernbert")
TEXTS = ("a quiet triumph .", "a loud yawn !", "very long", "the film and a quiet film", "loud")
PAIRS = [
    {"prompt": f"the film {word} ", "chosen": chosen, "rejected": rejected, "margin": 1.0, "agreement": 0.75}
    for word in ("is", "a", "user")
    for chosen, rejected in zip(TEXTS, TEXTS[1:], strict=False)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes, once for each family, the folder of a random language model, masked or causal, with a tokenizer."""

    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in made:
            path = tmp_path_factory.mktemp("model") / f"my-{family}"
            torch.manual_seed(0)
            options = FAMILIES[family] | {"vocab_size": len(WORDS), "pad_token_id": 0, "initializer_range": 0.3}
            kind = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
            kind.from_config(AutoConfig.for_model(family, **options)).save_pretrained(path)
            make_tokenizer(family, **(ENDS if family in DECODERS else {})).save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return make


@pytest.fixture
def run(tmp_path):
    def run(model: str, out: str = "out", recipe: str = "", **options) -> Path:
        rows = tmp_path / "pairs.jsonl"
        if not rows.exists():
            rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        given = {
            "model_name_or_path": model, "dataset_name": rows, "eval_dataset_name": rows, "max_length": 32,
            "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 4,
            "output_dir": tmp_path / out, "disable_tqdm": True, **options,
        }  # fmt: skip
        flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        reward.main(*parse(*reward.OPTIONS, args=flags))
        return tmp_path / out

    return run


@pytest.mark.parametrize("family", LEARNED)
def test_what_must_be_learned(family, folder):
    model = RewardModelConfig(folder(family))
    assert has_own_head(model) == (family not in DECODERS)
    classifier = load_classifier(model)
    assert set(classifier.learned) == LEARNED[family]
    assert classifier.model.config.num_labels == 1 and not classifier.model.training
    if family in DECODERS:
        assert classifier.tokenizer("the film")["input_ids"][-1] == classifier.tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "peft"),
    [*((name, False) for name in ("bert", "gpt2", "llama")), *((name, True) for name in ENCODERS)],
    ids=lambda value: value if isinstance(value, str) else ("LoRA" if value else "all weights"),
)
def test_what_training_leaves_gives_the_same_scores(family, peft, folder, run, monkeypatch):
    """The margins on the held-out pairs, which the trainer measures before it saves, are those of the reward function."""
    margins = []
    original = reward.reward_model_report
    monkeypatch.setattr(
        reward, "reward_model_report", lambda **given: margins.extend(given["margins"]) or original(**given)
    )
    out = run(folder(family), use_peft=peft, lora_target_modules="all-linear", use_agreement=True)
    assert max(margins) - min(margins) > 0.01
    score = get_reward_adapter(str(out)) if peft else get_model(str(out))
    prompts = [row["prompt"] for row in PAIRS]
    sides = [score(prompts=prompts, completions=[row[side] for row in PAIRS]) for side in ("chosen", "rejected")]
    assert [a - b for a, b in zip(*sides, strict=True)] == pytest.approx(margins, abs=1e-4)
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "metrics.json", "saved_files.json", "tokenizer.json"} <= names
    assert ("model.safetensors" in names) != peft and ("adapter_model.safetensors" in names) == peft
    assert "my-" in (out / "README.md").read_text() and "None" not in (out / "README.md").read_text()
    assert json.loads((out / "metrics.json").read_text())["pairs"] == len(PAIRS)
    if not peft:
        assert str(out.parent) not in (out / "config.json").read_text()
        before, after = load_file(Path(folder(family)) / "model.safetensors"), load_file(out / "model.safetensors")
        common = before.keys() & after.keys()
        assert len(common) > 5 and sum(not torch.equal(before[name], after[name]) for name in common) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "peft"), [("bert", False), ("bert", True)])
def test_it_resumes_to_the_byte(family, peft, folder, run, monkeypatch):
    options = {
        "use_peft": peft, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "disable_dropout": False,
        "resume_from_checkpoint": "auto", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
    }  # fmt: skip
    expected = run(folder(family), "at once", **options)
    original, kill = Trainer._inner_training_loop, [None]

    def loop(self, *args, **kwargs):
        self.add_callback(KillAt(kill[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    for step in (2, 5, None):
        kill[0] = step
        if step is None:
            found = run(folder(family), "in pieces", **options)
        else:
            with pytest.raises(Killed):
                run(folder(family), "in pieces", **options)
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()
    before, after = (json.loads((out / "metrics.json").read_text()) for out in (expected, found))
    assert before["accuracy"] == after["accuracy"] and before["reliability"] == after["reliability"]
    with pytest.raises(ValueError, match=r"use_peft=\w+ instead of \w+ \(it changes which weights train\)"):
        run(
            folder(family),
            "other",
            **{**options, "use_peft": not peft, "resume_from_checkpoint": found / "checkpoint-5"},
        )


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"sft_adapter": "sft"}, r"sft_adapter=.* shares with the policy, but .*my-bert' is an encoder"),
        (
            "gpt2",
            {"sft_adapter": "sft", "use_peft": False},
            r"sft_adapter=.* but use_peft=False trains a model of its own\. .*or train a LoRA adapter \(use_peft: true\)",
        ),
        (
            "bert",
            {"use_peft": False, "dtype": "bfloat16"},
            r"dtype='bfloat16' .* are lost to rounding.* set bf16: true",
        ),
        ("bert", {"load_in_4bit": True}, r"load_in_4bit=True is only for a decoder"),
        ("bert", {"lora_top_layers": 1}, r"lora_top_layers=1 saves PPO work on a shared backbone"),
        (
            "bert",
            {"lora_target_modules": "c_attn"},
            r"'c_attn' is no layer of BertFor.*Name some of dense, key, query,",
        ),
        ("modernbert", {}, r"peft has no choice for the family 'modernbert'. Set it to all-linear, or to some of Wi"),
        ("bert", {"max_length": 513}, r"max_length=513 exceeds the model's context of 512"),
        ("roberta", {"max_length": 512}, r"max_length=512 exceeds the model's context of 511"),
    ],
)
def test_what_does_not_fit_a_model_of_its_own_is_refused(family, options, message, folder, run, sft_adapter):
    if "sft_adapter" in options:
        options = options | {"sft_adapter": sft_adapter}
    with pytest.raises((ValueError, ImportError), match=message) as caught:
        run(folder(family), **options)
    assert "\n" not in str(caught.value)


def test_conversations_need_a_chat_template(folder, run, tmp_path):
    turns = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [{"role": "user", "content": "the film"}], **turns}] * 4
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"turns\.jsonl row 1 .*the tokenizer has no chat template"):
        run(folder("bert"), dataset_name=tmp_path / "turns.jsonl")


def test_a_model_that_lacks_layers_is_refused(folder, tmp_path):
    """And so is one whose scores padding changes."""
    model = AutoModelForMaskedLM.from_pretrained(folder("bert"))
    weights = {name: of for name, of in model.state_dict().items() if ".layer.1." not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    AutoTokenizer.from_pretrained(folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\d+ tensors of BertForSequenceClassification are missing from its files"):
        load_classifier(RewardModelConfig(str(tmp_path)))


def test_a_classifier_keeps_its_score_and_gets_a_new_one_for_other_outputs(folder, tmp_path):
    for labels in (1, 2):
        torch.manual_seed(labels)
        model = AutoModelForSequenceClassification.from_pretrained(folder("bert"), num_labels=labels)
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder("bert")).save_pretrained(tmp_path)
        found = load_classifier(RewardModelConfig(str(tmp_path))).model
        assert torch.equal(found.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
        assert torch.equal(found.classifier.weight, model.classifier.weight) == (labels == 1)
        assert found.classifier.weight.shape == (1, 16)


def test_a_decoders_tokenizer_ends_texts_once(tmp_path):
    """It keeps what it writes before a text, and a tokenizer that ends texts itself is left as it is."""
    for begins in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "backbone")
        if begins:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
            )
            tokenizer.bos_token = "<|pad|>"
        expected = tokenizer("A film")["input_ids"] + [tokenizer.eos_token_id]
        for _ in range(2):
            end_texts(tokenizer, "it")
            assert tokenizer("A film")["input_ids"] == expected
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("A film")["input_ids"] == expected
    bert = make_tokenizer("bert")
    end_texts(bert, "it")
    assert added_tokens(bert) == ([], []) or bert("the film")["input_ids"][-1] == 3


def test_lora_adapts_the_layers_and_never_the_head(folder):
    for family in ("roberta", "bert", "deberta-v2"):
        classifier = load_classifier(RewardModelConfig(folder(family)))
        model = RewardModelConfig(folder(family), lora_target_modules=["dense"])
        config = classifier_lora(classifier, model, LoraArguments(lora_embeddings=True))
        prefix = classifier.model.base_model_prefix
        assert all(name.startswith(f"{prefix}.") and "pooler" not in name for name in config.target_modules)
        assert f"{prefix}.embeddings.word_embeddings" in config.target_modules
        assert len(config.target_modules) == 2 * 3 + 1  # of each layer: after attention, up and down


def test_roberta_counts_positions_from_the_pad_token_on(folder):
    classifier = load_classifier(RewardModelConfig(folder("roberta")))
    longest = longest_text(classifier.model, classifier.tokenizer)
    padding = classifier.model.roberta.embeddings.padding_idx
    assert longest == classifier.model.config.max_position_embeddings - padding - 1
    ids = torch.full((1, int(longest)), 5)
    assert math.isfinite(classifier.model(input_ids=ids).logits.item())
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        classifier.model(input_ids=torch.full((1, int(longest) + 1), 5))


@pytest.mark.slow
def test_whose_folder_it_is(folder, run, tmp_path, refused=pytest.raises):
    """A run replaces a model of its own, and never an adapter, a language model, or a folder that it reads."""
    out = run(folder("bert"), use_peft=False)
    first = (out / "model.safetensors").read_bytes()
    run(folder("bert"), use_peft=False, seed=1)
    assert (out / "model.safetensors").read_bytes() != first
    with refused(ValueError, match="holds a model, and an adapter must not be beside it"):
        run(folder("bert"))
    with refused(ValueError, match="the run reads this folder and would overwrite it"):
        run(str(out), use_peft=False)
    run(str(out), "continued", use_peft=False, learning_rate=0.0)  # a reward model is a start, with its head
    again = load_file(tmp_path / "continued" / "model.safetensors")
    assert all(torch.equal(again[name], of) for name, of in load_file(out / "model.safetensors").items())
    run(folder("bert"), "adapter")
    with refused(ValueError, match="holds an adapter, and a model must not be beside it"):
        run(folder("bert"), "adapter", use_peft=False)
    (tmp_path / "language").mkdir()
    AutoModelForMaskedLM.from_pretrained(folder("bert")).save_pretrained(tmp_path / "language")
    with refused(ValueError, match="holds a model that is no classifier, and this run saves a reward model"):
        run(folder("bert"), "language", use_peft=False)
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(bytes(weights))
    with refused(ValueError, match=r"model\.safetensors: not the file that was saved with the others"):
        get_model(str(out))


@pytest.mark.slow
def test_an_adapter_on_an_encoder_is_no_reward_adapter(folder, run, tmp_path):
    from pipeline.backbone.adapters import check_adapter

    out = run(folder("distilbert"), lora_target_modules="all-linear")
    with pytest.raises(ValueError, match=r"a classifier of its own.*rewards\.get_reward_adapter\(folder="):
        check_adapter(str(out), needs_head=True)
    with pytest.raises(ValueError, match=r"rewards\.get_reward_adapter\(folder="):
        get_model(str(out))
    other = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder("distilbert")))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folder("distilbert")).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the adapter was trained on another base"):
        get_reward_adapter(str(out), model=str(tmp_path / "other"))
    whole = run(folder("distilbert"), "whole", use_peft=False)
    with pytest.raises(
        FileNotFoundError, match=re.escape("This is a whole model. Write reward_models.pretrained.get_mod")
    ):
        check_adapter(str(whole), needs_head=True)
