"""`data.turns` and what reads pairs: the prompt is found, never doubled, and a pair that is none is named."""

import json

import pytest
from datasets import Dataset

from data.files import load_rows
from data.preferences import check_preferences, explicit_prompts
from data.prompts import check_prompts
from data.texts import check_texts
from data.turns import split_pair


def turns(*texts: str) -> list[dict]:
    """Messages of a user and an assistant in turn; `role: text` for another role."""
    roles = ["user", "assistant"] * len(texts)
    return [
        dict(zip(("role", "content"), text.split(": ", 1) if ": " in text else (role, text), strict=True))
        for role, text in zip(roles, texts, strict=False)
    ]


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
SPLITS = {
    "words": ("The film is great fun", "The film is dull", "The film is"),
    "inside a word": ("The film is good", "The film is gone", "The film is"),
    "one side goes on": ("The film", "The film is dull", "The"),
    "inside the first word": ("good", "gone", ""),
    "a dialogue": (HH + " I can.", HH + " I cannot.", HH),
    "a dialogue, the same first words": (HH + " I think so", HH + " I think not", HH),
    "a chat template's": (CHATML + "I can", CHATML + "I cannot", CHATML),
    "messages": (turns("Hi", "yes"), turns("Hi", "no"), turns("Hi")),
    "messages of two rounds": (turns("a", "b", "c", "d"), turns("a", "b", "c", "e"), turns("a", "b", "c")),
    "a system's turn": (
        turns("system: S", "user: a", "assistant: b"),
        turns("system: S", "user: a", "assistant: c"),
        turns("system: S", "user: a"),
    ),
}


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), SPLITS.values(), ids=SPLITS)
def test_where_an_implicit_prompt_ends(chosen, rejected, prompt):
    parts = split_pair("p row 1", {"chosen": chosen, "rejected": rejected})
    assert parts.prompt == prompt
    assert (parts.prompt + parts.chosen, parts.prompt + parts.rejected) == (chosen, rejected)


ANSWERS = "'rejected' must answer the same prompt as 'chosen'"
REFUSED = {
    "two system turns": (
        {
            "chosen": turns("system: a", "user: b", "assistant: c"),
            "rejected": turns("system: x", "user: b", "assistant: d"),
        },
        ANSWERS,
    ),
    "two user turns": ({"chosen": turns("a", "b"), "rejected": turns("x", "y")}, ANSWERS),
    "no prompt": ({"chosen": turns("assistant: a"), "rejected": turns("assistant: b")}, ANSWERS),
    "a later user's turn differs": (
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "x", "y")},
        ANSWERS,
    ),
    "one answer more": (
        {"chosen": turns("a", "b"), "rejected": turns("a", "b", "c", "d")},
        "'chosen' must have an answer",
    ),
    "a user's turn after": (
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x")},
        "'chosen' must hold no user or system turn",
    ),
    "ends in a user's turn": (
        {"chosen": turns("a", "b", "c"), "rejected": turns("a", "x")},
        "must end in an assistant turn",
    ),
    "HH, an empty answer": (
        {"chosen": HH + " ", "rejected": HH + " no"},
        "'chosen' must not be empty after the common prompt",
    ),
    "HH, two prompts": ({"chosen": HH + " a", "rejected": HH.replace("Why", "Who") + " b"}, ANSWERS),
    "HH, a turn more": ({"chosen": HH + " a", "rejected": HH + " b\n\nHuman: c\n\nAssistant: d"}, ANSWERS),
    "HH, a user's turn last": ({"chosen": HH + " a", "rejected": HH + " b\n\nHuman: c"}, ANSWERS),
    "human and gpt": (
        {"chosen": turns("human: a", "gpt: b"), "rejected": turns("human: a", "gpt: c")},
        "must have only the roles system, .*, but is 'human'. Rename the role 'human' to 'user'",
    ),
    "a capital": (
        {"chosen": turns("User: a", "assistant: b"), "rejected": turns("a", "c")},
        "Rename the role 'User' to 'user'",
    ),
    "another prompt, text": (
        {"prompt": "other", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        "'prompt' must be a user turn of .*, but is 'other'. Delete the column 'prompt'",
    ),
    "another prompt, messages": (
        {"prompt": turns("other"), "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        "'prompt' must be the beginning of 'chosen' and 'rejected'.*Delete the column 'prompt'",
    ),
    "a prompt beside dialogues": (
        {"prompt": "Why?", "chosen": HH + " a", "rejected": HH + " b"},
        "Delete the column 'prompt'",
    ),
    "a prefilled prompt": (
        {"prompt": turns("a", "b"), "chosen": turns("assistant: c"), "rejected": turns("assistant: d")},
        "'prompt' must end in a turn that 'chosen' and 'rejected' answer",
    ),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_pair_that_is_none(row, message, caplog):
    texts = isinstance(row["chosen"], str)
    good = (
        {"chosen": HH + " yes", "rejected": HH + " no"}
        if texts
        else {"chosen": turns("a", "b"), "rejected": turns("a", "c")}
    )
    if "prompt" in row:
        good["prompt"] = turns("a") if isinstance(row["prompt"], list) else "a"
        if texts:
            good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = Dataset.from_list([good, row, good])
    with pytest.raises(ValueError, match=rf"^p row 2 \(counting from 1\): .*{message}"):
        check_preferences(rows, "p")
    assert len(check_preferences(rows, "p", drop=True)) == 2
    assert "1 of 3 rows are left out" in caplog.text


EXPLICIT = {"prompt": "The film is so", "chosen": " good", "rejected": " dull"}
CHAT = {"prompt": turns("Hi"), "chosen": turns("assistant: yes"), "rejected": turns("assistant: no")}
DOUBLED = {
    "texts": (EXPLICIT, EXPLICIT | {"chosen": "The film is so good", "rejected": "The film is so dull"}),
    "messages": (CHAT, CHAT | {"chosen": turns("Hi", "yes"), "rejected": turns("Hi", "no")}),
    "UltraFeedback": (CHAT, {"prompt": "Hi ", "chosen": turns("Hi", "yes"), "rejected": turns("Hi", "no")}),
}


@pytest.mark.parametrize(("row", "doubled"), DOUBLED.values(), ids=DOUBLED)
def test_a_prompt_is_not_doubled(row, doubled):
    other = {"margin": 1.0}
    rows = check_preferences(Dataset.from_list([doubled | other] * 3), "p")
    assert list(rows) == [row | other] * 3
    assert list(explicit_prompts(rows, "p")) == [row | other] * 3


def test_some_rows_with_the_prompt_twice_are_named():
    rows = Dataset.from_list([EXPLICIT, DOUBLED["texts"][1]])
    with pytest.raises(
        ValueError,
        match=r"^p row 2 .*'prompt' must not be repeated at the beginning of both sides.*Remove it from both",
    ):
        check_preferences(rows, "p")
    alike = {"prompt": "I", "chosen": "I do", "rejected": "I do not"}  # an answer may begin as its prompt does
    assert len(check_preferences(Dataset.from_list([EXPLICIT, alike]), "p")) == 2


@pytest.mark.parametrize("kind", ["pairs", "UltraFeedback", "dialogues"])
def test_prompts_of_pairs_are_those_that_the_reward_model_learns(kind, tmp_path):
    """By one splitter, with all columns for the reward functions, and with the row of the file."""
    row, good = DOUBLED["UltraFeedback"][1], turns("Hi")
    if kind == "dialogues":
        row, good = {"chosen": HH + " a", "rejected": HH + " b"}, HH
    if kind == "pairs":
        row = {name: row[name] for name in ("chosen", "rejected")}
    bad = row | {"rejected": row["chosen"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one | {"id": number}) + "\n" for number, one in enumerate([bad, row, row])))
    rows = check_prompts(load_rows(str(path), "train"), "p", drop=True)
    assert rows["prompt"][:] == [good, good] and rows["id"][:] == [1, 2]
    assert rows.numbers.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1 .*'rejected' must differ"):
        check_prompts(load_rows(str(path), "train"), "p")


@pytest.mark.parametrize(
    "row", [EXPLICIT | {"prompt": " "}, {"chosen": "good", "rejected": "dull"}], ids=["blank", "none"]
)
def test_a_pair_without_a_prompt_can_be_scored_and_not_completed(row):
    rows = check_preferences(Dataset.from_list([row]), "p")
    with pytest.raises(ValueError, match=r"^p row 1 .*(nothing to complete|Give the pairs a column 'prompt')"):
        explicit_prompts(rows, "p")


PROMPTS = {
    "a system's turn": (turns("system: a"), "'prompt' must end in a turn that can be answered"),
    "a developer's turn": (turns("user: a", "developer: b"), "must end in a turn that can be answered"),
    "an unknown role": (turns("human: a"), "Rename the role 'human' to 'user'"),
    "no role that has a name": (turns("narrator: a"), r"but is 'narrator'\. Rename the role\.$"),
}


@pytest.mark.parametrize(("prompt", "message"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_that_cannot_be_answered(prompt, message):
    with pytest.raises(ValueError, match=rf"^p row 2 \(counting from 1\): .*{message}"):
        check_prompts(Dataset.from_dict({"prompt": [turns("a"), prompt]}), "p")


@pytest.mark.parametrize("prompt", [turns("a"), turns("a", "b"), turns("user: a", "assistant: b", "tool: c")])
def test_a_prompt_that_can(prompt):
    assert len(check_prompts(Dataset.from_dict({"prompt": [prompt]}), "p")) == 1


TEXTS = {
    "a user's turn last": ({"messages": turns("a", "b", "c")}, "'messages' must end in an assistant turn"),
    "a completion of a user": (
        {"prompt": turns("a"), "completion": turns("user: b")},
        "'completion' must end in an assistant turn",
    ),
    "a completion with its prompt": (
        {"prompt": turns("a"), "completion": turns("a", "b")},
        "must not begin with the prompt",
    ),
    "texts with their prompts": (
        {"prompt": "Why is it", "completion": "Why is it so"},
        "must not begin with the prompt",
    ),
    "an unpaired row": ({"prompt": "a", "completion": "b", "label": False}, "'label' must be True"),
    "an unpaired row's number": ({"prompt": "a", "completion": "b", "label": 0}, "'label' must be True"),
    "human and gpt": ({"messages": turns("human: a", "gpt: b")}, "Rename the role 'human' to 'user'"),
}


@pytest.mark.parametrize(("row", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_not_to_be_imitated(row, message):
    with pytest.raises(ValueError, match=rf"^p row 1 \(counting from 1\): .*{message}"):
        check_texts(Dataset.from_list([row]), "p")


def test_labels_of_classes_are_no_verdicts():
    assert len(check_texts(Dataset.from_list([{"text": "a", "label": 0}]), "p")) == 1
    assert len(check_texts(Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]), "p")) == 1


def test_unpaired_rows_are_no_pairs():
    with pytest.raises(ValueError, match=r"^p: no column 'chosen'\. Rows of completion and label are unpaired"):
        check_preferences(Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]), "p")


def test_texts_that_stood_among_numbers_are_texts_once_those_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(EXPLICIT | {"chosen": cell}) + "\n" for cell in ("7", 7, "[8]")))
    with pytest.raises(ValueError, match=r"rows\.jsonl row 2 .*'chosen' must be text.*but is 7"):
        check_preferences(load_rows(str(path), "train"), "p")
    rows = check_preferences(load_rows(str(path), "train"), "p", drop=True)
    assert rows.map(lambda row: row)["chosen"][:] == ["7", "[8]"] and rows.numbers.tolist() == [1, 3]
