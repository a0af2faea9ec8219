"""`pipeline.backbone.sampling`: what is sampled comes from the whole distribution of a role, and ends where TRL ends it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_likely

from pipeline.backbone import sampling
from pipeline.backbone.sampling import gathered, sample, sampling_options
from pipeline.rl.config import PPOConfig
from tests.benchmarks.gpu import Live


pytestmark = pytest.mark.slow


ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def samples(backbone, tokenizer, role="policy", rows=ROWS, seed=0, **options):
    torch.manual_seed(seed)
    given = {"max_completion_length": 6, "temperature": 1.0, "batch_size": 3, **options}
    return list(sample(backbone, role, rows, tokenizer, **given))


def test_batches_hold_what_they_say(backbone, tokenizer):
    make_likely(backbone, tokenizer.eos_token_id)
    batches = samples(backbone, tokenizer, rows=ROWS * 4, batch_size=8)
    assert [len(batch.completion_ids) for batch in batches] == [8, 8]
    lengths = []
    for number, batch in enumerate(batches):
        width = batch.completion_ids.shape[1]
        assert torch.equal(batch.input_ids[:, -width:], batch.completion_ids)
        assert torch.equal(batch.attention_mask[:, -width:].bool(), batch.mask)
        assert batch.logprobs is None
        for i, row in enumerate(batch.rows()):
            prompt = batch.input_ids[i, :-width][batch.attention_mask[i, :-width].bool()].tolist()
            assert prompt == (ROWS * 4)[8 * number + i]
            assert row.count(tokenizer.eos_token_id) == (row[-1] == tokenizer.eos_token_id)
            assert len(row) == 6 or row[-1] == tokenizer.eos_token_id
            lengths.append(len(row))
    assert len(set(lengths)) > 2


def test_a_pad_token_that_is_the_end_of_text(backbone, tokenizer):
    make_likely(backbone, tokenizer.eos_token_id)
    plain = samples(backbone, tokenizer, rows=ROWS * 4, batch_size=16)[0]
    tokenizer.pad_token = tokenizer.eos_token
    merged = samples(backbone, tokenizer, rows=ROWS * 4, batch_size=16)[0]
    assert merged.rows() == plain.rows()
    assert torch.equal(merged.mask, plain.mask)
    assert any(row[-1] == tokenizer.eos_token_id for row in merged.rows())


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_what_is_shared_does_not_depend_on_the_number_of_processes(backbone, tokenizer, monkeypatch, processes):
    """Five batches: of seven processes, two have none."""
    make_likely(backbone, tokenizer.eos_token_id)

    def shared(process: int, processes: int) -> list[tuple[int, list[list[int]]]]:
        monkeypatch.setattr(
            sampling, "PartialState", lambda: SimpleNamespace(process_index=process, num_processes=processes)
        )
        torch.manual_seed(process)  # whatever state the generator is in
        batches = sample(backbone, "policy", ROWS * 5, tokenizer, max_completion_length=6, temperature=1.0, batch_size=4,
                         share_seed=(3,))  # fmt: skip
        return [(batch.first, batch.rows()) for batch in batches]

    (alone,) = gathered(shared(0, 1))
    found = [shared(i, processes) for i in range(processes)]
    assert [len(parts) for parts in found] == {2: [3, 2], 3: [2, 2, 1], 7: [1, 1, 1, 1, 1, 0, 0]}[processes]
    (together,) = gathered([part for parts in reversed(found) for part in parts])  # in any order
    assert together == alone
    assert len(alone) == 20
    assert len({str(alone[i : i + 4]) for i in range(0, 20, 4)}) == 5  # batches of the same prompts differ


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("role", ["policy", "value"])
def test_logprobs_are_those_of_the_role_that_scores(backbone, tokenizer, role, temperature):
    for batch in samples(backbone, tokenizer, role, temperature=temperature, keep_logprobs=True):
        with torch.no_grad():
            expected = backbone.logprobs(role, *batch[:3], temperature)
        torch.testing.assert_close(batch.logprobs[batch.mask], expected[batch.mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 1),
        ("top_p", 0.1),
        ("min_p", 0.9),
        ("typical_p", 0.1),
        ("repetition_penalty", 50.0),
        ("no_repeat_ngram_size", 1),
        ("temperature", 0.1),
        ("min_new_tokens", 6),
        ("min_length", 12),
        ("max_length", 4),
        ("suppress_tokens", [100, 101]),
        ("begin_suppress_tokens", [100, 101]),
        ("bad_words_ids", [[100], [101]]),
        ("sequence_bias", [[[100], 20.0]]),
        ("forced_eos_token_id", 7),
        ("exponential_decay_length_penalty", [1, 5.0]),
        ("epsilon_cutoff", 0.5),
        ("eta_cutoff", 0.5),
        ("top_h", 0.1),
        ("num_beams", 3),
        ("num_return_sequences", 2),
        ("guidance_scale", 3.0),
        ("return_dict_in_generate", True),
        ("use_cache", False),
        ("renormalize_logits", True),
        ("stop_strings", ["the"]),
    ],
)
def test_the_models_own_generation_config_cuts_nothing(backbone, tokenizer, name, value):
    make_likely(backbone, 100, 101, 102, tokenizer.eos_token_id)  # tokens come again, and a few hold half of the mass
    options = {"rows": ROWS * 4, "keep_logprobs": True}
    expected = samples(backbone, tokenizer, **options)
    own = backbone.get_base_model().generation_config
    setattr(own, name, value)
    found = samples(backbone, tokenizer, **options)
    assert [batch.rows() for batch in found] == [batch.rows() for batch in expected]
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(found, expected, strict=True))
    assert backbone.get_base_model().generation_config is own and getattr(own, name) == value


def test_what_a_user_sets_is_set(backbone, tokenizer):
    """Each option of the trainers arrives, and other fields through generation_kwargs; they go before ours."""
    args = PPOConfig(output_dir="x", top_k=1, use_cpu=True, bf16=False, generation_kwargs={"max_new_tokens": 3})
    assert sampling_options(args) == {
        "top_k": 1,
        "top_p": 1.0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "cache_implementation": None,
        "max_new_tokens": 3,
    }
    greedy = [samples(backbone, tokenizer, seed=seed, options=sampling_options(args))[0].rows() for seed in (0, 1)]
    assert greedy[0] == greedy[1] and max(map(len, greedy[0])) == 3


def test_logprobs_are_kept_without_the_logits_of_a_completion(backbone, tokenizer):
    """In memory beside the weights is at most one step's logits, and the end of one row does not shift another's."""
    make_likely(backbone, tokenizer.eos_token_id)
    recorders = []

    class Noted(sampling.SampledLogprobs):
        def __init__(self, temperature):
            super().__init__(temperature)
            recorders.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SampledLogprobs", Noted)
        (batch,) = samples(backbone, tokenizer, rows=ROWS * 2, batch_size=8, keep_logprobs=True)
    assert recorders[0].logits is None and all(x.shape == (8,) for x in recorders[0].kept)
    with torch.no_grad():
        expected = backbone.logprobs("policy", *batch[:3])
    assert not batch.mask.all() and batch.logprobs.shape == batch.mask.shape
    torch.testing.assert_close(batch.logprobs[batch.mask], expected[batch.mask], atol=1e-5, rtol=0)


def test_every_end_that_the_model_names_ends(backbone, tokenizer):
    other = 7
    backbone.generation_config.eos_token_id = [other, tokenizer.eos_token_id]
    make_likely(backbone, other, tokenizer.eos_token_id)
    rows = [row for batch in samples(backbone, tokenizer, rows=ROWS * 8) for row in batch.rows()]
    ends = (other, tokenizer.eos_token_id)
    assert {row[-1] for row in rows} >= set(ends)
    assert not any(token in ends for row in rows for token in row[:-1])


def test_a_model_that_names_no_end_ends_with_the_tokenizer(backbone, tokenizer):
    backbone.generation_config.eos_token_id = None
    make_likely(backbone, tokenizer.eos_token_id)
    rows = [row for batch in samples(backbone, tokenizer, rows=ROWS * 4) for row in batch.rows()]
    assert any(row[-1] == tokenizer.eos_token_id and len(row) < 6 for row in rows)


def test_frequencies_are_the_softmax_at_the_temperature(backbone, tokenizer):
    """1000 draws of one token: the shares of the likeliest tokens, within four standard errors."""
    ids, temperature, draws = [5, 6, 7], 0.5, 1000
    with torch.no_grad(), backbone.role("policy"):
        logits = backbone(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 3)).logits[0, -1]
    expected = (logits / temperature).softmax(dim=-1)
    options = {"max_completion_length": 1, "temperature": temperature, "batch_size": draws}
    (batch,) = samples(backbone, tokenizer, rows=[ids] * draws, **options)
    shares = torch.bincount(batch.completion_ids[:, 0], minlength=len(expected)) / draws
    likeliest = expected.topk(5)
    assert likeliest.values[-1] > 0.005
    error = (likeliest.values * (1 - likeliest.values) / draws).sqrt()
    assert ((shares[likeliest.indices] - likeliest.values).abs() < 4 * error).all()


def test_logprobs_are_kept_without_a_copy_of_all_logits(backbone, tokenizer):
    """Beside the model live a few steps' logits, not those of all 32."""
    with Live(backbone) as live:
        samples(backbone, tokenizer, rows=ROWS[:3], max_completion_length=32, keep_logprobs=True)
    logits = 4 * 3 * 32 * backbone.get_base_model().config.vocab_size
    assert live.peak - live.standing < 0.3 * logits
