"""`reward_models.listwise`: rankings and ratings as tokens, batches, losses and comparisons, in their trainer."""

import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import tensor
from trl import ModelConfig, RewardConfig

from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import lora_config
from reward_models import listwise
from reward_models.listwise import (
    CollateTexts,
    RatingScale,
    by_ranking,
    comparisons,
    longest,
    outcome,
    tokenize_once,
)
from reward_models.ranking import RankingTrainer


RANKINGS = [
    {"prompt": "It was", "ranking": [" fine", " so so", " bad"]},
    {"prompt": "It was", "ranking": [" fine", " bad"]},
    {"prompt": "They are", "ranking": [" good", " not bad", " so so", " bad"]},
]
RATED = [
    {"prompt": "It was", "completion": " fine", "rating": 3.0},
    {"prompt": "It was", "completion": " bad", "rating": -1.0},
    {"prompt": "They are", "completion": " so so", "rating": 1.0},
    {"prompt": "They are", "completion": " not bad", "rating": 1.0},
]


@pytest.fixture
def trainer_of(tiny, tmp_path):
    def make(rows, held_out=None, batch=2, **options):
        torch.manual_seed(0)
        model = ModelConfig(tiny, lora_r=4, lora_target_modules=["c_attn"])
        base, tokenizer = load_pretrained(model, head=True)
        settings = {"max_steps": 3, "learning_rate": 1e-2, "max_length": 32, "gradient_checkpointing": False}
        args = RewardConfig(
            str(tmp_path), per_device_train_batch_size=batch, per_device_eval_batch_size=batch, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", **settings | options,
        )  # fmt: skip
        return RankingTrainer(
            model=base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            peft_config=lora_config(model, task_type="SEQ_CLS", base=base),
        )  # fmt: skip

    return make


def score_alone(trainer, text: str) -> float:
    """The score of a text by itself, ended as TRL ends it."""
    ids = trainer.processing_class(text + trainer.processing_class.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()


def batches(trainer):
    """Each batch that training reads, and the texts of its rows of tokens."""
    for batch in trainer.get_train_dataloader():
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        texts = [trainer.processing_class.decode(ids[mask.bool()][:-1]) for ids, mask in rows]
        yield batch, texts


@pytest.mark.parametrize("centering", [None, 0.5])
def test_the_loss_of_rankings_by_hand(trainer_of, centering):
    """From the batches that training reads: the probability of each order, text by text in numpy."""
    trainer = trainer_of(RANKINGS, center_rewards_coefficient=centering)
    trainer.model.eval()
    seen = []
    for batch, texts in batches(trainer):
        total = 0.0
        sizes = batch["sizes"].tolist()
        for size in sizes:
            ranked, texts = texts[:size], texts[size:]
            seen.append(ranked)
            strengths = np.exp([score_alone(trainer, text) for text in ranked])
            total -= sum(np.log(strengths[k] / strengths[k:].sum()) for k in range(size))
            total += (centering or 0) * (2 * np.log(strengths).mean()) ** 2
        with torch.no_grad():
            loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert loss.item() == pytest.approx(total / len(sizes), rel=1e-4)
        assert len(outputs.logits) == sum(sizes)
    expected = [[row["prompt"] + text for text in row["ranking"]] for row in RANKINGS]
    assert sorted(seen) == sorted(expected)


def test_the_loss_of_ratings_by_hand(trainer_of):
    trainer = trainer_of(RATED, batch=4)
    trainer.model.eval()
    assert trainer.rating_scale == RatingScale(mean=1.0, std=pytest.approx(2**0.5))
    rating = {row["prompt"] + row["completion"]: row["rating"] for row in RATED}
    ((batch, texts),) = batches(trainer)
    expected = np.mean([(score_alone(trainer, text) - (rating[text] - 1) / 2**0.5) ** 2 for text in texts])
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)
    scores = [score_alone(trainer, text) for text in texts]
    order = [
        scores[a] > scores[b] for a, b in itertools.permutations(range(4), 2) if rating[texts[a]] > rating[texts[b]]
    ]
    assert len(order) == 5  # of six pairs one is rated alike
    assert trainer._metrics["eval"]["accuracy"] == [pytest.approx(np.mean(order))]


@pytest.mark.slow
def test_a_ranking_of_two_trains_as_its_pair(trainer_of):
    rankings = [{"prompt": "It was", "ranking": two} for two in ([" fine", " bad"], [" good", " so so"])]
    pairs = [{"prompt": row["prompt"], "chosen": row["ranking"][0], "rejected": row["ranking"][1]} for row in rankings]
    found = []
    for rows in (rankings, pairs):
        trainer = trainer_of(rows)
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        log = next(row for row in trainer.state.log_history if "train_loss" in row)
        found.append((weights, log["train_loss"], trainer._total_train_tokens))
    (ours, our_loss, our_tokens), (theirs, their_loss, their_tokens) = found
    assert our_loss == pytest.approx(their_loss, rel=1e-5) and our_tokens == their_tokens > 0
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_each_text_of_a_batch_is_scored_once(trainer_of):
    trainer = trainer_of(RANKINGS, batch=3)
    seen = []
    embeddings = trainer.model.get_base_model().transformer.wte
    embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    ((batch, texts),) = batches(trainer)
    trainer.compute_loss(trainer.model, batch)
    assert len(texts) == 9 and seen == [7]  # two of the texts stand in two rankings


@pytest.mark.slow
@pytest.mark.parametrize("rows", [RANKINGS, RATED], ids=["rankings", "ratings"])
def test_the_loss_falls_and_its_figures_are_logged(trainer_of, rows):
    trainer = trainer_of(rows, held_out=rows, batch=4, max_steps=30, logging_steps=10)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_accuracy"] == 1
    assert after["eval_min_reward"] < after["eval_mean_reward"] < after["eval_max_reward"]
    assert after["eval_margin"] > 0
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert all({"accuracy", "margin", "mean_reward", "num_tokens"} <= row.keys() for row in logged)
    assert logged[0]["num_tokens"] < logged[1]["num_tokens"]


def test_figures_are_those_of_all_processes(trainer_of, monkeypatch):
    """As if another process had the same batch with twice the tokens: sums of both, and not means of means."""
    trainer = trainer_of(RANKINGS, batch=3)
    ((batch, _),) = batches(trainer)
    other = tensor([100.0, 5.0, 0.0, -4.0, 10.0, 1.0, -9.0, 9.0])  # tokens, score, right, apart, texts, compared
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine, other]))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    figures = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    scores = {text: score_alone(trainer, text) for _, texts in batches(trainer) for text in texts}
    ranked = [[row["prompt"] + text for text in row["ranking"]] for row in RANKINGS]
    gaps = [scores[a] - scores[b] for row in ranked for a, b in itertools.combinations(row, 2)]
    assert len(gaps) == 10
    assert figures["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 11, abs=1e-6)
    assert figures["margin"] == pytest.approx((sum(gaps) - 4) / 11, abs=1e-4)
    assert figures["mean_reward"] == pytest.approx((sum(scores[t] for row in ranked for t in row) + 5) / 19, abs=1e-4)
    assert (figures["min_reward"], figures["max_reward"]) == (-9, 9)
    assert figures["num_tokens"] == 100 + batch["attention_mask"].sum().item()


def test_a_row_with_a_text_that_is_too_long_is_left_out(trainer_of):
    long = [{"prompt": "It was", "ranking": [" fine", " bad" * 40]}]
    assert len(trainer_of(long + RANKINGS).train_dataset) == 3
    rated = trainer_of([{"prompt": "It was", "completion": " bad" * 40, "rating": 100.0}, *RATED])
    assert len(rated.train_dataset) == 4 and rated.rating_scale.mean == 1  # of the rows that are trained on


def test_tokens_are_those_of_pairs(trainer_of):
    """Texts and conversations are written as TRL writes the sides of a pair, whichever of the two columns holds them."""
    trainer = trainer_of(RANKINGS)
    of_pair = trainer._prepare_dataset(
        Dataset.from_list([{"prompt": "It was", "chosen": " fine", "rejected": " bad"}]),
        trainer.processing_class, trainer.args, "pairs",
    )[0]  # fmt: skip
    assert trainer.train_dataset[1]["ranking_ids"] == [of_pair["chosen_ids"], of_pair["rejected_ids"]]
    again = trainer._prepare_dataset(trainer.train_dataset, trainer.processing_class, trainer.args, "train")
    assert again is trainer.train_dataset


def test_conversations_end_where_a_completion_does(trainer_of):
    trainer = trainer_of(RANKINGS)
    tokenizer = trainer.processing_class
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] + eos_token + '\\n' }}{% endfor %}"
    ask, answers = [{"role": "user", "content": "How?"}], [[{"role": "assistant", "content": t}] for t in "ab"]
    rows = Dataset.from_list([{"prompt": ask, "ranking": answers}])
    (found,) = trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")["ranking_ids"]
    end = tokenizer.eos_token
    assert found == [tokenizer(f"How?{end}\n{text}{end}")["input_ids"] for text in "ab"]
    rated = Dataset.from_list([{"messages": ask + answers[0], "rating": 1.0}])
    assert trainer._prepare_dataset(rated, tokenizer, trainer.args, "train")["text_ids"][0] == found[0]


def test_each_distinct_text_is_tokenized_once():
    asked = []

    def prepare(pairs: Dataset) -> Dataset:
        asked.append(pairs.to_list())
        for side in ("chosen", "rejected"):
            pairs = pairs.add_column(f"{side}_ids", [list(map(ord, json.dumps(text))) for text in pairs[side]])
        return pairs

    turns = [[{"role": "user", "content": text}] for text in "xyx"]
    for texts in (["x", "y", "x", "z", "z"], turns):
        assert tokenize_once(texts, prepare) == [list(map(ord, json.dumps(text))) for text in texts]
    assert asked[0] == [{"chosen": "x", "rejected": "y"}, {"chosen": "z", "rejected": "x"}]  # the last fills the row


def test_groups_are_padded_to_the_longest():
    scores, mask = by_ranking(tensor([1.0, 2, 3, 4, 5, 6]), tensor([2, 3, 1]))
    assert scores.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]


def test_gaps_are_of_the_better_text_minus_the_worse():
    found = outcome(tensor([5.0, 1, 2, 7]), tensor([3, 1]), None).gaps
    assert sorted(found.tolist()) == [-1, 3, 4]
    found = outcome(tensor([5.0, 1, 2]), None, tensor([0.0, 1, 1])).gaps
    assert sorted(found.tolist()) == [-4, -3]  # the two that are rated alike are not compared


def test_the_scale_of_ratings():
    assert RatingScale.of([1.0, 3.0]) == RatingScale(2.0, 1.0)
    with pytest.raises(ValueError, match="^rating: all 3 ratings are 2.5, so there is nothing to learn from them.$"):
        RatingScale.of([2.5] * 3)


def test_batches_are_padded_as_those_of_pairs():
    class Pairs:
        pad_token_id, pad_to_multiple_of = 9, 4

        def __call__(self, rows):
            return "pairs"

    collate = CollateTexts(Pairs(), RatingScale(2.0, 4.0))
    batch = collate([{"ranking_ids": [[1, 2, 3, 4, 5], [1]]}, {"ranking_ids": [[2], [3], [4]]}])
    assert batch["input_ids"][:2].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [1] + [9] * 7]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 1, 1, 1, 1] and batch["sizes"].tolist() == [2, 3]
    batch = collate([{"text_ids": [1], "rating": 2}, {"text_ids": [2], "rating": 8.0}])
    assert batch["ratings"].tolist() == [0, 1.5]
    assert collate([{"chosen_ids": [1], "rejected_ids": [2]}]) == "pairs"


# ------------------------------------------------------------------------------------------------ held-out rows
A, B, C = (1,), (2, 2), (3, 3, 3)


def test_comparisons_by_hand():
    pairs = Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [2, 2], "agreement": 0.75}])
    assert comparisons(pairs) == ([A], [B], [0.75], None)
    rankings = Dataset.from_list([{"ranking": ["a"], "ranking_ids": [list(C), list(A), list(B)]}])
    assert comparisons(rankings) == ([C, C, A], [A, B, B], None, None)
    rated = [{"rating": rating, "text_ids": list(ids)} for rating, ids in ((1.0, A), (3.0, B), (1.0, C))]
    assert comparisons(Dataset.from_list(rated)) == ([B, B], [A, C], None, [2.0, 2.0])
    for rows, expected in ((pairs, [2]), (rankings, [3]), (Dataset.from_list(rated), [1, 2, 3])):
        assert longest(rows) == expected


def test_of_many_ratings_some_pairs_are_compared(monkeypatch):
    monkeypatch.setattr(listwise, "PAIRS", 50)
    rows = Dataset.from_list([{"rating": float(number), "text_ids": [number]} for number in range(40)])
    found = comparisons(rows)
    assert found == comparisons(rows) and 30 < len(found.chosen) <= 50
    assert all(better > worse for (better,), (worse,) in zip(found.chosen, found.rejected, strict=True))
    assert len(set(zip(found.chosen, found.rejected, strict=True))) == len(found.chosen)
