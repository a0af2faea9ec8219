"""`data.hh`: HH's texts become conversations, broken rows are left out by kind, and held-out dialogues are not trained on."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset

from data import hh
from data.preferences import load_preferences
from data.prompts import load_prompts
from data.texts import load_texts


ASKED = "\n\nHuman: Which film?\n\nAssistant: What do you like?\n\nHuman: Short ones."
PROMPT = [
    {"role": "user", "content": "Which film?"},
    {"role": "assistant", "content": "What do you like?"},
    {"role": "user", "content": "Short ones."},
]


def row(chosen: str = "I know one.", rejected: str = "It is late.", asked: str = ASKED) -> dict[str, str]:
    return {name: f"{asked}\n\nAssistant: {text}" for name, text in (("chosen", chosen), ("rejected", rejected))}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_messages_by_hand():
    assert hh.messages(ASKED) == PROMPT


def test_only_a_marker_that_begins_a_paragraph_begins_a_turn():
    text = "\n\nHuman: Say it.  Human: No.\nAssistant: twice\n\nNote: Frank said\n\nFrank: Hello\n\nAssistant: Assistant: no\n"
    assert hh.messages(text) == [
        {"role": "user", "content": "Say it.  Human: No.\nAssistant: twice\n\nNote: Frank said\n\nFrank: Hello"},
        {"role": "assistant", "content": "Assistant: no"},
    ]


def test_the_prompt_ends_where_a_turn_does():
    """Both replies begin with `I`, and the texts first differ inside a word."""
    assert hh.pair(**row()) == {
        "prompt": PROMPT,
        "chosen": [{"role": "assistant", "content": "I know one."}],
        "rejected": [{"role": "assistant", "content": "It is late."}],
    }


BROKEN = {
    "no text": ({"chosen": None, "rejected": ASKED}, hh.NOT_TEXT),
    "no marker": ({"chosen": "Hello", "rejected": "Hi"}, hh.UNKNOWN),
    "another speaker": (row(asked="\n\nSystem: Be kind." + ASKED), hh.UNKNOWN),
    "the assistant begins": (row(asked="\n\nAssistant: Hello." + ASKED), hh.UNKNOWN),
    "ends in a human turn": ({"chosen": row()["chosen"] + "\n\nHuman: Yes?", "rejected": row()["rejected"]}, hh.OPEN),
    "other words in the prompt": (
        {"chosen": row()["chosen"], "rejected": row(asked=ASKED.replace("film", "book"))["rejected"]},
        hh.DIFFERENT,
    ),
    "other turns": (
        {"chosen": row()["chosen"], "rejected": "\n\nHuman: Which film?\n\nAssistant: None."},
        hh.DIFFERENT,
    ),
    "two human turns": (row(asked=ASKED + "\n\nHuman: Please."), hh.REPEATED),
    "two assistant turns": (row(asked=ASKED + "\n\nAssistant: Well."), hh.REPEATED),
    "an empty chosen reply": (row(chosen=" \n"), hh.EMPTY_REPLY),
    "an empty rejected reply": (row(rejected=""), hh.EMPTY_REPLY),
    "an empty turn before": (row(asked="\n\nHuman: \n\nAssistant: Yes?" + ASKED), hh.EMPTY_TURN),
    "the same reply": (row(rejected=" I know one. "), hh.IDENTICAL),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_has_its_kind(case):
    broken, kind = BROKEN[case]
    pairs, dropped = hh.convert([row(), broken, broken, row("No.")])
    assert dropped == {kind: [2, 3]}
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["I know one.", "No."]


def test_long_dialogues_are_left_out_with_their_longer_side():
    """Words are counted: 2 + 4 + 2 of the prompt, and those of the reply."""
    rows = [row("Yes.", "No way."), row("Yes, of course.", "No."), row("Yes.", "No, no, no.")]

    def words(conversation: list[dict]) -> int:
        return sum(len(turn["content"].split()) for turn in conversation)

    pairs, dropped = hh.convert(rows, words, max_tokens=10)
    assert dropped == {hh.LONG: [2, 3]} and len(pairs) == 1
    assert len(hh.convert(rows, words, max_tokens=11).pairs) == 3
    assert len(hh.convert(rows).pairs) == 3


def asked(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_what_is_held_out_depends_on_the_letters_of_the_first_turn():
    prompts = [asked(f"Question {number}?") for number in range(2000)]
    held_out = [hh.is_held_out(prompt, 0.25) for prompt in prompts]
    assert 0.22 < sum(held_out) / 2000 < 0.28
    assert held_out == [hh.is_held_out(asked(f"QUESTION, {number}") + PROMPT, 0.25) for number in range(2000)]
    # SHA-256 of "question0" begins with 0x658d3451, which is 0.39669 of 2^32.
    assert hh.is_held_out(prompts[0], 0.3967) and not hh.is_held_out(prompts[0], 0.3966)


def dialogues(number: int) -> list[dict]:
    """Rows of as many dialogues, each with a longer one that begins alike."""
    found = []
    for i in range(number):
        first = f"\n\nHuman: Question {i}?"
        found += [row(f"Answer {i}.", asked=first), row("See.", asked=f"{first}\n\nAssistant: Well.\n\nHuman: And?")]
    return found


def test_the_stages_read_the_files_and_train_on_nothing_held_out(tmp_path):
    pairs, _ = hh.convert(
        [*dialogues(40), dialogues(1)[0] | {"rejected": row("Go.", asked="\n\nHuman: Question 0?")["chosen"]}]
    )
    counts = hh.write_stages(pairs, tmp_path, 0.25)
    assert sum(counts.values()) == 81 and counts["test"] > 4
    begins = {}
    for split in ("train", "test"):
        file = {stage: str(tmp_path / f"{stage}_{split}.jsonl") for stage in ("preferences", "sft", "prompts")}
        preferences = list(load_preferences(file["preferences"], "train"))
        texts, prompts = list(load_texts(file["sft"], "train")), list(load_prompts(file["prompts"], "train"))
        assert len(preferences) == counts[split]
        assert texts == [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences]
        distinct = {json.dumps(pair["prompt"]) for pair in preferences}
        assert sorted(json.dumps(prompt["prompt"]) for prompt in prompts) == sorted(distinct)
        begins[split] = {pair["prompt"][0]["content"] for pair in preferences}
    assert begins["train"].isdisjoint(begins["test"])
    assert len(begins["train"] | begins["test"]) == 40
    assert len(list(tmp_path.glob("*_*.jsonl"))) == 6 and not list(tmp_path.glob("*.tmp"))


def test_a_second_run_writes_the_same_bytes(tmp_path):
    pairs, _ = hh.convert(dialogues(20))
    hh.write_stages(pairs, tmp_path / "a", 0.25)
    hh.write_stages(pairs, tmp_path / "b", 0.25)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files and all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files
    )


def test_no_side_may_be_empty(tmp_path):
    pairs, _ = hh.convert([row()])
    with pytest.raises(
        ValueError,
        match=r"^held_out=0\.25 of 1 pairs leaves [01] to train on and [01] held out\. Both need at least one\. Give more",
    ):
        hh.write_stages(pairs, tmp_path / "out", 0.25)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files(name, tmp_path):
    content = ("\n".join(json.dumps(row(f"Ünd {number}.")) for number in range(3)) + "\n\n").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(hh.read_rows(str(path))) == [row(f"Ünd {number}.") for number in range(3)]


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row()).encode() * 50)[:-20])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: the archive is damaged \(.*\)\. Fetch it anew\.$"):
        hh.read_rows(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: the archive is damaged"):
        hh.read_rows(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chosen": "a", "rejected": "b"}\n{"chosen"', r"line 2: not valid JSON .*Correct or delete the line\.$"),
        ('{"chosen": "a", "answer": "b"}', r"no column 'rejected'; found: \['chosen', 'answer'\]\. Name data of HH"),
        ("", r"rows\.jsonl: the data has no rows"),
    ],
)
def test_a_file_that_is_not_hh(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        hh.read_rows(str(path))


def test_a_folder_of_the_hub_is_no_option_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()))
    with pytest.raises(ValueError, match=r"^data_dir='harmless-base' is for a dataset on the hub, but .* is a file"):
        hh.read_rows(str(path), "harmless-base")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl\.gz: no such file or folder"):
        hh.read_rows(str(tmp_path / "none.jsonl.gz"))


def test_the_hub_is_asked_for_the_folder_and_the_revision(monkeypatch):
    def load(source, **options):
        assert (source, options) == (
            "Anthropic/hh-rlhf",
            {"split": "train", "data_dir": "harmless-base", "revision": "v1"},
        )
        return Dataset.from_list([row()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(hh.read_rows("Anthropic/hh-rlhf@v1", "harmless-base")) == [row()]
