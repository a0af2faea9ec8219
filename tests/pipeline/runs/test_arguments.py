"""`pipeline.runs.arguments`: no typo passes, every recipe parses, and PPOConfig is RLOOConfig for one completion."""

import json
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from datasets import Dataset, DatasetDict
from peft import get_peft_model, get_peft_model_state_dict
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from trl import ModelConfig, RLOOConfig

from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.rl.config import PPOConfig
from pipeline.runs.arguments import CompletionArguments, DataArguments
from pipeline.runs.command_line import parse
from reward_models.functions import load_function


ROOT = Path(__file__).parents[3]
# The protocols of papers and the recipes of the loop list stages; test_reproduce.py and test_loop.py parse those.
OF_STAGES = ("mini.yaml", "full.yaml", "loop.yaml", "study.yaml")
RECIPES = sorted(path for path in (ROOT / "pipeline" / "recipes").rglob("*.yaml") if path.name not in OF_STAGES)
COMMAND = re.compile(r"^# accelerate launch --config_file (\S+) -m pipeline\.(\w+) --config (\S+)$", re.MULTILINE)
CPU = {"output_dir": "out", "use_cpu": True}


def write(path: Path, text: str) -> list[str]:
    """The arguments that name a recipe of this text, with what PPOConfig needs on any machine."""
    path.write_text(f"output_dir: out\nuse_cpu: true\n{text}")
    return ["--config", str(path)]


def test_typo_in_a_recipe(tmp_path):
    recipe = write(tmp_path / "ppo.yaml", "learning_rat: 1.0e-3\n")
    message = f"{tmp_path / 'ppo.yaml'}: unknown key 'learning_rat'. Did you mean learning_rate?"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse(DataArguments, PPOConfig, args=recipe)


@pytest.mark.parametrize("flag", [["--dataset-nam", "x"], ["--dataset_nam", "x"], ["--dataset_nam=x"]])
def test_typo_on_the_command_line(tmp_path, flag):
    with pytest.raises(ValueError, match=r"^command line: unknown key 'dataset_nam'\. Did you mean dataset_name\?$"):
        parse(DataArguments, PPOConfig, args=[*write(tmp_path / "ppo.yaml", ""), *flag])


def test_the_beginning_of_a_flag_is_no_flag(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'num_iter'"):
        parse(PPOConfig, args=[*write(tmp_path / "ppo.yaml", ""), "--num_iter", "2"])


def test_nothing_is_suggested_where_nothing_is_near(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'qqqqqqqq'\.$"):
        parse(DataArguments, args=["--qqqqqqqq", "1"])


def test_key_of_another_stage(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'beta'"):
        parse(DataArguments, ModelConfig, args=["--beta", "0.1"])


@pytest.mark.parametrize("text", ["", "- beta\n- 0.1\n", "beta\n"])
def test_recipe_that_is_no_mapping(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"r\.yaml: not a YAML mapping"):
        parse(DataArguments, args=["--config", str(tmp_path / "r.yaml")])


def test_recipe_overrides_defaults_and_command_line_overrides_the_recipe(tmp_path):
    recipe = write(tmp_path / "ppo.yaml", "beta: 0.5\nlam: 0.25\ndataset_name: rows.csv\n")
    data, args = parse(DataArguments, PPOConfig, args=[*recipe, "--beta", "0.75", "--dataset-name", "other.csv"])
    assert (args.beta, args.lam, args.gamma, data.dataset_name) == (0.75, 0.25, 1.0, "other.csv")


def test_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["stage", "--dataset_name", "rows.csv"])
    assert parse(DataArguments)[0].dataset_name == "rows.csv"


def test_negated_flag(tmp_path):
    (args,) = parse(PPOConfig, args=[*write(tmp_path / "ppo.yaml", ""), "--no_disable_dropout"])
    assert args.disable_dropout is False


def test_two_bounds_on_the_command_line(tmp_path):
    (args,) = parse(PPOConfig, args=[*write(tmp_path / "ppo.yaml", ""), "--reward_clip_range", "-1", "0.5"])
    assert args.reward_clip_range == [-1, 0.5]


def test_recipe_key_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="unknown key"):
        parse(PPOConfig, args=write(tmp_path / "ppo.yaml", "on: true\n"))


def test_recipes_are_found():
    stages = {COMMAND.search(path.read_text()).group(2) for path in RECIPES}
    assert stages >= {"sft", "reward", "ppo", "evaluation", "pretrain"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch, stage, recipe = COMMAND.search(path.read_text()).groups()
    assert Path(launch).is_file()
    assert Path(recipe).resolve() == path
    hints = get_type_hints(import_module(f"pipeline.{stage}").main)
    hints.pop("return")
    # No GPU is here to hear of bf16.
    cpu = ["--use_cpu", "true"] if any(issubclass(kind, TrainingArguments) for kind in hints.values()) else []
    for part in parse(*hints.values(), args=["--config", recipe, *cpu]):
        named = getattr(part, "dataset_name", None) or "human_ratings"
        for name in named if isinstance(named, list) else [named]:
            # Those of the hub have stand-ins in test_recipes.py, and a converter writes those in runs.
            own = name.partition(":")[0] == "human_ratings" or Path(name).is_file()
            assert own or re.fullmatch(r"[\w-]+/[\w.-]+|runs/.+\.jsonl", name)
        for function in getattr(part, "reward_funcs", None) or []:
            if "name='runs/" not in function:  # a model that an earlier stage leaves
                load_function(function)


def test_demo_ppo_recipe_says_what_it_does():
    hints = get_type_hints(import_module("pipeline.ppo").main)
    recipe = ROOT / "pipeline" / "recipes" / "demo" / "ppo.yaml"
    *_, args = parse(*[kind for name, kind in hints.items() if name != "return"], args=["--config", str(recipe)])
    text = recipe.read_text()
    prompts = int(re.search(r"rollouts: (\d+) prompts an update", text).group(1))
    updates, epochs, minibatches = map(
        int, re.search(r"PPO: (\d+) updates of (\d+) epochs of (\d+) minibatches", text).groups()
    )
    assert args.generation_batch_size == prompts
    assert args.num_iterations == epochs
    assert args.steps_per_generation == args.gradient_accumulation_steps * minibatches
    assert args.max_steps == updates * epochs * minibatches


def test_baselines_stand_on_the_footing_of_the_demo():
    """The same completions to learn from in number, length and temperature, the same start, rewards and epochs."""

    def options(stage, recipe):
        hints = get_type_hints(import_module(f"pipeline.{stage}").main)
        parts = parse(*[kind for name, kind in hints.items() if name != "return"], args=["--config", str(recipe)])
        return {key: value for part in parts for key, value in vars(part).items()}

    recipes = ROOT / "pipeline" / "recipes"
    ppo = options("ppo", recipes / "demo" / "ppo.yaml")
    dpo = options("dpo", recipes / "baselines" / "dpo.yaml")
    passes = ppo["steps_per_generation"] * ppo["num_iterations"]
    completions = ppo["max_steps"] * ppo["gradient_accumulation_steps"] // passes * ppo["generation_batch_size"]
    shared = ("sft_adapter", "reward_adapter", "normalize_scores", "dataset_name", "max_steps", "num_iterations")
    shared += ("steps_per_generation", "generation_batch_size", "max_completion_length", "temperature")
    for stage in ("rloo", "grpo"):
        theirs = options(stage, recipes / "baselines" / f"{stage}.yaml")
        assert {key: theirs[key] for key in shared} == {key: ppo[key] for key in shared}
        assert theirs["reward_weights"][1] == ppo["missing_eos_penalty"]
        assert f"max_completion_len={ppo['max_completion_length']}," in theirs["reward_funcs"][0]
    assert 2 * dpo["max_pairs"] == completions
    assert dpo["max_steps"] * dpo["per_device_train_batch_size"] == dpo["max_pairs"] * ppo["num_iterations"]
    assert (dpo["sft_adapter"], dpo["dataset_name"]) == (ppo["sft_adapter"], ppo["dataset_name"])


def test_one_completion_a_prompt():
    assert PPOConfig(**CPU).num_generations == 1
    assert PPOConfig(**CPU, num_generations=2).num_generations == 2


def test_defaults():
    args = PPOConfig(**CPU)
    assert (args.num_iterations, args.gamma, args.lam, args.vf_coef, args.value_clip) == (4, 1.0, 0.95, 0.1, 0.2)
    assert args.normalize_advantages and args.disable_dropout
    assert args.missing_eos_penalty is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"steps_per_generation": 4},
        {"generation_batch_size": 32},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"pad_to_multiple_of": "none", "bf16": False},
    ],
    ids=str,
)
def test_all_that_trl_derives_is_derived(given):
    """TRL refuses one completion a prompt in its last check, and we catch that: had it one more step after it, or the
    check before another, a field would be left as it was given."""
    own = ("num_iterations", "normalize_advantages", "disable_dropout", "gradient_checkpointing", "adam_epsilon")
    ours = PPOConfig(**CPU, **given)
    theirs = RLOOConfig(**CPU, **given, num_generations=2, **{name: getattr(ours, name) for name in own})
    assert theirs.steps_per_generation and theirs.generation_batch_size
    for name, value in vars(theirs).items():
        if name not in ("num_generations", "distributed_state"):
            assert vars(ours)[name] == value, name


def test_derived_batches():
    args = PPOConfig(**CPU, per_device_train_batch_size=16, steps_per_generation=4, gradient_accumulation_steps=2)
    assert args.generation_batch_size == 16 * 4
    args = PPOConfig(**CPU, per_device_train_batch_size=16, generation_batch_size=48)
    assert args.steps_per_generation == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_generations": 3}, r"generation_batch_size \(8\) must be divisible by num_generations \(3\)"),
        ({"generation_batch_size": 12}, r"generation_batch_size \(12\) must be divisible by the global batch size"),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "can not be both configured"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
    ids=str,
)
def test_other_checks_of_trl_stand(given, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**CPU, per_device_train_batch_size=8, **given)


@pytest.mark.parametrize("number", [0, -1])
def test_no_completion_a_prompt(number):
    with pytest.raises(ValueError, match="num_generations"):
        PPOConfig(**CPU, num_generations=number)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True),
        ("vllm_structured_outputs_regex", "[a-z]+"),
        ("mask_truncated_completions", True),
        ("sync_ref_model", True),
        ("router_aux_loss_coef", 0.1),
        ("chat_template_kwargs", {"a": 1}),
        ("use_transformers_continuous_batching", True),
    ],
)
def test_what_ppo_does_not_support(name, value):
    with pytest.raises(ValueError) as caught:
        PPOConfig(**CPU, **{name: value})
    once = " (once use_transformers_paged)" if name == "use_transformers_continuous_batching" else ""
    assert str(caught.value).startswith(f"{name}={value!r}{once} is not supported by PPO; ")


def test_a_dual_clip_is_above_the_clip_range():
    assert PPOConfig(**CPU, dual_clip=1.3, epsilon=0.2).dual_clip == 1.3
    with pytest.raises(ValueError, match=r"^dual_clip=1.3 must be above 1 \+ 0.3, the highest ratio"):
        PPOConfig(**CPU, dual_clip=1.3, epsilon=0.2, epsilon_high=0.3)


def test_a_judge_without_samples_would_judge_nothing():
    assert PPOConfig(**CPU, judge="a.b", sample_updates=2).judge == "a.b"
    with pytest.raises(
        ValueError, match=r"^judge='a.b' judges the completions of samples.jsonl, and sample_updates is 0"
    ):
        PPOConfig(**CPU, judge="a.b")


@pytest.mark.parametrize(("steps", "accumulation"), [(3, 2), (1, 2), (4, 3)])
def test_minibatches_are_whole(steps, accumulation):
    message = f"gradient_accumulation_steps={accumulation} does not divide steps_per_generation={steps}"
    with pytest.raises(ValueError, match=message):
        PPOConfig(**CPU, steps_per_generation=steps, gradient_accumulation_steps=accumulation)
    assert PPOConfig(**CPU, steps_per_generation=2 * accumulation, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(
    ("name", "other", "source"),
    [
        ("human_ratings", None, "human_ratings"),
        ("owner/name", None, "owner/name"),
        ("rows.jsonl", None, None),
        ("rows.jsonl", "held_out.jsonl", "held_out.jsonl"),
        ("owner/name", "held_out.csv", "held_out.csv"),
        ("rows.parquet", None, None),
        ("owner/name", "", None),
    ],
)
def test_evaluation_rows(name, other, source):
    assert DataArguments(dataset_name=name, eval_dataset_name=other).eval_source == source


def test_rows_without_splits_are_not_held_out_from_themselves(tmp_path):
    rows = Dataset.from_list([{"text": "A"}])
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "data").mkdir()
    for name, source in (("saved", None), ("splits", "splits"), ("data", "data"), ("rows.JSONL", None)):
        found = DataArguments(dataset_name=str(tmp_path / name)).eval_source
        assert found == (source and str(tmp_path / source))


def test_figures_go_where_the_tilde_points(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CompletionArguments(output_dir="~/out").output_dir == str(tmp_path / "out")


def test_lora_config():
    model = ModelConfig(lora_r=4, lora_alpha=6, lora_dropout=0.5, lora_target_modules=["a", "b"], use_rslora=True)
    policy, reward = lora_config(model, task_type="CAUSAL_LM"), lora_config(model, task_type="SEQ_CLS")
    assert (policy.r, policy.lora_alpha, policy.lora_dropout, policy.use_rslora) == (4, 6, 0.5, True)
    assert set(policy.target_modules) == {"a", "b"}
    assert (policy.modules_to_save, reward.modules_to_save) == (None, ["score"])
    assert (policy.task_type, reward.task_type) == ("CAUSAL_LM", "SEQ_CLS")


@pytest.mark.parametrize(
    ("modules", "top"),
    [(None, None), (None, 1), (["all-linear"], None), (["c_attn"], 1), (["attn.c_proj"], None), (["wte"], None)],
    ids=str,
)
def test_an_adapter_of_gpt2_is_saved_as_peft_finds_it_without_a_warning(modules, top, tmp_path):
    base = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9, num_labels=1)
    model, lora = ModelConfig(lora_r=2, lora_target_modules=modules), LoraArguments(lora_top_layers=top)
    saved = []
    for given in (True, False):
        classifier = GPT2ForSequenceClassification(base)
        config = lora_config(model, task_type="SEQ_CLS", lora=lora, base=classifier)
        if not given:
            config.fan_in_fan_out = False
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            get_peft_model(classifier, config).save_pretrained(tmp_path / str(given))
        assert any("fan_in_fan_out" in str(each.message) for each in found) == (not given and modules != ["wte"])
        saved.append(json.loads((tmp_path / str(given) / "adapter_config.json").read_text()))
    ours, peft = ({k: sorted(v) if isinstance(v, list) else v for k, v in each.items()} for each in saved)
    assert ours == peft


SHAPE = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_how_far_an_adapter_reaches(name, tmp_path):
    if name == "gpt2":
        base = GPT2ForSequenceClassification(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9, num_labels=1))
    else:
        base = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_key_value_heads=2, num_labels=1))
    lora = LoraArguments(lora_embeddings=True, lora_top_layers=1)
    config = lora_config(ModelConfig(lora_r=2), task_type="SEQ_CLS", lora=lora, base=base)
    model = get_peft_model(base, config)
    adapted = {key.split(".lora_")[0] for key in get_peft_model_state_dict(model) if "lora_" in key}
    layers, embeddings = (
        ("transformer.h", "transformer.wte") if name == "gpt2" else ("model.layers", "model.embed_tokens")
    )
    assert f"base_model.model.{embeddings}" in adapted
    assert all(key.startswith(f"base_model.model.{layers}.2.") for key in adapted if not key.endswith(embeddings))
    assert len(adapted) == 1 + (4 if name == "gpt2" else 7)  # every linear layer of the top layer
    kept = get_peft_model_state_dict(model)
    assert all("lora_" in key or key.endswith("score.weight") for key in kept)  # no frozen embeddings among them


@pytest.mark.parametrize("modules", ["off", ["c_attn", "c_fcc"], ["ttn"], ["score.weight"]])
def test_a_name_of_no_layer_is_refused(modules):
    """peft refuses names only if it finds none of them, and then with a message that names none."""
    base = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    wrong = modules if isinstance(modules, str) else modules[-1]
    message = (
        f"^lora_target_modules: '{wrong}' is no layer of GPT2ForSequenceClassification that LoRA adapts. "
        f"Name some of c_attn, c_fc, c_proj, or set all-linear.$"
    )
    for lora in (LoraArguments(), LoraArguments(lora_top_layers=1)):
        with pytest.raises(ValueError, match=message):
            lora_config(ModelConfig(lora_target_modules=modules), task_type="SEQ_CLS", lora=lora, base=base)
    for known in ("c_fc", ["attn.c_proj", "wte"]):
        lora_config(ModelConfig(lora_target_modules=known), task_type="SEQ_CLS", base=base)


def test_an_adapter_cannot_reach_further_than_the_model():
    base = GPT2ForSequenceClassification(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(
        ValueError, match=r"^lora_top_layers=4: the model has 3 layers\. Set it to a number from 1 to 3\.$"
    ):
        lora_config(ModelConfig(), task_type="SEQ_CLS", lora=LoraArguments(lora_top_layers=4), base=base)


def test_defaults_of_what_is_an_option():
    args = PPOConfig(**CPU)
    assert (args.kl_estimator, args.kl_target, args.kl_horizon) == ("k1", None, 10_000)
    assert (args.critic, args.value_init, args.critic_warmup_updates) == ("adapter", "auto", 0)
    assert (args.entropy_coef, args.ptx_coef, args.max_approx_kl) == (0, 0, None)
    assert not args.whiten_rewards
    assert (args.adam_epsilon, args.lr_scheduler_type) == (1e-5, "linear")
    assert (args.min_reward_accuracy, args.sample_updates) == (0.55, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator='k2' is not one of k1, k3."),
        ({"critic": "model"}, "critic='model' is not one of adapter, head."),
        ({"vllm_mode": "remote"}, "vllm_mode='remote' is not one of server, colocate."),
        ({"value_init": "zero"}, "value_init='zero' is not one of auto, reward, policy."),
        (
            {"critic": "head", "value_init": "policy"},
            "value_init='policy' is for a value adapter, and critic='head'",
        ),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0."),
        ({"kl_horizon": -1.0}, "kl_horizon=-1.0 must be above 0."),
        ({"max_approx_kl": 0.0}, "max_approx_kl=0.0 must be above 0."),
        (
            {"kl_target": 6.0, "kl_horizon": 31, "per_device_train_batch_size": 8, "steps_per_generation": 4},
            "kl_horizon=31 is shorter than one rollout of 32 sequences",
        ),
        ({"kl_target": 6.0, "beta": 0.0}, "beta=0.0 cannot be adapted to kl_target=6.0. Set beta above 0."),
    ],
    ids=str,
)
def test_options_that_make_no_sense(given, message):
    with pytest.raises(ValueError) as caught:
        PPOConfig(**CPU, **given)
    assert str(caught.value).startswith(message)
