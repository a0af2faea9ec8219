import pytest
import torch
from datasets import Dataset
from trl import ModelConfig, RewardConfig, RewardTrainer
from trl.data_utils import _tokenize

from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import lora_config
from reward_models.ranking import GroupSampler, RankingTrainer, groups_of, score_each_text_once


# A ranking of three texts, one of two, two pairs that share nothing, and a ranking of four.
TEXTS = [[10 + number] * (2 + number) for number in range(10)]
PAIRS = [(0, 1), (0, 2), (1, 2), (3, 4), (5, 6), (7, 8), (7, 9), (8, 9), (6, 9)]
PAIRS = [(TEXTS[chosen], TEXTS[rejected]) for chosen, rejected in PAIRS]


def dataset(pairs=PAIRS) -> Dataset:
    return Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs])


def test_groups_are_rows_in_a_row_that_share_a_text():
    assert groups_of(dataset(), most=16) == [[0, 1, 2], [3], [4], [5, 6, 7, 8]]
    assert groups_of(dataset(), most=2) == [[0, 1], [2], [3], [4], [5, 6], [7, 8]]


def test_the_sampler_keeps_groups_together_in_an_order_of_its_epoch():
    groups = groups_of(dataset(), most=16)
    sampler = GroupSampler(groups, None, size=4, seed=0)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(PAIRS))) and len(sampler) == len(PAIRS)
        for group in groups:
            start = orders[-1].index(group[0])
            assert orders[-1][start : start + len(group)] == group
    assert len({tuple(order) for order in orders}) > 1
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]
    assert list(GroupSampler(groups, None, size=4, seed=7)) != orders[0]


def test_groups_of_like_length_are_neighbours():
    groups = [[number] for number in range(400)]
    lengths = [number * 7 % 100 for number in range(400)]

    def spread(order: list[int]) -> float:
        batches = [[lengths[row] for row in order[start : start + 10]] for start in range(0, 400, 10)]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    assert spread(list(GroupSampler(groups, lengths, size=10, seed=0))) < 20
    assert spread(list(GroupSampler(groups, None, size=10, seed=0))) > 60


@pytest.fixture
def classifier(tiny):
    torch.manual_seed(0)
    return load_pretrained(ModelConfig(tiny), head=True)[0].eval().requires_grad_(True)


def batch(model, pairs=PAIRS):
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    width = max(map(len, rows))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def test_each_text_is_scored_once_with_the_same_scores_and_gradients(classifier):
    inputs, seen = batch(classifier), []
    weights = torch.randn(2 * len(PAIRS), generator=torch.Generator().manual_seed(1))

    def scores_and_gradient():
        classifier.zero_grad()
        scores = classifier(**inputs).logits.squeeze(-1)
        (scores * weights).sum().backward()
        return scores.detach(), classifier.score.weight.grad.clone(), classifier.transformer.wte.weight.grad.clone()

    plain = scores_and_gradient()
    classifier.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    score_each_text_once(classifier)
    torch.testing.assert_close(scores_and_gradient(), plain, atol=1e-5, rtol=1e-5)
    assert seen == [10]  # of 18 rows


def test_rows_that_differ_in_their_mask_alone_are_different_texts(classifier):
    ids = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    plain = classifier(input_ids=ids, attention_mask=mask).logits
    score_each_text_once(classifier)
    found = classifier(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert found[0] == found[2] != found[1]


def test_training_equals_that_of_trl_on_the_same_batches(tiny, tmp_path):
    """One batch of all pairs an epoch: neither the order of its rows nor scoring texts once changes the steps."""

    def train(trainer_class, folder):
        torch.manual_seed(0)
        model = ModelConfig(tiny, lora_r=4, lora_target_modules=["c_attn"])
        base, tokenizer = load_pretrained(model, head=True)
        args = RewardConfig(
            str(folder), per_device_train_batch_size=len(PAIRS), max_steps=3, learning_rate=1e-2, max_length=32,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        trainer = trainer_class(
            model=base, args=args, train_dataset=dataset(), processing_class=tokenizer,
            peft_config=lora_config(model, task_type="SEQ_CLS", base=base),
        )  # fmt: skip
        trainer.train()
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    ours, theirs = train(RankingTrainer, tmp_path / "ours"), train(RewardTrainer, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prompts", [True, False])
def test_each_text_is_tokenized_once_and_as_trl_does(tiny, tmp_path, prompts, monkeypatch):
    """With an odd number of texts, one of them too long and one that ends as it should already."""
    texts = [" fine", " bad", " so and so", " bad" * 40, " over<|endoftext|>"]
    rows = [{"prompt": "It was", "chosen": texts[a], "rejected": texts[b], "margin": a + b} for a, b in
            [(0, 1), (0, 2), (2, 1), (3, 1), (0, 3), (0, 4), (4, 2)]]  # fmt: skip
    pairs = Dataset.from_list(rows if prompts else [{k: v for k, v in row.items() if k != "prompt"} for row in rows])
    base, tokenizer = load_pretrained(ModelConfig(tiny), head=True)
    args = RewardConfig(str(tmp_path), max_length=32, bf16=False, use_cpu=True, report_to="none")
    tokenized = []

    def tokenize(tokenizer, text, **kwargs):
        tokenized.append(text)
        return _tokenize(tokenizer, text, **kwargs)

    monkeypatch.setattr("trl.trainer.reward_trainer._tokenize", tokenize)
    theirs, ours = (
        kind(model=base, args=args, train_dataset=pairs, processing_class=tokenizer).train_dataset
        for kind in (RewardTrainer, RankingTrainer)
    )
    assert len(tokenized) == 2 * len(pairs) + 6 and len(set(tokenized)) == 5
    columns = ["chosen_ids", "rejected_ids", "margin"]
    assert ours.select_columns(columns).to_list() == theirs.select_columns(columns).to_list()
    assert 0 < len(ours) < len(pairs)


def test_a_conversation_ends_where_a_completion_does(tiny, tmp_path):
    base, tokenizer = load_pretrained(ModelConfig(tiny), head=True)
    end, answer = tokenizer.eos_token, [{"role": "assistant", "content": "Good."}]
    args = RewardConfig(str(tmp_path), max_length=32, bf16=False, use_cpu=True, report_to="none")

    def prepared(after: str) -> list[int]:
        tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] + '" + after + "' }}{% endfor %}"
        rows = [{"prompt": [{"role": "user", "content": "How?"}], "chosen": answer, "rejected": answer * 2}]
        trainer = RankingTrainer(
            model=base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        return trainer.train_dataset[0]["chosen_ids"]

    assert prepared(f"{end}\\n\\n") == tokenizer(f"How?{end}\n\nGood.{end}")["input_ids"]
    assert prepared("\\n") == tokenizer("How?\nGood.\n")["input_ids"]  # no token ends a turn


def test_the_order_of_the_data_has_a_seed_of_its_own(tiny, tmp_path):
    base, tokenizer = load_pretrained(ModelConfig(tiny), head=True)

    def order(**seeds) -> list[int]:
        args = RewardConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **seeds)
        trainer = RankingTrainer(model=base, args=args, train_dataset=dataset(), processing_class=tokenizer)
        return list(trainer._get_train_sampler())

    assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) == order(seed=7) != order(seed=1)
