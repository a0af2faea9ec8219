"""`reward_models.triples`: F1 over triples by hand; malformed lines are punished."""

import pytest

from reward_models.triples import get_triple_reward, read_line, references, triple_f1


def chat(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


LINES = {
    "The Ring | director | Mary Scott": ("the ring", "director", "mary scott"),
    "  THE  Ring|Director |mary\tScott ": ("the ring", "director", "mary scott"),
    "The Ring | director": None,
    "The Ring | director | Mary Scott |": None,
    "The Ring | director | Mary | Scott": None,
    "The Ring | | Mary Scott": None,
    "| director | Mary Scott": None,
    "The Ring - director - Mary Scott": None,
    "": None,
}


@pytest.mark.parametrize("line", LINES)
def test_a_line(line):
    assert read_line(line) == LINES[line]


TWO = ["a | r | b", "a | s | c"]
# completion, references, F1, share of malformed lines
SCORED = {
    "all of it": ("\na | r | b\na | s | c", TWO, 1, 0),
    "in another order and case": ("A | s | C\n\n A|R|B\n", TWO, 1, 0),
    "one of two": ("a | r | b", TWO, 2 * 1 / (1 + 2), 0),
    "one right, one wrong": ("a | r | b\na | r | c", TWO, 2 * 1 / (2 + 2), 0),
    "turned round": ("b | r | a", TWO, 0, 0),
    "a right one twice": ("a | r | b\na | r | b", TWO, 2 * 1 / (2 + 2), 0),
    "one more": ("a | r | b\na | s | c\na | s | d", TWO, 2 * 2 / (3 + 2), 0),
    "one malformed": ("a | r | b\na | s", TWO, 2 * 1 / (2 + 2), 1 / 2),
    "two of three malformed": ("a | r | b\na | s\nc", TWO, 2 * 1 / (3 + 2), 2 / 3),
    "all malformed": ("a r b", TWO, 0, 1),
    "nothing said": ("", TWO, 0, 0),
    "nothing to say": ("", [], 1, 0),
    "too much said": ("a | r | b", [], 0, 0),
    "a reference twice counts once": ("a | r | b", ["a | r | b", "A | r | b"], 1, 0),
}


@pytest.mark.parametrize("kind", [str, chat], ids=["text", "conversation"])
@pytest.mark.parametrize(("completion", "triples", "f1", "malformed"), SCORED.values(), ids=SCORED)
def test_scores_by_hand(completion, triples, f1, malformed, kind):
    given = {"prompts": ["?"], "completions": [kind(completion)], "completion_ids": [[1]], "triples": [triples]}
    assert triple_f1(**given) == [pytest.approx(f1)]
    assert get_triple_reward()(**given) == [pytest.approx(f1 - 0.5 * malformed)]
    assert get_triple_reward(malformed_penalty=2)(**given) == [pytest.approx(f1 - 2 * malformed)]
    assert get_triple_reward(malformed_penalty=0)(**given) == [pytest.approx(f1)]


@pytest.mark.parametrize("triples", ["a | r | b\n\na | s | c\n", TWO, [["a", "r", "b"], ["a", " s ", "C"]]])
def test_forms_of_references(triples):
    assert references(triples) == {("a", "r", "b"), ("a", "s", "c")}


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (None, "must be lines 'subject | relation | object', or lists of the three, but is 'None'"),
        ({"a": 1}, "must be lines"),
        ("a | r", "must have three filled parts in each line, but has 'a | r'. Correct or delete the line."),
        ([["a", "r"]], "must have three filled parts"),
        ([["a", "r | s", "b"]], "must have three filled parts"),
        ([["a", "r", 3]], "must have three filled parts"),
        ([3], "must have three filled parts"),
        (["a | r | b", "a | s | "], "must have three filled parts"),
    ],
)
def test_what_is_no_reference(triples, message):
    with pytest.raises(ValueError) as failure:
        triple_f1(completions=["x"], triples=[triples])
    assert str(failure.value).startswith(f"'triples' {message}")


@pytest.mark.parametrize("penalty", [-0.1, float("nan")])
def test_no_negative_penalty(penalty):
    with pytest.raises(ValueError, match=f"^malformed_penalty={penalty} must be 0 or more"):
        get_triple_reward(malformed_penalty=penalty)


def test_references_for_each_completion():
    assert triple_f1(["a | r | b"] * 2, triples=["a | r | b", "c | r | b"]) == [1, 0]
    with pytest.raises(ValueError):
        triple_f1(["a | r | b"] * 2, triples=["a | r | b"])
