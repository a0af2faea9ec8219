import pytest
import torch
from torch import nn

from pipeline.backbone.logprobs import token_logprobs


def run(head, hidden, tokens, **options):
    """Log-probabilities, entropies, and gradients of a sum in which each token weighs otherwise."""
    hidden = hidden.clone().requires_grad_(True)
    logprobs, entropy = token_logprobs(head, hidden, tokens, 0.7, **options)
    weights = torch.arange(1.0, tokens.numel() + 1).view(tokens.shape)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad


@pytest.fixture
def case():
    torch.manual_seed(0)
    head = nn.Linear(6, 11).requires_grad_(False)
    return head, torch.randn(3, 5, 6), torch.randint(0, 11, (3, 5))


@pytest.mark.parametrize("logits", [11, 40, 2**23])  # one position at a time, a few, all
def test_pieces_give_what_the_whole_gives(case, monkeypatch, logits):
    head, hidden, tokens = case
    monkeypatch.setattr("pipeline.backbone.logprobs.LOGITS", logits)
    logprobs, entropy, gradient = run(head, hidden, tokens)
    plain = hidden.clone().requires_grad_(True)
    expected = torch.distributions.Categorical(logits=head(plain) / 0.7)
    torch.testing.assert_close(logprobs, expected.log_prob(tokens).detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy().detach(), atol=1e-6, rtol=0)
    (expected.log_prob(tokens) * torch.arange(1.0, 16).view(3, 5)).sum().backward()
    torch.testing.assert_close(gradient, plain.grad, atol=1e-5, rtol=1e-5)


def test_autocast_rounds_the_logits_and_not_the_entropy(case):
    head, hidden, tokens = case
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy, _ = run(head, hidden, tokens)
        logits = head(hidden).float() / 0.7
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs, expected.log_prob(tokens), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy(), atol=1e-6, rtol=0)


def test_a_trained_head_and_a_rewarded_entropy_get_their_gradients(case):
    head, hidden, tokens = case
    logprobs, _, gradient = run(head, hidden, tokens)
    again, entropy, same = run(head, hidden, tokens, entropy_requires_grad=True)
    torch.testing.assert_close(again, logprobs)
    torch.testing.assert_close(same, gradient, atol=1e-5, rtol=1e-5)
    head.requires_grad_(True)
    logprobs, entropy = token_logprobs(head, hidden, tokens, 1.0)
    logprobs.sum().backward()
    assert head.weight.grad.abs().max() > 0


def test_no_more_logits_are_in_memory_than_allowed(case, monkeypatch):
    head, hidden, tokens = case
    monkeypatch.setattr("pipeline.backbone.logprobs.LOGITS", 44)
    sizes = []
    head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    run(head, hidden, tokens)
    assert max(sizes) <= 44 and sum(sizes) == 15 * 11  # each position once: nothing is computed again


def test_the_head_never_sees_a_slice(backbone, tokenizer):
    seen = []
    head = backbone.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: seen.append(inputs[0].is_contiguous()))
    ids = torch.full((3, 4), 5)
    backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert len(seen) == 2 and all(seen)


def test_an_entropy_that_nobody_asks_for_is_left_out(case):
    head, hidden, tokens = case
    expected, _, gradient = run(head, hidden, tokens)
    plain = hidden.clone().requires_grad_(True)
    logprobs, entropy = token_logprobs(head, plain, tokens, 0.7, entropy=False)
    (logprobs * torch.arange(1.0, 16).view(3, 5)).sum().backward()
    assert entropy is None and torch.equal(logprobs, expected) and torch.equal(plain.grad, gradient)


@pytest.mark.parametrize("lowest", [-float("inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [[0], [1, 2, 3], list(range(10))], ids=len)
def test_tokens_that_cannot_come_add_nothing_to_the_entropy(case, lowest, masked):
    """Some models give a part of their vocabulary -inf, or the lowest number, which the temperature makes -inf."""
    head, hidden, _ = case
    left = [token for token in range(11) if token not in masked]
    tokens = torch.full((3, 5), 10)
    expected = torch.distributions.Categorical(logits=head(hidden)[..., left] / 0.7)
    head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(masked), lowest))
    logprobs, entropy, gradient = run(head, hidden, tokens)
    torch.testing.assert_close(logprobs, expected.log_prob(torch.tensor(len(left) - 1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy(), atol=1e-6, rtol=0)
    assert gradient.isfinite().all()
