"""`reward_models.translation`: chrF by hand and BLEU as sacrebleu has them, and the error where sacrebleu is missing."""

import sys

import pytest
from sacrebleu import sentence_bleu, sentence_chrf

from reward_models.functions import load_function
from reward_models.translation import get_bleu, get_chrf


def chat(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("kind", [str, chat], ids=["text", "conversation"])
def test_chrf_by_hand(kind):
    # "abc" against "abd": 2 of 3 letters, 1 of 2 pairs and 0 of 1 triple are shared. Precision and recall are both the mean
    # of the orders that there are, (2/3 + 1/2 + 0) / 3. Spaces do not count.
    assert get_chrf()([kind(" ab c")], ["a bd"]) == pytest.approx([7 / 18])
    # Recall weighs twice as much: of "ab" in "abcd", precision is 1, recall (2/4 + 1/3) / 2, F2 = 5 P R / (4 P + R).
    assert get_chrf()([kind("ab")], ["abcd"]) == pytest.approx([5 * (5 / 12) / (4 + 5 / 12)])
    assert get_chrf()([kind("Das Haus."), kind("")], ["Das Haus.", "Das Haus."]) == [1.0, 0.0]


def test_the_best_reference_counts():
    both = [["Heute kauft er Brot.", "Er kauft heute Brot."]]
    for metric in (get_chrf(), get_bleu()):
        assert metric([" Er kauft heute Brot."], both) == pytest.approx([1.0])
        assert metric([" Er kauft heute Brot."], ["Heute kauft er Brot."])[0] < 0.9


def test_scores_are_those_of_sacrebleu():
    text, reference = "Der alte Mann kauft einen roten Auto.", "Der alte Mann kauft ein rotes Auto."
    assert get_chrf(word_order=2)([text], [reference]) == [sentence_chrf(text, [reference], word_order=2).score / 100]
    assert get_bleu()([text], [reference]) == [sentence_bleu(text, [reference]).score / 100]
    # Of 8 words, counting the full stop, "Der alte Mann kauft" and "Auto ." are right: 6/8, 4/7, 2/6 and 1/5.
    assert get_bleu()([text], [reference]) == pytest.approx([(6 / 8 * 4 / 7 * 2 / 6 * 1 / 5) ** 0.25])
    assert get_bleu(tokenize="char")(["东西"], ["东西"]) == pytest.approx([1.0])


@pytest.mark.parametrize("cell", [None, 5, [], [""], [None], " ", {"text": "a"}])
def test_references_that_are_none(cell):
    for metric in (get_chrf(), get_bleu()):
        with pytest.raises(
            ValueError, match=r"^'references' must be a text or a list of texts, none of them empty, but is "
        ):
            metric(["a"], [cell])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("get_chrf(word_order=-1)", "word_order=-1 is not a number of words"),
        ("get_bleu(tokenize='german')", "tokenize='german' is not one of .*13a"),
    ],
)
def test_options_that_there_are_not(call, message):
    with pytest.raises(ValueError, match=message):
        load_function(f"reward_models.translation.{call}")


def test_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.delitem(sys.modules, "reward_models.translation")
    with pytest.raises(ValueError) as found:
        load_function("reward_models.translation.get_chrf()", "judge")
    assert str(found.value) == (
        "judge: cannot import 'reward_models.translation.get_chrf' (chrF and BLEU need sacrebleu: pip install "
        "'spine-rlhf[translation]'). Install the package that has the module 'sacrebleu.metrics'."
    )
    assert not getattr(found.value, "__notes__", None)  # it is not for want of a folder


@pytest.mark.parametrize(
    "statement", ["import a_package_that_is_not_there", "from a_package_that_is_not_there.part import x"]
)
def test_a_module_of_the_users_own_that_lacks_a_package(statement, tmp_path, monkeypatch):
    (tmp_path / "rewards_with_an_import.py").write_text(
        f"{statement}\n\ndef f(completions, **kwargs):\n    return [0.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"Install the package that has the module 'a_package_that_is_not_there'\.$"):
        load_function("rewards_with_an_import.f")
