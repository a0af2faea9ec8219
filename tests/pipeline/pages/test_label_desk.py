"""`pipeline.pages.label_desk`: who gets which pair, undo, and that nothing is lost by reloads, restarts or company."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.pages.label_answers import AnswerFile, current, read_answers
from pipeline.pages.label_desk import PATIENCE, Desk, checked_name
from pipeline.pages.label_pairs import Pair, Pool


PAIRS = [Pair("The film", (f" is good {number}", f" is bad {number}"), ("ppo", "sft")) for number in range(12)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(tmp_path, pairs=PAIRS, *, seed=0, overlap=0, total=None, clock=None) -> Desk:
    """A desk as a page has it that was started now, on the answers of earlier ones."""
    options = {"clock": clock} if clock else {}
    total = len(pairs) if total is None else total
    return Desk(
        AnswerFile(tmp_path / "answers.jsonl"), Pool(pairs), seed=seed, overlap=overlap, total=total, **options
    )


def label_all(desk: Desk, annotator: str, choose=lambda task: "1") -> list[str]:
    """The pairs that an annotator gets until none is left."""
    seen = []
    while (task := desk.next_task(annotator)) is not None:
        assert desk.answer(annotator, task.ticket, choose(task))
        seen.append(task.pair.id)
    return seen


def test_a_pair_stays_until_it_is_answered(tmp_path):
    desk = make(tmp_path)
    task = desk.next_task("Ana")
    assert desk.next_task("Ana") == task  # a reload
    assert desk.next_task("Ben").pair != task.pair
    assert desk.answer("Ana", task.ticket, "1")
    assert desk.next_task("Ana").pair != task.pair


def test_an_answer_counts_once(tmp_path):
    desk = make(tmp_path)
    task = desk.next_task("Ana")
    assert desk.answer("Ana", task.ticket, "1", "certain")
    assert not desk.answer("Ana", task.ticket, "2")
    (line,) = read_answers(desk.file.path)
    assert (line["label"], line["sure"], line["number"]) == ("1", "certain", 1)


def shown_order(desk: Desk, annotator: str) -> dict[str, bool]:
    """Return whether each pair was shown with its second completion first, once all are answered."""
    swapped = {}
    while (task := desk.next_task(annotator)) is not None:
        assert task.sides == (task.pair.completions[::-1] if task.swapped else task.pair.completions)
        desk.answer(annotator, task.ticket, "1")
        swapped[task.pair.id] = task.swapped
    return swapped


def test_the_order_is_drawn_for_each_pair_and_recorded(tmp_path):
    desk = make(tmp_path, overlap=1)
    ana, ben = shown_order(desk, "Ana"), shown_order(desk, "Ben")
    assert {*ana.values()} == {True, False} and ana.keys() == ben.keys() and ana != ben
    for line in read_answers(desk.file.path):
        assert line["swapped"] == {"Ana": ana, "Ben": ben}[line["annotator"]][line["pair"]]
        assert line["first"].startswith(" is bad" if line["swapped"] else " is good")
        assert line["first_from"] == ("sft" if line["swapped"] else "ppo")
    for name, seed in (("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        again = shown_order(make(tmp_path / name, seed=seed), "Ana")
        assert (again == ana) == (name == "same")


def test_a_window_from_before_a_restart_answers_as_it_was_shown(tmp_path):
    task = make(tmp_path).next_task("Ana")
    restarted = make(tmp_path, seed=7)
    other = f"{task.pair.id}.{1 - task.swapped}"  # one of the two is not what the new seed draws
    assert restarted.answer("Ana", task.ticket, "1") and restarted.answer("Ben", other, "2")
    lines = read_answers(restarted.file.path)
    assert lines[0]["first"] == lines[1]["second"] == task.sides[0]
    with pytest.raises(ValueError, match="The page was started again and has other pairs"):
        restarted.answer("Ana", "0123456789abcdef.0", "1")


def test_a_restart_goes_on_where_the_page_was(tmp_path):
    desk = make(tmp_path)
    for label in ("1", "skip", "2"):
        desk.answer("Ana", desk.next_task("Ana").ticket, label)
    desk.undo("Ana")
    seen = {line["pair"] for line in current(desk.lines)}
    restarted = make(tmp_path)
    assert restarted.progress("Ana")[:4] == desk.progress("Ana")[:4] == (12, 2, 1, 1)
    undone = desk.next_task("Ana")
    assert restarted.next_task("Ana").pair == undone.pair and restarted.next_task("Ana").number == 3
    assert seen.isdisjoint(label_all(restarted, "Ana"))
    assert restarted.progress("Ana").done == len(PAIRS)
    assert sorted(line["number"] for line in current(restarted.lines)) == list(range(1, 13))


def test_undo_goes_back_step_by_step(tmp_path):
    desk = make(tmp_path)
    tasks = []
    for label in ("1", "2", "tie"):
        tasks.append(desk.next_task("Ana"))
        desk.answer("Ana", tasks[-1].ticket, label)
    desk.answer("Ben", desk.next_task("Ben").ticket, "1")
    for task in reversed(tasks):
        assert desk.undo("Ana")
        assert desk.next_task("Ana") == task
    assert not desk.undo("Ana")
    assert [line["annotator"] for line in current(desk.lines)] == ["Ben"]
    assert len(desk.lines) == 7  # nothing is removed from the file
    assert set(label_all(desk, "Ana")) >= {task.pair.id for task in tasks}


def test_every_third_pair_goes_to_all(tmp_path):
    desk = make(tmp_path, overlap=3)
    ana = [desk.next_task("Ana").pair.id]
    desk.answer("Ana", desk.next_task("Ana").ticket, "1")
    ana += label_all(desk, "Ana")
    ben = label_all(desk, "Ben", lambda task: "2" if task.swapped else "1")
    assert len(ana) == 12 and ben == [ana[2], ana[5], ana[8], ana[11]]
    restarted = make(tmp_path, overlap=5)  # what was shown to all still is
    assert label_all(restarted, "Cem") == ben
    assert restarted.progress("Cem").several == 4 and restarted.progress("Cem").annotators == 3


def test_agreement_is_that_of_the_shared_pairs(tmp_path):
    desk = make(tmp_path, overlap=1)
    for annotator in ("Ana", "Ben"):  # Ben likes what Ana likes, but for the first pair
        for number, _ in enumerate(PAIRS):
            task = desk.next_task(annotator)
            good = "2" if task.swapped else "1"
            other = {"1": "2", "2": "1"}[good]
            desk.answer(annotator, task.ticket, other if (annotator == "Ben" and number == 0) or number > 5 else good)
    unanimous, same, kappa = desk.progress("Ana").agreement
    assert unanimous == same == pytest.approx(11 / 12)
    chance = (11 / 24) ** 2 + (13 / 24) ** 2
    assert kappa == pytest.approx((11 / 12 - chance) / (1 - chance))


def test_a_pair_that_somebody_leaves_is_given_to_another(tmp_path):
    clock = Clock()
    desk = make(tmp_path, PAIRS[:2], clock=clock)
    left, other = desk.next_task("Ana"), desk.next_task("Ben")
    desk.answer("Ben", other.ticket, "1")
    assert desk.next_task("Ben") is None
    clock.now = PATIENCE + 1
    assert desk.next_task("Ben").pair == left.pair
    assert desk.answer("Ben", desk.next_task("Ben").ticket, "1")
    assert desk.answer("Ana", left.ticket, "2")  # she is back: a second opinion
    assert desk.progress("Ana").several == 1


def test_seconds_are_those_since_the_pair_was_shown(tmp_path):
    clock = Clock()
    desk = make(tmp_path, clock=clock)
    task = desk.next_task("Ana")
    clock.now = 3.26
    desk.next_task("Ana")  # a reload
    clock.now = 4.26
    desk.answer("Ana", task.ticket, "1")
    assert desk.lines[0]["seconds"] == 4.3


def test_the_number_of_pairs_is_kept(tmp_path):
    desk = make(tmp_path, total=5)
    assert len(label_all(desk, "Ana")) == 5
    assert desk.next_task("Ben") is None
    assert desk.progress("Ana").done == 5


def test_many_people_at_once_lose_nothing_and_share_nothing(tmp_path):
    pairs = [Pair("P", (f"{number} a", f"{number} b"), ("x", "y")) for number in range(150)]
    desk = make(tmp_path, pairs, overlap=10)
    names = [f"annotator {number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as threads:
        seen = list(threads.map(lambda name: label_all(desk, name), names))
    seen += [label_all(desk, name) for name in names]  # pairs for all that somebody had opened last
    lines = read_answers(desk.file.path)
    assert len(lines) == sum(map(len, seen))
    counts = Counter(line["pair"] for line in lines)
    shared = {line["pair"] for line in lines if line["shared"]}
    assert len(shared) == 15 and all(counts[pair] == len(names) for pair in shared)
    assert len(counts) == 150 and all(counts[pair] == 1 for pair in counts.keys() - shared)
    assert sorted({line["number"] for line in lines}) == list(range(1, 151))


def test_texts_of_another_pair_are_refused(tmp_path):
    desk = make(tmp_path)
    desk.answer("Ana", desk.next_task("Ana").ticket, "1")
    path = desk.file.path
    path.write_text(path.read_text().replace(" is good", " was good"))
    with pytest.raises(ValueError, match=r"answers\.jsonl line 1: the texts are not those of the pair"):
        make(tmp_path)


@pytest.mark.parametrize("name", ["", "  ", "a\x1b[31mb", "x" * 41, "\ud800"])
def test_a_name_that_cannot_be_kept(name):
    with pytest.raises(ValueError, match="Please enter"):
        checked_name(name)


def test_a_name():
    assert checked_name("  Zoë  Łuć ") == "Zoë Łuć"
