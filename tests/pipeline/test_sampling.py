"""`pipeline.sampling`: what is sampled comes from the whole distribution of a role, and ends where TRL ends it."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_likely

from pipeline import sampling
from pipeline.sampling import gathered, sample


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
            expected, _ = backbone.logprobs(role, *batch[:3], temperature)
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
    ],
)
def test_the_models_own_generation_config_cuts_nothing(backbone, tokenizer, name, value):
    make_likely(backbone, 100, 101, 102)  # so that tokens come again, and a few hold half of the probability
    expected = [batch.rows() for batch in samples(backbone, tokenizer)]
    setattr(backbone.generation_config, name, value)
    assert [batch.rows() for batch in samples(backbone, tokenizer)] == expected


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
