"""Facts from the tests of huggingface/trl (README.md names them) as inputs for ours."""

import json

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer
from trl import ModelConfig, RewardConfig

from data.files import load_rows
from data.preferences import check_preferences, explicit_prompts
from data.prompts import check_prompts, tokenize_prompts
from data.texts import check_texts
from data.tokens import Counts, Lengths, prepare_tokens
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.logprobs import token_logprobs
from pipeline.rl.masking import masked_mean, masked_sums, whiten
from reward_models.composite import Composite, RewardError
from reward_models.learned import score_rows
from reward_models.ranking import RankingTrainer
from tests.outside.chain import chain, complete
from tests.outside.pieces import minibatches


# ------------------------------------------------------------------------------------------------ statistics
def test_masked_mean_variance_and_whitening():
    """Theirs is the unbiased variance of 2 and 3, 1/2; ours is the biased 1/4. They whiten to ∓sqrt(1/2), we to ∓1."""
    values, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[False, True, True, False]])
    count, total, squares = masked_sums(values, mask).tolist()
    assert masked_mean(values, mask).item() == total / count == 2.5
    biased = squares / count - (total / count) ** 2
    assert biased == 0.25 and biased * count / (count - 1) == 0.5
    whitened = whiten(values, mask, masked_sums(values, mask))
    torch.testing.assert_close(whitened, torch.tensor([[0.0, -1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_logprobs_in_chunks_of_32_positions(temperature, dtype, close, monkeypatch):
    torch.manual_seed(42)
    hidden, labels = torch.randn(64, 32, dtype=dtype), torch.randint(0, 128, (64,))
    head = torch.nn.Linear(32, 128, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(128, 32))
    monkeypatch.setattr("pipeline.backbone.logprobs.LOGITS", 32 * 128)
    ours, theirs = (hidden.clone().requires_grad_(True) for _ in range(2))
    logprobs, entropy = token_logprobs(head, ours.unsqueeze(0), labels.unsqueeze(0), temperature)
    expected = (head(theirs).float() / temperature).log_softmax(dim=-1)
    torch.testing.assert_close(
        logprobs[0], expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum(dim=-1), atol=1e-5, rtol=1e-5)
    logprobs.sum().backward()
    expected.gather(-1, labels.unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=close, rtol=close)


def test_the_fields_of_a_row_stay_together():
    x = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]])
    y = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    found = minibatches(mask, pieces=3, accumulation=3, logprobs=x, values=y)  # the shortest row comes first
    rows = {tuple(batch.logprobs[0].tolist()): batch.values[0].tolist() for batch in found}
    assert rows == {(10, 11): [1, 1], (20, 21): [2, 2], (30, 31): [3, 3]}
    assert found[0].values[0, 0] == 2 and all(batch.weights is None for batch in found)


# ------------------------------------------------------------------------------------------------ completions
END, PAD = 151645, 151643
COMPLETIONS = [
    [1, 2, 3, 4, 5, 6, 7, 8],  # was cut
    [9, 10, 11, END, PAD, PAD, PAD, PAD],
    [12, 13, 14, 15, 16, 17, 18, END],  # ended at the last place
]


@pytest.mark.parametrize("pad", [PAD, END])
def test_which_completions_ended(pad, monkeypatch):
    backbone = chain(torch.zeros(4, 4), ends=END)
    completions = torch.tensor([[pad if token == PAD else token for token in row] for row in COMPLETIONS])
    monkeypatch.setattr(backbone, "generate", lambda input_ids, **options: torch.cat([input_ids, completions], dim=1))
    monkeypatch.setattr("pipeline.backbone.sampling.SampledLogprobs.read", lambda self, sequences: None)
    batch = complete(backbone, [[1], [2], [3]], 8, end=END, pad=pad)
    assert batch.mask.sum(dim=1).tolist() == [8, 4, 8]
    assert [row[-1] == END for row in batch.rows()] == [False, True, True]
    assert batch.rows()[1] == [9, 10, 11, END]


# ------------------------------------------------------------------------------------------------ rewards
def total(*gave: list, weights: list[float] | None = None) -> list[float]:
    """The weighted sum of what functions gave to two completions, as the trainers are given it."""
    composite = Composite([lambda prompts, values=values, **kwargs: values for values in gave], weights)
    given = {"prompts": ["a", "b"], "completions": ["c", "d"]}
    columns = torch.tensor([function(**given) for function in composite.functions], dtype=torch.float32).T
    return composite.total(columns, *given.values()).tolist()


def test_weights_of_rewards():
    assert total([1.0, 1.0], [0.0, 0.0], weights=[0.7, 0.3]) == pytest.approx([0.7, 0.7], abs=1e-6)


def test_a_function_that_does_not_apply(monkeypatch):
    """None stands for NaN in the trainers' columns. Where no function applies they warn, and we end."""
    columns = torch.tensor([[3.0, float("nan")], [5.0, float("nan")]])
    composite = Composite([len, sum])
    assert composite.total(columns, ["a", "b"], ["c", "d"]).tolist() == [3, 5]
    with pytest.raises(RewardError, match=r"make no finite score .* for prompt 'b', completion 'd'"):
        composite.total(columns.where(torch.tensor([[True], [False]]), float("nan")), ["a", "b"], ["c", "d"])


ROWS = [[1, 2, 3], [6, 7], [4, 5], [8]]


@pytest.mark.parametrize("pad", [0, 999])
def test_rows_are_padded_at_the_right_and_come_back_in_order(pad):
    seen = []

    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.extend(zip(ids.tolist(), mask.tolist(), strict=True))
        return (ids * mask).sum(dim=1)

    assert score_rows(score, ROWS, pad_token_id=pad, batch_size=4, device="cpu") == [6, 13, 9, 8]
    assert sorted(seen) == sorted(
        [
            ([1, 2, 3], [1, 1, 1]),
            ([6, 7, pad], [1, 1, 0]),
            ([4, 5, pad], [1, 1, 0]),
            ([8, pad, pad], [1, 0, 0]),
        ]
    )


PAIRS = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sun is in the sky.", "rejected": "The sun is in the sea."},
]


@pytest.fixture(scope="module")
def classifier(tiny):
    torch.manual_seed(0)
    return load_pretrained(ModelConfig(tiny), head=True)


def reward_trainer(classifier, rows: list[dict], folder, **options) -> RankingTrainer:
    base, tokenizer = classifier
    options = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64, **options}
    return RankingTrainer(
        model=base,
        args=RewardConfig(str(folder), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("margins", [True, False])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_the_loss_with_margins_and_centred_rewards(margins, coefficient, classifier, tmp_path):
    """-log sigmoid(chosen - rejected - margin) + 0.01 (chosen + rejected)^2; a margin is the chosen text's length."""
    rows = [row | ({"margin": len(row["chosen"])} if margins else {}) for row in PAIRS]
    trainer = reward_trainer(classifier, rows, tmp_path, center_rewards_coefficient=coefficient)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(inputs)).item()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        each = zip(ids.split(1), mask.split(1), strict=True)
        scores = [trainer.model(input_ids=ids, attention_mask=mask).logits.item() for ids, mask in each]
    chosen, rejected = torch.tensor(scores).view(2, 2)
    lengths = torch.tensor([16.0, 22.0]) if margins else 0.0
    expected = (
        -logsigmoid(chosen - rejected - lengths).mean() + (coefficient or 0) * (chosen + rejected).square().mean()
    )
    assert found == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ formats
SKY, BLUE, GREEN = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
FRIENDLY = {"role": "system", "content": "Respond in a friendly manner."}
THINKS = {"thinking": "The user asks the color of the sky..."}
CALL = {"type": "function", "function": {"name": "get_color", "arguments": {"what": "sky"}}}
TOOL = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "get_color", "content": "blue"}, BLUE]


def written(row: dict, folder):
    """The row as it is read from a file."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return load_rows(str(path), "train")


TAKEN = {
    "language modeling": (check_texts, {"text": "The sky is blue."}),
    "language modeling, turns": (check_texts, {"messages": [SKY, BLUE]}),
    "language modeling, thoughts": (check_texts, {"messages": [FRIENDLY, SKY, BLUE | THINKS]}),
    "prompt and completion": (check_texts, {"prompt": "The sky is", "completion": " blue."}),
    "prompt and completion, turns": (check_texts, {"prompt": [SKY], "completion": [BLUE]}),
    "prompt and completion, thoughts": (check_texts, {"prompt": [FRIENDLY, SKY], "completion": [BLUE | THINKS]}),
    "prompt": (check_prompts, {"prompt": "The sky is"}),
    "prompt, turns": (check_prompts, {"prompt": [SKY]}),
    "prompt, a system's turn": (check_prompts, {"prompt": [FRIENDLY, SKY]}),
    "pair": (check_preferences, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
    "pair, turns": (check_preferences, {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}),
    "pair, thoughts": (
        check_preferences,
        {"prompt": [FRIENDLY, SKY], "chosen": [BLUE | THINKS], "rejected": [GREEN | THINKS]},
    ),
    "pair, implicit prompt": (check_preferences, {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}),
    "pair, implicit prompt, text": (
        check_preferences,
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    ),
}


@pytest.mark.parametrize(("check", "row"), TAKEN.values(), ids=TAKEN)
def test_a_format_that_is_taken(check, row, tmp_path):
    """Each as it is: keys of a message beside role and content stay, for the chat template."""
    assert list(check(written(row, tmp_path), "p")) == [row]


REFUSED = {
    "tool calls in a pair": (
        check_preferences,
        {"prompt": [SKY], "chosen": TOOL, "rejected": [GREEN]},
        "'chosen' must be text, or a list of messages that each have a text 'role' and a text 'content'",
    ),
    "tool calls": (
        check_texts,
        {"messages": [SKY, *TOOL]},
        "'messages' must be text, or a list of messages that each",
    ),
    "from and value": (
        check_prompts,
        {"prompt": [{"from": "user", "value": "What color is the sky?"}]},
        "'prompt' must be text, or a list of messages that each have a text 'role' and a text 'content'",
    ),
    "conversations": (
        check_texts,
        {
            "conversations": [
                {"from": "user", "value": "What color is the sky?"},
                {"from": "assistant", "value": "It is blue."},
            ]
        },
        r"the columns \['conversations'\] fit no format. Give exactly one of: text; messages",
    ),
}


@pytest.mark.parametrize(("check", "row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_format_that_is_refused(check, row, message, tmp_path):
    """Theirs take these, or turn them into others."""
    with pytest.raises(ValueError, match=message):
        check(written(row, tmp_path), "p")


UNPAIRED = Dataset.from_dict(
    {
        "prompt": ["The sky is", "The sun is", "The sky is", "The sun is"],
        "completion": [" blue.", " in the sky.", " green.", " in the sea."],
        "label": [True, True, False, False],
    }
)


def test_unpaired_rows_are_neither_pairs_nor_all_to_be_imitated():
    with pytest.raises(ValueError, match=r"^p: no column 'chosen'\. Rows of completion and label are unpaired"):
        check_preferences(UNPAIRED, "p")
    with pytest.raises(ValueError, match="^p row 3 .*'label' must be True"):
        check_texts(UNPAIRED, "p")
    kept = check_texts(UNPAIRED, "p", drop=True)
    assert kept["completion"][:] == [" blue.", " in the sky."]


EXTRACTED = {
    "turns": (
        {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
        {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]},
    ),
    "text": (PAIRS[0], {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
}


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(("implicit", "expected"), EXTRACTED.values(), ids=EXTRACTED)
def test_a_prompt_is_extracted_once(implicit, expected, explicit):
    rows = Dataset.from_list([expected if explicit else implicit])
    assert list(explicit_prompts(check_preferences(rows, "p"), "p")) == [expected]


# ------------------------------------------------------------------------------------------------ tokens
def test_rows_longer_than_two_tokens():
    """Rows of 3, 4 and 1 tokens: theirs cut two to [1, 2] and [4, 5]; a pair's would be left out."""
    lengths = Lengths(rows=[3, 4, 1], prompts=[0, 0, 0])
    assert lengths.counts(2) == Counts(rows=3, kept=1, cut=2, dropped=0, longest=4)
    assert lengths.counts(2, drops=True) == Counts(rows=3, kept=1, cut=0, dropped=2, longest=4)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_conversations_prompt_is_what_stands_before_the_answer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHATML
    (prompt,) = tokenize_prompts([[SKY]], tokenizer)
    whole = tokenizer.apply_chat_template([SKY, BLUE], tokenize=True, return_dict=True)["input_ids"]
    answer = tokenizer("It is blue." + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt and whole[len(prompt) :][: len(answer)] == answer
    text = tokenizer.decode(prompt)
    assert "It is blue." not in text and text.endswith("<|im_start|>assistant\n")
    assert not tokenizer.decode(whole).strip().endswith("<|im_start|>assistant")


THINKING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
)


def test_what_opens_an_answer_is_not_lost_from_a_pair(classifier, tmp_path, caplog):
    """The template opens answers with a tag, which the chosen one repeats and the rejected one lacks.

    The reward model reads both as the template writes them. A line says whose tokens do not begin as the prompt's."""
    base, tokenizer = classifier
    row = {
        "prompt": [{"role": "user", "content": "What is 2+2?"}],
        "chosen": [{"role": "assistant", "content": "<think>2+2=4</think>It is 4."}],
        "rejected": [{"role": "assistant", "content": "It is 4."}],
    }
    template, tokenizer.chat_template = tokenizer.chat_template, THINKING
    try:
        _, lengths = prepare_tokens(Dataset.from_list([row]), tokenizer, "p")
        (ids,) = reward_trainer(classifier, [row], tmp_path).train_dataset.select_columns(
            ["chosen_ids", "rejected_ids"]
        )
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(ids["chosen_ids"]) == "user: What is 2+2?\nassistant: <think>2+2=4</think>It is 4.\n"
    assert tokenizer.decode(ids["rejected_ids"]) == "user: What is 2+2?\nassistant: It is 4.\n"
    assert lengths.rows == [max(map(len, ids.values()))]
    assert "in 1 of 1 rows the tokens of the whole row do not begin with those of the prompt" in caplog.text
