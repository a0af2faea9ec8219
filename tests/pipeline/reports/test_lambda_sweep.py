"""`pipeline.reports.lambda_sweep`: lambda by hand, from the gradients of the losses that PPO sums, and the table."""

import json

import pytest
import torch
from torch import tensor

from pipeline import tables
from pipeline.reports.lambda_sweep import SWEEP_NOTE, implied_lambda
from pipeline.rl.advantages import gae, token_rewards
from pipeline.rl.losses import policy_loss, text_loss


# A policy over the tokens 0, 1 and 2, which ends a completion. Its three rows of logits are for the first token, and for the
# second token after 0 and after 1. All completions of at most two tokens; -1 is padding.
COMPLETIONS = tensor([[2, -1], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
MASK = COMPLETIONS >= 0
STATES = tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]])  # row of logits of each token
SCORES = tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0, -2.0], dtype=torch.float64)
TEXTS, TEXT_STATES = tensor([[0, 1], [1, 2], [2, -1]]), tensor([[0, 1], [0, 2], [0, 0]])
VALUES = tensor([0.3, -0.7, 1.1], dtype=torch.float64)  # of each state: any baseline leaves the gradient as it is


def logprobs_of(logits: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=-1)[states].gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(("ptx_coef", "weight"), [(0.2, 1.0), (3.0, 1.0), (0.2, 4.0)])
def test_ppo_with_ptx_descends_l_minus_lambda_r(ptx_coef, weight):
    """The gradient of PPO's loss over all completions, each as often as the policy writes it, is that of L - lambda E[R]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    logprobs = logprobs_of(logits, STATES, COMPLETIONS)
    probabilities = (logprobs * MASK).sum(dim=1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    of_texts = text_loss(logprobs_of(logits, TEXT_STATES, TEXTS), TEXTS >= 0)
    length = (probabilities * MASK.sum(dim=1)).sum().item()
    assert 1 < length < 2
    lambda_ = implied_lambda(ptx_coef, length, weight)
    expected = torch.autograd.grad(of_texts - lambda_ * (probabilities * SCORES).sum(), logits, retain_graph=True)[0]

    old = logprobs.detach()
    rewards = token_rewards(weight * SCORES, old, old, MASK, kl_coef=0.0)
    advantages, _ = gae(rewards, VALUES[STATES], MASK, gamma=1.0, lam=1.0)
    # A minibatch in which each completion is as frequent as it is likely: the loss divides by the tokens of all seven.
    share = (probabilities.detach() / length * MASK.sum()).unsqueeze(1).expand_as(old)
    policy, _ = policy_loss(logprobs, old, advantages, MASK, clip=0.2, weights=share)
    found = torch.autograd.grad(policy + ptx_coef * of_texts, logits)[0]
    torch.testing.assert_close(found / ptx_coef, expected)  # the constant moves no minimum
    assert expected.abs().max() > 0.05


def test_lambda_by_hand():
    assert implied_lambda(0.25, 16.0) == 0.25
    assert implied_lambda(0.25, 16.0, weight=2.0) == 0.5
    assert implied_lambda(0.0, 16.0) is None


def report_of(folder, gain: float, loss: float) -> None:
    interval = {"mean": gain, "low": gain - 0.125, "high": gain + 0.125}
    change = {"mean": loss - 5.0, "low": loss - 5.25, "high": loss - 4.75}
    sft = {"judge": 0.25, "score": 0.0, "kl": 0.0, "distinct_2": 0.875, "text_loss": 5.0}
    report = {"sft": sft, "policy": sft | {"score": 1.5, "kl": 4.0, "text_loss": loss}}
    report |= {"judge_gain": interval, "win_rate": interval, "text_loss_change": change}
    (folder / "ppo").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    history = [{"completions/mean_length": length} for length in (18.0, 14.0)]
    (folder / "ppo" / "metrics.json").write_text(json.dumps({"history": [*history, {"train_runtime": 1.0}]}))


def test_the_table_of_a_sweep(tmp_path):
    report_of(tmp_path / "0", 0.5, 6.0)
    report_of(tmp_path / "0.25", 0.25, 5.5)
    with pytest.raises(FileNotFoundError, match="2/report.json: no such file. Run `make lambda-sweep`"):
        tables.lambda_sweep(tmp_path, "0", "0.25", "2")
    tables.lambda_sweep(tmp_path, "0", "0.25")
    _, _, start, small, infinite, _, note = (tmp_path / "table.md").read_text().splitlines()
    assert start == "| SFT | – | – | 5.000 | – | – | +0.00 | – | – |"
    assert small == (
        "| 0.25 | 0.25 | 16.0 | 5.500 | +0.500 [+0.250, +0.750] | +0.25 [+0.12, +0.38] | +1.50 | 4.0 | 0.88 |"
    )
    assert infinite.startswith("| ∞ | 0 | 16.0 | 6.000 | +1.000 [+0.750, +1.250] |")
    assert note == SWEEP_NOTE
    assert [row["lambda"] for row in json.loads((tmp_path / "table.json").read_text())] == [0.25, None]
    assert (tmp_path / "trade_off.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_the_loss_of_texts(tmp_path):
    report_of(tmp_path / "1", 0.5, 6.0)
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    del report["text_loss_change"]
    (tmp_path / "1" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"report\.json: .*'text_loss_change'"):
        tables.lambda_sweep(tmp_path, "1")
