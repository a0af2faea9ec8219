"""Facts from the generation tests of huggingface/transformers (README.md names them) as inputs for ours.

All that is sampled comes from `pipeline.sampling.sample`, so these are facts about what a user's options do there.
"""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from pipeline.backbone.roles import Backbone
from tests.outside.chain import NOTHING, chain, complete, drawn


def logs(*rows: list[float]) -> list[list[float]]:
    return [[math.log(share) if share else NOTHING for share in row] for row in rows]


RAMP = [[*range(10)], [10, 11, 12, 13, 14, 5, 6, 7, 8, 9]]
CUTS = {
    "top_k": (RAMP, {"top_k": 3}, [{7, 8, 9}, {2, 3, 4}]),
    "top_p": (logs([0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]), {"top_p": 0.8}, [{0, 3}, {1, 2, 3}]),
    "min_p": (
        logs([0.9, 0.0274, 0.047, 0.0274], [0.15, 0.3, 0.3, 0.25], [0.97, 0.01, 0.01, 0.01]),
        {"min_p": 0.05},
        [{0, 2}, {0, 1, 2, 3}, {0}],
    ),
    "typical_p": (logs([0.97, 0.01, 0.01, 0.01], [0.4, 0.2, 0.2, 0.2]), {"typical_p": 0.5}, [{0}, {1, 2, 3}]),
    "epsilon_cutoff": (
        logs([0.87, 0.099, 0.001, 0.03], [0.4, 0.299, 0.101, 0.2]),
        {"epsilon_cutoff": 0.1},
        [{0}, {0, 1, 2, 3}],
    ),
    "eta_cutoff": (logs([0.0, 0.1, 0.8, 0.1], [0.01, 0.04, 0.9, 0.05]), {"eta_cutoff": 0.0625}, [{1, 2, 3}, {2}]),
}


@pytest.mark.parametrize(("logits", "options", "kept"), CUTS.values(), ids=CUTS)
def test_what_an_option_cuts(logits, options, kept):
    assert drawn(logits, **options) == kept


@pytest.mark.parametrize(("size", "kept"), [(2, [{0}, {1, 2}]), (3, [{0, 1, 2}, {1, 2}])])
def test_no_repeat_ngram_counts_the_prompt(size, kept):
    assert drawn([[1 / 3] * 3] * 2, [[1, 1, 2, 1], [0, 1, 0, 1]], no_repeat_ngram_size=size) == kept


def test_bad_words_never_forbid_an_end():
    """After the prompt, bad words forbid 0, 1 and 3, or 0, 1 and 2; 4 stands among them, and ends a text."""
    bad = [[1], [4], [1, 0], [0, 1, 2], [1, 3, 1, 3]]
    for prompt, kept in (([0, 1, 3, 1], {2, 4}), ([0, 1, 0, 1], {3, 4})):
        batch = complete(chain(torch.zeros(5, 5), ends=4), [prompt] * 200, 1, end=4, bad_words_ids=bad)
        assert set(batch.completion_ids.flatten().tolist()) == kept


@pytest.mark.parametrize("ends", [0, [0, 18]])
def test_min_new_tokens_holds_back_every_end(ends):
    """Ends are e^9 times as likely as other tokens, and held back for three of them, however long the prompts are."""
    table = torch.zeros(20, 20)
    table[:, ends] = 9.0
    batch = complete(chain(table, ends), [[5], [1, 2, 3, 4, 5]] * 8, 8, end=0, pad=19, min_new_tokens=3)
    lengths, last = batch.mask.sum(dim=1).tolist(), [row[-1] for row in batch.rows()]
    assert min(lengths) == 4 and set(last) == ({0} if ends == 0 else {0, 18})


@pytest.mark.parametrize("prompt", [5, 1])
def test_max_new_tokens_do_not_count_the_prompt(prompt):
    batch = complete(chain(torch.zeros(9, 9), ends=99), [[4] * prompt], 5, end=99)
    assert batch.input_ids.shape[1] == prompt + 5 and batch.mask.all()


def rising(vocabulary: int) -> torch.Tensor:
    """A table by which each token is followed by the next one."""
    following = torch.arange(1, vocabulary + 1).clamp(max=vocabulary - 1)
    return torch.full((vocabulary, vocabulary), NOTHING).scatter(1, following.unsqueeze(1), 0.0)


@pytest.mark.parametrize("ends", [7, [7], [7, 11], [11, 7]])
def test_one_end_or_several(ends):
    batch = complete(chain(rising(12), ends), [[3]], 10, end=9)  # the tokenizer's comes later
    assert batch.rows() == [[4, 5, 6, 7]]


def test_each_row_ends_by_itself():
    """Two of three rows end at once: padding follows them, and the third goes on."""
    table = rising(12)
    batch = complete(chain(table, ends=5), [[4], [9, 4], [2]], 8, end=5, pad=0)
    assert batch.rows() == [[5], [5], [3, 4, 5]]
    assert batch.completion_ids.tolist() == [[5, 0, 0], [5, 0, 0], [3, 4, 5]]


PEAK = [1 / 20] * 20
PEAK[5], PEAK[10] = 1 / 20 + 0.1, 1 / 20 - 0.4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_temperature(temperature):
    """A flat distribution stays flat; below 1 peaks rise and valleys sink, above 1 the other way round."""
    table = torch.zeros(20, 20)
    table[0], table[1] = 1 / 20, torch.tensor(PEAK)
    backbone = chain(table, ends=99)

    def shares(token: int, temperature: float) -> torch.Tensor:
        ids = torch.cat([torch.full((20, 1), token), torch.arange(20).unsqueeze(1)], dim=1)
        with torch.no_grad():
            found = backbone.logprobs("policy", ids, torch.ones_like(ids), ids[:, 1:], temperature)
        return found.squeeze(1).exp()

    torch.testing.assert_close(shares(0, temperature), torch.full((20,), 1 / 20))
    weights = torch.tensor([math.exp(logit / temperature) for logit in PEAK])
    torch.testing.assert_close(shares(1, temperature), weights / weights.sum())
    changed, plain = shares(1, temperature), shares(1, 1.0)
    sharper = (changed[5] > plain[5], changed[10] < plain[10])
    assert sharper == ((temperature < 1,) * 2)


@pytest.mark.parametrize("row", [[-23.18, -29.96, -43.54, 47.77], [-33.58, -26.87, -32.96, 22.51]])
def test_logprobs_of_far_logits_make_a_distribution(row):
    table = torch.tensor([row] * 4)
    ids = torch.tensor([[0, token] for token in range(4)])
    with torch.no_grad():
        found = chain(table, ends=99).logprobs("policy", ids, torch.ones_like(ids), ids[:, 1:]).squeeze(1)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)
    largest = max(row)  # all others are below e^-49 of it
    torch.testing.assert_close(found, torch.tensor([logit - largest for logit in row]), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("row", [[0.0, 0.7, 0.8, math.nan], [0.1, math.inf, 0.3, -math.inf]])
def test_logits_that_are_no_numbers_are_refused(row):
    """Theirs can be asked to repair them."""
    with pytest.raises(FloatingPointError, match="policy gives logits that are not finite"):
        complete(chain(torch.tensor([row] * 4), ends=99), [[0]], 1, end=99)


def test_a_token_that_cannot_come_is_a_number():
    table = torch.tensor([[0.1, 0.2, 0.3, -math.inf]] * 4)
    batch = complete(chain(table, ends=99), [[0]] * 100, 1, end=99)
    assert set(batch.completion_ids.flatten().tolist()) == {0, 1, 2} and batch.logprobs.isfinite().all()


SHAPE = {"vocab_size": 30, "eos_token_id": None}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "positions learned": (GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **SHAPE), "c_attn"),
    "positions rotated": (LlamaConfig(**LLAMA, **SHAPE), "q_proj"),
    "positions as a bias": (BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SHAPE), "query_key_value"),
}


@pytest.mark.parametrize(("config", "module"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("role", ["policy", None])
def test_32_tokens_of_padding_at_the_left_change_nothing(config, module, role):
    config.initializer_range = 0.5
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules=[module], init_lora_weights=False, fan_in_fan_out=module == "c_attn"
    )
    backbone = Backbone(base, lora).eval()
    ids = torch.randint(30, (2, 8))
    padded = torch.cat([torch.zeros(2, 32, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        plain = backbone.logprobs(role, ids, torch.ones_like(ids), ids[:, 1:])
        found = backbone.logprobs(role, padded, (torch.arange(40) >= 32).long().expand(2, 40), ids[:, 1:])
    assert plain.std() > 0.5
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
