"""Load the embedded default data: 23,700 text snippets, each rated by 15 or more people from -4 to +4.

Hutto & Gilbert (ICWSM 2014) published their ratings inside the source distribution of `vaderSentiment` (MIT licence). We
fetch that file through pip, so that mirrors and proxies work. Its sha256 is checked before anything in it is read. This
repository keeps none of its texts.
"""

import functools
import hashlib
import html
import io
import itertools
import json
import random
import statistics
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from datasets import Dataset

from data.pip_files import Release, fetch


SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

SOURCES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
DOMAINS = dict(zip(("film", "products", "tweets", "editorials"), SOURCES, strict=True))
SPLITS = ("train", "validation", "test")


class Snippet(NamedTuple):
    """One rated text.

    `ratings` holds one integer of -4..+4 for each rater; `mean` is their mean.
    """

    source: str
    id: str
    text: str
    ratings: tuple[int, ...]
    mean: float


def _archive(content: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=io.BytesIO(content), mode="r:gz")
    except tarfile.TarError as error:
        raise ValueError(
            f"{SDIST}: the archive cannot be read ({error}). It is not the published one. Delete it and run again."
        ) from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:  # extractfile returns None for a member that is not a file
        raise ValueError(
            f"{SDIST}: the archive has no file {name!r}. It is not the published one. Delete it and run again."
        )
    return file.read()


def load_snippets() -> list[Snippet]:
    """Load all rated snippets, in the order of the files.

    The archives are read in memory: no member is written to disk. HTML entities are decoded, runs of white space are
    collapsed, and the movie file's doubled single quotes become double quotes. The mean is computed from the individual
    ratings (for 195 tweets the text file states another mean).
    """
    return list(_read(fetch(Release("vaderSentiment==3.3.2", SDIST, SHA256)).read_bytes()))


@functools.lru_cache(maxsize=1)
def _read(content: bytes) -> tuple[Snippet, ...]:
    with _archive(content) as outer:
        inner = _member(outer, INNER)
    snippets = []
    with _archive(inner) as archive:
        for source in SOURCES:
            tables = []
            for kind, columns in (("anonDataRatings", 4), ("GroundTruth", 3)):
                name = f"hutto_ICWSM_2014/{source}_{kind}.txt"
                lines = _member(archive, name).decode("utf-8-sig", errors="replace").splitlines()
                rows = [line.split("\t", columns - 1) for line in lines]
                bad = next((n for n, row in enumerate(rows, 1) if len(row) != columns), None)
                if bad:
                    raise ValueError(f"{SDIST}: {name} line {bad} does not have {columns} columns.")
                tables.append({row[0]: row[-1] for row in rows})
            ratings, texts = tables
            for key, text in texts.items():
                values = tuple(json.loads(ratings.get(key, "[]")))
                text = " ".join(html.unescape(text).replace("''", '"').split())
                if values and text:
                    snippets.append(Snippet(source, key, text, values, statistics.fmean(values)))
    return tuple(snippets)


def split_of(snippet: Snippet) -> str:
    """Return the split of a snippet: 85% train, 5% validation, 10% test, by a hash of its letters.

    Texts that differ only in case or punctuation get the same split, so no test text is seen in training.
    """
    letters = "".join(character for character in snippet.text.lower() if character.isalnum())
    bucket = int(hashlib.sha256(letters.encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 85 else "validation" if bucket < 90 else "test"


def load_split(split: str, sources: tuple[str, ...] = SOURCES) -> list[Snippet]:
    """Load the snippets of one split (`train`, `validation` or `test`) from the given sources."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    return [s for s in load_snippets() if s.source in sources and split_of(s) == split]


# The demo's domain. The other sources add pretraining text and, for the reward model, more rated opinions.
DOMAIN = ("movieReviewSnippets",)
EMBEDDED_PAIRS = {"train": 16_500, "validation": 2_000, "test": 4_000}


def agreement(chosen: Snippet, rejected: Snippet) -> float:
    """Return the share of rater pairs who rate `chosen` higher; ties count half.

    Every rater of `chosen` is paired with every rater of `rejected`.
    """
    outcomes = [(a > b) + 0.5 * (a == b) for a in chosen.ratings for b in rejected.ratings]
    return statistics.fmean(outcomes)


def _shared_words(a: list[str], b: list[str]) -> int:
    """Count the words that both texts begin with; leave each text at least one word of its own."""
    shared = 0
    while shared < min(len(a), len(b)) - 1 and a[shared] == b[shared]:
        shared += 1
    return shared


def preference_pairs(
    split: str,
    *,
    sources: tuple[str, ...] = DOMAIN,
    pairs: int | None = None,
    min_gap: float = 0.5,
    seed: int = 0,
) -> Dataset:
    """Draw same-prompt preference pairs of one split with a fixed seed, to measure a reward model on.

    Two snippets of one source that begin with the same word make a pair: prompt = all the words they share, chosen =
    the continuation that people rated higher. Both members are drawn uniformly, so that common openings do not crowd
    out the others. Both snippets of a pair are of the same split.

    Columns: `prompt`, `chosen`, `rejected` (strings; prompt + chosen is the snippet), `margin` (difference of the mean
    ratings, at least `min_gap`), `agreement` (share of raters who prefer the chosen one).

    Raises:
        ValueError: the split has fewer than `pairs` such pairs.
    """
    groups = _openings(split, sources)
    members = [(opening, member) for opening, group in groups.items() if len(group) > 1 for member in group]
    wanted = EMBEDDED_PAIRS[split] if pairs is None else pairs
    generator = random.Random(seed)
    rows: list[dict] = []
    seen, fruitless = set(), 0
    while len(rows) < wanted:
        fruitless += 1
        if not members or fruitless > 10_000:
            raise ValueError(
                f"pairs={wanted}: the {split} split of {', '.join(sources)} has only about {len(rows)}. Lower it."
            )
        opening, a = generator.choice(members)
        b = generator.choice(groups[opening])
        texts = frozenset((a.text, b.text))
        row = _pair(a, b, min_gap)
        if row is None or texts in seen:
            continue
        seen.add(texts)
        fruitless = 0
        rows.append(row)
    return Dataset.from_list(rows)


def domain_pairs(domain: str, split: str) -> Dataset:
    """Draw pairs of one domain (`film`, `products`, `tweets` or `editorials`), as `preference_pairs` does.

    Of film there are as many as by default, and of the smaller domains a quarter.

    Raises:
        ValueError: there is no such domain or split.
    """
    if domain not in DOMAINS or split not in SPLITS:
        raise ValueError(
            f"human_ratings:{domain}, split {split!r}: the domains are {', '.join(DOMAINS)}, and the splits "
            f"{', '.join(SPLITS)}. Name one of each."
        )
    pairs = EMBEDDED_PAIRS[split] if domain == "film" else EMBEDDED_PAIRS[split] // 4
    return preference_pairs(split, sources=(DOMAINS[domain],), pairs=pairs)


def ranked_pairs(
    split: str,
    *,
    sources: tuple[str, ...] = DOMAIN,
    size: int = 8,
    rounds: int = 2,
    min_gap: float = 0.5,
    seed: int = 0,
) -> Dataset:
    """Return same-prompt preference pairs of one split as rankings, to train a reward model on.

    In each round every snippet joins one group of up to `size` snippets that begin with the same word and have similar
    lengths. All pairs of a group follow each other. So a trainer that puts them into one batch scores each snippet once
    for all its pairs (Ouyang et al. 2022, arXiv 2203.02155, section 3.5). The columns are those of `preference_pairs`.
    """
    rows = []
    for groups in _ranked_groups(split, sources, size, rounds, seed):
        pairs = (_pair(a, b, min_gap) for group in groups for a, b in itertools.combinations(group, 2))
        rows += [row for row in pairs if row]
    return Dataset.from_list(rows)


def rankings(
    split: str, *, sources: tuple[str, ...] = DOMAIN, size: int = 8, rounds: int = 2, seed: int = 0
) -> Dataset:
    """Return the groups of `ranked_pairs` as rankings of up to `size` completions, the one that people rated best first.

    Of texts with equal mean ratings one is kept, since a ranking has no ties. All differ, and each keeps a word of its own.

    Columns: `prompt` (all the words that the group shares), `ranking` (list of the completions).
    """
    rows = []
    for groups in _ranked_groups(split, sources, size, rounds, seed):
        for group in groups:
            distinct = {snippet.text: snippet for snippet in reversed(group)}
            one_each = {snippet.mean: snippet for snippet in distinct.values()}
            ranked = [one_each[mean].text.split(" ") for mean in sorted(one_each, reverse=True)]
            shared = min((_shared_words(ranked[0], words) for words in ranked[1:]), default=0)
            if shared:
                completions = [" " + " ".join(words[shared:]) for words in ranked]
                rows.append({"prompt": " ".join(ranked[0][:shared]), "ranking": completions})
    return Dataset.from_list(rows)


def rated_texts(split: str, *, sources: tuple[str, ...] = DOMAIN) -> Dataset:
    """Return the snippets of one split with their mean ratings, from -4 to 4; snippets of one word are left out.

    Columns: `prompt` (the first word), `completion` (the others), `rating`.
    """
    found = [(snippet.text.partition(" "), snippet.mean) for snippet in load_split(split, sources)]
    rows = [{"prompt": first, "completion": f" {rest}", "rating": mean} for (first, _, rest), mean in found if rest]
    return Dataset.from_list(rows)


def _ranked_groups(
    split: str, sources: tuple[str, ...], size: int, rounds: int, seed: int
) -> Iterator[list[list[Snippet]]]:
    """Yield the groups of each round, in random order."""
    generator = random.Random(seed)
    openings = _openings(split, sources).values()
    for _ in range(rounds):
        groups = []
        for opening in openings:
            members = opening.copy()
            generator.shuffle(members)
            for start in range(0, len(members), 8 * size):
                window = sorted(members[start : start + 8 * size], key=lambda snippet: len(snippet.text))
                groups += [window[i : i + size] for i in range(0, len(window), size)]
        generator.shuffle(groups)
        yield groups


def _openings(split: str, sources: tuple[str, ...]) -> dict[tuple[str, str], list[Snippet]]:
    """Group the snippets of a split by source and first word; leave out snippets of one word."""
    groups = defaultdict(list)
    for snippet in load_split(split, sources):
        first, *others = snippet.text.split(" ")
        if others:
            groups[snippet.source, first].append(snippet)
    return groups


def _pair(a: Snippet, b: Snippet, min_gap: float) -> dict | None:
    """Return two snippets as a row of preferences.

    Return None if they share no first word, or if their mean ratings differ by less than `min_gap`.
    """
    if abs(a.mean - b.mean) < min_gap:
        return None
    chosen, rejected = (a, b) if a.mean > b.mean else (b, a)
    chosen_words, rejected_words = chosen.text.split(" "), rejected.text.split(" ")
    shared = _shared_words(chosen_words, rejected_words)
    if shared == 0:
        return None
    return {
        "prompt": " ".join(chosen_words[:shared]),
        "chosen": " " + " ".join(chosen_words[shared:]),
        "rejected": " " + " ".join(rejected_words[shared:]),
        "margin": chosen.mean - rejected.mean,
        "agreement": agreement(chosen, rejected),
    }


def prompts(split: str, *, sources: tuple[str, ...] = DOMAIN, seed: int = 0) -> Dataset:
    """Return prompts for PPO and evaluation: the first one to three words of each snippet of a split, in random order.

    Columns: `prompt`.
    """
    generator = random.Random(seed)
    rows = []
    for snippet in load_split(split, sources):
        words = snippet.text.split(" ")
        length = generator.randint(1, 3)
        if len(words) > length:
            rows.append(" ".join(words[:length]))
    generator.shuffle(rows)
    return Dataset.from_dict({"prompt": rows})


def texts(split: str, *, sources: tuple[str, ...] = DOMAIN) -> Dataset:
    """Return the whole snippets of one split, for supervised fine-tuning.

    Columns: `text`.
    """
    return Dataset.from_dict({"text": [snippet.text for snippet in load_split(split, sources)]})
