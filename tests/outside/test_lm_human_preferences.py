"""Facts from the tests of openai/lm-human-preferences (README.md names them) as inputs for ours."""

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.backbone.roles import Backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.kl import adapted_kl_coef
from tests.outside.chain import NOTHING, chain, complete, drawn


def plus_one() -> Backbone:
    """A policy over ten tokens that says the last token plus one, and nothing else; 9 says itself."""
    following = torch.arange(1, 11).clamp(max=9)
    return chain(torch.full((10, 10), NOTHING).scatter(1, following.unsqueeze(1), 0.0), ends=99)


CONTEXTS, FOLLOWING = [[5, 0], [4, 3]], [[1, 2, 3, 4], [4, 5, 6, 7]]


def test_a_sure_policy_says_what_it_is_sure_of():
    batch = complete(plus_one(), CONTEXTS, 4, end=99)
    assert batch.rows() == FOLLOWING
    assert batch.input_ids.tolist() == [a + b for a, b in zip(CONTEXTS, FOLLOWING, strict=True)]
    assert batch.logprobs.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sure_policy_has_logprob_and_entropy_0(temperature):
    """Tokens that cannot come (logits of -inf) add nothing to the entropy."""
    backbone = plus_one()
    batch = complete(backbone, CONTEXTS, 4, end=99)
    with torch.no_grad():
        found = backbone.logprobs_and_entropy("policy", *batch[:3], temperature)
    assert [x.tolist() for x in found] == [[[0.0] * 4] * 2] * 2


LOGITS = [1, 1.01, 1.001, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("k", "kept"), [(1, {6}), (2, {1, 6}), (3, {1, 2, 6}), (4, {0, 1, 2, 6}), (5, {0, 1, 2, 3, 4, 5, 6})]
)
def test_top_k(k, kept):
    """Tokens as likely as the k-th are kept with it."""
    assert drawn([LOGITS], top_k=k) == [kept]


@pytest.mark.parametrize(
    ("p", "kept", "first_beyond"),
    # Mass of 6, 1, 2, 0 in this order, summed up: 0.398, 0.546, 0.692, 0.838.
    [(0.7, {6, 1, 2}, {0}), (0.6, {6, 1}, {2}), (0.5, {6}, {1})],
)
def test_top_p(p, kept, first_beyond):
    """Theirs keeps the most tokens whose mass is at most p, ours the fewest whose mass is at least p: one more."""
    assert drawn([LOGITS], top_p=p) == [kept | first_beyond]


def test_top_p_of_all_keeps_all():
    assert drawn([LOGITS], top_p=1.0) == [set(range(7))]


@pytest.mark.parametrize(
    ("kls", "expected"),
    [
        ([3.0], 0.2),
        ([3.3], 0.2 * 1.008),  # a tenth above the target, 8 of 100 sequences
        ([30.0], 0.2 * 1.016),
        ([0.0], 0.2 * 0.984),
        ([30.0, 30.0, 0.0], 0.2 * 1.016 * 1.016 * 0.984),
    ],
)
def test_adaptive_kl(kls, expected):
    coefficient = 0.2
    for kl in kls:
        coefficient = adapted_kl_coef(coefficient, kl, target=3.0, horizon=100, batch_size=8)
    assert coefficient == pytest.approx(expected, rel=1e-12)


def small_gpt2(seed: int, **shape: int) -> Backbone:
    torch.manual_seed(seed)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=10, n_layer=2, n_head=3, initializer_range=0.5, eos_token_id=None, **shape)
    )
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return Backbone(base.eval(), lora).eval()


def test_token_by_token_is_as_all_at_once():
    backbone = small_gpt2(7, n_embd=9, n_positions=5)
    batch = complete(backbone, [[3], [8]], 4, end=99)
    assert batch.mask.all() and batch.logprobs.std() > 0.1
    with torch.no_grad():
        whole = backbone.logprobs("policy", *batch[:3])
    torch.testing.assert_close(batch.logprobs, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first_is_real", [True, False])
def test_gaps_anywhere_change_nothing(first_is_real):
    """Four rows of 4 + 3 tokens, spread over 7 + 5 places: positions count real tokens, so 8 of them are enough."""
    backbone = small_gpt2(7, n_embd=3, n_positions=8)
    ids = torch.randint(10, (4, 7))
    places = []
    for first, count, width in ((0, 4, 7), (7, 3, 5)):
        begin = int(first_is_real)
        some = [torch.randperm(width - begin)[: count - begin] + begin + first for _ in ids]
        places.append(torch.stack([torch.cat([torch.arange(first, first + begin), x]).sort().values for x in some]))
    places = torch.cat(places, dim=1)
    mask = torch.zeros(4, 12, dtype=torch.bool).scatter(1, places, True)
    spread = torch.randint(10, (4, 12)).scatter(1, places, ids)
    assert mask[:, 0].all() == first_is_real and len(mask.unique(dim=0)) > 1
    with torch.no_grad():
        plain = backbone.hidden_states("policy", ids, torch.ones_like(ids))
        found = backbone.hidden_states("policy", spread, mask.long())[mask].view(plain.shape)
    assert plain.std() > 0.1
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("steps", "accumulation", "minibatches"), [(12, 4, 3), (12, 3, 4), (7, 3, None)])
def test_a_batch_is_divided_without_a_rest(steps, accumulation, minibatches):
    options = {"steps_per_generation": steps, "gradient_accumulation_steps": accumulation}
    if minibatches is None:
        with pytest.raises(ValueError, match="gradient_accumulation_steps=3 does not divide steps_per_generation=7"):
            PPOConfig("x", use_cpu=True, bf16=False, **options)
        return
    args = PPOConfig("x", use_cpu=True, bf16=False, **options)
    assert args.steps_per_generation / args.gradient_accumulation_steps == minibatches
