"""`data.tokens` and prompts as tokens: special tokens stand once, templates' refusals name the row, and rows are counted."""

from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data.prompts import check_prompt_lengths, tokenize_prompts
from data.tokens import Counts, Lengths, added_tokens, prepare_tokens


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, the film"}
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHAT


@pytest.fixture
def tokenizer(request):
    """The embedded one, with the special tokens that a test's marker wants around a text."""
    found = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "data" / "backbone")
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    found.chat_template = CHAT
    return found


def writes(tokenizer, template: str):
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "The film", "The film"),
        ("$A </s>", "The film", "The film"),
        ("<s> $A", "The film", "<s>The film"),
        ("<s> $A", "<s>The film", "<s>The film"),
        ("<s> $A </s>", "<s>The film", "<s>The film"),
        ("<s> $A </s>", "The film", "<s>The film"),
    ],
)
def test_a_prompt_begins_once_and_does_not_end(template, text, expected, tokenizer):
    plain = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert tokenize_prompts([text], writes(tokenizer, template)) == [plain]


def test_begin_and_end_of_one_kind(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token
    assert added_tokens(writes(tokenizer, "</s> $A </s>")) == ([tokenizer.eos_token_id],) * 2
    assert tokenize_prompts(["</s>A"], tokenizer) == [tokenizer("</s>A", add_special_tokens=False)["input_ids"]]


def test_the_assistants_turn_is_continued_and_others_are_answered(tokenizer):
    ids = tokenize_prompts([[USER], [USER, ANSWER], [USER, ANSWER, USER]], tokenizer)
    assert tokenizer.batch_decode(ids) == [
        "user: Hi</s>assistant: ",
        "user: Hi</s>assistant: Sure, the film",
        "user: Hi</s>assistant: Sure, the film</s>user: Hi</s>assistant: ",
    ]


PROMPTS = {
    "ends a text": (
        ["A film", "A film</s>"],
        CHAT,
        r"row 2 .*'prompt' must not end with '</s>'.*Remove it from the prompt",
    ),
    "a template without an opening": ([[USER], [USER]], CHAT.split("{% if")[0], r"row 1 .*Correct the chat template"),
    "a system turn": (
        [[USER], [{"role": "system", "content": "S"}, USER]],
        NO_SYSTEM,
        r"row 2 .*refused by the chat template \(no system turn here\).*the beginning of the first user turn",
    ),
    "a template's own mistake": (
        [[USER], [USER]],
        "{{ messages.x.y }}",
        r"row 1 .*refused by the chat template .*no attribute 'x'",
    ),
}


@pytest.mark.parametrize(("prompts", "template", "message"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_that_cannot_be_completed(prompts, template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"^p {message}"):
        check_prompt_lengths(Dataset.from_dict({"prompt": prompts}), tokenizer, 99, 9, "p")


def test_prompts_are_counted_and_left_out_when_asked(tokenizer, caplog):
    tokenizer.chat_template = NO_SYSTEM
    rows = Dataset.from_dict({"prompt": PROMPTS["a system turn"][0] + [[USER | {"content": "a b " * 99}], [USER]]})
    kept, counts = check_prompt_lengths(rows, tokenizer, 99, 9, "p", drop=True)
    assert kept["prompt"][:] == [[USER], [USER]]
    assert counts == Counts(4, 2, 0, 2, len(tokenize_prompts([[USER]], tokenizer)[0]))
    assert "2 of 4 rows are left out" in caplog.text and "(first: row 2)" in caplog.text


SYSTEM = [{"role": "system", "content": "S"}, USER]
ROWS = {
    "messages": [{"messages": [USER, ANSWER]}, {"messages": [*SYSTEM, ANSWER]}],
    "completion": [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": SYSTEM, "completion": [ANSWER]}],
    "pairs": [
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "No"}]},
        {"chosen": [*SYSTEM, ANSWER], "rejected": [*SYSTEM, ANSWER | {"content": "No"}]},
    ],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_template_that_refuses_a_row(rows, tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    rows = Dataset.from_list(rows)
    with pytest.raises(
        ValueError, match=r"^p row 2 \(counting from 1\): .* is refused by the chat template \(no system"
    ):
        prepare_tokens(rows, tokenizer, "p")
    kept, lengths = prepare_tokens(rows, tokenizer, "p", drop=True)
    whole = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=True)["input_ids"]
    assert len(kept) == 1 and lengths.rows == [len(whole)]


def test_a_template_that_begins_twice(tokenizer):
    tokenizer.chat_template = "<s>{{ bos_token }}" + CHAT
    with pytest.raises(ValueError, match=r"^p row 1 .*'messages' must not begin with '<s>' twice"):
        prepare_tokens(Dataset.from_list(ROWS["messages"]), tokenizer, "p")


@pytest.mark.parametrize(
    "row",
    [{"text": "<s>A film"}, {"prompt": "<s>A", "completion": " film"}, {"chosen": "<s>A b", "rejected": "<s>A c"}],
)
def test_a_text_begins_once(row, tokenizer, caplog):
    rows, lengths = prepare_tokens(Dataset.from_list([row]), writes(tokenizer, "<s> $A"), "p")
    assert rows[0] == {name: text.removeprefix("<s>") for name, text in row.items()}
    ids = tokenizer("".join(list(rows[0].values())[: 1 if "chosen" in row else 2]) + "</s>")["input_ids"]
    assert lengths.rows == [len(ids)] and ids[:2].count(tokenizer.bos_token_id) == 1
    assert "1 of 1 texts begin with '<s>' (first: p row 1" in caplog.text


def test_a_tokenizer_that_ends_texts_is_refused_where_they_are_trained_on(tokenizer):
    with pytest.raises(ValueError, match=r"^p: the tokenizer ends every text with '</s>'.*add_eos_token=False"):
        prepare_tokens(Dataset.from_list([{"text": "a"}]), writes(tokenizer, "$A </s>"), "p")
    prepare_tokens(Dataset.from_list(ROWS["messages"]), tokenizer, "p")  # templates write no special tokens


def test_a_prompt_whose_tokens_do_not_begin_the_row_is_said(tokenizer, caplog):
    rows = Dataset.from_list(
        [{"prompt": "The film", "completion": " is"}, {"prompt": "The fi", "completion": "lm is"}]
    )
    prepare_tokens(rows, tokenizer, "p")
    assert (
        "in 1 of 2 rows the tokens of the whole row do not begin with those of the prompt" in caplog.text
        and "first: p row 2" in caplog.text
    )


def test_counts_by_hand():
    lengths = Lengths(rows=[4, 5, 6, 9], prompts=[4, 1, 2, 5])
    assert lengths.counts(5) == Counts(4, 2, 2, 0, 9)
    assert lengths.counts(5, drops=True) == Counts(4, 2, 0, 2, 9)
    assert lengths.counts(5, needs_rest=True) == Counts(4, 2, 1, 1, 9)
    assert str(lengths.counts(5, needs_rest=True)) == "2 of 4 rows kept, 1 cut, 1 dropped; the longest has 9 tokens"
    lengths.counts(5).check("p", 5, 0.5)
    with pytest.raises(
        ValueError, match=r"^p: max_length=5 leaves 2 of 4 rows kept, 2 cut; .* Only 50% are whole, but min_kept=0\.6"
    ):
        lengths.counts(5).check("p", 5, 0.6)
    with pytest.raises(ValueError, match=r"^p: every pair is longer than max_length=3"):
        lengths.counts(3, drops=True).check("p", 3, 0.0, "pair")
