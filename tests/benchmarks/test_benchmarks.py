"""The benchmark's own code, on shapes that take no time. What it measures is not asserted here."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks import ensemble, rounding, scaling
from tests.benchmarks.cost import decoding_flops, layer_weights, update_flops
from tests.benchmarks.ppo_update import SMOLLM2, Contender, markdown, measure
from tests.benchmarks.spine_contender import make_trainer
from tests.benchmarks.work import Work, state_bytes


TINY = Work(layers=3, hidden=32, heads=2, vocabulary=97, batch=4, prompt=6, completion=5, epochs=2, top=1, rank=4)
TINY_LLAMA = replace(TINY, heads=4, key_heads=2, inner=48)


def test_the_operations_are_those_of_the_papers():
    """GPT-2 124M, 64 + 64 tokens, 4 epochs, 4 of 12 layers: 668, 469 and 201 GFLOP a sequence, and 27 to sample it."""
    a_sequence = Work(batch=1)
    gflop = {row: update_flops(a_sequence, row) / 1e9 for row in ("trl_full", "spine_all", "spine_top")}
    assert gflop == pytest.approx({"trl_full": 668, "spine_all": 469, "spine_top": 201}, abs=1)
    assert decoding_flops(a_sequence) / 1e9 == pytest.approx(27, abs=0.5)
    assert update_flops(Work(), "spine_top") == pytest.approx(8 * update_flops(a_sequence, "spine_top"))


@pytest.mark.parametrize("work", [TINY, TINY_LLAMA, Work(), SMOLLM2])
def test_weights_are_counted_as_the_model_has_them(work):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(work.config("fp32"))
    counted = sum(p.numel() for name, p in model.named_parameters() if ".0." in name and p.ndim == 2)
    assert layer_weights(work) == counted
    assert model.get_output_embeddings().weight.shape == (work.vocabulary, work.hidden)


@pytest.mark.parametrize(("row", "critic", "adapters"), [("spine_joint", "head", 1), ("spine_all", "adapter", 2)])
def test_the_joint_row_trains_one_adapter(tmp_path, row, critic, adapters):
    options = {"row": row, "dtype": "fp32", "top": None, "microbatch": 2, "folder": str(tmp_path)}
    trainer = make_trainer(TINY, options)
    assert trainer.args.critic == critic
    trained = {
        name.split(".lora_A.")[1]
        for name, p in trainer.model.named_parameters()
        if "lora_A" in name and p.requires_grad
    }
    assert len(trained) == adapters, trained


@pytest.mark.slow
@pytest.mark.parametrize("work", [TINY, TINY_LLAMA])
def test_ours_runs_by_turns_and_is_written_down(work):
    result = measure(work, 2, "no python is needed", rows=("spine_top",))
    row = result["rows"]["spine_top"]
    assert set(row) == {
        *("seconds", "generation", "scoring", "training"),
        *("peak_rss_gb", "state_backbones", "dtype"),
    }
    assert min(row[name] for name in ("generation", "scoring", "training")) > 0
    assert row["generation"] + row["scoring"] + row["training"] == pytest.approx(row["seconds"], rel=0.3)
    result |= {"speedup": 3.0, "memory_ratio": 0.2, "floor_seconds": 1.0}
    assert "| spine_top |" in markdown(result) and "1/3.00" in markdown(json.loads(json.dumps(result)))


def test_an_ensemble_is_timed_beside_one_member():
    found = ensemble.measure(TINY, 1, 3, 2)
    assert found["ratio"] == found["seconds"]["all"] / found["seconds"]["one"] and found["seconds"]["one"] > 0


@pytest.mark.slow
def test_what_rounding_and_faults_do_is_measured():
    """Each fault that is planted shows beside the sound pass: on a flat random policy in float32, which has no rounding."""
    backbone, tokenizer = rounding.load("data/backbone", "float32", "sdpa", None, None)
    lines = rounding.table(backbone, tokenizer, ["The film", "A", "It is a"] * 2).splitlines()[2:]
    means = {cells[1].strip(): float(cells[2]) for cells in (line.split("|") for line in lines)}
    sound, drawn_otherwise = means.pop("**sound**"), means.pop("temperature missing in sampling")
    assert max(sound, drawn_otherwise) < 1e-4  # the second shows in which tokens come, not in their logprobs
    assert len(means) == 6 and min(means.values()) > 1e-2


@pytest.mark.slow
def test_scaling_is_measured_and_drawn(tmp_path):
    axes = {"epochs": ("PPO epochs", (1, 2))}
    result = scaling.measure(TINY, axes, "fp32", 1)
    assert [row["value"] for row in result["epochs"]] == [1, 2]
    assert all(row["measured"] > row["predicted"] > 0 for row in result["epochs"])
    scaling.draw(result, axes, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_contender_that_ends_says_why():
    broken = replace(TINY, heads=5)  # does not divide the hidden size
    with (
        Contender("spine_top", "fp32", broken, sys.executable) as contender,
        pytest.raises(RuntimeError, match="spine_top in fp32 ended:(.|\n)*num_heads"),
    ):
        contender.update()


@pytest.mark.slow
def test_four_roles_of_gpt2_live_in_little_more_than_one_backbone(tmp_path):
    """Item by item, LoRA of r=16 on attention and MLP of 4 layers, 3.1 MB: weights, gradients and Adam's two moments of
    policy and value, weights of the reward; the reference of a fresh policy is the backbone. 9 x 3.1 MB beside 498."""
    work = Work(prompt=4, completion=4, epochs=1, batch=2)
    options = {"row": "spine_top", "dtype": "fp32", "top": 4, "microbatch": 2, "folder": str(tmp_path)}
    trainer = make_trainer(work, options)
    trainer.args.max_steps = 1
    before = state_bytes(torch.nn.Module(), torch.optim.Adam([torch.zeros(1)]))  # of other tests' models
    trainer.train()
    backbone = sum(p.nbytes for n, p in trainer.model.named_parameters() if "lora_" not in n and "heads." not in n)
    lora = (
        4 * 16 * 4 * (4 + 2 + 5 + 5) * 768
    )  # bytes of one adapter: r (inputs + outputs) of four projections, 4 layers
    assert backbone == 4 * 124_439_808
    heads = 4 * 768
    others = before - backbone - 3 * lora - 2 * heads
    counted = state_bytes(trainer.model, trainer.optimizer) - others
    steps = 4 * sum(1 for group in trainer.optimizer.param_groups for _ in group["params"])  # Adam counts them
    assert counted == backbone + 9 * lora + 5 * heads + steps
    assert counted / backbone < 1.06
