"""Check the policy at step 0: sampling and scoring use the same policy, and it computes what the model itself computes.

Two passes with the same arithmetic must agree to the bit or nearly so, in any precision. Two passes with different
arithmetic, such as sampling with a cache and scoring whole sequences, differ by rounding; for them only means over many
tokens have a bound. `tests/benchmarks/NOTES.md` gives the size of rounding and of faults on a real model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import Sample, sampling_options
from pipeline.rl.checks import ROWS, Check, held, is_exact
from pipeline.rl.config import PPOConfig
from pipeline.rl.importance import CLIP, disagreement


DISAGREE = (
    "Above the bound, the policy that samples is not the policy that learns: check positions, padding, attention and "
    "temperature."
)


def sampled_with(args: PPOConfig) -> str:
    """Return a sentence on the options of sampling that training knows nothing of, or ""."""
    defaults = {option.name: option.default for option in fields(args)}
    options = sampling_options(args).items()
    given = ", ".join(f"{name}={value}" for name, value in options if value != defaults.get(name))
    return f" Sampling also has {given}, which training does not follow." if given else ""


@contextmanager
def adapters_that_run(backbone: Backbone) -> Iterator[set[tuple[str, str]]]:
    """Record the adapters that each LoRA layer runs, as (layer, adapters), while the code inside runs."""
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


def policy_checks(
    backbone: Backbone, batches: list[Sample], sampling: set[tuple[str, str]], args: PPOConfig
) -> Iterator[Check]:
    """Check the logprobs of the same tokens: in sampling, in two passes of PPO, and under the reference."""
    found: dict[str, list[Tensor]] = {}
    with adapters_that_run(backbone) as scoring:
        policy = [_rescored(backbone, "policy", batch, args) for batch in batches]
    for batch, (logprobs, entropy) in zip(batches, policy, strict=True):
        assert batch.logprobs is not None  # sampled with keep_logprobs
        second, ref_logprobs = (_rescored(backbone, role, batch, args)[0] for role in ("policy", "reference"))
        for name, value in (
            ("sampled", batch.logprobs),
            ("again", second),
            ("reference", ref_logprobs),
            ("policy", logprobs),
            ("surprise", logprobs + entropy),
        ):
            found.setdefault(name, []).append(value[batch.mask].float())
    tokens = {name: torch.cat(parts).unsqueeze(0) for name, parts in found.items()}
    real = torch.ones_like(tokens["policy"], dtype=torch.bool)
    again, reference = ((tokens["policy"] - tokens[name]).abs().mean().item() for name in ("again", "reference"))
    # In units of logits, since a temperature below 1 magnifies rounding too.
    scale = min(1.0, args.temperature)
    compared = disagreement(tokens["policy"] * scale, tokens["sampled"] * scale, real)
    sampled = {name: value.item() for name, value in compared.items()}
    yield held(
        "dropout is off",
        again,
        1e-3,
        "refused",
        "Mean difference of a token's logprob (nats) between two passes in training mode, with the same arithmetic. Above "
        "the bound, ratios do not start at 1: set disable_dropout: true, and set the model's own dropout options to 0.",
    )
    exact = is_exact(args, backbone)
    yield held(
        "sampled and rescored logprobs agree",
        sampled["difference"],
        1e-3 if exact else 0.1,
        "refused",
        f"Mean difference (nats, times a temperature below 1) between a token's logprob in generation and in PPO's training "
        f"pass. The largest difference is {sampled['largest']:.3g}. {DISAGREE}{sampled_with(args)}",
    )
    yield held(
        "importance ratios start near 1",
        sampled["outside"],
        0.1,
        "refused",
        f"Share of tokens whose probability (to the power of a temperature below 1) differs between generation and PPO's "
        f"training pass by a factor beyond 1 ± {CLIP:g}, where PPO clips. {DISAGREE}{sampled_with(args)}",
    )
    odd = {name for name, _ in sampling ^ scoring}
    yield held(
        "sampling and scoring run the same adapters",
        len(odd),
        0,
        "refused",
        f"Number of layers whose adapters differ between generation and PPO's training pass{_first(odd)}. Switch roles only "
        f"with `Backbone.role`.",
    )
    yield _drawn_check(tokens["surprise"], args)
    yield held(
        "KL is 0 at step 0",
        reference,
        1e-3,
        "refused",
        "Mean difference (nats) between a token's logprob under the policy and under the reference, which start as the same "
        "adapter.",
    )


def own_checks(backbone: Backbone, batch: Sample, args: PPOConfig) -> Iterator[Check]:
    """Check that the logprobs PPO trains on are the same in other passes over a few rows.

    The other passes are the model's own forward, a pass with the padding at the other side, and a pass through all layers
    instead of from the trunk.
    """
    ids, mask, completion_ids, real = (part[:ROWS] for part in batch[:4])
    few, length = Sample(ids, mask, completion_ids, real, None), completion_ids.shape[1]
    ours = _rescored(backbone, "policy", few, args)[0]
    if backbone.trunk_depth:
        full = backbone.logprobs("policy", ids, mask, completion_ids, args.temperature)
        yield held(
            "a pass from the trunk is the full pass",
            (ours - full)[real].abs().mean().item(),
            1e-3,
            "refused",
            "Mean difference (nats) between a token's logprob in a pass from the states that roles share and in a pass "
            "through all layers, with the same arithmetic. Above the bound, train an adapter of all layers: leave "
            "lora_top_layers unset.",
        )
    bound = 1e-3 if is_exact(args, backbone) else 0.1
    scale = min(1.0, args.temperature)
    begins = mask.long().argmax(dim=1, keepdim=True)  # columns of padding at the left
    columns = torch.arange(ids.shape[1], device=ids.device) + begins
    moved, moved_mask = (table.gather(1, columns % ids.shape[1]) for table in (ids, mask))
    right = backbone.logprobs("policy", moved, moved_mask, moved[:, 1:], args.temperature)
    at = ids.shape[1] - length - 1 - begins + torch.arange(length, device=ids.device)
    yield held(
        "logprobs do not depend on the side of the padding",
        (ours - right.gather(1, at))[real].abs().mean().item() * scale,
        bound,
        "refused",
        "Mean difference (nats, times a temperature below 1) between a token's logprob with the padding at the left and at "
        "the right. Above the bound, the model counts padding as tokens: use a model that does not (GPT-2, Llama, Qwen "
        "...).",
    )
    own = torch.zeros_like(ours)
    for i, (text, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
        with backbone.role("policy"):  # the model by itself: one row, no padding, no position ids
            logits = backbone.get_base_model()(input_ids=text[keep].unsqueeze(0), use_cache=False).logits[0]
        count = int(real[i].sum())
        logprobs = (logits[-count - 1 : -1].float() / args.temperature).log_softmax(dim=-1)
        own[i, :count] = logprobs.gather(1, completion_ids[i, :count].unsqueeze(1)).squeeze(1)
    yield held(
        "logprobs are the model's own",
        (ours - own)[real].abs().mean().item() * scale,
        bound,
        "refused",
        "Mean difference (nats, times a temperature below 1) between a token's logprob in PPO's training pass and in the "
        "model's own forward over each row alone. Above the bound, PPO would train a different model from the one that "
        "samples.",
    )


def _first(names: set[str]) -> str:
    return f", such as {min(names)}" if names else ""


def _rescored(backbone: Backbone, role: str, batch: Sample, args: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies (B, T) of a batch as PPO computes them: from the trunk if there is one."""
    trunk = backbone.trunk(*batch[:2]) if backbone.trunk_depth else None
    return backbone.logprobs_and_entropy(role, *batch[:3], args.temperature, trunk)


def _drawn_check(surprise: Tensor, args: PPOConfig) -> Check:
    """Check that tokens occur as often as the policy says: `surprise`, logprob + entropy, (1, N), has a mean of about 0.

    Given the tokens before it, a token's logprob has the mean -entropy. So the sum of logprob + entropy over tokens is a
    martingale, and this sum divided by its standard deviation is about normal.
    """
    deviations = surprise.sum().abs() / surprise.square().sum().sqrt()
    beyond = [name for name, neutral in WITHOUT_EFFECT.items() if getattr(args, name) not in neutral]
    return held(
        "tokens are drawn from the policy",
        deviations.item(),
        6,
        "warning" if beyond else "refused",
        "Distance of the sampled tokens' mean logprob from the value that the policy's entropy predicts, in standard "
        "deviations. Above the bound, the tokens are drawn from another distribution than PPO scores: check temperature and "
        "the options that cut or penalise tokens.",
    )


# Options that draw from another distribution than PPO scores, and the values that change nothing.
WITHOUT_EFFECT: dict[str, tuple] = {
    "top_k": (0, None),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}


def sampling_checks(args: PPOConfig) -> Iterator[Check]:
    """Warn of options with which tokens are drawn from another distribution than PPO scores."""
    for name, neutral in WITHOUT_EFFECT.items():
        value = getattr(args, name)
        if value not in neutral:
            yield Check(
                f"{name} is unset",
                None,
                "the whole distribution",
                "warning",
                f"{name}={value!r} changes the distribution that tokens are sampled from. PPO's logprobs, ratios and KL are "
                f"those of the policy's whole distribution at temperature={args.temperature:g}. Leave {name} unset.",
            )
