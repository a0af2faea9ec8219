"""Recipes for real models, whole: the first step of each stage on a random model of the architecture, in bfloat16.

The hub is out of the tests' reach. In its place stand datasets with the splits and columns that the hub's have, and
models with as many layers as the published ones, a few units wide.
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from data import files
from pipeline import convert_hh, ppo
from pipeline.runs.command_line import parse


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipeline" / "recipes"
POST = "SUBREDDIT: r/films\n\nTITLE: A film\n\nPOST: I saw the film number {}. It was long.\n\nTL;DR:"


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def splits(row, *names: str) -> dict[str, list[dict]]:
    return {name: [row(number) for number in range(8)] for name in names}


# Columns and splits as the datasets' cards and the scripts that made them (huggingface/trl, examples/datasets) have them.
HUB = {
    "trl-lib/tldr": splits(
        lambda number: {"prompt": POST.format(number), "completion": f" A film of {number} hours."},
        *("train", "validation", "test"),
    ),
    "trl-lib/tldr-preference": splits(
        lambda number: {
            "prompt": POST.format(number),
            "chosen": f" A film of {number} hours.",
            "rejected": f" Film {number}.",
        },
        *("train", "validation"),
    ),
    "trl-lib/Capybara": splits(
        lambda number: {
            "source": "Know-Logic",
            "messages": turns("Which film?", f"Number {number}.", "Why?", "It is short."),
            "num_turns": 2,
        },
        *("train", "test"),
    ),
    "trl-lib/hh-rlhf-helpful-base": splits(
        lambda number: {
            # Some pairs are the same twice, and some replies are empty.
            "chosen": turns("", "" if number == 3 else f"See film {number}.")[1:],
            "rejected": turns("", f"See film {number}." if number == 2 else "No.")[1:],
            "prompt": turns("Which film?", "What do you like?", f"Films about {number}."),
        },
        *("train", "test"),
    ),
}
CHAT = "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA = LlamaConfig(num_hidden_layers=32, max_position_embeddings=131_072, tie_word_embeddings=False, **NARROW)
QWEN = Qwen2Config(num_hidden_layers=24, max_position_embeddings=32_768, tie_word_embeddings=True, **NARROW)
SMOLLM = LlamaConfig(num_hidden_layers=30, max_position_embeddings=8192, tie_word_embeddings=True, **NARROW)
# By recipe: the published model, and its architecture as deep, but narrow.
MODELS = {
    "gpt2": ("openai-community/gpt2", GPT2LMHeadModel, GPT2Config(n_layer=12, n_embd=16, n_head=2)),
    "gpt2-xl": ("openai-community/gpt2-xl", GPT2LMHeadModel, GPT2Config(n_layer=48, n_embd=16, n_head=2)),
    "llama-8b": ("meta-llama/Llama-3.1-8B", LlamaForCausalLM, LLAMA),
    "qwen2.5-0.5b-chat": ("Qwen/Qwen2.5-0.5B-Instruct", Qwen2ForCausalLM, QWEN),
    "smollm2-chat": ("smollm2", LlamaForCausalLM, SMOLLM),
}


MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# What README and docs say to type with a recipe and more options: stage, recipe, options.
WITH_OPTIONS = re.compile(
    r"^accelerate launch .* -m pipeline\.(\w+) --config pipeline/recipes/(\S+) (--.+)$", re.MULTILINE
)
# How `make smollm2-chat` converts HH: the options, and the numbers among them.
CONVERTED = re.search(
    r"convert_hh \$\(HH\) \S+ --max_tokens (\d+) --tokenizer \S+ --held_out (\S+)", MAKEFILE
).groups()
CONVERTED = int(CONVERTED[0]), ["--max_tokens", CONVERTED[0], "--held_out", CONVERTED[1]]


TRAINING = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
TRAINING |= {"save_strategy": "no", "use_cpu": "true", "warmup_steps": 0}
SHORT = {"max_completion_length": 4}
SIZES = {
    "sft": TRAINING,
    "reward": TRAINING | SHORT | {"sft_completions": 4},
    # Of a reward model after one step nothing is asked.
    "ppo": TRAINING | SHORT | {"steps_per_generation": 2, "num_iterations": 1, "min_reward_accuracy": 0},
    "evaluation": SHORT | {"max_prompts": 4},
}


def first_step(stage: str, recipe: Path, model: str, *options: str):
    """Run a stage by a recipe and options, with another model and one small step."""
    main = import_module(f"pipeline.{stage}").main
    kinds = [kind for argument, kind in get_type_hints(main).items() if argument != "return"]
    flags = [str(word) for key, value in SIZES[stage].items() for word in (f"--{key}", value)]
    main(*parse(*kinds, args=["--config", str(recipe), *options, *flags, "--model_name_or_path", model]))


def hh_row(number: int) -> str:
    asked = f"\n\nHuman: Which film is number {number}?\n\nAssistant: "
    return json.dumps({"chosen": f"{asked}A film of {number} hours.", "rejected": f"{asked}I will not say."}) + "\n"


def narrow_model(name: str, folder: Path) -> str:
    """Save a random model of a recipe's architecture, with the embedded tokenizer; a chat model's has a template, ends
    turns with `<|im_end|>` and pads with `<|endoftext|>`, as Qwen's does."""
    _, kind, config = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "backbone")
    if name.endswith("chat"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
        tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", CHAT
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hub(monkeypatch):
    """Have the stand-ins loaded in place of the datasets of the hub."""

    def load(name, source, split, **options):
        return Dataset.from_list(HUB[source][split])

    monkeypatch.setattr(files, "_load_split", load)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_first_step_of_every_stage(name, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)  # where the recipes' `runs` go
    model, out = narrow_model(name, tmp_path / "model"), Path("runs") / name
    if name == "smollm2-chat":  # its data is made by a command
        Path("hh.jsonl").write_text("".join(map(hh_row, range(40))))
        convert_hh.main(["hh.jsonl", str(out / "data"), *CONVERTED[1], "--tokenizer", model])
    for stage in SIZES:
        first_step(stage, RECIPES / name / f"{stage}.yaml", model)

    heads = {"sft": False, "reward": True, "ppo": False, "ppo/value": True}
    for folder, has_head in heads.items():
        weights = load_file(out / folder / "adapter_model.safetensors")
        assert any(key.endswith("score.weight") for key in weights) == has_head
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert max(tensor.abs().max() for key, tensor in weights.items() if "lora_B" in key) > 0  # something trained
    report = json.loads((out / "report.json").read_text())
    assert report["prompts"] == 4 and 0 <= report["reward_model"]["accuracy"] <= 1
    history = json.loads((out / "ppo" / "metrics.json").read_text())["history"]
    assert history[0]["kl"] == pytest.approx(0, abs=1e-3)
    dropped = [record.getMessage() for record in caplog.records if "rows are left out" in record.getMessage()]
    if name == "qwen2.5-0.5b-chat":  # training and held-out pairs
        message = (
            "trl-lib/hh-rlhf-helpful-base: 2 of 8 rows are left out: 1 because 'rejected' must differ from 'chosen' (first: "
            "row 3); 1 because 'chosen' must not be empty (first: row 4)."
        )
        assert dropped == [message, message]
    else:
        assert not dropped


@pytest.mark.slow
def test_own_data_by_the_commands_of_readme_and_docs(tmp_path, monkeypatch):
    """They differ from the recipes in the files that they name: these are read, and no others."""
    commands = {name: WITH_OPTIONS.findall(page) for name, page in PAGES.items() if WITH_OPTIONS.search(page)}
    # The answers of pipeline.label are read by the reward stage's own reader in tests/pipeline/pages/test_label_answers.py.
    labels = commands.pop("labelling.md")
    assert [command[:2] for command in labels] == [("reward", "demo/reward.yaml")]
    ((stage, recipe, options),) = commands.pop("overoptimization.md")  # it needs the adapters of two demos
    assert (stage, recipe) == ("ppo", "papers/ziegler2019/ppo_without_kl.yaml")
    _, _, _, rewards, _, _, args = parse(*ppo.OPTIONS, args=["--config", str(RECIPES / recipe), *shlex.split(options)])
    assert len(rewards.reward_funcs) == 1 and args.reward_weights == [1, 0] and args.beta == 0
    assert commands.keys() == {"README.md", "own-data.md"} and commands["README.md"] == commands["own-data.md"]
    commands = commands["README.md"]
    assert [(stage, recipe) for stage, recipe, _ in commands] == [(stage, f"smollm2/{stage}.yaml") for stage in SIZES]
    example = json.loads(re.search(r"```json\n(.*)\n```", PAGES["README.md"]).group(1))
    pairs = [{**example, "chosen": example["chosen"] + " Yes." * number} for number in range(8)]
    files_of_rows = {
        "texts": [{"text": row["prompt"] + row["chosen"]} for row in pairs],
        "pairs": pairs,
        "held_out_pairs": pairs[:4],
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
        "held_out_prompts": [{"prompt": row["prompt"]} for row in pairs[:3]],
    }
    monkeypatch.chdir(tmp_path)
    for name, rows in files_of_rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = narrow_model("smollm2-chat", tmp_path / "model")
    for stage, recipe, options in commands:
        first_step(stage, RECIPES / recipe, model, *options.split())
    out = Path("runs/smollm2")
    read = {
        stage: json.loads((out / stage / "metrics.json").read_text())["rows"] for stage in ("sft", "reward", "ppo")
    }
    assert {part["source"] for rows in read.values() for part in rows.values()} == {
        *("texts.jsonl", "pairs.jsonl", "held_out_pairs.jsonl", "prompts.jsonl")
    }
    assert json.loads((out / "report.json").read_text())["prompts"] == 3


# By task: what a demonstration says, and the column of references in another form than `data.tasks` writes it.
TASKS = {
    "question_answering": ("Number {}.", {"answers": {"text": ["Number {}", "{}"], "answer_start": [5, 12]}}),
    "knowledge_graph": ("film | number | {}", {"triples": [["film", "number", "{}"], ["film", "length", "long"]]}),
}


def filled(cell, number: int):
    """A cell with the number of its row in all texts."""
    if isinstance(cell, dict):
        return {key: filled(value, number) for key, value in cell.items()}
    if isinstance(cell, list):
        return [filled(value, number) for value in cell]
    return cell.format(number) if isinstance(cell, str) else cell


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_any_model_and_data(task, tmp_path, monkeypatch):
    """The recipes, with a chat model, conversations, and files of the user."""
    said, references = TASKS[task]
    asked = [turns(f"Which film is number {number}?") for number in range(8)]
    rows = {
        "texts": [{"prompt": ask, "completion": turns("", said.format(n))[1:]} for n, ask in enumerate(asked)],
        "prompts": [{"prompt": ask, "id": n} | filled(references, n) for n, ask in enumerate(asked)],
    }
    monkeypatch.chdir(tmp_path)
    for name, of_file in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    model = narrow_model("smollm2-chat", tmp_path / "model")
    for stage, name in (("sft", "texts"), ("ppo", "prompts"), ("evaluation", "prompts")):
        options = ["--dataset_name", f"{name}.jsonl"]
        first_step(stage, RECIPES / task / f"{stage}.yaml", model, *options)
    report = json.loads((Path("runs") / task / "report.json").read_text())
    assert report["prompts"] == 4 and -0.5 <= report["sft"]["score"] <= report["sft"]["judge"] + 1
    assert report["rows"]["prompts"]["source"] == "prompts.jsonl"
    for key in ("score_gain", "judge_gain"):
        assert report[key]["low"] <= report[key]["mean"] <= report[key]["high"]


def test_every_real_model_has_all_stages():
    """A folder of recipes is whole or says nothing of a real model."""
    for folder in RECIPES.iterdir():
        if folder.name in MODELS:
            stages = {path.stem for path in folder.glob("*.yaml")}
            assert stages == {"sft", "reward", "ppo", "evaluation"}, folder.name


@pytest.mark.parametrize("name", MODELS)
def test_stages_of_a_recipe_fit_each_other(name):
    """One model, one reach of the adapters, one length and temperature from SFT to the report."""
    options = {}
    for stage in ("sft", "reward", "ppo", "evaluation"):
        kinds = get_type_hints(import_module(f"pipeline.{stage}").main)
        cpu = [] if stage == "evaluation" else ["--use_cpu", "true"]
        given = ["--config", str(RECIPES / name / f"{stage}.yaml"), *cpu]
        parts = parse(*[kind for argument, kind in kinds.items() if argument != "return"], args=given)
        options[stage] = {key: value for part in parts for key, value in vars(part).items()}
    sft, reward, ppo, evaluation = options.values()
    assert sft["model_name_or_path"] == MODELS[name][0] and sft["dtype"] == "bfloat16"
    for key in ("model_name_or_path", "dtype", "attn_implementation"):
        assert len({str(stage[key]) for stage in options.values()}) == 1, key
    for key in ("lora_r", "lora_alpha", "lora_top_layers"):
        assert sft[key] == reward[key] == ppo[key], key
    assert ppo["bf16"] and reward["bf16"] and sft["bf16"]
    assert sft["output_dir"] == reward["sft_adapter"] == ppo["sft_adapter"] == evaluation["sft_adapter"]
    assert [reward["output_dir"]] == ppo["reward_adapter"] == evaluation["reward_adapter"]
    assert ppo["output_dir"] == evaluation["policy_adapter"]
    assert ppo["normalize_scores"] and evaluation["normalize_scores"]
    assert reward["max_completion_length"] == ppo["max_completion_length"] == evaluation["max_completion_length"]
    assert ppo["temperature"] == evaluation["temperature"]
    if name == "smollm2-chat":  # every dialogue fits, and what is evaluated on was not trained on
        assert sft["max_length"] == reward["max_length"] == CONVERTED[0]
        read = [path for stage in (sft, reward, ppo) for path in (stage["dataset_name"], stage["eval_dataset_name"])]
        kinds = ("sft", "preferences", "prompts")
        assert read == [f"runs/{name}/data/{kind}_{split}.jsonl" for kind in kinds for split in ("train", "test")]
        assert evaluation["dataset_name"] == ppo["eval_dataset_name"]
        return
    assert ppo["dataset_name"] == evaluation["dataset_name"] in HUB
    assert {sft["dataset_name"], reward["dataset_name"]} <= HUB.keys()
    assert evaluation["dataset_eval_split"] != ppo["dataset_train_split"]
