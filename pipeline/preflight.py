"""Checks before PPO, in seconds: what is wrong here would make every later curve a riddle."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, set_seed
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from data.prompts import tokenize_prompts
from pipeline.artifacts import read_metrics
from pipeline.backbone import Backbone
from pipeline.configs import PPOConfig
from pipeline.sampling import Sample, sample
from reward_models.learned import score_rows


PROMPTS, BATCH = 64, 32


@dataclass(frozen=True)
class Check:
    """One check: what was measured, the bound it is held to, its result, and why it matters."""

    name: str
    measured: float | None
    bound: str
    result: str  # passed, warning or refused
    why: str

    def __str__(self) -> str:
        measured = "unknown" if self.measured is None else f"{self.measured:.4g}"
        return f"{self.name}: {measured}, bound {self.bound}. {self.why}"


@torch.no_grad()
def preflight(
    backbone: Backbone,
    prompts: list,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    reward_adapters: dict[str, str] | None = None,
    vllm: VLLMGeneration | None = None,
) -> list[Check]:
    """Look at the policy at step 0, at its reward models (role: folder) and at vLLM, if it is to sample, on completions of
    the first 64 prompts.

    Raises:
        ValueError: a check refuses; the message has every one that does.
    """
    set_seed(args.seed)
    was_training = backbone.training
    backbone.train()  # as in PPO, so that dropout shows
    rows = tokenize_prompts(prompts[:PROMPTS], tokenizer)
    batches = list(
        sample(
            backbone,
            "policy",
            rows,
            tokenizer,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            batch_size=BATCH,
            keep_logprobs=True,
        )
    )
    checks = [*_policy_checks(backbone, batches, args), *_sampling_checks(args)]
    if vllm:
        checks.append(_vllm_check(backbone, vllm, rows, tokenizer, args))
    completions = [row for batch in batches for row in batch.rows()]
    for role, folder in (reward_adapters or {}).items():
        of_role = [*_reward_model_checks(read_metrics(folder), args)]
        of_role += _score_checks(backbone, role, rows, completions, tokenizer, args)
        checks += of_role if role == "reward" else [replace(check, name=f"{check.name} ({role})") for check in of_role]
    backbone.train(was_training)
    refused = [str(check) for check in checks if check.result == "refused"]
    if refused:
        raise ValueError("PPO is refused before it starts. " + " ".join(refused))
    return checks


def _tolerance(args: PPOConfig, backbone: Backbone) -> float:
    """The difference of logprobs or scores that arithmetic alone explains."""
    exact = backbone.get_base_model().dtype in (torch.float32, torch.float64) and not args.bf16
    return 1e-3 if exact else 0.25


def _held(name: str, measured: float, bound: float, failing: str, why: str, *, least: bool = False) -> Check:
    fine = measured >= bound if least else measured <= bound
    return Check(name, measured, f"{'at least' if least else 'at most'} {bound:g}", "passed" if fine else failing, why)


def _policy_checks(backbone: Backbone, batches: list[Sample], args: PPOConfig) -> Iterator[Check]:
    """On logprobs of the same tokens: sampled, rescored, rescored again, and by the reference."""
    bound, differences = _tolerance(args, backbone), {"sampled": [], "again": [], "reference": []}
    for batch in batches:
        inputs = (*batch[:3], args.temperature)
        policy = backbone.logprobs("policy", *inputs)[0]
        for name, other in (
            ("sampled", batch.logprobs),
            ("again", backbone.logprobs("policy", *inputs)[0]),
            ("reference", backbone.logprobs("reference", *inputs)[0]),
        ):
            differences[name].append((policy - other).masked_fill(~batch.mask, 0).abs().max())
    largest = {name: torch.stack(found).max().item() for name, found in differences.items()}  # NaN stays NaN
    yield _held(
        "dropout is off",
        largest["again"],
        bound,
        "refused",
        "Largest difference of a token's logprob between two passes in training mode (nats). Above the bound, ratios "
        "do not start at 1: set disable_dropout: true, and the model's own dropout options to 0.",
    )
    yield _held(
        "sampled and rescored logprobs agree",
        largest["sampled"],
        bound,
        "refused",
        "Largest difference (nats) of a token's logprob in generation and in the pass that PPO trains. Above the "
        "bound, the policy that samples is not the one that learns: look at positions, padding and attention.",
    )
    yield _held(
        "KL is 0 at step 0",
        largest["reference"],
        bound,
        "refused",
        "Largest difference (nats) of a token's logprob by policy and reference, which start as one adapter.",
    )


def _sampling_checks(args: PPOConfig) -> Iterator[Check]:
    """On options that draw from another distribution than PPO scores."""
    whole = {
        "top_k": (0, None),
        "top_p": (1.0,),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
        "generation_kwargs": (None, {}),
    }
    for name, neutral in whole.items():
        value = getattr(args, name)
        if value not in neutral:
            yield Check(
                f"{name} is unset",
                None,
                "the whole distribution",
                "warning",
                f"{name}={value!r} changes what is sampled from, and PPO's logprobs, ratios and KL are of the policy's whole "
                f"distribution at temperature={args.temperature:g}. Leave {name} unset.",
            )


def _vllm_check(
    backbone: Backbone,
    vllm: VLLMGeneration,
    prompt_rows: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Check:
    """On logprobs of tokens that vLLM sampled: its own, and those that PPO takes for the policy that sampled them."""
    vllm.sync_weights()
    _, completions, sampled, _ = vllm.generate(prompts=prompt_rows, images=None, num_generations=1)
    differences = []
    for prompt, completion, theirs in zip(prompt_rows, completions, sampled, strict=True):
        ids = torch.tensor([prompt + list(completion)], device=backbone.get_base_model().device)
        chosen = ids[:, len(prompt) :]
        ours = backbone.logprobs("policy", ids, torch.ones_like(ids), chosen, args.temperature)[0]
        theirs = [math.nan if of_token is None else of_token for (of_token,) in theirs]
        differences.append((ours.squeeze(0).float() - torch.tensor(theirs, device=ids.device)).abs())
    return _held(
        "vLLM samples from the policy",
        torch.cat(differences).mean().item(),
        args.epsilon / 4,
        "warning",
        "Mean difference (nats) of a token's logprob in vLLM, which has kernels and a precision of its own, and in the pass "
        "that PPO trains. PPO's ratios leave it out: the bound is a quarter of what they are clipped at. Above it, look at "
        "vLLM's dtype, and on a server at `--logprobs-mode processed_logprobs`, which temperature needs.",
    )


def _reward_model_checks(metrics: dict[str, Any], args: PPOConfig) -> Iterator[Check]:
    """What the reward stage measured on held-out pairs."""
    why = "Share of held-out pairs that the reward model orders as people do; 0.5 is chance."
    if "accuracy" not in metrics:
        note = "Its folder has no metrics.json with it: this reward model may be no better than chance."
        yield Check("reward model's accuracy", None, f"at least {args.min_reward_accuracy:g}", "warning", note)
        return
    yield _held(
        "reward model's accuracy",
        metrics["accuracy"],
        args.min_reward_accuracy,
        "refused",
        f"{why} Train it longer or on more pairs, or lower min_reward_accuracy.",
        least=True,
    )
    if "ece" not in metrics:
        return
    yield _held(
        "reward model's calibration error",
        metrics["ece"],
        0.15,
        "warning",
        "Mean gap between how sure it is and how often people agree. An overconfident model rewards small "
        "differences too much.",
    )


def _score_checks(
    backbone: Backbone,
    role: str,
    prompt_rows: list[list[int]],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Iterator[Check]:
    """On a reward role's scores of the completions."""
    score = partial(backbone.scores, role=role)
    rows = [prompt + chosen for prompt, chosen in zip(prompt_rows, completions, strict=True)]
    device, pad_id = backbone.get_base_model().device, tokenizer.pad_token_id
    alone, together = (
        np.array(score_rows(score, rows, pad_token_id=pad_id, batch_size=size, device=device))
        for size in (1, len(rows))
    )
    tensors = [torch.tensor(row) for row in rows]
    ids = pad(tensors, padding_value=pad_id, padding_side="left").to(device)
    mask = pad([torch.ones_like(row) for row in tensors], padding_value=0, padding_side="left").to(device)
    left = score(ids, mask).cpu().numpy()
    spread = float(together.std())
    yield _held(
        "scores vary on SFT completions",
        spread,
        1e-3,
        "refused",
        f"Standard deviation of the scores; their mean is {together.mean():.3f}. Without it there is nothing to learn.",
        least=True,
    )
    yield _held(
        "scores do not depend on batch and padding",
        float(np.abs([together - alone, left - alone]).max()),
        _tolerance(args, backbone) * max(1.0, spread),
        "refused",
        "Largest difference of a text's score alone, in a batch padded at the right, and padded at the left.",
    )
    lengths = np.array([len(row) for row in completions], dtype=float)
    related = float(np.corrcoef(lengths, together)[0, 1]) if lengths.std() and spread else 0.0
    yield _held(
        "scores are not lengths",
        abs(related),
        0.5,
        "warning",
        f"Size of the correlation of score and completion length ({related:+.2f}): a policy that chases such a score "
        f"will write {'longer' if related > 0 else 'shorter'} before it writes better.",
    )
