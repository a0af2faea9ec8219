"""Make short texts about a film that state facts, to ask questions about and to extract the facts from.

The films, people and places are made up. Their names are words of the embedded backbone's vocabulary, one token each, and a
seed draws everything. A fact is a triple (film, relation, object).
"""

import random
from typing import NamedTuple


FILMS = [
    f"The {noun}"
    for noun in (
        "Ring Dragon Queen Bridge Wedding Dream Ghost Island Secret Wind Angel Blade Judge King Star Wall Ball Bull Night "
        "Park Museum Square Hill Street"
    ).split()
]
PEOPLE = (
    "Green Murphy Allen Moore Scott Jones Brown Parker Smith Fisher Howard Kennedy Hoffman Kaufman Miller Burns Davis "
    "Harrison Anderson Jackson Williams Adams Grant Blair"
).split()
PLACES = (
    "Hollywood Manhattan Washington Paris London Boston Brooklyn Chicago Texas California Japan China Canada Europe France "
    "Africa"
).split()
# The number of each name in its list; no name is in two lists.
NUMBERS = {name: number for names in (FILMS, PEOPLE, PLACES) for number, name in enumerate(names)}


class Relation(NamedTuple):
    """A relation: its possible objects, the sentences that state it, and the question that asks for the object."""

    objects: list[str]
    sentences: tuple[str, ...]
    question: str


RELATIONS = {
    "director": Relation(
        PEOPLE, ("{object} directed {film}.", "{film} was directed by {object}."), "Who directed it?"
    ),
    "star": Relation(PEOPLE, ("{object} stars in {film}.", "{film} stars {object}."), "Who stars in it?"),
    "place": Relation(PLACES, ("They shot {film} in {object}.", "{film} was shot in {object}."), "Where was it shot?"),
}


class Fact(NamedTuple):
    """One fact about a film."""

    film: str
    relation: str
    object: str


def is_held_out(fact: Fact) -> bool:
    """Tell whether no text to train on states the fact: so knowing facts by heart answers no held-out question.

    For each film it is every fifth person and every fifth place.
    """
    return (NUMBERS[fact.film] + NUMBERS[fact.object]) % 5 == 0


def draw_facts(generator: random.Random, count: int, *, held_out: bool) -> list[Fact]:
    """Draw facts of different relations about one film, all of them held out, or none; no object is drawn twice."""
    film = generator.choice(FILMS)
    facts: list[Fact] = []
    for relation in generator.sample(list(RELATIONS), count):
        possible = [Fact(film, relation, thing) for thing in RELATIONS[relation].objects]
        used = {fact.object for fact in facts}
        facts.append(
            generator.choice([fact for fact in possible if is_held_out(fact) == held_out and fact.object not in used])
        )
    return facts


def state(generator: random.Random, facts: list[Fact]) -> str:
    """Return a text with one sentence for each fact, in their order; only the first names the film."""
    sentences = []
    for number, fact in enumerate(facts):
        sentence = generator.choice(RELATIONS[fact.relation].sentences)
        sentence = sentence.format(film="it" if number else fact.film, object=fact.object)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)


def question_answering(generator: random.Random, *, held_out: bool) -> dict:
    """Return one row of prompt, completion and `answers`: a text of three facts, and a question about one of them."""
    facts = draw_facts(generator, 3, held_out=held_out)
    asked = generator.choice(facts)
    return {
        "prompt": f"{state(generator, facts)} {RELATIONS[asked.relation].question}",
        "completion": f" {asked.object}",
        "answers": [asked.object],
    }


def knowledge_graph(generator: random.Random, *, held_out: bool) -> dict:
    """Return one row of prompt, completion and `triples`: a text of one to three facts, to be written as lines."""
    facts = draw_facts(generator, generator.choice((1, 2, 3)), held_out=held_out)
    lines = [" | ".join(fact) for fact in facts]
    return {
        "prompt": f"{state(generator, facts)} Triples:",
        "completion": "".join(f"\n{line}" for line in lines),
        "triples": lines,
    }
