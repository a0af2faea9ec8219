"""`python -m pipeline.compare`: its options, and errors that come before the model is loaded."""

import socket
from types import SimpleNamespace

import pytest

from pipeline import compare
from pipeline.compare import check_address, functions_of, main, model_of, pad_token_of
from pipeline.pages.compare_runs import find_runs
from reward_models.functions import RewardArguments
from tests.pages.compare_run import OPTIONS, make_run


@pytest.fixture
def run(tmp_path, sft_adapter, reward_adapter):
    return make_run(tmp_path / "demo", sft_adapter, reward_adapter)


@pytest.fixture
def loaded(monkeypatch):
    """Keeps what `load` is called with, instead of loading a model; the page is not built."""
    seen = SimpleNamespace()

    def load(runs, policies, model, rewards, functions, **options):
        seen.__dict__.update(
            runs=runs, policies=policies, model=model, rewards=rewards, functions=functions, **options
        )
        raise InterruptedError

    monkeypatch.setattr(compare, "load", load)
    return seen


def recipe(folder, run, **options) -> str:
    lines = {
        "model_name_or_path": "gpt2", "dtype": "bfloat16", "bf16": True, "sft_adapter": run / "sft",
        "reward_adapter": run / "reward", "output_dir": run / "ppo", "lam": 0.5, "kl_target": 9.0, "beta": 0.1,
        "kl_horizon": 10000,
    } | options  # fmt: skip
    path = folder / "ppo.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return str(path)


def test_runs_alone_are_enough(run, loaded, tiny):
    with pytest.raises(InterruptedError):
        main([str(run)])
    assert [policy.name for policy in loaded.policies] == ["sft", "ppo", "ppo/checkpoint-4", "bare backbone"]
    assert loaded.model.model_name_or_path == tiny and loaded.model.dtype == "float32" and loaded.rewards is None
    assert loaded.policies[0].options.values == OPTIONS and loaded.pad_token is None


def test_a_recipe_says_the_rest(run, loaded, tmp_path):
    functions = "[trl.rewards.think_format_reward, trl.rewards.accuracy_reward]"
    weights = "[1.0, 2.0, 3.0]"
    path = recipe(tmp_path, run, reward_funcs=functions, reward_weights=weights, pad_token="<|pad|>")
    with pytest.raises(InterruptedError):
        main(["--config", path, "--dtype", "float16"])
    assert [policy.name for policy in loaded.policies[:2]] == ["sft", "ppo"]  # sft_adapter and output_dir
    assert loaded.model.model_name_or_path == "gpt2" and loaded.model.dtype == "float16"
    assert loaded.rewards.reward_adapter == [str(run / "reward")] and loaded.pad_token == "<|pad|>"
    assert loaded.policies[1].options["lam"] == 0.5 and loaded.policies[1].options.beta == 0.3  # of the last update
    assert [function.__name__ for function in loaded.functions] == ["think_format_reward"]
    assert loaded.weights == [1.0, 2.0]  # accuracy_reward reads the column `solution`


def test_functions_that_read_other_columns_are_left_out():
    rewards = RewardArguments(reward_funcs=["trl.rewards.accuracy_reward", "reward_models.rules.sentiment"])
    functions, weights, left_out = functions_of(rewards, [1.0, 2.0])
    assert [function.__name__ for function in functions] == ["sentiment"] and weights == [2.0]
    assert left_out == ["trl.rewards.accuracy_reward"]


def test_the_pad_token_is_that_of_the_reward(run, tokenizer):
    tokenizer.save_pretrained(run / "sft")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(run / "reward")
    assert pad_token_of(find_runs([str(run)])) == tokenizer.eos_token


def test_a_base_that_is_not_here_is_one_clear_error(run, tiny):
    runs = find_runs([str(run)])
    assert model_of(runs, None).model_name_or_path == tiny
    path = run / "sft" / "adapter_config.json"
    path.write_text(path.read_text().replace(tiny, "/nowhere/model"))
    with pytest.raises(
        FileNotFoundError, match=r"sft: its base model /nowhere/model is not here\. Name it with --model_"
    ):
        model_of(runs, None)
    assert model_of(runs, "gpt2").model_name_or_path == "gpt2"


def test_a_taken_port_is_one_clear_error(run, loaded):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"--host 127\.0\.0\.1 --port {port}: the page cannot listen there"):
            main([str(run), "--port", str(port)])
    assert not vars(loaded)
    check_address("127.0.0.1", port)
    with pytest.raises(OSError, match=r"--host 203\.0\.113\.7: the page cannot listen there .*Name another"):
        check_address("203.0.113.7", None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the folder of a run, such as runs/demo, or a recipe with --config"),
        (["runs", "--port", "70000"], "--port 70000 must be from 1 to 65535"),
        (["runs", "--hst", "x"], "unrecognized arguments: --hst x"),
    ],
)
def test_a_wrong_command_line_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert message in capsys.readouterr().err


def test_without_gradio_a_line_says_what_to_install(run, loaded, monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs gradio\. Install it: pip install 'spine-rlhf\[pages\]'"):
        main([str(run)])
    assert not vars(loaded)
