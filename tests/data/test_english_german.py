"""`data.translation`: German by hand, and no held-out pair of words in training."""

import random
import re
from itertools import chain

import pytest

from data.english_german import ADJECTIVES, NOUNS, number, ordinal
from data.hh import is_held_out
from data.tasks import make
from data.translation import HELD_OUT, Grammar, phrase


ARTICLES = {"the": "der", "a": "ein", "my": "mein", "his": "sein"}
SIZES = {"sft_train": 3000, "prompts_train": 3000, "prompts_test": 500}


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return make("translation", *SIZES.values(), 0)


@pytest.mark.parametrize(
    ("noun", "article", "case", "adjective", "english", "german"),
    [
        ("man", "the", "nominative", "old", "the old man", "der alte Mann"),
        ("man", "the", "accusative", "old", "the old man", "den alten Mann"),
        ("woman", "the", "accusative", "young", "the young woman", "die junge Frau"),
        ("child", "the", "accusative", "small", "the small child", "das kleine Kind"),
        ("man", "a", "nominative", "sick", "a sick man", "ein kranker Mann"),
        ("apple", "a", "accusative", "red", "a red apple", "einen roten Apfel"),
        ("apple", "a", "nominative", None, "an apple", "ein Apfel"),
        ("egg", "a", "accusative", "white", "a white egg", "ein weißes Ei"),
        ("city", "a", "accusative", "old", "an old city", "eine alte Stadt"),
        ("car", "my", "nominative", "new", "my new car", "mein neues Auto"),
        ("cat", "my", "nominative", "beautiful", "my beautiful cat", "meine schöne Katze"),
        ("dog", "his", "accusative", "black", "his black dog", "seinen schwarzen Hund"),
    ],
)
def test_endings_by_hand(noun, article, case, adjective, english, german):
    (noun,) = [one for one in NOUNS if one.en == noun]
    (adjective,) = [one for one in ADJECTIVES if one[0] == adjective] or [None]
    assert phrase(noun, (article, ARTICLES[article]), case, adjective) == (english, german)


@pytest.mark.parametrize(
    ("value", "english", "german"),
    [
        (2, "two", "zwei"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (20, "twenty", "zwanzig"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (99, "ninety-nine", "neunundneunzig"),
    ],
)
def test_numbers(value, english, german):
    assert number(value) == (english, german)


@pytest.mark.parametrize(
    ("day", "english", "german"),
    [
        (1, "first", "erst"),
        (3, "third", "dritt"),
        (4, "fourth", "viert"),
        (7, "seventh", "siebt"),
        (8, "eighth", "acht"),
        (12, "twelfth", "zwölft"),
        (19, "nineteenth", "neunzehnt"),
        (20, "twentieth", "zwanzigst"),
        (21, "twenty-first", "einundzwanzigst"),
        (28, "twenty-eighth", "achtundzwanzigst"),
    ],
)
def test_days_of_the_month(day, english, german):
    assert ordinal(day) == (english, german)


# Drawn sentences, translated by hand: each kind of sentence, of subject and of word order.
BY_HAND = {
    "We buy seven clocks.": "Wir kaufen sieben Uhren.",
    "She has forty-seven lamps.": "Sie hat siebenundvierzig Lampen.",
    "The girl reads his beautiful letter.": "Das Mädchen liest seinen schönen Brief.",
    "On Friday he finds his black bottle.": "Am Freitag findet er seine schwarze Flasche.",
    "Today the woman buys his cat.": "Die Frau kauft heute seine Katze.",
    "My doctor does not buy the white picture.": "Mein Arzt kauft das weiße Bild nicht.",
    "He does not eat a warm apple.": "Er isst keinen warmen Apfel.",
    "Does a beautiful man wear the hat?": "Trägt ein schöner Mann den Hut?",
    "Do they love the big doctor?": "Lieben sie den großen Arzt?",
    "The teacher can buy a red apple.": "Der Lehrer kann einen roten Apfel kaufen.",
    "The young child wants to find my car.": "Das junge Kind will mein Auto finden.",
    "His sister has looked for my big kitchen.": "Seine Schwester hat meine große Küche gesucht.",
    "Is his cat in the car?": "Ist seine Katze im Auto?",
    "The man is in the school.": "Der Mann ist in der Schule.",
    "The brother is very happy.": "Der Bruder ist sehr glücklich.",
    "Today is the fourth of July.": "Heute ist der vierte Juli.",
    "The film is on the nineteenth of July.": "Der Film ist am neunzehnten Juli.",
    "It is a quarter past two.": "Es ist Viertel nach zwei.",
    "The game begins at a quarter to one.": "Das Spiel beginnt um Viertel vor eins.",
    "Where are you, Mr. Weber?": "Wo sind Sie, Herr Weber?",
    "Good morning, Maria!": "Guten Morgen, Maria!",
}


def test_sentences_by_hand():
    grammar, found = Grammar(random.Random(0)), {}
    for _ in range(400):
        sentence = grammar.sentence()
        found[sentence.en] = sentence.de
    for english, german in BY_HAND.items():
        assert german in found[english]


def test_no_held_out_pair_is_trained_on_but_every_word_is(files):
    grammar, pairs = Grammar(random.Random(1)), {True: set(), False: set()}
    for _ in range(3000):
        sentence = grammar.sentence()
        pairs[is_held_out([{"content": sentence.pair}], HELD_OUT)].add(sentence.pair)
    assert not pairs[True] & pairs[False] and len(pairs[True]) > 50

    def words(*names: str) -> set[str]:
        rows = chain.from_iterable(files[name] for name in names)
        return {word for row in rows for word in re.findall(r"[\w-]+", row["prompt"])}

    assert not words("prompts_test") - words("sft_train", "prompts_train")
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())


def test_rows_have_the_columns_of_their_stage(files):
    for row in files["sft_train"]:
        assert set(row) == {"prompt", "completion"} and re.fullmatch(r" \w.*[.?!]", row["completion"])
    for row in files["prompts_train"] + files["prompts_test"]:
        assert set(row) == {"prompt", "references"} and all(
            re.fullmatch(r"\w.*[.?!]", text) for text in row["references"]
        )
        assert re.fullmatch(r"English: \w.*[.?!]\nGerman:", row["prompt"])
    assert {len(row["references"]) for row in files["prompts_test"]} == {1, 2}  # two word orders
