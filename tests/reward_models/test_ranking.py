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


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------ what is learned
LABELLED = [
    {"prompt": "It was", "chosen": " fine", "rejected": " bad", "agreement": 0.75, "margin": 2.0},
    {"prompt": "It was", "chosen": " fine", "rejected": " so so", "agreement": 0.5, "margin": 0.5},
    {"prompt": "It was", "chosen": " so so", "rejected": " bad", "agreement": 1.0, "margin": 1.0},
]


def labelled_trainer(tiny, folder, kind=RankingTrainer, options=None, **learned):
    torch.manual_seed(0)
    base, tokenizer = load_pretrained(ModelConfig(tiny), head=True)
    args = RewardConfig(
        str(folder), per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none", **(options or {})
    )
    return kind(
        model=base, args=args, train_dataset=Dataset.from_list(LABELLED), processing_class=tokenizer, **learned
    )


def pairs_and_scores(trainer, batch):
    """The batch's rows by their texts, and the score of each text alone."""
    decode = trainer.processing_class.decode
    scores, texts = [], []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            real = ids[mask.bool()].unsqueeze(0)
            scores.append(trainer.model(input_ids=real, attention_mask=torch.ones_like(real)).logits.item())
            texts.append(decode(real[0], skip_special_tokens=True))
    half = len(texts) // 2
    by_text = {(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]): row for row in LABELLED}
    rows = [by_text[pair] for pair in zip(texts[:half], texts[half:], strict=True)]
    return rows, torch.tensor(scores[:half]), torch.tensor(scores[half:])


@pytest.mark.parametrize("centering", [None, 0.5])
@pytest.mark.parametrize(
    ("learned", "label"),
    [
        ({"use_agreement": True, "use_margin": False}, lambda row: row["agreement"]),
        ({"label_smoothing": 0.1, "use_margin": False}, lambda row: 0.9),
        ({"label_smoothing": 0.1}, lambda row: 0.9),
        ({"label_smoothing": 0.1, "use_agreement": True, "use_margin": False},
         lambda row: 0.9 * row["agreement"] + 0.1 * (1 - row["agreement"])),
        ({"use_margin": False}, lambda row: 1.0),
    ],
)  # fmt: skip
def test_the_loss_of_a_batch_by_hand(learned, label, centering, tiny, tmp_path):
    """From the batches that training reads, in the trainer's own order."""
    trainer = labelled_trainer(tiny, tmp_path, options={"center_rewards_coefficient": centering}, **learned)
    trainer.model.eval()
    sizes = []
    for batch in trainer.get_train_dataloader():
        rows, chosen, rejected = pairs_and_scores(trainer, batch)
        p = torch.tensor([label(row) for row in rows])
        margin = torch.tensor([row["margin"] if learned.get("use_margin", True) else 0.0 for row in rows])
        won = torch.sigmoid(chosen - rejected - margin)
        expected = -(p * won.log() + (1 - p) * (1 - won).log()).mean()
        expected += (centering or 0) * (chosen + rejected).square().mean()
        with torch.no_grad():
            found, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4) and len(outputs.logits) == 2 * len(rows)
        sizes.append(len(rows))
    assert sorted(sizes) == [1, 2]


def test_by_default_the_loss_is_that_of_trl(tiny, tmp_path):
    """To the bit, with its margins and its figures."""
    found = []
    for kind in (RankingTrainer, RewardTrainer):
        trainer = labelled_trainer(tiny, tmp_path, kind)
        trainer.model.eval()
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert "agreement" not in batch and "margin" in batch
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, batch).item()
        found.append((loss, dict(trainer._metrics["eval"])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)  # each text is scored once, in a batch of another size
    assert found[0][1].keys() == found[1][1].keys()


@pytest.mark.slow
def test_a_column_that_is_not_learned_changes_no_evaluation(tiny, tmp_path):
    def loss(rows, **learned):
        trainer = labelled_trainer(tiny, tmp_path, **learned)
        return trainer.evaluate(Dataset.from_list(rows))["eval_loss"]

    without = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in LABELLED]
    assert loss(LABELLED, use_margin=False) == loss(without, use_margin=False) != loss(LABELLED)
    ties = [row | {"agreement": 0.5} for row in without]
    learned = {"use_margin": False, "use_agreement": True}
    assert loss(LABELLED, **learned) != loss(ties, **learned) != loss(without, use_margin=False)


@pytest.mark.slow
def test_scores_are_as_far_apart_as_raters_are(tiny, tmp_path):
    """All of two texts that three of four raters tell apart so: sigmoid of the gap comes to 3/4."""
    base, tokenizer = load_pretrained(ModelConfig(tiny), head=True)
    args = RewardConfig(
        str(tmp_path), max_steps=60, learning_rate=3e-2, lr_scheduler_type="linear", per_device_train_batch_size=4,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = RankingTrainer(
        model=base, args=args, train_dataset=Dataset.from_list(LABELLED[:1] * 4), processing_class=tokenizer,
        use_margin=False, use_agreement=True,
        peft_config=lora_config(ModelConfig(tiny, lora_r=4), task_type="SEQ_CLS", base=base),
    )  # fmt: skip
    trainer.train()
    _, chosen, rejected = pairs_and_scores(trainer, trainer.data_collator(list(trainer.train_dataset)[:1]))
    assert torch.sigmoid(chosen - rejected).item() == pytest.approx(0.75, abs=0.02)
