"""`pipeline.migrate` from OpenRLHF, verl and LLaMA-Factory: every key comes out, the arithmetic by hand, our parser reads it.

The configs are ours, written after the projects' example configs: their options with small values and made-up names.
"""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from pipeline import ppo, reward
from pipeline.migrate import convert, main
from pipeline.migration import llama_factory, openrlhf, verl
from pipeline.migration.reading import flattened, read_command_line, read_file, read_overrides, read_script
from pipeline.runs.command_line import parse


CONFIGS = Path(__file__).parent / "configs"
# Config: its source, and the stage of its recipe.
FILES = {
    "openrlhf_ppo.sh": ("openrlhf", ppo),
    "openrlhf_ppo_0_8.sh": ("openrlhf", ppo),
    "openrlhf_rm.sh": ("openrlhf", reward),
    "verl_ppo.sh": ("verl", ppo),
    "verl_ppo.yaml": ("verl", ppo),
    "llama_factory_rm.yaml": ("llama-factory", reward),
    "llama_factory_ppo.yaml": ("llama-factory", ppo),
}


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


def recipe_of(name: str) -> str:
    return convert(FILES[name][0], [str(CONFIGS / name)])


def given_in(name: str) -> dict:
    """The keys and values of a config, but for those that its project's other keys stand for."""
    path = str(CONFIGS / name)
    if name.startswith("openrlhf"):
        return read_command_line(read_script(path, tuple(openrlhf.MODULES))[1])
    given = read_overrides(read_script(path, verl.MODULES)[1]) if name.endswith(".sh") else flattened(read_file(path))
    left_out = ("defaults", "_target_", "prompt_length")
    return {key: value for key, value in given.items() if value is not None and not key.endswith(left_out)}


def parsed(text: str, stage, tmp_path: Path) -> dict:
    """The fields of every part of the recipe, as its stage parses it."""
    path = tmp_path / "new.yaml"
    path.write_text(text)
    hints = get_type_hints(stage.main)
    hints.pop("return")
    parts = parse(*hints.values(), args=["--config", str(path), "--use_cpu", "true"])
    return {key: value for part in parts for key, value in vars(part).items()}


# ------------------------------------------------------------------------------------------------ whole configs
@pytest.mark.parametrize("name", FILES)
def test_every_key_comes_out_and_our_parser_reads_the_recipe(name, tmp_path):
    """As a key of ours with the same name, beside one of ours, or in a comment of its own."""
    text = recipe_of(name)
    for key in given_in(name):
        assert re.search(rf"(^|# | x ){re.escape(key)}([:,;]|$)", text, re.MULTILINE), key
    parsed(text, FILES[name][1], tmp_path)
    assert f"-m pipeline.{FILES[name][1].__name__.removeprefix('pipeline.')} --config <this file>" in text


# Values of keys that are no number, and of those with few values. Without them the value is 1, or the project's default.
VALUES = {
    **{"lr_scheduler": "cosine", "lr_scheduler_type": "cosine", "warmup_style": "cosine", "kl_ctrl.type": "fixed"},
    **{"param_dtype": "bf16", "data_type": "bf16", "estimator": "gae", "adv_estimator": "gae", "flash_attn": "sdpa"},
    **{
        "is_correction_type": "tis",
        "kl_estimator": "k1",
        "rollout_is": "token",
        "use_kl_loss": True,
        "kl_penalty": "kl",
    },
    **{"rollout.name": "vllm", "finetuning_type": "lora", "reward_model_type": "lora", "report_to": "none"},
    **{"clip_range": [-5, 5], "betas": [0.9, 0.99], "eps_clip_low_high": [0.2, 0.3], "threshold": [0.5, 2.0]},
    **{"dynamic_filtering_range": [0, 1], "dynamic_filtering_reward_range": [0, 1], "rollout_is_threshold": 2.0},
    **{"use_kl_in_reward": True, "enable": True, "batch_size": 1024, "gpus_per_node": 8, "max_len": 2048},
    **{"ring_attn_size": 8, "ulysses_sequence_parallel_size": 8, "dual_clip": 3.0, "clip_ratio_c": 3.0},
}
SWITCHES = {*verl.SWITCHES, *llama_factory.SWITCHES}


def value_of(key: str, default: object) -> object:
    for name in sorted(VALUES, key=len, reverse=True):
        if key.endswith(name):
            return VALUES[name]
    return True if key in SWITCHES else default if default is not None else 1


@pytest.mark.parametrize(
    ("migrate", "keys", "defaults", "always"),
    [
        (openrlhf.migrate, openrlhf.known_keys("ppo"), openrlhf.tables.DEFAULTS["ppo"], {"actor.adam.lr": 1e-5}),
        (openrlhf.migrate, openrlhf.tables.FLAT["ppo"], {}, {"actor_learning_rate": 1e-5}),
        (openrlhf.migrate, openrlhf.known_keys("reward"), openrlhf.tables.DEFAULTS["reward"], {"adam.lr": 1e-5}),
        (openrlhf.migrate, openrlhf.tables.FLAT["reward"], {}, {"learning_rate": 1e-5}),
        (verl.migrate, {*verl.RENAMED, *verl.READ, *verl.DROPPED}, verl.DEFAULTS, {}),
        (llama_factory.migrate, llama_factory.READ, llama_factory.DEFAULTS["ppo"], {"stage": "ppo"}),
        (llama_factory.migrate, llama_factory.READ, llama_factory.DEFAULTS["reward"], {"stage": "rm"}),
    ],
    ids=["openrlhf-ppo", "openrlhf-ppo-flat", "openrlhf-rm", "openrlhf-rm-flat", "verl", "llama-ppo", "llama-rm"],
)
def test_every_known_key_comes_out_alone(migrate, keys, defaults, always):
    missing = []
    for key in sorted({*keys} - {*always, "agent_func_path", "train.agent_func_path"}):  # the last two are refused
        try:
            text = migrate({**always, key: value_of(key, defaults.get(key))})
        except ValueError as error:
            assert "must be true or false" in str(error), key
            text = migrate({**always, key: True})
        if not re.search(rf"(^|# | x ){re.escape(key)}([:,;]|$)", text, re.MULTILINE):
            missing.append(key)
    assert not missing


def test_ppo_of_openrlhf():
    assert yaml.safe_load(recipe_of("openrlhf_ppo.sh")) == {
        "model_name_or_path": "my-org/llama-3-8b-sft",
        "dtype": "bfloat16",
        "reward_funcs": ["reward_models.pretrained.get_model(name='my-org/llama-3-8b-rm')"],
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "dataset_name": "my-org/prompts",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,  # 128 / 8 processes
        "steps_per_generation": 128,  # 1024 / 8
        "num_generations": 1,
        "max_completion_length": 1024,
        "temperature": 1.0,
        "reward_clip_range": [-10, 10],
        "use_vllm": True,
        "vllm_mode": "colocate",
        "num_train_epochs": 1,
        "num_iterations": 1,
        "beta": 0.01,
        "epsilon": 0.2,
        "gamma": 1,
        "lam": 1,
        "vf_coef": 1.0,
        "value_clip": 0.5,
        "learning_rate": 5e-7,
        "value_learning_rate": 9e-6,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "kl_estimator": "k1",
        "vllm_tensor_parallel_size": 2,
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_enable_sleep_mode": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": 0.5,
        "vllm_importance_sampling_clip_max": 5.0,
        "gradient_checkpointing": True,
        "output_dir": "./final/llama3-8b-rlhf",
        "save_strategy": "no",
        "logging_steps": 8,  # 1 update of 8 minibatches
        "seed": 42,
        "bf16": True,
        "report_to": "none",
    }


def test_older_names_of_openrlhf():
    text = recipe_of("openrlhf_ppo_0_8.sh")
    found = yaml.safe_load(text)
    assert found["reward_funcs"] == ["reward_models.remote.get_remote(url='http://localhost:5000/get_reward')"]
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    assert tuple(found[key] for key in keys) == (16, 4, 32, 2)  # 2 processes: 128 / 32, 1024 / 32
    assert found["max_completion_length"] == 512 and found["logging_steps"] == 16  # 8 minibatches x 2 epochs
    assert found["attn_implementation"] == "flash_attention_2" and found["report_to"] == ["wandb"]
    assert found["vllm_mode"] == "server" and found["vllm_importance_sampling_correction"] is False
    assert "learning_rate: 5.0e-07  # actor_learning_rate; this was for all weights" in text
    assert "--config_file accelerate_configs/zero3.yaml --num_processes 2 -m pipeline.ppo" in text


def test_the_reward_model_of_openrlhf():
    text = recipe_of("openrlhf_rm.sh")
    assert yaml.safe_load(text) == {
        "model_name_or_path": "my-org/llama-3-8b-sft",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "dataset_name": "my-org/preferences",
        "max_length": 8192,
        "loss_type": "bradley_terry",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 128,  # 256 pairs / 2
        "learning_rate": 9e-6,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "output_dir": "./checkpoint/llama3-8b-rm",
        "save_strategy": "steps",
        "save_steps": 200,
        "logging_steps": 1,
        "seed": 42,
        "bf16": True,
        "report_to": "none",
    }
    assert "# data.rejected_key: 'rejected_answer'\n#   rename this column of the rows to rejected." in text


def test_ppo_of_verl():
    text = recipe_of("verl_ppo.sh")
    assert yaml.safe_load(text) == {
        "model_name_or_path": "/home/me/models/Qwen2.5-3B-Instruct",
        "dtype": "bfloat16",
        "reward_funcs": [
            "reward_models.pretrained.get_model(name='/home/me/models/Skywork-Reward-V2-Llama-3.2-3B')",
        ],
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": "all-linear",
        "dataset_name": "/home/me/data/gsm8k/train.parquet",
        "eval_dataset_name": "/home/me/data/gsm8k/test.parquet",
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,  # 256 / (16 x 8 processes)
        "steps_per_generation": 8,  # 1024 / (16 x 8)
        "num_generations": 1,
        "max_completion_length": 2048,
        "temperature": 1.0,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "num_train_epochs": 15,
        "num_iterations": 1,
        "beta": 0.0,
        "epsilon": 0.2,
        "dual_clip": 3.0,
        "gamma": 1.0,
        "lam": 1.0,
        "vf_coef": 1.0,
        "value_clip": 0.5,
        "learning_rate": 1e-6,
        "value_learning_rate": 1e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "vllm_tensor_parallel_size": 1,
        "vllm_gpu_memory_utilization": 0.6,
        "vllm_importance_sampling_correction": False,
        "gradient_checkpointing": True,
        "output_dir": "checkpoints/gsm8k/qwen2.5_3b",
        "run_name": "qwen2.5_3b",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 40,  # 10 updates of 4 minibatches
        "logging_steps": 4,
        "bf16": True,
        "report_to": ["wandb"],
    }
    assert (
        "TO DO: one file with the rows of /home/me/data/gsm8k/train.parquet, /home/me/data/math/train.parquet" in text
    )


def test_a_file_of_verl():
    text = recipe_of("verl_ppo.yaml")
    found = yaml.safe_load(text)
    assert (found["lora_r"], found["lora_alpha"], found["learning_rate"]) == (32, 64, 1e-5)
    assert "LoRA usually wants" not in text
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations")
    # 64 prompts x 2 and 32 x 2, over 4 processes; 4 at a time.
    assert tuple(found[key] for key in sizes) == (4, 4, 8, 2)
    assert found["max_steps"] == 400 and found["save_steps"] == 80  # 100 and 20 updates of 2 epochs x 2 minibatches
    assert "num_train_epochs" not in found
    assert (found["epsilon"], found["epsilon_high"], found["dual_clip"]) == (0.2, 0.28, 3.0)
    assert (found["beta"], found["kl_estimator"]) == (0.05, "k3") and "kl_target" not in found
    assert "nats a token. `kl_target` is in nats a" in text
    assert found["critic_warmup_updates"] == 4  # verl's first update is number 1, and number 5 trains the policy
    assert "use_vllm" not in found and "# actor_rollout_ref.rollout.name: 'sglang'" in text
    assert (
        "reward_adapter: ./runs/reward  # TO DO" in text
        and "# custom_reward_function.path: 'rewards/exact.py'" in text
    )


def test_the_reward_model_of_llama_factory():
    text = recipe_of("llama_factory_rm.yaml")
    assert yaml.safe_load(text) == {
        "model_name_or_path": "my-org/qwen3-4b",
        "trust_remote_code": True,
        "dtype": "bfloat16",
        "lora_r": 8,
        "lora_alpha": 16,  # twice the rank
        "lora_target_modules": "all-linear",
        "dataset_name": "dpo_en_demo",
        "max_length": 2048,
        "loss_type": "bradley_terry",
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "gradient_checkpointing": True,
        "output_dir": "saves/qwen3-4b/lora/reward",
        "logging_steps": 10,
        "save_steps": 500,
        "save_only_model": False,
        "dataloader_num_workers": 4,
        "ddp_timeout": 180000000,
        "bf16": True,
        "report_to": "none",
    }
    assert "TO DO: the file or hub id that dataset_info.json has for dpo_en_demo" in text


def test_ppo_of_llama_factory():
    text = recipe_of("llama_factory_ppo.yaml")
    found = yaml.safe_load(text)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    assert tuple(found[key] for key in keys) == (1, 8, 16, 4)  # 2 minibatches of 8
    assert (found["logging_steps"], found["save_steps"]) == (80, 4000)  # 10 and 500 updates of 2 x 4 steps
    assert (found["beta"], found["kl_target"], found["kl_horizon"], found["epsilon"]) == (0.2, 6.0, 10000.0, 0.2)
    assert (found["max_completion_length"], found["top_p"], found["top_k"], found["temperature"]) == (
        512,
        0.9,
        0,
        0.95,
    )
    assert (found["sft_adapter"], found["reward_adapter"]) == ("saves/llama3-8b/lora/sft", "./runs/reward")
    assert found["lora_target_modules"] == ["q_proj", "v_proj"]
    assert "TO DO: train it anew with pipeline.reward on the same pairs" in text


# ------------------------------------------------------------------------------------------------ single keys
PPO = {"actor.model_name_or_path": "m", "actor.num_gpus_per_node": 2}


@pytest.mark.parametrize(
    ("rows", "samples", "minibatch", "piece", "processes", "ours"),
    [
        # prompts, completions of each, completions of a step, at most a piece, processes: piece, accumulation, rollout
        (1024, 1, 128, 8, 8, (8, 2, 16)),  # 128 / 8 = 16 = 8 x 2; 1024 / 8 = 128 = 8 x 16
        (64, 4, 64, 8, 2, (8, 4, 16)),  # 256 completions: 128 a process = 8 x 16
        (96, 1, 48, 5, 4, (4, 3, 6)),  # 48 / 4 = 12: pieces of 4, not 5; 96 / 4 = 24
        (16, 1, 16, 64, 1, (16, 1, 1)),
    ],
)
def test_sizes(rows, samples, minibatch, piece, processes, ours):
    openrlhf_options = {
        **{"rollout.batch_size": rows, "rollout.n_samples_per_prompt": samples, "train.batch_size": minibatch},
        **{"train.micro_batch_size": piece, "actor.num_gpus_per_node": processes},
    }
    actor = "actor_rollout_ref.actor."
    verl_options = {
        **{
            "data.train_batch_size": rows,
            "actor_rollout_ref.rollout.n": samples,
            "trainer.n_gpus_per_node": processes,
        },
        **{f"{actor}ppo_mini_batch_size": minibatch // samples, f"{actor}ppo_micro_batch_size_per_gpu": piece},
    }
    for text in (openrlhf.migrate(openrlhf_options), verl.migrate(verl_options)):
        found = yaml.safe_load(text)
        keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        assert tuple(found[key] for key in keys) == ours


@pytest.mark.parametrize(
    ("migrate", "given", "expected"),
    [
        (openrlhf.migrate, PPO | {"critic.freezing_steps": 3}, {"critic_warmup_updates": 4}),  # updates 0 to 3
        (openrlhf.migrate, PPO | {"actor.eps_clip_low_high": [0.2, 0.27]}, {"epsilon": 0.2, "epsilon_high": 0.27}),
        (openrlhf.migrate, PPO | {"actor.dual_clip": 3.0}, {"dual_clip": 3.0}),
        (openrlhf.migrate, PPO | {"actor.entropy_coef": 0.01}, {"entropy_coef": 0.01}),
        (openrlhf.migrate, PPO | {"algo.kl.estimator": "k3"}, {"kl_estimator": "k3"}),
        (openrlhf.migrate, PPO | {"ds.lora.rank": 64, "ds.lora.alpha": 64}, {"lora_r": 64, "lora_alpha": 64}),
        (openrlhf.migrate, PPO | {"actor.lr_scheduler": "constant"}, {"lr_scheduler_type": "constant"}),
        (openrlhf.migrate, {"pretrain_data": "t", "ptx_coef": 0.1}, {"ptx_coef": 0.1, "ptx_dataset_name": "t"}),
        (openrlhf.migrate, {"margin_loss": True, "loss": "logexp"}, {"use_margin": True, "loss_type": "bradley_terry"}),
        (verl.migrate, {"actor_rollout_ref.actor.clip_ratio": 0.3}, {"epsilon": 0.3}),
        (verl.migrate, {"trainer.critic_warmup": 1}, {}),
        (verl.migrate, {"actor_rollout_ref.rollout.top_k": 20}, {"top_k": 20}),
        (
            verl.migrate,
            {"actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine", "actor_rollout_ref.actor.optim.min_lr_ratio": 0.2},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
        ),
        (
            verl.migrate,
            {"actor_rollout_ref.rollout.name": "vllm", "algorithm.rollout_correction.rollout_is": "token"},
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0},
        ),
        (llama_factory.migrate, {"stage": "rm", "quantization_bit": 4}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (llama_factory.migrate, {"stage": "rm", "flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
        (llama_factory.migrate, {"stage": "rm", "adapter_name_or_path": "a"}, {"sft_adapter": "a", "start_from_sft": True}),
        (llama_factory.migrate, {"stage": "ppo", "reward_model_type": "api"}, {"reward_funcs": ["my_rewards.ask"]}),
        (llama_factory.migrate, {"stage": "ppo", "max_steps": 5, "ppo_epochs": 2}, {"max_steps": 10}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__module__", ""),
)  # fmt: skip
def test_single_keys(migrate, given, expected, tmp_path):
    text = migrate(given)
    found = yaml.safe_load(text)
    assert {key: found.get(key) for key in expected} == expected
    if not expected:
        assert "critic_warmup_updates" not in found
    for key in given:
        assert re.search(rf"(^|# | x ){re.escape(key)}([:,;]|$)", text, re.MULTILINE), key
    parsed(text, reward if "pipeline.reward --config" in text else ppo, tmp_path)


def test_a_target_in_nats_a_token_is_not_taken_for_one_in_nats_a_sequence():
    text = openrlhf.migrate(PPO | {"algo.kl.target": 0.1, "algo.kl.horizon": 500})
    assert (
        "kl_target" not in yaml.safe_load(text)
        and "# algo.kl.target: 0.1\n#   OpenRLHF's target is in nats a token" in text
    )


def test_weights_of_all_are_told_from_adapters():
    assert "LoRA usually wants" in openrlhf.migrate(PPO)
    assert "LoRA usually wants" not in openrlhf.migrate(PPO | {"ds.lora.rank": 8})
    assert "LoRA usually wants" in llama_factory.migrate({"stage": "rm", "finetuning_type": "full"})


def test_values_of_a_script(tmp_path, monkeypatch):
    path = tmp_path / "run.sh"
    path.write_text(
        'export NAME="my run"\nLR=1e-6 # small\nN=${GPUS:-4}\n'
        "python -m verl.trainer.main_ppo --config-name=x \\\n    # a comment\n"
        '    +trainer.experiment_name="$NAME" critic.optim.lr=$LR trainer.n_gpus_per_node=$N trainer.nnodes=1 "$@"\n'
    )
    module, words = read_script(str(path), verl.MODULES)
    assert read_overrides(words) == {
        **{
            "trainer.experiment_name": "my run",
            "critic.optim.lr": 1e-6,
            "trainer.n_gpus_per_node": 4,
            "trainer.nnodes": 1,
        }
    }
    monkeypatch.setenv("GPUS", "2")
    assert read_overrides(read_script(str(path), verl.MODULES)[1])["trainer.n_gpus_per_node"] == 2


# ------------------------------------------------------------------------------------------------ errors
SCRIPT = "python3 -m openrlhf.cli.train_ppo_ray --actor.adam.lr {}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["openrlhf"], "give one file"),
        (["openrlhf", "nowhere.sh"], "nowhere.sh: no such file"),
        (["openrlhf", "--", "--actor.adam.rl", "1"], r"unknown key 'actor.adam.rl': .* Did you mean actor.adam.lr\?"),
        (["openrlhf", "--", "--lambdd", "1"], r"unknown key 'lambdd': .* Did you mean lambd\?"),
        (
            ["openrlhf", "--", "--pretrain", "m", "--actor.model_name_or_path", "m"],
            "'pretrain' and 'actor.model_name_or_path' are one option",
        ),
        (["openrlhf", "--", "--dataset", "d", "--rollout_batch_size", "8"], "of train_ppo_ray, 'dataset' of train_rm"),
        (["openrlhf", "--", "--algo.advantage.estimator", "rloo"], "has no critic, so it is not PPO. See pipeline.rloo"),
        (["openrlhf", "--", "--advantage_estimator", "group_norm"], "pipeline/recipes/baselines/grpo.yaml"),
        (["openrlhf", "--", "--rollout_batch_size", "100"], r"rollout_batch_size: 100 completions are not a multiple"),
        (["openrlhf", "--", "--train.batch_size", "0"], "train.batch_size=0 must be a whole number, 1 or more"),
        (["openrlhf", "--", "--actor.adam.betas", "0.9"], "actor.adam.betas=0.9 must be 2 numbers"),
        (["openrlhf", "--", "--lambd", "1", "2"], r"lambd=\[1, 2\] must be one value"),
        (["openrlhf", "--", "--gamma", "2"], "gamma=2.0 must be from 0 to 1"),
        (["openrlhf", "--", "--train.agent_func_path", "a.py"], "turns with an environment are not supported"),
        (["verl", "--", "algorithm.adv_estimator=grpo"], "has no critic, so it is not PPO. See pipeline.grpo"),
        (["verl", "--", "algorithm.gama=1"], r"unknown key 'algorithm.gama': .* Did you mean algorithm.gamma\?"),
        (["verl", "--", "gamma"], "'gamma' is not of the form key=value"),
        (["verl", "--", "data.train_batch_size=100"], "data.train_batch_size: 100 completions are not a multiple"),
        (["verl", "--", "trainer.n_gpus_per_node=7"], "ppo_mini_batch_size: 256 completions are not a multiple of 7"),
        (["verl", "--", "algorithm.use_kl_in_reward=perhaps"], "must be true or false"),
        (["llama-factory", "--", "--stage", "sft"], "stage='sft' is not converted. For this stage see pipeline.sft"),
        (["llama-factory", "--", "--lora_rank", "8"], "stage='sft' is not converted"),
        (["llama-factory", "--", "--stage", "rm", "--lora_rnk", "8"], r"unknown key 'lora_rnk': .* Did you mean lora_rank\?"),
        (["llama-factory", "--", "--stage", "ppo", "--ppo_epochs", "0"], "ppo_epochs=0 must be a whole number, 1 or more"),
        (["openrlhf", "unset.sh"], "the variable 'LR' is not set"),
        (["openrlhf", "two.sh"], "2 commands start openrlhf.cli"),
        (["verl", "unset.sh"], "no command starts verl.trainer.main_ppo"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("unset.sh").write_text(SCRIPT.format("$LR"))
    Path("two.sh").write_text(SCRIPT.format("1e-6") * 2)
    with pytest.raises(SystemExit, match=rf"^pipeline\.migrate: .*{message}"):
        main(words)
    assert capsys.readouterr().out == ""


def test_an_error_of_a_file_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("1: 2\n")
    with pytest.raises(
        SystemExit, match=r"^pipeline\.migrate: old\.yaml: unknown key '1': no PPOConfig of TRL had it"
    ):
        main(["old.yaml"])
    with pytest.raises(SystemExit, match=r"^pipeline\.migrate: nowhere\.yaml: no such file") as caught:
        main(["nowhere.yaml"])
    assert str(caught.value).count("nowhere.yaml") == 1
