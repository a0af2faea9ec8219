"""The same tokens give the same numbers as in TRL 1.12.0, the last release with a PPOTrainer.

`fixtures/trl_1_12_ppo.py` ran that trainer and wrote its variables down, with the weights of its models. Where ours
differ, the test names what TRL does, and shows that the difference is this and nothing else:

- the reward is one step late: TRL plays one more step after a completion that ended before the last column, in which
  nothing is chosen; the state before it has a value, and the score comes there (`padding_mask_p1` is the mask with it);
- that step counts as a token in the value loss;
- whitening divides by the unbiased standard deviation, of advantages and, with `whiten_rewards`, of rewards;
- what stands under the padding is INVALID_LOGPROB = 1.0, a ratio of 1 and a log-ratio of 0, and enters some averages.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.backbone.adapters import Adapter
from pipeline.backbone.roles import Backbone
from pipeline.rl.advantages import gae, token_rewards
from pipeline.rl.kl import kl_per_token
from pipeline.rl.losses import approx_kl, policy_loss, value_loss
from pipeline.rl.masking import masked_sums, whiten


FIXTURE = Path(__file__).parent / "fixtures" / "trl_1_12_ppo.safetensors"
CLOSE = {"atol": 1e-4, "rtol": 0}

with safe_open(FIXTURE, "pt") as file:
    FACTS = json.loads(file.metadata()["facts"])
    TRL = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict

SETTINGS = FACTS["settings"]
GAE = {name: SETTINGS[name] for name in ("gamma", "lam")}
PAD, EOS = FACTS["special"]["pad_token_id"], FACTS["special"]["eos_token_id"]
MASK, WITH_LATE_STEP = ~TRL["padding_mask"], ~TRL["padding_mask_p1"]
LENGTHS = MASK.sum(dim=1)
EARLY = LENGTHS < MASK.shape[1]  # rows that ended before the last column
UNBIASED = ((MASK.sum() - 1) / MASK.sum()).sqrt()  # from a biased whitening to an unbiased one
MINIBATCHES = range(len(TRL["minibatch.pg_loss"]))


def part(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in TRL.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def ours() -> dict[str, torch.Tensor]:
    """The roles of one backbone on TRL's tokens: logprobs, ref_logprobs, values (B, T), and scores (B,)."""
    base = GPT2LMHeadModel(GPT2Config(**FACTS["shape"], **FACTS["special"])).requires_grad_(False)
    base.transformer.load_state_dict(part("base."))
    lora, reward = LoraConfig(task_type="CAUSAL_LM", **FACTS["lora"]), part("reward.")
    backbone = Backbone(base, Adapter("policy", lora, part("policy."), None))
    backbone.add_role("reward", Adapter("reward", lora, reward, reward.pop("head")))
    backbone.add_value()
    backbone.eval()
    ids = torch.cat([TRL["queries"], TRL["responses"]], dim=1)
    attend = torch.cat([TRL["queries"] != PAD, MASK], dim=1)
    with torch.no_grad():
        logprobs, ref_logprobs = (
            backbone.logprobs(role, ids, attend, TRL["responses"], SETTINGS["temperature"])
            for role in ("policy", None)
        )
        values = backbone.values(ids, attend, MASK.shape[1])
        return {
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "values": values,
            "scores": backbone.scores(ids, attend),
        }


def minibatch(number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows of the rollout (b,), and TRL's numbers of one minibatch."""
    return TRL["minibatch.micro_batch_inds"][number], {
        name: tensor[number] for name, tensor in part("minibatch.").items()
    }


# ------------------------------------------------------------------------------------------------ the fixture itself
def test_the_rollout_has_every_kind_of_row():
    prompts = (TRL["queries"] != PAD).sum(dim=1)
    ended = (TRL["responses"] == EOS).any(dim=1)
    assert prompts.unique().numel() >= 4 and LENGTHS.unique().numel() >= 5
    assert (~ended).any() and (ended & EARLY).any() and (ended & ~EARLY).any()
    assert SETTINGS["temperature"] != 1 and SETTINGS["missing_eos_penalty"]
    assert TRL["minibatch.pg_clipfrac_stats"].max() > 0.2 and TRL["minibatch.vf_clipfrac"].max() > 0.2


def test_the_mask_ends_with_the_first_end_of_text():
    for row, length in zip(TRL["responses"].tolist(), LENGTHS.tolist(), strict=True):
        assert length == (row.index(EOS) + 1 if EOS in row else len(row))
    assert torch.equal(WITH_LATE_STEP.sum(dim=1), LENGTHS + EARLY)


# ------------------------------------------------------------------------------------------------ rollout
@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs"])
def test_logprobs(ours, name):
    assert_close(ours[name][MASK], TRL[name][MASK], **CLOSE)
    assert (TRL[name][~MASK] == 1.0).all()  # INVALID_LOGPROB


def test_values(ours):
    # Also in the late step: the state is the one after the end-of-text token.
    assert_close(ours["values"][WITH_LATE_STEP], TRL["values"][WITH_LATE_STEP], **CLOSE)
    assert TRL["values"][WITH_LATE_STEP & ~MASK].abs().min() > 0.01


def test_scores(ours):
    ended = ((TRL["responses"] == EOS) & MASK).any(dim=1)
    assert_close(ours["scores"] - SETTINGS["missing_eos_penalty"] * ~ended, TRL["scores"], **CLOSE)


def rewards_of(ours, mask):
    given = (TRL["scores"], ours["logprobs"], ours["ref_logprobs"])
    return token_rewards(*given, mask, kl_coef=SETTINGS["kl_coef"])


def test_rewards(ours):
    found = rewards_of(ours, MASK)
    assert_close(found[~EARLY], TRL["rewards"][~EARLY], **CLOSE)
    # In the other rows TRL's score comes one step late, where nothing was chosen and there is no penalty.
    last = LENGTHS[EARLY, None] - 1
    moved = found[EARLY].scatter_add(1, last, -TRL["scores"][EARLY, None])
    assert_close(moved.scatter_add(1, last + 1, TRL["scores"][EARLY, None]), TRL["rewards"][EARLY], **CLOSE)


def late_rewards() -> torch.Tensor:
    """TRL's rewards by our function: the late step is a token on which policy and reference agree."""
    given = (TRL["scores"], TRL["logprobs"], TRL["ref_logprobs"])
    return token_rewards(*given, WITH_LATE_STEP, kl_coef=SETTINGS["kl_coef"])


def test_rewards_with_the_late_step():
    assert_close(late_rewards(), TRL["rewards"], **CLOSE)


# ------------------------------------------------------------------------------------------------ advantages
def test_advantages_and_returns():
    advantages, returns = gae(TRL["rewards"], TRL["values"], WITH_LATE_STEP, **GAE)
    assert_close(returns, TRL["returns"], **CLOSE)
    assert_close(advantages, TRL["returns"] - TRL["values"], **CLOSE)


def test_what_the_late_step_does_to_advantages(ours):
    """It discounts the score once more, and mixes the value after the end into it: at the last token, TRL's advantage
    is ours + gamma * V + gamma * lam * (score - V) - score. Earlier tokens see it through (gamma * lam)^k."""
    found, _ = gae(rewards_of(ours, MASK), ours["values"], MASK, **GAE)
    theirs, gamma, lam = TRL["returns"] - TRL["values"], GAE["gamma"], GAE["lam"]
    for row, length in enumerate(LENGTHS.tolist()):
        score = TRL["scores"][row].item()
        value = TRL["values"][row, length].item() if EARLY[row] else None
        late = gamma * value + gamma * lam * (score - value) - score if EARLY[row] else 0.0
        for t in range(length):
            expected = found[row, t].item() + (gamma * lam) ** (length - 1 - t) * late
            assert theirs[row, t].item() == pytest.approx(expected, abs=1e-4), (row, t)


def test_whitening():
    raw = TRL["returns"] - TRL["values"]
    assert_close(whiten(raw, MASK, masked_sums(raw, MASK)) * UNBIASED, TRL["advantages"], **CLOSE)
    assert 1 - UNBIASED > 1e-3  # so that the test would see it


# ------------------------------------------------------------------------------------------------ k3, whitened rewards
K3 = part("k3_whitened.")
LATE_COUNT = WITH_LATE_STEP.sum()


def k3_rewards(ours) -> torch.Tensor:
    """Rewards of the second run by our functions, with the late step, before they are whitened."""
    logprobs, ref_logprobs = (ours[name].masked_fill(~MASK, 1.0) for name in ("logprobs", "ref_logprobs"))
    given = (TRL["scores"], logprobs, ref_logprobs, WITH_LATE_STEP)
    return token_rewards(*given, kl_coef=SETTINGS["kl_coef"], kl_estimator="k3")


def unbiased(rewards: torch.Tensor) -> torch.Tensor:
    """Our whitened rewards, were the variance the unbiased one: sqrt((n - 1) / n) as far from the mean, which stays."""
    mean = rewards[WITH_LATE_STEP].mean()
    whitened = whiten(rewards, WITH_LATE_STEP, masked_sums(rewards, WITH_LATE_STEP), shift_mean=False)
    return torch.where(WITH_LATE_STEP, (whitened - mean) * ((LATE_COUNT - 1) / LATE_COUNT).sqrt() + mean, 0)


def test_k3(ours):
    found = -SETTINGS["kl_coef"] * kl_per_token(ours["logprobs"], ours["ref_logprobs"], MASK, estimator="k3")
    assert_close(found, K3["non_score_reward"].masked_fill(~MASK, 0), **CLOSE)
    assert (K3["non_score_reward"] <= 0).all() and (TRL["non_score_reward"] > 0.1).any()


def test_whitened_rewards(ours):
    """TRL keeps the mean too, and whitens the late step with the rest; its variance is the unbiased one."""
    rewards = k3_rewards(ours)
    assert_close(unbiased(rewards), K3["rewards"], **CLOSE)
    biased = whiten(rewards, WITH_LATE_STEP, masked_sums(rewards, WITH_LATE_STEP), shift_mean=False)
    assert (biased - K3["rewards"]).abs().max() > 1e-2  # so that the test would see it


def test_advantages_of_whitened_rewards(ours):
    values = ours["values"].masked_fill(~WITH_LATE_STEP, 0)
    advantages, returns = gae(unbiased(k3_rewards(ours)), values, WITH_LATE_STEP, **GAE)
    assert_close(returns, K3["returns"], **CLOSE)
    whitened = whiten(advantages, MASK, masked_sums(advantages, MASK)) * UNBIASED
    assert_close(whitened, K3["advantages"], **CLOSE)


# ------------------------------------------------------------------------------------------------ losses
@pytest.mark.parametrize("number", MINIBATCHES)
def test_policy_loss(number):
    rows, theirs = minibatch(number)
    given = (theirs["new_logprobs"], TRL["logprobs"][rows], TRL["advantages"][rows], MASK[rows])
    loss, share = policy_loss(*given, clip=SETTINGS["cliprange"])
    assert_close(loss, theirs["pg_loss"], **CLOSE)
    assert_close(share, theirs["pg_clipfrac_stats"], **CLOSE)


@pytest.mark.parametrize("number", MINIBATCHES)
def test_value_loss(number):
    rows, theirs = minibatch(number)
    given = (theirs["vpred"], TRL["values"][rows], TRL["returns"][rows])
    clip = SETTINGS["cliprange_value"]
    loss, share = value_loss(*given, WITH_LATE_STEP[rows], clip=clip)
    assert_close(loss, theirs["vf_loss"], **CLOSE)
    assert_close(share, theirs["vf_clipfrac"], **CLOSE)
    # Ours is over chosen tokens only; what is between them is the loss of the late steps.
    late = WITH_LATE_STEP[rows] & ~MASK[rows]
    together = sum(value_loss(*given, mask, clip=clip)[0] * mask.sum() for mask in (MASK[rows], late))
    assert_close(together / WITH_LATE_STEP[rows].sum(), theirs["vf_loss"], **CLOSE)


@pytest.mark.parametrize("number", MINIBATCHES)
def test_statistics_are_diluted_by_the_padding(number):
    """TRL's approxkl and ratio are means over the padding too, where the log-ratio is 1.0 - 1.0."""
    rows, theirs = minibatch(number)
    mask, old = MASK[rows], TRL["logprobs"][rows]
    real = mask.float().mean()
    assert_close(approx_kl(theirs["new_logprobs"], old, mask) * real, theirs["approxkl_stats"], **CLOSE)
    ratio = torch.exp(theirs["new_logprobs"] - old)[mask].mean()
    assert_close(ratio * real + 1 - real, theirs["ratio_stats"], **CLOSE)


@pytest.mark.parametrize("number", MINIBATCHES)
def test_from_tokens_to_losses(ours, number):
    """Everything before the second forward pass is ours, with TRL's late step and unbiased whitening."""
    rows, theirs = minibatch(number)
    values = ours["values"].masked_fill(~WITH_LATE_STEP, 0)
    logprobs, ref_logprobs = (ours[name].masked_fill(~MASK, 1.0) for name in ("logprobs", "ref_logprobs"))
    ended = (TRL["responses"] == EOS).any(dim=1)
    scores = ours["scores"] - SETTINGS["missing_eos_penalty"] * ~ended
    rewards = token_rewards(scores, logprobs, ref_logprobs, WITH_LATE_STEP, kl_coef=SETTINGS["kl_coef"])
    advantages, returns = gae(rewards, values, WITH_LATE_STEP, **GAE)
    advantages = whiten(advantages, MASK, masked_sums(advantages, MASK)) * UNBIASED
    policy, _ = policy_loss(
        theirs["new_logprobs"], logprobs[rows], advantages[rows], MASK[rows], clip=SETTINGS["cliprange"]
    )
    value, _ = value_loss(
        theirs["vpred"], values[rows], returns[rows], WITH_LATE_STEP[rows], clip=SETTINGS["cliprange_value"]
    )
    assert_close(policy, theirs["pg_loss"], **CLOSE)
    assert_close(value, theirs["vf_loss"], **CLOSE)
