"""`pipeline.migrate`: every key of TRL's old PPOConfigs comes out, the arithmetic by hand, and our parser reads it."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from safetensors import safe_open

from pipeline.migrate import main
from pipeline.migration.reading import read_command_line
from pipeline.migration.trl import migrate
from pipeline.runs.command_line import parse


# Fields of TRL 0.11.4's PPOConfig, each with a value that is not its default.
OLD = {
    "exp_name": "e",
    "seed": 3,
    "log_with": "wandb",
    "task_name": "t",
    "model_name": "m",
    "query_dataset": "q",
    "reward_model": "r",
    "remove_unused_columns": False,
    "tracker_kwargs": {"wandb": {"entity": "e"}},
    "accelerator_kwargs": {"cpu": True},
    "project_kwargs": {"logging_dir": "l"},
    "tracker_project_name": "p",
    "push_to_hub_if_best_kwargs": {"repo_id": "r"},
    "steps": 1000,
    "learning_rate": 1e-4,
    "adap_kl_ctrl": False,
    "init_kl_coef": 0.3,
    "kl_penalty": "abs",
    "target": 5.0,
    "horizon": 500.0,
    "gamma": 0.9,
    "lam": 0.8,
    "cliprange": 0.25,
    "cliprange_value": 0.35,
    "vf_coef": 0.5,
    "batch_size": 64,
    "forward_batch_size": 16,
    "mini_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "world_size": 1,
    "ppo_epochs": 3,
    "max_grad_norm": 0.7,
    "optimize_cuda_cache": True,
    "optimize_device_cache": True,
    "early_stopping": True,
    "target_kl": 0.2,
    "compare_steps": 2,
    "ratio_threshold": 5.0,
    "use_score_scaling": True,
    "use_score_norm": True,
    "score_clip": 4.0,
    "whiten_rewards": True,
    "gradient_checkpointing": True,
    "is_encoder_decoder": True,
    "is_peft_model": True,
    "backward_batch_size": 32,
    "global_backward_batch_size": 32,
    "global_batch_size": 64,
    "dataset_num_proc": 4,
}
# Fields of TRL 0.12's OnPolicyConfig and PPOConfig and of 1.12.0's PPOConfig that TrainingArguments has not.
NEW = {
    "exp_name": "e",
    "dataset_num_proc": 4,
    "num_mini_batches": 2,
    "total_episodes": 1000,
    "local_rollout_forward_batch_size": 32,
    "num_sample_generations": 5,
    "response_length": 20,
    "stop_token": "eos",
    "stop_token_id": 7,
    "temperature": 0.9,
    "missing_eos_penalty": 1.5,
    "sft_model_path": "s",
    "world_size": 2,
    "num_total_batches": 9,
    "micro_batch_size": 8,
    "local_batch_size": 8,
    "batch_size": 8,
    "local_mini_batch_size": 4,
    "mini_batch_size": 4,
    "reward_model_path": "r",
    "model_adapter_name": "a",
    "ref_adapter_name": "b",
    "num_ppo_epochs": 3,
    "whiten_rewards": True,
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "cliprange": 0.25,
    "vf_coef": 0.5,
    "cliprange_value": 0.35,
    "gamma": 0.9,
    "lam": 0.8,
    "ds3_gather_for_generation": False,
}


# Keys of PPOConfig that are still to come: the recipe names them, and parses without them until then.
def read(text: str, tmp_path: Path) -> dict:
    """The fields of every part of the recipe, as pipeline.ppo parses it."""
    path = tmp_path / "new.yaml"
    path.write_text(text)
    hints = get_type_hints(import_module("pipeline.ppo").main)
    hints.pop("return")
    return {
        key: value
        for part in parse(*hints.values(), args=["--config", str(path), "--use_cpu", "true"])
        for key, value in vars(part).items()
    }


@pytest.mark.parametrize(
    ("given", "mark"),
    [(OLD, {"ppo_epochs": 4, "mini_batch_size": 16}), (NEW, {"num_ppo_epochs": 4})],
    ids=["0.11", "1.12"],
)
def test_every_key_comes_out(given, mark, tmp_path):
    """Alone and with all the others: as a key of ours, beside one, or in a comment of its own."""
    for key in given:
        for config in ({**mark, key: given[key]}, given):
            assert re.search(rf"(^|# | x ){key}([:,;]|$)", migrate(config), re.MULTILINE), key
    read(migrate(given), tmp_path)


def test_a_recipe_from_0_11():
    text = migrate(OLD | {"adap_kl_ctrl": True, "kl_penalty": "kl"})
    assert yaml.safe_load(text) == {
        "model_name_or_path": "m",
        "gradient_checkpointing": True,
        "reward_adapter": "./runs/reward",
        "dataset_name": "q",
        "per_device_train_batch_size": 16,  # forward_batch_size
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,  # 64 / 16
        "max_completion_length": 256,
        "temperature": 1.0,
        "reward_clip_range": [-4.0, 4.0],
        "max_steps": 96,  # ceil(1000 / 64) = 16 updates of 3 epochs of 64 / (16 * 2) = 2 minibatches
        "num_iterations": 3,
        "beta": 0.3,
        "kl_estimator": "k1",
        "kl_target": 5.0,
        "kl_horizon": 500.0,
        "epsilon": 0.25,
        "gamma": 0.9,
        "lam": 0.8,
        "whiten_rewards": True,
        "vf_coef": 0.5,
        "value_clip": 0.35,
        "max_approx_kl": 0.3,  # 1.5 * 0.2
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.7,
        "run_name": "e",
        "seed": 3,
        "report_to": "wandb",
        "remove_unused_columns": False,
    }


def test_a_recipe_from_1_12():
    text = migrate(NEW | {"per_device_train_batch_size": 8, "output_dir": "out"})
    assert yaml.safe_load(text) == {
        "model_name_or_path": "s",
        "gradient_checkpointing": True,
        "reward_adapter": "r",
        "dataset_name": "human_ratings",
        "per_device_train_batch_size": 4,  # a minibatch is 8 / 2
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_completion_length": 20,
        "temperature": 0.9,
        "missing_eos_penalty": 1.5,
        "max_steps": 378,  # ceil(1000 / (8 * 2 processes)) = 63 updates of 3 epochs of 2 minibatches
        "num_iterations": 3,
        "beta": 0.3,
        "kl_estimator": "k3",
        "epsilon": 0.25,
        "gamma": 0.9,
        "lam": 0.8,
        "whiten_rewards": True,
        "vf_coef": 0.5,
        "value_clip": 0.35,
        "learning_rate": 3e-6,
        "max_grad_norm": 0.0,
        "run_name": "e",
        "ds3_gather_for_generation": False,
        "logging_steps": 60,  # 10 updates of 6 optimizer steps
        "save_steps": 3000,
        "output_dir": "out",
    }


@pytest.mark.parametrize("given", [{"ppo_epochs": 4}, {"num_ppo_epochs": 4}], ids=["0.11", "1.12"])
def test_what_was_left_out_has_the_old_default(given, tmp_path):
    text = migrate(given)
    found = read(text, tmp_path)
    if "ppo_epochs" in given:
        # Beside those of both below: batch_size 128 = mini_batch_size, steps 20000, 157 updates of 4 epochs.
        assert (found["learning_rate"], found["beta"], found["seed"], found["max_steps"]) == (1.41e-5, 0.2, 0, 628)
        assert (found["per_device_train_batch_size"], found["steps_per_generation"]) == (128, 1)
    else:
        assert (found["learning_rate"], found["beta"], found["seed"], found["num_train_epochs"]) == (3e-6, 0.05, 42, 3)
        assert (found["temperature"], found["max_completion_length"]) == (0.7, 53)
    assert (found["epsilon"], found["value_clip"], found["vf_coef"], found["gamma"], found["lam"]) == (
        0.2,
        0.2,
        0.1,
        1,
        0.95,
    )
    assert f"num_iterations: 4  # {next(iter(given))}\n" in text
    assert "epsilon: 0.2  # cliprange, TRL's default\n" in text


# ------------------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize(
    ("piece", "accumulation", "minibatches", "ours", "max_steps"),
    [
        # 1000 episodes, 2 epochs. Rollouts of piece x accumulation; ours: piece, accumulation, pieces a rollout.
        (16, 1, 1, (16, 1, 1), 126),  # ceil(1000 / 16) = 63 updates x 2 x 1
        (16, 4, 1, (16, 4, 4), 32),  # ceil(1000 / 64) = 16 x 2 x 1
        (16, 4, 4, (16, 1, 4), 128),  # 16 x 2 x 4
        (16, 4, 2, (16, 2, 4), 64),
        (16, 1, 4, (4, 1, 4), 504),  # minibatches of 4
        (16, 2, 4, (8, 1, 4), 256),  # ceil(1000 / 32) = 32 x 2 x 4; minibatches of 8
        (6, 3, 2, (3, 3, 6), 224),  # ceil(1000 / 18) = 56 x 2 x 2; minibatches of 9 in pieces of 3
    ],
)
def test_sizes_from_1_12(piece, accumulation, minibatches, ours, max_steps, tmp_path):
    given = {
        "per_device_train_batch_size": piece,
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": minibatches,
        "total_episodes": 1000,
        "num_ppo_epochs": 2,
    }
    found = read(migrate(given), tmp_path)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    assert tuple(found[key] for key in keys) == ours
    assert found["max_steps"] == max_steps
    assert found["generation_batch_size"] == piece * accumulation
    assert found["steps_per_generation"] == minibatches * found["gradient_accumulation_steps"]


@pytest.mark.parametrize(
    ("rows", "piece", "accumulation", "ours", "max_steps"),
    [
        # 1000 steps (completions), 2 epochs.
        (64, 64, 1, (64, 1, 1), 32),  # ceil(1000 / 64) = 16 updates x 2 x 1
        (64, 16, 1, (16, 1, 4), 128),
        (64, 16, 2, (16, 2, 4), 64),  # minibatches of 32
        (64, 8, 8, (8, 8, 8), 32),
    ],
)
def test_sizes_from_0_11(rows, piece, accumulation, ours, max_steps, tmp_path):
    given = {"batch_size": rows, "mini_batch_size": piece, "gradient_accumulation_steps": accumulation}
    found = read(migrate(given | {"steps": 1000, "ppo_epochs": 2}), tmp_path)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    assert tuple(found[key] for key in keys) == ours
    assert found["max_steps"] == max_steps
    assert found["generation_batch_size"] == rows


def test_sizes_that_trl_refused():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps = 8 is not a multiple of num_mini_batches = 3"):
        migrate({"num_mini_batches": 3})
    with pytest.raises(ValueError, match=r"batch_size = 100 is not a multiple of mini_batch_size x .* = 16"):
        migrate({"batch_size": 100, "mini_batch_size": 16})


def test_passes_over_the_prompts_stay(tmp_path):
    found = read(migrate({"num_train_epochs": 2, "num_mini_batches": 2}), tmp_path)
    assert (found["num_train_epochs"], found["max_steps"]) == (2, -1)
    text = migrate({"num_train_epochs": 2, "total_episodes": 80, "max_steps": 7})
    assert "num_train_epochs" not in yaml.safe_load(text)
    assert yaml.safe_load(text)["max_steps"] == 40  # 80 / 8 updates x 4 epochs


def test_steps_of_0_11_are_counted_whatever_else_is_given():
    text = migrate({"ppo_epochs": 2, "steps": 1280, "max_steps": 7})
    assert yaml.safe_load(text)["max_steps"] == 20  # 1280 / 128 updates x 2 epochs
    assert "# max_steps: 7\n" in text


def test_what_picks_the_best_checkpoint_comes_along(tmp_path):
    given = {"num_mini_batches": 2, "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": True}
    found = read(migrate({**given, "evaluation_strategy": "steps", "dataset_test_split": "dev"}), tmp_path)
    assert found["eval_strategy"] == "steps" and found["dataset_eval_split"] == "dev"
    assert found["eval_steps"] == found["save_steps"] == 40  # 5 updates x 4 epochs x 2 minibatches


def test_updates_become_optimizer_steps():
    given = {"num_mini_batches": 2, "num_ppo_epochs": 3, "save_steps": 5, "warmup_steps": 4, "logging_steps": 0.05}
    found = yaml.safe_load(migrate(given))
    assert (found["save_steps"], found["warmup_steps"], found["logging_steps"]) == (30, 24, 0.05)
    assert yaml.safe_load(migrate({"warmup_ratio": 0.1}))["warmup_steps"] == 0.1


def test_optimizer_steps_that_trl_left_out():
    """TRL 1.12 counted accumulation over the whole epoch, so that num_mini_batches changed nothing beside it. Ours makes
    the steps that were documented, and the recipe says so wherever TRL, as it ran, made others."""
    with safe_open(Path(__file__).parent / "rl" / "fixtures" / "trl_1_12_ppo.safetensors", "pt") as file:
        runs = json.loads(file.metadata()["facts"])["optimizer_steps"]
    assert any(run["optimizer_steps"] != 2 * run["num_mini_batches"] for run in runs)
    for run in runs:
        made = run.pop("optimizer_steps")  # in one update of two epochs
        rows = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"]
        text = migrate({**run, "num_ppo_epochs": 2, "total_episodes": rows})
        documented = 2 * run["num_mini_batches"]
        assert yaml.safe_load(text)["max_steps"] == documented
        note = re.search(r"about (\S+) an epoch", text.replace("\n#  ", ""))
        assert (float(note.group(1)) if note else documented / 2) == made / 2


# ------------------------------------------------------------------------------------------------ single keys
def test_fixed_kl_from_0_11():
    found = migrate({"adap_kl_ctrl": False, "init_kl_coef": 0.3, "target": 5.0})
    assert "kl_target" not in yaml.safe_load(found)
    assert "kl_target" not in yaml.safe_load(found)
    assert "# target: 5.0\n#   TRL used it only with adap_kl_ctrl." in found


def test_early_stop_from_0_11():
    assert "max_approx_kl" not in yaml.safe_load(migrate({"ppo_epochs": 4, "target_kl": 0.2}))
    assert yaml.safe_load(migrate({"ppo_epochs": 4, "early_stopping": True}))["max_approx_kl"] == 1.5


def test_where_the_policy_comes_from():
    found = migrate({"model_name_or_path": "tokenizer", "sft_model_path": "sft"})
    assert yaml.safe_load(found)["model_name_or_path"] == "sft"
    assert "# model_name_or_path: 'tokenizer'" in found
    assert yaml.safe_load(migrate({"model_name_or_path": "m", "kl_coef": 0.1}))["model_name_or_path"] == "m"


def test_gradients_that_were_never_clipped():
    assert yaml.safe_load(migrate({"num_ppo_epochs": 4}))["max_grad_norm"] == 0
    found = migrate({"num_ppo_epochs": 4, "max_grad_norm": 0.5})
    assert yaml.safe_load(found)["max_grad_norm"] == 0 and "# max_grad_norm: 0.5\n" in found
    assert yaml.safe_load(migrate({"ppo_epochs": 4, "max_grad_norm": 0.5}))["max_grad_norm"] == 0.5


def test_where_a_completion_ends():
    assert "# stop_token: None (TRL's default)\n" in migrate({"num_ppo_epochs": 4})
    assert "# stop_token: 'eos'\n" in migrate({"stop_token": "eos"})
    found = migrate({"stop_token_id": 7})
    assert "# stop_token_id: 7\n" in found and "# stop_token:" not in found


def test_learning_rate_of_all_weights():
    assert "LoRA usually wants" in migrate({"learning_rate": 1e-5})
    assert "LoRA usually wants" not in migrate({"learning_rate": 1e-5, "use_peft": True})


def test_what_ppo_does_not_support_is_no_key():
    found = migrate({"num_ppo_epochs": 4, "fp16": True, "resume_from_checkpoint": "x"})
    assert not {"fp16", "resume_from_checkpoint"} & yaml.safe_load(found).keys()
    assert "# fp16: True\n#   PPO does not support it." in found
    assert "# resume_from_checkpoint: 'x'\n#   a checkpoint of TRL's PPO cannot be resumed here." in found


def test_what_is_not_set_is_not_given():
    assert migrate({"num_ppo_epochs": 2, "missing_eos_penalty": None}) == migrate({"num_ppo_epochs": 2})


# ------------------------------------------------------------------------------------------------ errors, reading
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ppo_epoch": 4}, r"unknown key 'ppo_epoch': no PPOConfig of TRL had it. Did you mean ppo_epochs\?"),
        ({"kl_coeff": 4}, r"unknown key 'kl_coeff': .* Did you mean kl_coef\?"),
        ({"zzzzzzzz": 4}, r"unknown key 'zzzzzzzz': no PPOConfig of TRL had it. Remove it if it is your own."),
        ({"ppo_epochs": 4, "kl_coef": 0.1}, r"'ppo_epochs' is a key of TRL up to 0.11, 'kl_coef' of 0.12 to 1.12"),
        ({"steps": 4, "num_train_epochs": 1}, r"'steps' is a key of TRL up to 0.11, 'num_train_epochs' of 0.12"),
        ({"exp_name": "a", "run_name": "b"}, r"'exp_name' and 'run_name' are both run_name here"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        migrate(given)


def test_whose_keys_they_are():
    assert "of TRL up to 0.11." in migrate({"batch_size": 64, "mini_batch_size": 16, "learning_rate": 1e-5})
    assert "of TRL 0.12 to 1.12." in migrate({"learning_rate": 1e-5, "cliprange": 0.1})


def test_the_command_line():
    words = "--learning_rate 1e-5 --whiten_rewards --no_push_to_hub --kl-coef=0.1 --lora_target_modules q v --optim x"
    assert read_command_line(words.split()) == {
        "learning_rate": 1e-5,
        "whiten_rewards": True,
        "push_to_hub": False,
        "kl_coef": 0.1,
        "lora_target_modules": ["q", "v"],
        "optim": "x",
    }
    with pytest.raises(ValueError, match="'python' stands before any --key"):
        read_command_line(["python", "ppo.py"])


@pytest.mark.parametrize("form", ["yaml", "json", "command line"])
def test_all_three_ways_in_are_one(form, tmp_path, capsys):
    if form == "command line":
        main(["--", "--learning_rate", "1e-5", "--num_ppo_epochs", "2", "--stop_token", "eos"])
    else:
        text = "learning_rate: 1e-5\nnum_ppo_epochs: 2\nstop_token: eos\n"
        text = text if form == "yaml" else '{"learning_rate": 1e-5, "num_ppo_epochs": 2, "stop_token": "eos"}'
        (tmp_path / "old").write_text(text)
        main([str(tmp_path / "old")])
    assert capsys.readouterr().out == migrate({"learning_rate": 1e-5, "num_ppo_epochs": 2, "stop_token": "eos"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one file"),
        (["--learning_rate", "1"], "give one file"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--", "--kl_coeff", "1"], "unknown key 'kl_coeff'"),
        (["--", "--num_mini_batches", "3"], "is not a multiple of"),
    ],
)
def test_an_error_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match=rf"^pipeline\.migrate: .*{message}"):
        main(words)
    assert capsys.readouterr().out == ""


def test_a_file_that_is_no_mapping(tmp_path):
    (tmp_path / "old.yaml").write_text("- a\n")
    with pytest.raises(SystemExit, match="not a YAML mapping"):
        main([str(tmp_path / "old.yaml")])
