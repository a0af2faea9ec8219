"""Draw sentences in English and German for the translation recipe, from a grammar of some 150 words of each.

The sentences are simple and right: articles, adjective endings, verb forms, word order, numbers, dates, times and greetings.
"You" is "du", and "Sie" with Mr. and Mrs. The words are in `data.english_german`.

Each sentence pairs two of its words or numbers, such as verb and object, or day and month. No such pair is both in held-out
sentences and in others, but its words are.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from data.english_german import (
    ADJECTIVES,
    EINER,
    EVENTS,
    FIRST_NAMES,
    GREETINGS,
    HAVE,
    LAST_NAMES,
    MODALS,
    MONTHS,
    NOUNS,
    PRONOUNS,
    UNITS,
    VERBS,
    WHEN,
    Noun,
    number,
    ordinal,
)
from data.hh import is_held_out


class Sentence(NamedTuple):
    """An English sentence, its translations (the first is the one to learn), and the pair that decides its split."""

    en: str
    de: tuple[str, ...]
    pair: str


# Articles and possessives: English and the German stem; "der" is inflected by itself.
ARTICLES = [*[("the", "der")] * 2, *[("a", "ein")] * 2, ("my", "mein"), ("his", "sein")]
THE = {"nominative": {"m": "der", "f": "die", "n": "das"}, "accusative": {"m": "den", "f": "die", "n": "das"}}
EIN = {"nominative": {"m": "", "f": "e", "n": ""}, "accusative": {"m": "en", "f": "e", "n": ""}}
# Endings of an adjective after "der" and after words like "ein".
WEAK = {"nominative": {"m": "e", "f": "e", "n": "e"}, "accusative": {"m": "en", "f": "e", "n": "e"}}
MIXED = {"nominative": {"m": "er", "f": "e", "n": "es"}, "accusative": {"m": "en", "f": "e", "n": "es"}}


def phrase(
    noun: Noun, article: tuple[str, str], case: str, adjective: tuple[str, ...] | None = None
) -> tuple[str, str]:
    """Return a noun with article and adjective, in English and, in this case, in German."""
    english, stem = article
    definite = stem == "der"
    german = THE[case][noun.gender] if definite else stem + EIN[case][noun.gender]
    words, german_words = [noun.en], [noun.de]
    if adjective:
        words.insert(0, adjective[0])
        german_words.insert(0, adjective[1] + (WEAK if definite else MIXED)[case][noun.gender])
    if english == "a" and words[0][0] in "aeiou":
        english = "an"
    return " ".join([english, *words]), " ".join([german, *german_words])


def upper(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return text[0].upper() + text[1:]


class Grammar:
    """Draw sentences with a random generator."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        kinds: list[tuple[Callable[[], Sentence], int]] = [
            *((self.action, 60), (self.property, 12), (self.place, 7), (self.count, 9)),
            *((self.date, 5), (self.time, 3), (self.greeting, 4)),
        ]
        self.makers, self.weights = zip(*kinds, strict=True)

    def sentence(self) -> Sentence:
        """Draw a sentence of any kind."""
        (make,) = self.draw.choices(self.makers, self.weights)
        return make()

    def _noun(self, kinds: str) -> Noun:
        return self.draw.choice([noun for noun in NOUNS if noun.kind in kinds])

    def _phrase(self, noun: Noun, case: str, article: tuple[str, str] | None = None) -> tuple[str, str]:
        """Return a noun with an article, and half of the time with an adjective."""
        fitting = [adjective for adjective in ADJECTIVES if noun.kind in adjective[2]]
        adjective = self.draw.choice(fitting) if fitting and self.draw.random() < 0.5 else None
        return phrase(noun, article or self.draw.choice(ARTICLES), case, adjective)

    def _subject(self) -> tuple[str, str, int]:
        """Return a subject in English and German, and the place of the verb's form."""
        if self.draw.random() < 0.4:
            return self.draw.choice(PRONOUNS)
        return *self._phrase(self._noun("p"), "nominative"), 2

    def action(self) -> Sentence:
        """Draw a statement or question of subject, verb and object, in one of six forms."""
        verb = self.draw.choice(VERBS)
        noun = self._noun(verb.objects)
        who, wer, form = self._subject()
        third = form == 2
        shape = self.draw.choice(("plain", "plain", "when", "when", "not", "question", "modal", "perfect"))
        # "He does not see a dog": German says "keinen Hund", and to "the dog" adds "nicht".
        article = self.draw.choice(ARTICLES)
        what, was = self._phrase(noun, "accusative", article)
        verb_en, verb_de = verb.en_third if third else verb.en, verb[3 + form]
        german: tuple[str, ...]
        if shape == "plain":
            english, german = f"{who} {verb_en} {what}.", (f"{wer} {verb_de} {was}.",)
        elif shape == "when":
            when, wann = self.draw.choice(WHEN)
            english = f"{when} {who} {verb_en} {what}."
            german = (f"{wann} {verb_de} {wer} {was}.", f"{wer} {verb_de} {wann} {was}.")
        elif shape == "not":
            english = f"{who} {'does' if third else 'do'} not {verb.en} {what}."
            negated = f"k{was}" if article[0] == "a" else f"{was} nicht"
            german = (f"{wer} {verb_de} {negated}.",)
        elif shape == "question":
            english = f"{'does' if third else 'do'} {who} {verb.en} {what}?"
            german = (f"{verb_de} {wer} {was}?",)
        elif shape == "modal":
            plain, of_third, forms = self.draw.choice(MODALS)
            english = f"{who} {of_third if third else plain} {verb.en} {what}."
            german = (f"{wer} {forms[form]} {was} {verb.wir}.",)
        else:
            english = f"{who} {'has' if third else 'have'} {verb.en_done} {what}."
            german = (f"{wer} {HAVE[form]} {was} {verb.done}.",)
        return Sentence(upper(english), tuple(map(upper, german)), f"{verb.en} {noun.en}")

    def property(self) -> Sentence:
        """Draw a statement or question of what something is like."""
        adjective = self.draw.choice(ADJECTIVES)
        noun = self._noun(adjective[2])
        what, was = phrase(noun, self.draw.choice([one for one in ARTICLES if one[0] != "a"]), "nominative")
        form = self.draw.choice(("{0} is {1}.", "{0} is not {1}.", "is {0} {1}?", "{0} is very {1}."))
        forms = {"{0} is {1}.": "{0} ist {1}.", "{0} is not {1}.": "{0} ist nicht {1}."}
        forms |= {"is {0} {1}?": "ist {0} {1}?", "{0} is very {1}.": "{0} ist sehr {1}."}
        english, german = form.format(what, adjective[0]), forms[form].format(was, adjective[1])
        return Sentence(upper(english), (upper(german),), f"{noun.en} {adjective[0]}")

    def place(self) -> Sentence:
        """Draw a statement or question of where somebody is."""
        noun, place = self._noun("pa"), self._noun("l")
        what, was = phrase(noun, self.draw.choice([one for one in ARTICLES if one[0] != "a"]), "nominative")
        where, wo = f"in the {place.en}", f"{'in der' if place.gender == 'f' else 'im'} {place.de}"
        english, german = self.draw.choice(
            ((f"{what} is {where}.", f"{was} ist {wo}."), (f"is {what} {where}?", f"ist {was} {wo}?"))
        )
        return Sentence(upper(english), (upper(german),), f"{noun.en} {place.en}")

    def count(self) -> Sentence:
        """Draw a statement of how many things somebody has, sees or needs."""
        noun, value = self._noun("aftwr"), self.draw.randrange(2, 100)
        who, wer, form = self._subject()
        many, viele = number(value)
        verb, third, forms = self.draw.choice(
            [
                ("have", "has", HAVE),
                *((verb.en, verb.en_third, verb[3:7]) for verb in VERBS if verb.en in ("see", "buy")),
            ]
        )
        english = f"{who} {third if form == 2 else verb} {many} {noun.en_many}."
        return Sentence(upper(english), (upper(f"{wer} {forms[form]} {viele} {noun.de_many}."),), f"{value} {noun.en}")

    def date(self) -> Sentence:
        """Draw a date, of today or of an event."""
        day, (month, monat) = self.draw.randrange(1, 29), self.draw.choice(MONTHS.split(", ")).split()
        en, de = ordinal(day)
        pair = f"{day} {month}"
        if self.draw.random() < 0.3:
            return Sentence(f"Today is the {en} of {month}.", (f"Heute ist der {de}e {monat}.",), pair)
        event, ereignis = self.draw.choice(EVENTS)
        return Sentence(
            f"The {event} is on the {en} of {month}.", (f"{upper(ereignis)} ist am {de}en {monat}.",), pair
        )

    def time(self) -> Sentence:
        """Draw the time of day, of now or of an event."""
        hour, kind = self.draw.randrange(1, 13), self.draw.randrange(4)
        event, ereignis = self.draw.choice([("it is", "es ist"), *EVENTS])
        en, de = UNITS[hour - 1], EINER[hour - 1]
        when, wann = (
            (f"{en} o'clock", f"{'ein' if hour == 1 else de} Uhr"),
            (f"half past {en}", f"halb {EINER[hour % 12]}"),
            (f"a quarter past {en}", f"Viertel nach {de}"),
            (f"a quarter to {en}", f"Viertel vor {de}"),
        )[kind]
        pair = f"{kind} {hour} {event}"
        if event == "it is":
            return Sentence(f"It is {when}.", (f"Es ist {wann}.",), pair)
        return Sentence(f"The {event} begins at {when}.", (f"{upper(ereignis)} beginnt um {wann}.",), pair)

    def greeting(self) -> Sentence:
        """Draw a greeting, to a first name or to Mr. or Mrs. and a last name."""
        en, de = self.draw.choice(GREETINGS)
        if self.draw.random() < 0.5:
            name = german_name = self.draw.choice(FIRST_NAMES)
            words = {"you": "dir", "are": "bist du"}
        else:
            title, anrede = self.draw.choice((("Mr.", "Herr"), ("Mrs.", "Frau")))
            last = self.draw.choice(LAST_NAMES)
            name, german_name = f"{title} {last}", f"{anrede} {last}"
            words = {"you": "Ihnen", "are": "sind Sie"}
        return Sentence(en.format(name), (de.format(german_name, **words),), f"{en} {name}")


# Share of the pairs (`Sentence.pair`) that only held-out sentences have.
HELD_OUT = 0.15


def translation(generator: random.Random, *, held_out: bool) -> dict:
    """Draw a sentence that is held out or is not, as a row of `prompt`, `completion` and `references`."""
    grammar = Grammar(generator)
    while True:
        english, german, pair = grammar.sentence()
        if is_held_out([{"content": pair}], HELD_OUT) == held_out:
            prompt = f"English: {english}\nGerman:"
            return {"prompt": prompt, "completion": f" {german[0]}", "references": list(german)}
