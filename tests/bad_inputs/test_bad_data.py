"""Rows that cannot be used: said with file, row and column, before the model is loaded wherever it is not asked."""

import json

import pytest

from data.files import load_rows


PAIR = {"prompt": "A", "chosen": " fine film.", "rejected": " poor film."}
TURNS = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "Fine."}]
OTHER = [TURNS[0], {"role": "assistant", "content": "Poor."}]
FILES = {
    "no rows": ("reward", "rows.jsonl", "", "the data has no rows"),
    "an array in a .jsonl": ("reward", "rows.jsonl", json.dumps([PAIR]), r"line 1: not a JSON object \(\["),
    "an array over lines in a .jsonl": (
        "reward",
        "rows.jsonl",
        json.dumps([PAIR], indent=1),
        "line 1: not valid JSON",
    ),
    "a line cut short": ("reward", "rows.jsonl", json.dumps(PAIR) + '\n{"prompt": "A"', "line 2: not valid JSON"),
    "UTF-16": ("reward", "rows.jsonl", json.dumps(PAIR).encode("utf-16"), "line 1: not UTF-8 text"),
    "UTF-16 as Excel saves": (
        "reward",
        "rows.csv",
        "chosen,rejected\na,b\n".encode("utf-16"),
        "line 1: not UTF-8.*UTF-16, save",
    ),
    "Latin-1": ("reward", "rows.csv", "chosen,rejected\ncaf\xe9,b\n".encode("latin-1"), "line 2: not UTF-8 text"),
    "semicolons": (
        "reward",
        "rows.csv",
        "chosen;rejected\na;b\n",
        "no column 'chosen'.* Separate the cells by commas",
    ),
    "tabs": ("reward", "rows.csv", "chosen\trejected\na\tb\n", "no column 'chosen'.* Separate the cells by commas"),
    "a comma too many": ("reward", "rows.csv", "chosen,rejected\nGood, really,b\n", "more cells than the header"),
    "rows under a key": (
        "reward",
        "rows.json",
        json.dumps({"data": [PAIR]}),
        r"no column 'chosen'.*found: \['data'\]",
    ),
    "a pickle": ("sft", "rows.pkl", b"\x80\x04.", r"must end in one of \.jsonl.*not '\.pkl'\. Convert the file"),
    "a text file": ("sft", "rows.txt", "A fine film.", r"not '\.txt'"),
    "an archive": ("sft", "rows.jsonl.gz", b"\x1f\x8b", "the archive is damaged"),
    "a text file in an archive": ("sft", "rows.txt.gz", b"\x1f\x8b", r"not '\.gz'"),
}
ROWS = {
    "prompts called query": ("ppo", [{"query": "A"}], "no column 'prompt'.*found: \\['query'\\]"),
    "a misspelt column": ("ppo", [{"promt": "A"}], "Did you mean 'promt'"),
    "an empty prompt": ("ppo", [{"prompt": "A"}, {"prompt": " "}], r"row 2 .*'prompt' must not be empty, but is ' '"),
    "token ids for a prompt": ("ppo", [{"prompt": [1, 2]}], r"row 1 .*'prompt' must be text.*but is \[1, 2\]"),
    "an empty text": ("sft", [{"text": "a"}, {"text": ""}], r"row 2 .*'text' must not be empty"),
    "text and messages": ("sft", [{"text": "a", "messages": TURNS}], "fit several formats"),
    "text called content": ("sft", [{"content": "a"}], r"\['content'\] fit no format"),
    "messages of another format": (
        "sft",
        [{"messages": [{"from": "human", "value": "a"}]}],
        "row 1 .*'messages' must be text, or a list of messages that each have a text 'role'",
    ),
    "messages written as text": ("sft", [{"messages": json.dumps(TURNS)}], "'messages' must be a conversation"),
    "an empty completion": ("sft", [{"prompt": "A", "completion": ""}], "'completion' must not be empty"),
    "no rejected": ("reward", [{"prompt": "A", "chosen": "b"}], "no column 'rejected'"),
    "labels instead of pairs": ("reward", [{"prompt": "A", "completion": "b", "label": True}], "no column 'chosen'"),
    "numbers for texts": ("reward", [{**PAIR, "chosen": 1, "rejected": 2}], "'chosen' must be text.*but is 1"),
    "nothing chosen": ("reward", [PAIR, {**PAIR, "chosen": None}], "row 2 .*'chosen' must be text.*but is None"),
    "the same twice": ("reward", [{**PAIR, "rejected": PAIR["chosen"]}], "'rejected' must differ from 'chosen'"),
    "a margin as text": ("reward", [{**PAIR, "margin": "1.5"}], "'margin' must be a finite number, but is '1.5'"),
    "an agreement in percent": ("reward", [{**PAIR, "agreement": 95.0}], "'agreement' must be a share from 0 to 1"),
    "an empty answer for DPO": ("dpo", [{**PAIR, "rejected": " "}], "'rejected' must not be empty"),
    "tools": (
        "sft",
        [{"messages": TURNS, "tools": []}, {"messages": TURNS, "tools": [{"name": "look"}]}],
        r"row 2 .*'tools' must be empty \(the stages write conversations without it\)",
    ),
    "tools as text for DPO": ("dpo", [{**PAIR, "tools": '[{"name": "look"}]'}], "'tools' must be empty"),
    "tools to prompts": ("ppo", [{"prompt": "A", "tools": [{"name": "look"}]}], "'tools' must be empty"),
    "options of the template": (
        "reward",
        [{**PAIR, "chat_template_kwargs": {"enable_thinking": True}}],
        "'chat_template_kwargs' must be empty",
    ),
    "a text and a conversation": ("dpo", [{"chosen": TURNS, "rejected": "b"}], "'rejected' must be a conversation"),
    "a completion that is not to be imitated": (
        "sft",
        [{"prompt": "A", "completion": " b", "label": "FALSE"}],
        "'label' must be True",
    ),
    "a call of a tool for an answer": (
        "sft",
        [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]}],
        "row 1 .*'messages' must be text, or a list of messages that each have a text 'role' and a text 'content'",
    ),
    "content in parts": (
        "sft",
        [{"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}],
        "row 1 .*a text 'content'",
    ),
    "a conversation of instructions alone": (
        "ppo",
        [{"prompt": [{"role": "system", "content": "Be kind."}]}],
        "must end in a turn that can be answered",
    ),
    "white space chosen": ("reward", [{**PAIR, "chosen": " \n\u00a0"}], "'chosen' must not be empty"),
    "no prompts to measure scores on": (
        "reward",
        [PAIR, {**PAIR, "prompt": ""}],
        r"row 2 .*'prompt' must not be empty \(there is nothing to complete\)",
    ),
    "no prompt in common": (
        "reward",
        [{"chosen": "Fine film.", "rejected": "Poor film."}],
        "row 1 .*'rejected' must begin with the same words as 'chosen'.*Give the pairs a column 'prompt'",
    ),
    "no prompt for DPO": (
        "dpo",
        [{**PAIR, "prompt": " "}],
        r"'prompt' must not be empty \(there is nothing to complete\)",
    ),
    "no prompt to judge": ("evaluation", [{"text": "A"}], "no column 'prompt'"),
    "no prompt to choose for": ("best_of_n", [{"prompt": ""}], "'prompt' must not be empty"),
}
# What only the tokenizer or the model can tell.
TO_THE_MODEL = {
    "a prompt beyond the context": ("ppo", [{"prompt": "A"}, {"prompt": "word " * 150}], "row 2 .*context of 128"),
    "a group's prompt too": (
        "grpo",
        [{"prompt": "word " * 150}],
        "row 1 .*context of 128.*lower max_completion_length",
    ),
    "a long prompt in a shuffled selection": (
        "reward",
        [*[PAIR] * 5, {**PAIR, "prompt": "A" + " film" * 70}, *[PAIR] * 6],
        r"rows\.jsonl row 6 \(counting from 1\): 'prompt' .*context of 128",
    ),
    "a prompt that ends a text, for SFT": (
        "sft",
        [{"prompt": "A", "completion": " b"}, {"prompt": "A<|endoftext|>", "completion": " b"}],
        r"row 2 .*'prompt' must not end with '<\|endoftext\|>', which ends texts, .*Remove it from the prompt",
    ),
    "a prompt that ends a text, for the reward model": (
        "reward",
        [{**PAIR, "prompt": "A<|endoftext|>"}],
        "'prompt' must not end with",
    ),
    "chats without a template": ("sft", [{"messages": TURNS}], "'messages' is a conversation .* no chat template"),
    "pairs of chats": ("reward", [{"chosen": TURNS, "rejected": OTHER}], "'chosen' is a conversation .* no chat"),
    "chats for DPO": ("dpo", [{"chosen": TURNS, "rejected": OTHER}], "'chosen' is a conversation .* no chat template"),
    "chats to continue": ("ppo", [{"prompt": TURNS[:1]}], "'prompt' is a conversation .* no chat template"),
    "pairs that are all too long": (
        "reward",
        [{**PAIR, "chosen": " fine" * 200}],
        "rows.jsonl: every pair is longer than max_length=128 tokens",
    ),
    "pairs that are mostly too long": (
        "reward",
        [PAIR, {**PAIR, "chosen": " fine" * 200}, {**PAIR, "rejected": " poor" * 300}],
        r"max_length=128 leaves 1 of 3 rows kept, 2 dropped; .* \d+ tokens\. Only 33% are whole, but min_kept=0\.5\. ",
    ),
    "pairs for DPO that are mostly cut": (
        "dpo",
        [PAIR, {**PAIR, "chosen": " fine" * 200}, {**PAIR, "prompt": "A" * 999}],
        "max_length=128 leaves 1 of 3 rows kept, 1 cut, 1 dropped",
    ),
    "texts that are mostly cut": (
        "sft",
        [{"prompt": "A", "completion": " fine" * 200}, {"prompt": "fine " * 200, "completion": " A"}],
        r"max_length=128 leaves 0 of 2 rows kept, 1 cut, 1 dropped; the longest has .* tokens\. Only 0% are whole",
    ),
}


@pytest.mark.parametrize(("stage", "name", "content", "message"), FILES.values(), ids=FILES)
def test_files(stage, name, content, message, refuses, world):
    refuses(stage, rf"{name}.*{message}", dataset_name=world.write(name, content))


@pytest.mark.parametrize(("stage", "rows", "message"), ROWS.values(), ids=ROWS)
def test_rows(stage, rows, message, refuses, world):
    refuses(stage, rf"rows\.jsonl.*{message}", dataset_name=world.write("rows.jsonl", rows))


@pytest.mark.parametrize(("stage", "rows", "message"), TO_THE_MODEL.values(), ids=TO_THE_MODEL)
def test_rows_that_the_model_cannot_take(stage, rows, message, refuses, world):
    options = {"sft_adapter": ""} if "chosen" in rows[0] and isinstance(rows[0]["chosen"], list) else {}
    refuses(stage, message, loads=True, dataset_name=world.write("rows.jsonl", rows), **options)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_rows_longer_than_the_context(stage, refuses):
    refuses(stage, "max_length=129 exceeds the model's context of 128 tokens", loads=True, max_length=129)


MISSING = {
    "a file": ("sft", "dataset_name", "nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
    "a folder": ("reward", "dataset_name", "./nowhere", "./nowhere: no such file or folder"),
    "held-out rows": ("sft", "eval_dataset_name", "nowhere.csv", "nowhere.csv: no such file or folder"),
    "a name without an owner": ("ppo", "dataset_name", "imdb", "A dataset on the hub is named `owner/name`"),
    "the hub": ("dpo", "dataset_name", "owner/name", "owner/name: no data found, neither here nor on the hub"),
    "a revision on the hub": ("dpo", "dataset_name", "owner/name@v2", "owner/name@v2: no data found, neither here"),
}


@pytest.mark.parametrize(("stage", "key", "value", "message"), MISSING.values(), ids=MISSING)
def test_data_that_is_not_there(stage, key, value, message, refuses):
    refuses(stage, message, **{key: value})


@pytest.mark.parametrize("option", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_evaluation_without_held_out_prompts(option, refuses):
    message = (
        r"eval_strategy='\w+', eval_on_start=\w+ need held-out prompts, and .* has none\. Name a dataset of prompts in"
    )
    refuses("ppo", message, loads=True, **option)


FINE = {
    "a byte-order mark": ("rows.csv", "\ufeffchosen,rejected\na,b\n"),
    "a byte-order mark in JSON": ("rows.jsonl", '\ufeff{"chosen": "a", "rejected": "b"}\n'),
    "Windows line ends": ("rows.jsonl", '{"chosen": "a", "rejected": "b"}\r\n\r\n'),
    "Windows line ends in CSV": ("rows.csv", "chosen,rejected\r\na,b\r\n"),
    "JSON lines in a .json": ("rows.json", '{"chosen": "a", "rejected": "b"}\n'),
    "no line end": ("rows.jsonl", '{"chosen": "a", "rejected": "b"}'),
}


@pytest.mark.parametrize(("name", "content"), FINE.values(), ids=FINE)
def test_what_looks_odd_and_is_right(name, content, world):
    assert list(load_rows(world.write(name, content), "train")) == [{"chosen": "a", "rejected": "b"}]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_one_row_is_a_dataset(stage, world):
    """Smaller than a batch, and than a rollout."""
    row = {"sft": {"text": "A fine film."}, "ppo": {"prompt": "A"}}.get(stage, PAIR)
    options = {} if stage == "sft" else {"sft_adapter": world.sft}
    world.run(stage, dataset_name=world.write("rows.jsonl", [row]), **options)
    assert (world.folder / "out" / "metrics.json").is_file()
