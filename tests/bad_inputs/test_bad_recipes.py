"""Recipes and command lines: YAML, types, ranges, and options that contradict each other. No model is loaded."""

import json
import sys
from dataclasses import fields
from importlib import import_module
from typing import get_type_hints

import pytest
from trl import SFTConfig

from pipeline.runs.arguments import DataArguments
from pipeline.runs.command_line import parse
from pipeline.runs.recipe import RANGES as RANGES_OF_OPTIONS


YAML = {
    "a bracket left open": ("run_name: [1, 2\n", r"recipe\.yaml line \d+: not a YAML recipe \(expected"),
    "a tab": ("\trun_name: x\n", r"recipe\.yaml line \d+: not a YAML recipe \(found character '\\t'"),
    "no space after the colon": ("lora_r:16\n", r"recipe\.yaml line \d+: not a YAML recipe"),
    "a key twice": ("seed: 1\n", r"recipe\.yaml line 8: not a YAML recipe \(the key 'seed' comes twice\)"),
    "a key twice below": ("lr_scheduler_kwargs: {a: 1, a: 2}\n", r"the key 'a' comes twice"),
    "a Python object": ("run_name: !!python/object/apply:os.getcwd []\n", r"could not determine a constructor"),
    "an unknown key": (
        "learning_rat: 0.1\n",
        r"recipe\.yaml: unknown key 'learning_rat'\. Did you mean learning_rate\?",
    ),
    "a key of another stage": ("kl_target: 5\n", r"recipe\.yaml: unknown key 'kl_target'"),
}
TYPES = {
    "text for a number": ("learning_rate: high\n", r"recipe\.yaml: learning_rate='high' must be a number\."),
    "a list for a number": ("learning_rate: [0.1]\n", r"learning_rate=\[0\.1\] must be a number\."),
    "a mapping for a number": ("warmup_steps: {a: 1}\n", r"warmup_steps=\{'a': 1\} must be a number\."),
    "a number for yes or no": ("logging_first_step: 2\n", r"logging_first_step=2 must be true or false\."),
    "a fraction for a whole number": ("lora_r: 16.5\n", r"lora_r=16\.5 must be a whole number\."),
    "null for a number": ("learning_rate: null\n", r"learning_rate=None must be a number\."),
    "yes for a number": (
        "logging_steps: yes\n",
        r"logging_steps=True must be a number\. YAML reads yes, no, on and off",
    ),
    "off for a word": (
        "eval_strategy: off\n",
        r"eval_strategy=False must be text\. .*If you mean the word, put it in quotes",
    ),
    "a word for yes": ("packing: maybe\n", r"packing='maybe' must be true or false\."),
    "a number for text": ("run_name: 2024\n", r"run_name=2024 must be text or null\."),
    "a number for a list": (
        "lora_target_modules: 5\n",
        r"lora_target_modules=5 must be a list in brackets, each entry",
    ),
    "infinity for a whole number": ("lora_r: .inf\n", r"lora_r=inf must be a whole number\."),
    "no such dtype": ("dtype: float61\n", r"dtype='float61' is not one of auto, bfloat16, float16, float32\."),
    "no such schedule": ("lr_scheduler_type: linearr\n", r"lr_scheduler_type='linearr' is not one of linear, cosine"),
    "a pad token without quotes": ("pad_token: [PAD]\n", r"pad_token=\['PAD'\] must be text or null\."),
    "no such optimizer": ("optim: adam\n", r"optim='adam' is not one of adamw_torch"),
}
RANGES = [
    ("sft", "max_steps", 0, "1 or more, or -1 to train num_train_epochs"),
    ("sft", "learning_rate", -1.0, "0 or more"),
    ("sft", "learning_rate", "nan", "0 or more"),
    ("sft", "per_device_train_batch_size", 0, "1 or more"),
    ("sft", "gradient_accumulation_steps", 0, "1 or more"),
    ("sft", "max_length", 0, "1 or more"),
    ("sft", "num_train_epochs", 0.0, "above 0"),
    ("sft", "seed", -1, "from 0 to 4294967295"),
    ("sft", "weight_decay", -0.1, "0 or more"),
    ("sft", "max_grad_norm", -1.0, "0 or more"),
    ("sft", "adam_beta1", 1.0, "0 or more and below 1"),
    ("sft", "logging_steps", 0.0, "above 0"),
    ("sft", "save_steps", 0.0, "above 0"),
    ("sft", "warmup_steps", -5.0, "0 or more"),
    ("sft", "lora_r", 0, "1 or more"),
    ("sft", "lora_dropout", 1.5, "from 0 to 1"),
    ("sft", "lora_top_layers", -1, "1 or more"),
    ("reward", "sft_completions", 0, "1 or more"),
    ("reward", "max_completion_length", 0, "1 or more"),
    ("ppo", "beta", -0.1, "0 or more"),
    ("ppo", "ptx_max_length", 1, "2 or more"),
    ("ppo", "temperature", 0.0, "above 0"),
    ("ppo", "top_p", 1.5, "above 0 and at most 1"),
    ("ppo", "num_iterations", 0, "1 or more"),
    ("ppo", "num_generations", 0, "1 or more"),
    ("ppo", "steps_per_generation", 0, "1 or more"),
    ("ppo", "max_completion_length", 0, "1 or more"),
    ("ppo", "epsilon", 0.0, "above 0"),
    ("ppo", "value_clip", 0.0, "above 0"),
    ("ppo", "vf_coef", -1.0, "0 or more"),
    ("ppo", "gamma", 1.5, "from 0 to 1"),
    ("ppo", "lam", -0.5, "from 0 to 1"),
    ("ppo", "kl_target", -1.0, "above 0"),
    ("ppo", "min_reward_accuracy", 55.0, "from 0 to 1"),
    ("ppo", "critic_warmup_updates", -1, "0 or more"),
    ("ppo", "sample_updates", -1, "0 or more"),
    ("rloo", "learning_rate", -1.0, "0 or more"),
    ("grpo", "temperature", -1.0, "above 0"),
    ("dpo", "beta", -1.0, "0 or more"),
    ("dpo", "max_pairs", 0, "1 or more"),
    ("evaluation", "temperature", 0.0, "above 0"),
    ("evaluation", "batch_size", 0, "1 or more"),
    ("evaluation", "max_prompts", 0, "1 or more"),
    ("best_of_n", "max_completion_length", 0, "1 or more"),
]
CONTRADICTIONS = {
    "an end of text of one stage": ("sft", {"eos_token": "!"}, r"^eos_token='!' would change only this stage"),
    "a chat template of one stage": ("sft", {"chat_template_path": "x"}, r"^chat_template_path='x' would change only"),
    "thinking that the reward would not see": (
        "rloo",
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        r"^chat_template_kwargs=\{'enable_thinking': False\} would not reach the reward model",
    ),
    "rankings torn apart": (
        "reward",
        {"train_sampling_strategy": "sequential"},
        r"^train_sampling_strategy='sequential' is not supported: pairs of a ranking are batched together",
    ),
    **{
        f"{key} among what is sampled by ({stage})": (
            stage,
            {"generation_kwargs": json.dumps({"typical_p": 0.9, key: value})},
            rf"^generation_kwargs: {key}={value!r} is not supported: {reason}",
        )
        for stage, key, value, reason in (
            ("ppo", "eos_token_id", 5, "completions end where the model's own generation config ends them"),
            ("ppo", "temperature", 0.5, "logprobs would be those of another temperature"),
            ("ppo", "num_return_sequences", 2, "a prompt has one completion at a time. Set num_generations"),
            ("rloo", "num_beams", 3, "completions are sampled one token after the other"),
            ("grpo", "return_dict_in_generate", True, "only tokens are returned"),
            ("grpo", "stop_strings", "the", "completions end at a token"),
        )
    },
    "a typo among what is sampled by": (
        "ppo",
        {"generation_kwargs": '{"typical": 0.9}'},
        r"^generation_kwargs: unknown key 'typical'\. Did you mean typical_p\?$",
    ),
    "one prompt to evaluate": ("evaluation", {"max_prompts": 1}, r"prompts\.jsonl: 1 prompt \(max_prompts=1\), and"),
    "one prompt for best of n": ("best_of_n", {"max_prompts": 1}, r": 1 prompt .* intervals need 2 or more"),
    "minibatches": ("ppo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "does not divide"),
    "a held KL without a penalty": ("ppo", {"kl_target": 6.0, "beta": 0.0}, "beta=0.0 cannot be adapted to kl_target"),
    "a head with an adapter's start": (
        "ppo",
        {"critic": "head", "value_init": "reward"},
        "critic='head' has no value adapter",
    ),
    "bounds the wrong way round": (
        "ppo",
        {"recipe": "reward_clip_range: [5, -5]\n"},
        r"\[5, -5\] must be two numbers",
    ),
    "one bound": ("ppo", {"recipe": "reward_clip_range: [5]\n"}, r"reward_clip_range=\[5\] must be two numbers"),
    "a group of one": ("grpo", {"num_generations": 1}, "at least 2 generations"),
    "no completions": ("best_of_n", {"n": [0, 2]}, r"n=\[0, 2\] must be a list of numbers of completions"),
    "a report that is not there": ("best_of_n", {"report": "none.json"}, "report='none.json': no such file"),
    "an optimizer on the command line": (
        "sft",
        {"optim": "adam"},
        "command line: argument --optim: invalid choice: 'adam'",
    ),
    "no adapter to evaluate": (
        "evaluation",
        {"policy_adapter": []},
        "argument --policy_adapter.*: expected one argument",
    ),
}


@pytest.mark.parametrize(("recipe", "message"), YAML.values(), ids=YAML)
def test_yaml(recipe, message, refuses):
    refuses("sft", message, recipe=recipe)


@pytest.mark.parametrize(("recipe", "message"), TYPES.values(), ids=TYPES)
def test_types(recipe, message, refuses):
    refuses("sft", message, recipe=recipe)


@pytest.mark.parametrize(("stage", "key", "value", "range"), RANGES)
def test_ranges(stage, key, value, range, refuses):
    refuses(stage, f"^{key}={value} must be {range}\\.$", **{key: value})


@pytest.mark.parametrize(("stage", "options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(stage, options, message, refuses):
    refuses(stage, message, **options)


def test_every_range_is_that_of_an_option():
    mains = [import_module(f"pipeline.{stage}").main for stage in ("ppo", "reward", "dpo", "evaluation")]
    kinds = [kind for main in mains for name, kind in get_type_hints(main).items() if name != "return"]
    options = {option.name for kind in kinds for option in fields(kind)}
    assert {name for names, _, _ in RANGES_OF_OPTIONS for name in names} <= options


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "prompts.jsonl/ppo.yaml"])
def test_a_recipe_that_is_not_there(name, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    with pytest.raises(FileNotFoundError, match=rf"^--config {name}: no such file\. Name a recipe"):
        parse(DataArguments, args=["--config", name])
    with pytest.raises(FileNotFoundError, match=rf"^--config {name}: no such file\. Name a recipe"):
        parse(DataArguments, args=[f"--config={name}"])


def test_a_recipe_that_is_no_text(world):
    path = world.write("recipe.yaml", b"run_name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a YAML recipe \('utf-8' codec can't decode"):
        parse(DataArguments, args=["--config", path])


def test_numbers_that_yaml_reads_as_text_are_numbers(world):
    """`1e-5` has no point, and so is text in YAML 1.1."""
    path = world.write("recipe.yaml", "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\nmax_steps: 1e1\n")
    with pytest.raises(ValueError, match=r"max_steps='1e1' must be a whole number"):
        parse(SFTConfig, args=["--config", path])
    world.write("recipe.yaml", "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\n")
    assert parse(SFTConfig, args=["--config", path])[0].learning_rate == 1e-5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clearml", "ClearMLCallback requires 'clearml' to be installed"),
        ("notebook", "notebook is not supported, only azure_ml"),
    ],
)
def test_a_tracker_that_is_not_there(name, problem, monkeypatch):
    """Trainer says so too, after the model was loaded. A recipe that is only read may name what another machine has."""
    args = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--report_to", name]
    monkeypatch.setattr(sys, "argv", ["stage", *args])
    with pytest.raises(ValueError, match=rf"^report_to=\['{name}'\]: .*({problem})"):
        parse(SFTConfig)
    assert parse(SFTConfig, args=args)[0].report_to == [name]
