"""What rounding does to the preflight's statistics on a model, and what planted faults do: the bounds stand between.

    python -m tests.benchmarks.rounding --model smollm2 --policy runs/smollm2/sft --reward runs/smollm2/reward
    python -m tests.benchmarks.rounding --model data/backbone --policy runs/demo/sft --reward runs/demo/reward
    python -m tests.benchmarks.rounding --model gpt2-random

`gpt2-random` is GPT-2 124M with random weights. Without `--policy` the adapter, in the top third of the layers, is random
too. Prints a table for each precision: float32, bfloat16 with fused attention (sdpa) and with eager attention.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import ModelConfig
from trl.trainer.utils import pad

from data.prompts import load_prompts, tokenize_prompts
from pipeline.backbone import architecture
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import Sample, sample
from pipeline.backbone.trunk import decoder_layers, first_adapted_layer
from pipeline.reports.markdown import markdown_table
from pipeline.rl.importance import disagreement
from reward_models.learned import score_rows


PRECISIONS = (("float32", "sdpa"), ("bfloat16", "sdpa"), ("bfloat16", "eager"))
TEMPERATURE = 0.7  # at 1 a lost temperature would be no fault


def load(name: str, dtype: str, attention: str, policy: str | None, reward: str | None) -> tuple[Backbone, object]:
    """Return the backbone with its policy, and the reward role where there is one, and the tokenizer."""
    model = ModelConfig(name, dtype=dtype, attn_implementation=attention, lora_target_modules=["all-linear"])
    base, tokenizer = load_pretrained(model)
    torch.manual_seed(0)
    if policy:
        backbone = Backbone(base, read_adapter(policy, base=base))
    else:
        top = LoraArguments(lora_top_layers=max(1, len(decoder_layers(base)[2]) // 3))
        backbone = Backbone(base, lora_config(model, task_type="CAUSAL_LM", lora=top, base=base))
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    if reward:
        backbone.add_role("reward", read_adapter(reward, needs_head=True, base=base))
    return backbone.eval(), tokenizer


def rescored(backbone: Backbone, batch: Sample, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of a batch, in the precision of PPO on this backbone."""
    with precision(backbone):
        return backbone.logprobs_and_entropy("policy", *batch[:3], temperature)


def precision(backbone: Backbone) -> torch.autocast:
    """Return the context for one pass: autocast remembers casts of weights, and faults change weights between passes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=backbone.get_base_model().dtype == torch.bfloat16)


# --------------------------------------------------------------------------------------------- planted faults
@contextmanager
def positions_shifted(backbone: Backbone) -> Iterator[None]:
    """Padding at the left counts as positions in scoring. Rotary embeddings see distances alone: no fault to them."""
    with patch.object(architecture, "positions", lambda mask: torch.ones_like(mask).long().cumsum(-1) - 1):
        yield


@contextmanager
def pads_attended(backbone: Backbone) -> Iterator[None]:
    original = backbone.hidden_states
    with patch.object(
        backbone,
        "hidden_states",
        lambda role, ids, mask, trunk=None: original(role, ids, torch.ones_like(mask), trunk),
    ):
        yield


@contextmanager
def dropout_on(backbone: Backbone) -> Iterator[None]:
    """A dropout of 0.05 in every adapter, and in the model where it has modules for it."""
    off = []
    for layer in backbone._tuned:
        for name, module in layer.lora_dropout.items():
            off.append((layer.lora_dropout, name, module))
            layer.lora_dropout[name] = nn.Dropout(0.05)
    modules = [(module, module.p) for module in backbone.modules() if isinstance(module, nn.Dropout)]
    for module, _ in modules:
        module.p = 0.05
    backbone.train()
    try:
        yield
    finally:
        backbone.eval()
        for module, p in modules:
            module.p = p
        for owner, name, module in off:
            owner[name] = module


@contextmanager
def another_adapter(backbone: Backbone) -> Iterator[None]:
    """The bare backbone, which the reference of a fresh policy is, stands for the policy."""
    original = backbone.hidden_states
    with patch.object(backbone, "hidden_states", lambda role, *inputs: original(None, *inputs)):
        yield


def layer_missing(number: int):
    @contextmanager
    def fault(backbone: Backbone) -> Iterator[None]:
        layer = decoder_layers(backbone.get_base_model())[2][number]
        kept = [(p, p.data.clone()) for name, p in layer.named_parameters() if "lora_B.default" in name]
        for parameter, _ in kept:
            parameter.data.zero_()
        try:
            yield
        finally:
            for parameter, values in kept:
                parameter.data.copy_(values)

    return fault


def faults(backbone: Backbone) -> dict:
    first, count = (
        first_adapted_layer(backbone.get_base_model(), "default"),
        len(decoder_layers(backbone.get_base_model())[2]),
    )
    layers = {
        f"adapter of layer {i} missing": layer_missing(i) for i in sorted({first, (first + count) // 2, count - 1})
    }
    return {
        "positions shifted": positions_shifted,
        "pads attended": pads_attended,
        "dropout 0.05": dropout_on,
        "another adapter samples": another_adapter,
        **layers,
    }


# --------------------------------------------------------------------------------------------- statistics
def statistics(sampled: list[Sample], scored: list[tuple[Tensor, Tensor]]) -> list[str]:
    """Return the row of one comparison: mean, largest, ratio and share outside of the clip range, and the deviations
    between logprobs and entropy."""
    ours, theirs, surprise = (
        torch.cat(parts).unsqueeze(0)
        for parts in zip(
            *((x[b.mask], b.logprobs[b.mask], (x + h)[b.mask]) for b, (x, h) in zip(sampled, scored, strict=True)),
            strict=True,
        )
    )
    found = disagreement(ours * TEMPERATURE, theirs * TEMPERATURE, torch.ones_like(ours, dtype=torch.bool))
    drawn = surprise.sum().abs() / surprise.square().sum().sqrt()
    return [f"{found[name].item():.2g}" for name in ("difference", "largest", "ratio", "outside")] + [
        f"{drawn.item():.1f}"
    ]


def score_difference(backbone: Backbone, rows: list[list[int]], pad_token_id: int) -> float:
    """Return the mean difference of scores alone and in a batch padded at the left, in deviations of the scores."""
    few = sorted(rows, key=len)[:: max(1, len(rows) // 8)]
    alone = np.array(score_rows(backbone.scores, few, pad_token_id=pad_token_id, batch_size=1, device="cpu"))
    tensors = [torch.tensor(row) for row in few]
    mask = pad([torch.ones_like(row) for row in tensors], padding_value=0, padding_side="left")
    left = backbone.scores(pad(tensors, padding_value=pad_token_id, padding_side="left"), mask).numpy()
    return float(np.abs(left - alone).mean() / max(1.0, alone.std()))


@torch.no_grad()
def table(backbone: Backbone, tokenizer, prompts: list[str]) -> str:
    """Return the statistics of a sound backbone and under each fault, as a table."""
    ids = tokenize_prompts(prompts, tokenizer)

    def drawn(**options) -> list[Sample]:
        """Return completions, with logprobs at `TEMPERATURE` whatever the options make `generate` draw from."""
        given = {"max_completion_length": 24, "temperature": TEMPERATURE, "batch_size": 32, "keep_logprobs": True}
        torch.manual_seed(0)
        with precision(backbone):
            return list(sample(backbone, "policy", ids, tokenizer, **given, options=options))

    batches = drawn()
    completed = [prompt + row for prompt, row in zip(ids, (r for b in batches for r in b.rows()), strict=True)]

    def compared(
        name: str, sampled: list[Sample], temperature: float = TEMPERATURE, *, with_scores: bool = False
    ) -> list:
        scores = "–"
        if with_scores and "reward" in backbone.heads:
            with precision(backbone):
                scores = f"{score_difference(backbone, completed, tokenizer.pad_token_id):.2g}"
        return [name, *statistics(sampled, [rescored(backbone, b, temperature) for b in sampled]), scores]

    rows = [compared("**sound**", batches, with_scores=True), compared("temperature missing in scoring", batches, 1.0)]
    for name, fault in faults(backbone).items():
        with fault(backbone):
            rows.append(compared(name, batches, with_scores=name.startswith("pads")))
    rows.append(compared("temperature missing in sampling", drawn(temperature=1.0)))
    names = ("mean", "largest", "mean ratio", "outside 1 ± 0.2", "drawn, deviations", "scores")
    return markdown_table(["", *names], rows, numbers=range(1, 7))


def random_gpt2(folder: str) -> str:
    """Save GPT-2 124M with random weights and the embedded tokenizer, and return its folder."""
    tokenizer = AutoTokenizer.from_pretrained("data/backbone")
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**special, bos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--policy")
    parser.add_argument("--reward")
    parser.add_argument("--prompts", type=int, default=64)
    asked = parser.parse_args()
    prompts = load_prompts("human_ratings", "train")["prompt"][: asked.prompts]
    with tempfile.TemporaryDirectory() as folder:
        name = random_gpt2(folder) if asked.model == "gpt2-random" else asked.model
        for dtype, attention in PRECISIONS:
            backbone, tokenizer = load(name, dtype, attention, asked.policy, asked.reward)
            print(f"\n{asked.model}, {dtype}, {attention}\n", flush=True)
            print(table(backbone, tokenizer, prompts), flush=True)


if __name__ == "__main__":
    main()
