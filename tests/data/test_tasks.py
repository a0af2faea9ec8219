"""`data.tasks`: what it writes can be answered from the text alone, and no held-out fact is trained on."""

import re

import pytest

from data import tasks
from data.film_facts import RELATIONS, Fact
from data.prompts import load_prompts
from data.texts import load_texts
from reward_models.answers import exact_match, token_f1
from reward_models.triples import get_triple_reward, triple_f1


SIZES = ["--demonstrations", "60", "--prompts", "50", "--held_out", "40"]


def reader(template: str) -> re.Pattern:
    """A reader of one sentence: a film is "The X", or "it" in later sentences."""
    text = (
        re.escape(template).replace(r"\{film\}", r"(?P<film>The \w+|[Ii]t)").replace(r"\{object\}", r"(?P<object>\w+)")
    )
    return re.compile(text)


SENTENCES = [(name, reader(text)) for name, relation in RELATIONS.items() for text in relation.sentences]


def read(text: str) -> list[Fact]:
    """The facts that a text states, in its order."""
    found = []
    for sentence in re.findall(r"[^.]+\.", text):
        ((name, match),) = [(name, match) for name, of in SENTENCES if (match := of.fullmatch(sentence.strip()))]
        assert (match["film"].lower() == "it") == bool(found)
        found.append(Fact(found[0].film if found else match["film"], name, match["object"]))
    return found


FILMS = ("question_answering", "knowledge_graph")


@pytest.fixture(params=FILMS)
def made(request, tmp_path, capsys):
    tasks.main([request.param, str(tmp_path / "data"), *SIZES])
    said = "60 rows in sft_train.jsonl, 50 rows in prompts_train.jsonl, 40 rows in prompts_test.jsonl."
    assert said in capsys.readouterr().out
    return request.param, tmp_path / "data"


def test_stages_read_the_files(made):
    task, folder = made
    column = {"question_answering": "answers", "knowledge_graph": "triples"}[task]
    assert load_texts(str(folder / "sft_train.jsonl"), "train").column_names == ["prompt", "completion"]
    for split, rows in (("train", 50), ("test", 40)):
        prompts = load_prompts(str(folder / f"prompts_{split}.jsonl"), split)
        assert prompts.column_names == ["prompt", column] and len(prompts) == rows


def test_no_held_out_fact_is_trained_on(made):
    _, folder = made
    facts, prompts = {}, {}
    for name in ("sft_train", "prompts_train", "prompts_test"):
        prompts[name] = load_prompts(str(folder / f"{name}.jsonl"), "train")["prompt"][:]
        texts = [re.sub(r"\. [^.]+[?:]$", ".", prompt) for prompt in prompts[name]]
        facts[name] = {fact for text in texts for fact in read(text)}
    assert len(facts["prompts_test"]) > 40
    assert not facts["prompts_test"] & (facts["sft_train"] | facts["prompts_train"])
    together = sum(prompts.values(), [])
    assert len(set(together)) == len(together) == 150


def test_an_answer_stands_in_the_text_once():
    for row in tasks.make("question_answering", 200, 200, 100, 1)["prompts_test"]:
        text, _, question = row["prompt"].rpartition(". ")
        (asked,) = [name for name, relation in RELATIONS.items() if relation.question == question]
        assert row["answers"] == [fact.object for fact in read(text + ".") if fact.relation == asked]
        assert text.count(row["answers"][0]) == 1


def test_triples_are_the_facts_of_the_text():
    sizes = set()
    for row in tasks.make("knowledge_graph", 1, 1, 100, 1)["prompts_test"]:
        facts = read(row["prompt"].removesuffix(" Triples:"))
        assert row["triples"] == [" | ".join(fact) for fact in facts]
        sizes.add(len(facts))
    assert sizes == {1, 2, 3}


def test_demonstrations_earn_the_whole_reward():
    for task, rewards in (
        ("question_answering", (exact_match, token_f1)),
        ("knowledge_graph", (triple_f1, get_triple_reward())),
    ):
        generator = tasks.random.Random(0)
        rows = [tasks.TASKS[task].draw(generator, held_out=False) for _ in range(100)]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        columns["completions"] = columns.pop("completion")
        for reward in rewards:
            assert reward(**columns) == [1.0] * 100


def test_a_seed_draws_the_rows():
    first, again, other = (tasks.make("knowledge_graph", 5, 5, 5, seed) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize("option", ["demonstrations", "prompts", "held_out"])
def test_no_empty_file(option, capsys, tmp_path):
    with pytest.raises(SystemExit):
        tasks.main(["knowledge_graph", str(tmp_path), f"--{option}", "0"])
    assert f"--{option} 0 must be 1 or more." in capsys.readouterr().err


@pytest.mark.slow
def test_no_more_rows_than_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr("data.film_facts.FILMS", ["The Ring"])
    with pytest.raises(
        ValueError, match=r"^prompts_test: 9000 rows are wanted, and there are only about \d+\. Lower the"
    ):
        tasks.make("knowledge_graph", 1, 1, 9000, 0)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_file_of_the_user_is_kept(task, tmp_path):
    (tmp_path / "sft_train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"sft_train\.jsonl is there, and no conversion has written it"):
        tasks.main([task, str(tmp_path), *SIZES])
    assert [path.name for path in tmp_path.iterdir()] == ["sft_train.jsonl"]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_command_always_writes_the_same_files(task, tmp_path, capsys):
    for folder in ("one", "two"):
        tasks.main([task, str(tmp_path / folder), *SIZES])
    assert capsys.readouterr().out.endswith(
        "two: 60 rows in sft_train.jsonl, 50 rows in prompts_train.jsonl, 40 rows in prompts_test.jsonl.\n"
    )
    for name in ("sft_train", "prompts_train", "prompts_test"):
        one, two = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("one", "two"))
        assert one == two


def test_a_task_has_a_number_of_rows_of_its_own():
    for task, rows in (("knowledge_graph", 2048), ("translation", 6144)):
        found = tasks.arguments([task, "folder"])
        assert (found.demonstrations, found.prompts, found.held_out) == (rows, rows, 512)
    assert tasks.arguments(["translation", "folder", "--prompts", "7"]).prompts == 7
