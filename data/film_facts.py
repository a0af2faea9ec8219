"""Make short texts about films that state facts, to ask questions about and to extract the facts from.

The films, people and places are made up. Their names are words of the embedded backbone's vocabulary, one token each, and a
seed draws everything. A fact is a triple (film, relation, object).
"""

import random
from typing import NamedTuple


FILMS = [
    f"The {noun}"
    for noun in (
        "Ring Dragon Queen Bridge Wedding Dream Ghost Island Secret Wind Angel Blade Judge King Star Wall Ball Bull Night Park "
        "Museum Square Hill Street"
    ).split()
]
FIRST_NAMES = (
    "John Jack Robert David Michael Steven Paul Peter Frank Ryan Kevin Jason Jerry Mark Mike Henry William Elizabeth Sara Anne "
    "Mary Martha Carl Roger"
).split()
LAST_NAMES = (
    "Green Murphy Allen Moore Scott Jones Brown Parker Smith Fisher Howard Kennedy Hoffman Kaufman Miller Burns Davis Harrison "
    "Anderson Jackson Williams Adams Grant Blair"
).split()
PLACES = (
    "Hollywood Manhattan Washington Paris London Boston Brooklyn Chicago Texas California Japan China Canada Europe France "
    "Africa"
).split()
# Of each relation: how a text states it, and the question whose answer is the object.
RELATIONS = {
    "director": (("{object} directed {film}.", "{film} was directed by {object}."), "Who directed {film}?"),
    "star": (("{object} stars in {film}.", "{film} stars {object}."), "Who stars in {film}?"),
    "place": (("{film} was shot in {object}.", "They shot {film} in {object}."), "Where was {film} shot?"),
}
# The number of each name in its list; no name is in two lists.
NUMBERS = {name: number for names in (FILMS, FIRST_NAMES, LAST_NAMES, PLACES) for number, name in enumerate(names)}


class Fact(NamedTuple):
    """One fact about a film."""

    film: str
    relation: str
    object: str


def is_held_out(fact: Fact) -> bool:
    """Tell whether no text to train on states the fact: so knowing facts by heart answers no held-out question.

    It is a fifth of all facts: of each film, every fifth place, and with each first name, every fifth last name.
    """
    return sum(NUMBERS[name] for name in (fact.film, *fact.object.split())) % 5 == 0


def draw_facts(generator: random.Random, count: int, *, held_out: bool) -> list[Fact]:
    """Draw different facts about two films, all of them held out, or none; no object is drawn twice.

    Two facts of one relation are about different films. So a question has one answer in the text.
    """
    films = generator.sample(FILMS, 2)
    asked = generator.sample([(film, relation) for film in films for relation in RELATIONS], count)
    facts: list[Fact] = []
    for film, relation in asked:
        while True:
            thing = (
                generator.choice(PLACES)
                if relation == "place"
                else f"{generator.choice(FIRST_NAMES)} {generator.choice(LAST_NAMES)}"
            )
            fact = Fact(film, relation, thing)
            names = set(thing.split())
            if is_held_out(fact) == held_out and not any(names & set(other.object.split()) for other in facts):
                break
        facts.append(fact)
    return facts


def state(generator: random.Random, facts: list[Fact]) -> str:
    """Return a text with one sentence for each fact, in their order."""
    return " ".join(
        generator.choice(RELATIONS[fact.relation][0]).format(film=fact.film, object=fact.object) for fact in facts
    )


def question_answering(generator: random.Random, *, held_out: bool) -> dict:
    """Return one row of prompt, completion and `answers`: a text of three facts, and a question about one of them.

    A person may be named by the last name alone, which is the second reference.
    """
    facts = draw_facts(generator, 3, held_out=held_out)
    asked = generator.choice(facts)
    question = RELATIONS[asked.relation][1].format(film=asked.film)
    return {
        "prompt": f"{state(generator, facts)} {question}",
        "completion": f" {asked.object}",
        "answers": list(dict.fromkeys((asked.object, asked.object.split()[-1]))),
    }


def knowledge_graph(generator: random.Random, *, held_out: bool) -> dict:
    """Return one row of prompt, completion and `triples`: a text of two or three facts, to be written as lines."""
    facts = draw_facts(generator, generator.choice((2, 3)), held_out=held_out)
    lines = [" | ".join(fact) for fact in facts]
    return {
        "prompt": f"{state(generator, facts)} Triples:",
        "completion": "".join(f"\n{line}" for line in lines),
        "triples": lines,
    }
