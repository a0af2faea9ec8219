"""`pipeline.pages.label_pairs`: pairs of every usual layout, and the pool that a thread fills."""

import json

import pytest

from pipeline.pages.label_pairs import Closed, Pair, Pool, is_swapped, read_pairs


USER = [{"role": "user", "content": "Hi"}]
HELLO, BYE = ([{"role": "assistant", "content": text}] for text in ("Hello!", "Bye."))
LAYOUTS = {
    "preferences": ({"prompt": "A", "chosen": " b", "rejected": " c"}, ("A", " b", " c")),
    "two responses": ({"prompt": "A", "response_1": " b", "response_2": " c"}, ("A", " b", " c")),
    "a label that is not used": ({"question": "A", "answer_a": "b", "answer_b": "c", "label": 2}, ("A", "b", "c")),
    "prompt in both sides": ({"chosen": "The film is b", "rejected": "The film is c"}, ("The film is", " b", " c")),
    "conversations": ({"prompt": USER, "chosen": HELLO, "rejected": BYE}, (USER, HELLO, BYE)),
    "whole conversations": ({"chosen": USER + HELLO, "rejected": USER + BYE}, (USER, HELLO, BYE)),
    "texts to a conversation": ({"prompt": USER, "response_a": "Hello!", "response_b": "Bye."}, (USER, HELLO, BYE)),
}


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    row, expected = LAYOUTS[layout]
    (pair,) = read_pairs(write(tmp_path / "pairs.jsonl", row, row), "train")  # the same row twice is one pair
    assert (pair.prompt, *pair.completions) == expected
    assert set(pair.sources) <= set(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A"}, r"pairs\.jsonl: no two columns are two responses to a prompt; found: \['text'\]"),
        ({"response_1": "A", "response_2": "B"}, r"pairs\.jsonl: no column 'prompt'"),
        ({"prompt": "A", "response_1": " b", "response_2": " b"}, r"row 1 \(counting from 1\): .*must differ"),
        ({"prompt": "A", "response_1": " ", "response_2": " b"}, r"row 1 .*must not be empty"),
        ({"prompt": "A", "chosen": " b", "rejected": None}, r"row 1 .*'rejected' must be text"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / "pairs.jsonl", row), "train")


def test_the_order_is_a_fair_coin():
    swapped = [is_swapped(seed, str(pair), "Ana") for seed in range(20) for pair in range(100)]
    assert 0.45 < sum(swapped) / len(swapped) < 0.55


def pair(number: int, far: float | None = None) -> Pair:
    return Pair("P", (f"{number} a", f"{number} b"), ("x", "y"), far)


def test_the_most_disputed_pair_comes_first():
    pairs = [pair(number, far) for number, far in enumerate((0.1, 0.4, 0.2))]
    assert [Pool(pairs).take().disagreement for _ in pairs] == [0.1] * 3
    pool = Pool(pairs, disputed=True)
    assert [pool.take().disagreement for _ in pairs] == [0.4, 0.2, 0.1]
    assert pool.take() is None


def test_a_thread_keeps_the_pool_filled_until_it_is_stopped():
    made = []

    def batches():
        for number in range(1000):
            made.append(number)
            yield [pair(2 * number), pair(2 * number + 1)]

    pool, told = Pool(), []
    pool.start(batches(), 3, told.append)
    taken = [pool.take().completions[0] for _ in range(10)]
    assert taken == [f"{number} a" for number in range(10)]
    pool.check_open()
    pool.stop()
    assert len(made) <= 7 and not told  # at most two batches ahead
    with pytest.raises(Closed):
        pool.check_open()
    while pool.take() is not None:  # those that wait are still shown
        pass


def test_pairs_to_choose_from_are_waited_for():
    pool = Pool(disputed=True, least=4)
    pool.start(iter([[pair(1, 0.1), pair(2, 0.2)], [pair(3, 0.5), pair(4, 0.0)], []]), 4, print)
    assert pool.take().disagreement == 0.5
    pool.stop()


def test_the_error_that_ends_the_sampling_is_told_after_the_last_pair():
    def batches():
        yield [pair(1)]
        raise FloatingPointError("The policy gives logits that are not finite")

    pool, told = Pool(), []
    pool.start(batches(), 5, told.append)
    assert pool.take() == pair(1)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="not finite"):
            pool.take()
    pool.stop()
    assert told == [pool.error]
