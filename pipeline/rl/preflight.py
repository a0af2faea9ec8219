"""Checks before PPO, in seconds: what is wrong here would make every later curve a riddle.

Each bound tells rounding from faults: `tests/benchmarks/NOTES.md` has what both measure on a real model. Two passes that
do the same arithmetic must agree to the bit or nearly so, in any precision; of two that do it otherwise, such as sampling
with a cache and scoring whole sequences, only what many tokens say together can be held to a bound.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from data.prompts import tokenize_prompts
from pipeline.backbone.adapters import read_metrics
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import Sample, sample, sampling_options
from pipeline.rl.config import PPOConfig
from pipeline.rl.importance import CLIP, disagreement
from reward_models.learned import score_rows


PROMPTS, BATCH = 64, 32
ROWS = 8  # that are scored alone: a pass over a single row reads all weights
DISAGREE = (
    "Above the bound, the policy that samples is not the one that learns: look at positions, padding, attention and "
    "temperature."
)


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
    """Check the policy at step 0, its reward models (role: folder) and vLLM, if it is to sample, on completions of the first
    64 prompts.

    Call it in the precision that PPO will run in (`accelerator.autocast`), and with the backbone as PPO will sample from it.

    Raises:
        ValueError: a check refuses; the message has every one that does.
    """
    set_seed(args.seed)
    was_training = backbone.training
    backbone.train()  # as in PPO, so that dropout shows
    rows = tokenize_prompts(prompts[:PROMPTS], tokenizer)
    progress = tqdm(
        total=(1 + len(reward_adapters or {})) * len(range(0, len(rows), BATCH)) + bool(vllm),
        desc="preflight",
        disable=args.disable_tqdm or not PartialState().is_main_process,
    )
    batches, checks = [], []
    with progress:
        with _adapters_that_run(backbone) as sampling:
            for batch in sample(
                backbone,
                "policy",
                rows,
                tokenizer,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                batch_size=BATCH,
                options=sampling_options(args),
                keep_logprobs=True,
            ):
                batches.append(batch)
                progress.update()
        checks += [*_policy_checks(backbone, batches, sampling, args), *_own_checks(backbone, batches[0], args)]
        checks += _sampling_checks(args)
        if vllm:
            checks.append(_vllm_check(backbone, vllm, rows, tokenizer, args))
            progress.update()
        completions = [row for batch in batches for row in batch.rows()]
        for role, folder in (reward_adapters or {}).items():
            of_role = [*_reward_model_checks(read_metrics(folder), args)]
            of_role += _score_checks(backbone, role, rows, completions, tokenizer, args, progress)
            checks += (
                of_role if role == "reward" else [replace(check, name=f"{check.name} ({role})") for check in of_role]
            )
    backbone.train(was_training)
    refused = [str(check) for check in checks if check.result == "refused"]
    if refused:
        raise ValueError("PPO is refused before it starts. " + " ".join(refused))
    return checks


def _is_exact(args: PPOConfig, backbone: Backbone) -> bool:
    """Return whether all that is measured is computed in float32 or better."""
    return backbone.get_base_model().dtype in (torch.float32, torch.float64) and not args.bf16


def _held(name: str, measured: float, bound: float, failing: str, why: str, *, least: bool = False) -> Check:
    fine = measured >= bound if least else measured <= bound
    return Check(name, measured, f"{'at least' if least else 'at most'} {bound:g}", "passed" if fine else failing, why)


@contextmanager
def _adapters_that_run(backbone: Backbone) -> Iterator[set[tuple[str, str]]]:
    """Note which adapters each LoRA layer runs, (layer, adapters), while the code inside runs."""
    seen: set[tuple[str, str]] = set()
    hooks = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, BaseTunerLayer):
            note = partial(_note_adapters, seen, name)
            hooks.append(layer.register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _note_adapters(seen: set[tuple[str, str]], name: str, layer: BaseTunerLayer, inputs: tuple) -> None:
    known = {*layer.lora_A, *layer.lora_embedding_A}
    runs = [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in known]
    seen.add((name, f"{runs}, merged {layer.merged_adapters}"))


def _policy_checks(
    backbone: Backbone, batches: list[Sample], sampling: set[tuple[str, str]], args: PPOConfig
) -> Iterator[Check]:
    """Check logprobs of the same tokens: sampled, rescored as PPO will, rescored again, and by the reference."""
    found: dict[str, list[Tensor]] = {}
    with _adapters_that_run(backbone) as scoring:
        policy = [_rescored(backbone, "policy", batch, args) for batch in batches]
    for batch, (logprobs, entropy) in zip(batches, policy, strict=True):
        again, reference = (_rescored(backbone, role, batch, args)[0] for role in ("policy", "reference"))
        for name, value in (
            ("sampled", batch.logprobs),
            ("again", again),
            ("reference", reference),
            ("policy", logprobs),
            ("surprise", logprobs + entropy),
        ):
            found.setdefault(name, []).append(value[batch.mask].float())
    tokens = {name: torch.cat(parts).unsqueeze(0) for name, parts in found.items()}
    real = torch.ones_like(tokens["policy"], dtype=torch.bool)
    again, reference = ((tokens["policy"] - tokens[name]).abs().mean().item() for name in ("again", "reference"))
    # In units of logits: a temperature below 1 magnifies rounding as it does everything else.
    scale = min(1.0, args.temperature)
    found = disagreement(tokens["policy"] * scale, tokens["sampled"] * scale, real)
    sampled = {name: value.item() for name, value in found.items()}
    yield _held(
        "dropout is off",
        again,
        1e-3,
        "refused",
        "Mean difference of a token's logprob (nats) between two passes in training mode, which do the same arithmetic. "
        "Above the bound, ratios do not start at 1: set disable_dropout: true, and the model's own dropout options to 0.",
    )
    exact = _is_exact(args, backbone)
    yield _held(
        "sampled and rescored logprobs agree",
        sampled["difference"],
        1e-3 if exact else 0.1,
        "refused",
        f"Mean difference (nats, times a temperature below 1) of a token's logprob in generation and in the pass that PPO "
        f"trains; the largest is {sampled['largest']:.3g}. {DISAGREE}",
    )
    yield _held(
        "importance ratios start near 1",
        sampled["outside"],
        0.1,
        "refused",
        f"Share of tokens whose probability (to the power of a temperature below 1) in generation and in the pass that PPO "
        f"trains differs by a factor beyond 1 ± {CLIP:g}, where PPO clips. {DISAGREE}",
    )
    odd = {name for name, _ in sampling ^ scoring}
    yield _held(
        "sampling and scoring run the same adapters",
        len(odd),
        0,
        "refused",
        f"Layers whose adapters differ between generation and the pass that PPO trains{_first(odd)}. Switch roles by "
        f"`Backbone.role` alone.",
    )
    yield _drawn_check(tokens["surprise"], args)
    yield _held(
        "KL is 0 at step 0",
        reference,
        1e-3,
        "refused",
        "Mean difference (nats) of a token's logprob by policy and reference, which start as one adapter.",
    )


def _own_checks(backbone: Backbone, batch: Sample, args: PPOConfig) -> Iterator[Check]:
    """Check the logprobs that PPO trains on, of a few rows, against those of the model's own forward, of a pass with the
    padding at the other side, and of a pass that does not start from the trunk."""
    ids, mask, chosen, real = (part[:ROWS] for part in batch[:4])
    few, length = Sample(ids, mask, chosen, real, None), chosen.shape[1]
    ours = _rescored(backbone, "policy", few, args)[0]
    if backbone.trunk_depth:
        full = backbone.logprobs("policy", ids, mask, chosen, args.temperature)
        yield _held(
            "a pass from the trunk is the full pass",
            (ours - full)[real].abs().mean().item(),
            1e-3,
            "refused",
            "Mean difference (nats) of a token's logprob between a pass from the states that roles share and one through "
            "all layers, which do the same arithmetic. Above the bound, train an adapter of all layers: leave "
            "lora_top_layers unset.",
        )
    bound = 1e-3 if _is_exact(args, backbone) else 0.1
    scale = min(1.0, args.temperature)
    begins = mask.long().argmax(dim=1, keepdim=True)  # columns of padding at the left
    columns = torch.arange(ids.shape[1], device=ids.device) + begins
    moved, moved_mask = (table.gather(1, columns % ids.shape[1]) for table in (ids, mask))
    right = backbone.logprobs("policy", moved, moved_mask, moved[:, 1:], args.temperature)
    at = ids.shape[1] - length - 1 - begins + torch.arange(length, device=ids.device)
    yield _held(
        "logprobs do not depend on the side of the padding",
        (ours - right.gather(1, at))[real].abs().mean().item() * scale,
        bound,
        "refused",
        "Mean difference (nats, times a temperature below 1) of a token's logprob with the padding at the left and at the "
        "right. Above the bound, the model counts padding as tokens: take one that does not (GPT-2, Llama, Qwen ...).",
    )
    own = torch.zeros_like(ours)
    for i, (text, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
        with backbone.role("policy"):  # as the model is by itself: a row alone, with nothing said of positions
            logits = backbone.get_base_model()(input_ids=text[keep].unsqueeze(0), use_cache=False).logits[0]
        count = int(real[i].sum())
        logprobs = (logits[-count - 1 : -1].float() / args.temperature).log_softmax(dim=-1)
        own[i, :count] = logprobs.gather(1, chosen[i, :count].unsqueeze(1)).squeeze(1)
    yield _held(
        "logprobs are the model's own",
        (ours - own)[real].abs().mean().item() * scale,
        bound,
        "refused",
        "Mean difference (nats, times a temperature below 1) of a token's logprob in the pass that PPO trains and by the "
        "logits of the model's own forward, of each row alone. Above the bound, PPO would train another model than the one "
        "that samples.",
    )


def _first(names: set[str]) -> str:
    return f", such as {min(names)}" if names else ""


def _rescored(backbone: Backbone, role: str, batch: Sample, args: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies (B, T) of a batch as PPO computes them: from the trunk where it has one."""
    trunk = backbone.trunk(*batch[:2]) if backbone.trunk_depth else None
    return backbone.logprobs_and_entropy(role, *batch[:3], args.temperature, trunk)


def _drawn_check(surprise: Tensor, args: PPOConfig) -> Check:
    """Check that tokens come as often as the policy says: the mean of logprob + entropy, (1, N), is 0 but for chance.

    Given the tokens before it, a token's logprob has the mean -entropy. So the sum of logprob + entropy over tokens is a
    martingale, and that sum over its standard deviation is about normal.
    """
    deviations = surprise.sum().abs() / surprise.square().sum().sqrt()
    beyond = [name for name, neutral in WHOLE.items() if getattr(args, name) not in neutral]
    return _held(
        "tokens are drawn from the policy",
        deviations.item(),
        6,
        "warning" if beyond else "refused",
        "Standard deviations between the mean logprob of the sampled tokens and what the policy's entropy expects. Above the "
        "bound, they are drawn from another distribution than PPO scores: look at temperature and at what cuts or penalises "
        "tokens.",
    )


# Options that draw from another distribution than PPO scores, and their values that do not.
WHOLE = {
    "top_k": (0, None),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}


def _sampling_checks(args: PPOConfig) -> Iterator[Check]:
    """Warn of options that draw from another distribution than PPO scores."""
    for name, neutral in WHOLE.items():
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
    device, differences = backbone.get_base_model().device, []
    for start in range(0, len(prompt_rows), BATCH):
        rows = slice(start, start + BATCH)
        chosen = [torch.tensor(row) for row in completions[rows]]
        theirs = [torch.tensor([math.nan if x is None else x for (x,) in row]) for row in sampled[rows]]
        asked = [torch.tensor(row) for row in prompt_rows[rows]]
        prompts, prompt_mask = _padded(asked, tokenizer.pad_token_id, "left", device)
        chosen, mask = _padded(chosen, tokenizer.pad_token_id, "right", device)
        inputs = torch.cat([prompts, chosen], dim=1), torch.cat([prompt_mask, mask], dim=1)
        ours = backbone.logprobs("policy", *inputs, chosen, args.temperature)
        differences.append((ours.float() - pad(theirs, padding_value=0.0).to(device)).abs()[mask])
    return _held(
        "vLLM samples from the policy",
        torch.cat(differences).mean().item(),
        0.1,
        "warning",
        "Mean difference (nats) of a token's logprob in vLLM, which has kernels and a precision of its own, and in the pass "
        "that PPO trains. The bound is that for generation: SmolLM2 in bfloat16 comes to 0.05 by rounding. Above it, look at "
        "vLLM's dtype, and on a server at `--logprobs-mode processed_logprobs`, which temperature needs.",
    )


def _padded(rows: list[Tensor], value: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows as one tensor (B, S), padded at a side, and its mask."""
    mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side).bool()
    return pad(rows, padding_value=value, padding_side=side).to(device), mask.to(device)


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
    progress: tqdm,
) -> Iterator[Check]:
    """Check a reward role's scores of the completions."""

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return backbone.scores(ids, mask, role)

    rows = [prompt + chosen for prompt, chosen in zip(prompt_rows, completions, strict=True)]
    device, pad_id = backbone.get_base_model().device, tokenizer.pad_token_id
    options = {"pad_token_id": pad_id, "device": device}
    scores = np.array(score_rows(score, rows, batch_size=BATCH, **options))
    progress.update(-(-len(rows) // BATCH))
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    # From the shortest to the longest.
    few = sorted({by_length[round(i)] for i in np.linspace(0, len(rows) - 1, ROWS)})
    left = score(*_padded([torch.tensor(rows[i]) for i in few], pad_id, "left", device)).cpu().numpy()
    alone = score_rows(score, [rows[i] for i in few], batch_size=1, **options)
    spread = float(scores.std())
    yield _held(
        "scores vary on SFT completions",
        spread,
        1e-3,
        "refused",
        f"Standard deviation of the scores; their mean is {scores.mean():.3f}. Without it there is nothing to learn.",
        least=True,
    )
    differences = np.abs([scores[few] - np.array(alone), left - np.array(alone)])
    yield _held(
        "scores do not depend on batch and padding",
        float(differences.mean()) / max(1.0, spread),
        1e-3 if _is_exact(args, backbone) else 0.1,
        "refused",
        "Mean difference of a text's score alone, in a batch padded at the right, and padded at the left, in deviations of "
        "the scores where these are above 1.",
    )
    lengths = np.array([len(row) for row in completions], dtype=float)
    related = float(np.corrcoef(lengths, scores)[0, 1]) if lengths.std() and spread else 0.0
    yield _held(
        "scores are not lengths",
        abs(related),
        0.5,
        "warning",
        f"Size of the correlation of score and completion length ({related:+.2f}): a policy that chases such a score "
        f"will write {'longer' if related > 0 else 'shorter'} before it writes better.",
    )
