"""`pipeline.pages.label_policies`: what is sampled, that a seed repeats it, and how far an ensemble disagrees."""

import math
from collections import Counter
from itertools import islice

import pytest
import torch
from trl import ModelConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone
from pipeline.pages.label_pairs import Closed, Pair, Pool
from pipeline.pages.label_policies import disputed, disputes_of, sampled_pairs
from tests.conftest import PROMPTS, make_adapter


def batches(backbone, tokenizer, roles=("policy", "policy"), **options):
    given = {"max_completion_length": 5, "temperature": 1.0, "batch_size": 3, "seed": 0, "asked": Counter()} | options
    return sampled_pairs(backbone, roles, ("a", "b"), tokenizer, PROMPTS, **given)


def test_each_prompt_comes_once_in_each_turn_and_the_seed_repeats_it(backbone, tokenizer):
    found = [pair for batch in islice(batches(backbone, tokenizer), 6) for pair in batch]
    assert Counter(pair.prompt for pair in found) == dict.fromkeys(PROMPTS, 2)
    assert len({pair.id for pair in found}) == 16
    assert [pair.prompt for pair in found[:8]] != PROMPTS
    again = [pair for batch in islice(batches(backbone, tokenizer), 6) for pair in batch]
    assert again == found
    assert next(batches(backbone, tokenizer, seed=1)) != found[:3]


def test_two_policies_each_write_one_side(backbone, tokenizer, tiny, tmp_path):
    """The second policy has the logits of another adapter: with a temperature near 0, each side is its greedy completion."""
    other = make_adapter(tiny, tmp_path / "other", head=False, seed=9)
    backbone.add_role("other", read_adapter(other, needs_head=False, base=backbone.get_base_model()))
    options = {"temperature": 1e-4, "batch_size": 8}
    (pairs,) = islice(batches(backbone, tokenizer, ("policy", "other"), **options), 1)
    (turned,) = islice(batches(backbone, tokenizer, ("other", "policy"), **options), 1)
    assert len(pairs) > 4
    assert [pair.completions for pair in pairs] == [pair.completions[::-1] for pair in turned]
    assert pairs[0].sources == ("a", "b")


def test_prompts_that_were_shown_wait_for_the_next_turn(backbone, tokenizer):
    asked = Counter(PROMPTS[:6]) + Counter(PROMPTS[:1])
    found = [pair.prompt for batch in islice(batches(backbone, tokenizer, asked=asked), 4) for pair in batch]
    assert set(found[:2]) == set(PROMPTS[6:]) and set(found[2:9]) == set(PROMPTS[1:])


def test_policies_that_always_write_the_same_are_an_error(backbone, tokenizer):
    with pytest.raises(ValueError, match=r"the same completion, or none, to each of the 8 prompts.*Raise temperature"):
        list(islice(batches(backbone, tokenizer, temperature=1e-5), 9))


def test_a_page_that_ends_does_not_wait_for_a_batch(backbone, tokenizer):
    pool = Pool()
    pool.close()
    with pytest.raises(Closed):
        next(batches(backbone, tokenizer, tell=pool.check_open))


def test_disagreement_is_that_of_the_members_scores(tiny, sft_adapter, reward_adapter, other_reward_adapter):
    """Also of texts from a file, which have ended: the score of a sequence is that of its last token."""
    base, tokenizer = load_pretrained(ModelConfig(tiny))
    backbone = Backbone(base, read_adapter(sft_adapter, base=base)).eval()
    disputes = disputes_of([reward_adapter, other_reward_adapter], backbone, tokenizer)
    pairs = [Pair("The film", (" is good.", " is bad."), ("x", "y")), Pair("A", (" b", " c"), ("x", "y"))]
    found = disputed(pairs, disputes, tokenizer)
    assert [one.id for one in found] == [one.id for one in pairs]
    for one in found:
        chances = []
        for role in ("reward", "reward_2"):
            scores = []
            for text in one.completions:
                ids = torch.tensor([tokenizer(one.prompt + text)["input_ids"] + [tokenizer.eos_token_id]])
                scores.append(backbone.scores(ids, torch.ones_like(ids), role).item())
            chances.append(1 / (1 + math.exp(scores[1] - scores[0])))
        assert one.disagreement == pytest.approx(abs(chances[0] - chances[1]) / 2, abs=1e-5)
    assert found[0].disagreement != found[1].disagreement
