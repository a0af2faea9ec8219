"""`data.convert`: pairs by hand of judgements, ratings, rankings and thumbs; splits apart; nothing of a user overwritten."""

import gzip
import json

import pytest
from datasets import Dataset

from data import convert
from data.conversion import in_form, make
from data.files import load_rows
from data.layouts import HH, JUDGEMENTS, PAIRS, RANKS, RATINGS, THUMBS, recognise
from data.pairing import Options
from data.preferences import check_preferences, load_preferences
from data.prompts import check_prompts, load_prompts
from data.texts import check_texts, load_texts


def made(rows: list[dict], *, options: Options = Options(), **given):  # noqa: B008
    data = Dataset.from_list(rows)
    return make(data, "p", recognise(data, "p", given), options)


def pair(chosen: str, rejected: str, prompt: str = "Q", **others) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | others


# ------------------------------------------------------------------------------------ layouts
LAYOUTS = {
    "judgements": ({"question": "Q", "response_a": "x", "response_b": "y", "winner": "a"}, JUDGEMENTS),
    "PKU-SafeRLHF": ({"prompt": "Q", "response_0": "x", "response_1": "y", "better_response_id": 1}, JUDGEMENTS),
    "PandaLM": (
        {"instruction": "Q", "input": "", "response1": "x", "response2": "y", "annotator1": 1, "annotator2": 0},
        JUDGEMENTS,
    ),
    "MT-bench": (
        {
            "question_id": 1,
            "conversation_a": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x"}],
            "conversation_b": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "y"}],
            "winner": "model_a",
        },
        JUDGEMENTS,
    ),
    "two summaries": ({"post": "Q", "Summary 1": "x", "Summary 2": "y", "choice": 1}, JUDGEMENTS),
    "ratings": ({"prompt": "Q", "response": "x", "score": 3.5}, RATINGS),
    "ratings of several people": ({"prompt": "Q", "text": "x", "rater_1": 3, "rater_2": 4}, RATINGS),
    "UltraFeedback": ({"instruction": "Q", "completions": [{"response": "x", "overall_score": 7.5}]}, RATINGS),
    "lists": ({"prompt": "Q", "responses": ["x", "y"], "scores": [1, 2]}, RATINGS),
    "two ratings": ({"question": "Q", "answer_0": "x", "answer_1": "y", "score_0": 0.5, "score_1": -0.5}, RATINGS),
    "ranks": ({"prompt": "Q", "answer": "x", "rank": 1}, RANKS),
    "Nectar": ({"prompt": "Q", "answers": [{"answer": "x", "rank": 1, "model": "m"}]}, RANKS),
    "best first": ({"prompt": "Q", "ranking": ["x", "y"]}, RANKS),
    "thumbs": ({"prompt": "Q", "completion": "x", "label": True}, THUMBS),
    "thumbs in words": ({"prompt": "Q", "reply": "x", "feedback": "thumbs_up"}, THUMBS),
    "sentiment by group": ({"Sentiment": "Negative", "Text": "x", "batch_id": "4"}, THUMBS),
    "pairs": ({"prompt": "Q", "chosen": "x", "rejected": "y", "score": 1}, PAIRS),
    "HH": ({"chosen": "\n\nHuman: Q\n\nAssistant: x", "rejected": "\n\nHuman: Q\n\nAssistant: y"}, HH),
}


@pytest.mark.parametrize(("row", "kind"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_recognised_by_its_columns(row, kind):
    assert recognise(Dataset.from_list([row]), "p").kind == kind


UNRECOGNISED = {
    "texts": ({"text": "x"}, "no preferences are recognised in the columns"),
    "texts of three": ({"prompt": "Q", "response_1": "x", "response_2": "y", "response_3": "z"}, "no preferences"),
    "classes of texts": ({"prompt": "Q", "completion": "x", "label": "sports"}, "no preferences"),
    "no label": ({"prompt": "Q", "response_1": "x", "response_2": "y"}, "no column tells which is better"),
    "no prompt": ({"text": "x", "rating": 3}, "no column tells which texts answer the same prompt"),
}


@pytest.mark.parametrize(("row", "message"), UNRECOGNISED.values(), ids=UNRECOGNISED)
def test_what_is_not_recognised_says_how_to_name_it(row, message):
    with pytest.raises(ValueError, match=f"^p: .*{message}.*--"):
        recognise(Dataset.from_list([row]), "p")


# ------------------------------------------------------------------------------------ judgements
def judged(*labels, prompt: str = "Q") -> dict:
    return {"prompt": prompt, "response1": "x", "response2": "y"} | {
        f"annotator{number}": label for number, label in enumerate(labels, 1)
    }


AGREEMENT = {
    "all the first": ((1, 1, 1), pair("x", "y", agreement=1.0)),
    "two of three the second": ((2, 1, 2), pair("y", "x", agreement=2 / 3)),
    "a tie counts half for each side": ((1, 0, 0), pair("x", "y", agreement=2 / 3)),
    "one who skipped does not count": ((1, None, 0), pair("x", "y", agreement=3 / 4)),
}


@pytest.mark.parametrize(("labels", "expected"), AGREEMENT.values(), ids=AGREEMENT)
def test_agreement_is_the_share_of_annotators_on_the_winners_side(labels, expected):
    (found,) = made([judged(*labels), judged(1, 2, 0, prompt="tied")]).pairs
    votes = found.pop("votes")
    assert found == expected | {"agreement": pytest.approx(expected["agreement"])}
    assert list(votes) == ["annotator1", "annotator2", "annotator3"]
    assert [vote is None for vote in votes.values()] == [label is None for label in labels]
    cast = [vote for vote in votes.values() if vote is not None]
    assert sum(cast) / len(cast) == pytest.approx(found["agreement"])  # each is turned to the winner's side


def test_ties_are_left_out_or_kept_with_half():
    rows = [judged(0), judged(2, prompt="R")]
    found = made(rows)
    assert found.pairs == [pair("y", "x", "R")]
    assert found.left_out == {"the annotators are tied": [0]}
    kept = made(rows, options=Options(ties=True))
    assert [one["agreement"] for one in kept.pairs] == [0.5, 1.0]
    assert kept.liked == [{"prompt": "R", "completion": "y"}]


def test_rows_that_judge_the_same_responses_are_votes():
    rows = [judged(1), judged(1), {"prompt": "Q", "response1": "y", "response2": "x", "annotator1": 1}]
    assert made(rows).pairs == [pair("x", "y", agreement=pytest.approx(2 / 3))]


def test_labels_that_could_mean_several_things_are_to_be_explained():
    rows = [{"prompt": "Q", "response_a": "x", "response_b": "y", "label": label} for label in (0, 1)]
    with pytest.raises(ValueError, match=r"^p: the labels \['0', '1'\] do not tell .* --first_wins=0 --second_wins=1"):
        made(rows)
    explained = Options(labels={"first_wins": ["1"], "second_wins": ["0"]})
    assert made(rows[:1], options=explained).pairs == [pair("y", "x")]
    numbered = [{"prompt": "Q", "response_0": "x", "response_1": "y", "label": label} for label in (0, 1)]
    assert made(numbered[1:]).pairs == [pair("y", "x")]


@pytest.mark.parametrize(
    ("label", "better"), [("A", "x"), ("model_b", "y"), ("response1", "x"), ("[2, 2]", "y"), (2.0, "y")]
)
def test_words_of_labels(label, better):
    assert made([judged(label)], label=["annotator1"]).pairs[0]["chosen"] == better


def test_instruction_and_input_are_one_prompt():
    row = {"instruction": "Translate.", "input": "Guten Tag", "response1": "x", "response2": "y", "label": 1}
    found = made([row, row | {"input": ""}])
    assert [one["prompt"] for one in found.pairs] == ["Translate.\n\nGuten Tag", "Translate."]


# ------------------------------------------------------------------------------------ ratings, ranks, thumbs
def rated(*values, column: str = "score") -> list[dict]:
    return [{"prompt": "Q", "response": text, column: value} for text, value in zip("wxyz", values, strict=False)]


def test_pairs_of_ratings_have_their_difference_as_margin():
    found = made([*rated(1, 3, 3.5), {"prompt": "R", "response": "x", "score": 1}])
    assert found.pairs == [pair("y", "x", margin=0.5), pair("y", "w", margin=2.5), pair("x", "w", margin=2.0)]
    assert found.liked == [{"prompt": "Q", "completion": "y"}]
    assert found.left_out == {"no other text has this prompt": [3]}
    assert [one["margin"] for one in made(rated(1, 3, 3.5), options=Options(min_gap=2)).pairs] == [2.5, 2.0]
    assert [one["margin"] for one in made(rated(1, 3, 3.5), options=Options(adjacent=True)).pairs] == [0.5, 2.0]


def test_ratings_of_several_people_give_a_mean_and_an_agreement():
    rows = [{"prompt": "Q", "text": text, "rater_1": a, "rater_2": b} for text, a, b in (("x", 5, 3), ("y", 3, 1))]
    # of the four pairs of ratings 5 > 3, 5 > 1, 3 = 3, 3 > 1
    assert made(rows).pairs == [pair("x", "y", margin=2.0, agreement=3.5 / 4)]
    in_rows = [
        {"prompt": "Q", "text": row["text"], "score": row[rater]} for rater in ("rater_1", "rater_2") for row in rows
    ]
    assert made(in_rows).pairs == made(rows).pairs


def test_two_texts_with_a_rating_each():
    row = {"prompt": "Q", "answer_0": "x", "answer_1": "y", "score_0": -0.5, "score_1": 0.5}
    assert made([row]).pairs == [pair("y", "x", margin=1.0)]


def test_pairs_whose_prompt_has_another_name_and_whose_sides_are_rated():
    row = {"question": "Q", "chosen": "x", "rejected": "y", "chosen_score": 3, "rejected_score": 1.5}
    assert made([row, row | {"question": ""}]).pairs == [pair("x", "y", margin=1.5)]
    assert made([row | {"task": "T"}], prompt=["task"]).pairs == [pair("x", "y", "T", margin=1.5)]
    implicit = {"chosen": "Q is x", "rejected": "Q is y"}
    assert made([implicit, {"chosen": "a", "rejected": "b"}]).pairs == [pair(" x", " y", "Q is"), pair("a", "b", "")]


ORDERED = {
    "ranks in rows": rated(1, 2, 3, column="rank"),
    "a list of ranks": [{"prompt": "Q", "responses": ["x", "w", "y"], "ranks": [2, 1, 3]}],
    "texts, best first": [{"prompt": "Q", "ranking": ["w", "x", "y"]}],
    "objects": [{"prompt": "Q", "answers": [{"answer": text, "rank": at} for at, text in enumerate("wxy", 1)]}],
    "JSON in a cell of CSV": [{"prompt": "Q", "responses": '["w", "x", "y"]', "ranks": "[1, 2, 3]"}],
}


@pytest.mark.parametrize("rows", ORDERED.values(), ids=ORDERED)
def test_a_ranking_of_three_makes_three_pairs_or_two(rows):
    assert made(rows).pairs == [pair("w", "x"), pair("w", "y"), pair("x", "y")]
    assert made(rows, options=Options(adjacent=True)).pairs == [pair("w", "x"), pair("x", "y")]


def test_thumbs_make_pairs_where_a_prompt_has_both_and_texts_of_all_that_are_liked():
    rows = [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, text, label in (
            ("Q", "x", True),
            ("Q", "y", False),
            ("Q", "z", True),
            ("R", "x", True),
            ("S", "x", False),
        )
    ]
    found = made(rows)
    assert found.pairs == [pair("x", "y"), pair("z", "y")]
    assert [tuple(row.values()) for row in found.liked] == [("Q", "x"), ("Q", "z"), ("R", "x")]
    assert found.left_out == {"no other text has this prompt": [3, 4]}


def test_without_a_prompt_texts_of_a_group_begin_alike():
    rows = [
        {"Text": text, "Sentiment": word, "batch_id": group}
        for text, word, group in (
            ("So bad a film", "Negative", "1"),
            ("So good a film", "Positive", "1"),
            ("Yes", "Positive", "2"),
        )
    ]
    assert made(rows).pairs == [pair(" good a film", " bad a film", "So")]


def test_texts_whose_group_is_missing_do_not_belong_together():
    rows = [{"text": text, "score": score, "group": group} for text, score, group in (("x", 1, None), ("y", 2, None))]
    rows += [{"text": text, "score": score, "group": 1} for text, score in (("x", 1), ("y", 2))]
    found = made(rows)
    assert found.pairs == [pair("y", "x", "", margin=1.0)] and found.left_out == {"the group is missing": [0, 1]}


def test_too_many_pairs_are_refused():
    rows = [{"prompt": "Q", "response": str(number), "score": number} for number in range(1500)]
    with pytest.raises(ValueError, match=r"can be paired in 1,124,250 ways.*--pairs adjacent"):
        made(rows)
    assert len(made(rows, options=Options(adjacent=True)).pairs) == 1499


# ------------------------------------------------------------------------------------ forms
def test_prompts_and_completions_that_would_run_together_are_conversations():
    rows, continued = rated(1, 2), [row | {"response": f" {row['response']}"} for row in rated(1, 2)]
    turn = {"role": "assistant", "content": "x"}
    found, form = in_form(made(rows))
    assert (form, found.pairs[0]["prompt"], found.pairs[0]["chosen"]) == (
        "conversation",
        [{"role": "user", "content": "Q"}],
        [turn],
    )
    found, form = in_form(made(continued))
    assert (form, found.pairs[0]["chosen"]) == ("text", " x")
    assert in_form(made(rows), between="\n")[0].pairs[0]["chosen"] == "\nx"
    assert in_form(made(rows), form="text")[0].pairs[0]["chosen"] == "x"
    with pytest.raises(ValueError, match="cannot be written as texts"):
        in_form(found._replace(pairs=in_form(made(rows))[0].pairs), form="text")


# ------------------------------------------------------------------------------------ files
def write_judgements(path, rows: int = 30) -> str:
    lines = [json.dumps(judged(1, 2, number % 3, prompt=f"Question {number}?")) for number in range(rows)]
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write("\n".join(lines))
    return str(path)


def test_the_files_go_into_the_stages_and_share_no_prompt(tmp_path, capsys):
    source, out = write_judgements(tmp_path / "judged.jsonl.gz"), tmp_path / "out"
    convert.main([source, str(out)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"{source}: 30 rows, judgements of two responses (prompt: prompt; texts: response1, response2;"
    )
    assert said[1] == "  left out 10: the annotators are tied; the first is row 1"
    prompts = {}
    for split in ("train", "test"):
        pairs = load_preferences(str(out / f"preferences_{split}.jsonl"), "train")
        texts = load_texts(str(out / f"sft_{split}.jsonl"), "train")
        prompts[split] = {
            json.dumps(row["prompt"]) for row in load_prompts(str(out / f"prompts_{split}.jsonl"), "train")
        }
        assert {json.dumps(row["prompt"]) for of in (pairs, texts) for row in of} == prompts[split]
        assert pairs["agreement"][:] == pytest.approx([2 / 3] * len(pairs))
    assert prompts["train"].isdisjoint(prompts["test"])
    assert sum(map(len, prompts.values())) == 20


def test_a_users_files_are_not_overwritten(tmp_path):
    source, out = write_judgements(tmp_path / "judged.jsonl"), tmp_path / "out"
    out.mkdir()
    (out / "sft_train.jsonl").write_text("mine")
    with pytest.raises(
        ValueError, match="sft_train.jsonl is there, and no conversion has written it. Name another folder."
    ):
        convert.main([source, str(out)])
    assert [path.name for path in out.iterdir()] == ["sft_train.jsonl"] and (
        out / "sft_train.jsonl"
    ).read_text() == "mine"
    with pytest.raises(NotADirectoryError, match="judged.jsonl is a file. Name another folder."):
        convert.main([source, source])
    fresh = tmp_path / "fresh"
    convert.main([source, str(fresh)])
    convert.main([source, str(fresh), "--held_out", "0.5"])  # what a conversion wrote, another may replace
    assert len(list(fresh.glob("*.jsonl"))) == 6
    with pytest.raises(ValueError, match="the command reads .* there, and would write over it"):
        convert.main([str(fresh / "preferences_train.jsonl"), str(fresh)])


def test_only_one_split_of_a_folder_is_read(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write_judgements(folder / "train.jsonl")
    write_judgements(folder / "test.jsonl", rows=50)
    convert.main([str(folder), str(tmp_path / "out"), "--split", "test"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{folder}: only the split test is read, not train." and ": 50 rows" in said[1]


def test_thumbs_without_pairs_leave_no_file_of_pairs(tmp_path):
    source = tmp_path / "liked.tsv"
    source.write_text("prompt\tcompletion\tlabel\n" + "".join(f"Q{n}\t x\tup\n" for n in range(20)))
    convert.main([str(source), str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == [
        "prompts_test.jsonl", "prompts_train.jsonl", "sft_test.jsonl", "sft_train.jsonl",
    ]  # fmt: skip


def test_a_split_that_would_be_empty(tmp_path):
    with pytest.raises(
        ValueError, match="held_out=0.2 of 0 pairs|leaves 1 to train on and 0 held out|leaves 0 to train"
    ):
        convert.main([write_judgements(tmp_path / "judged.jsonl", rows=2), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held_out", "1"], "--held_out 1.0 must be a share between 0 and 1."),
        (["--min_gap", "-1"], "--min_gap -1.0 must be 0 or more."),
        (["--between", " ", "--form", "conversation"], "--between is for --form text."),
    ],
)
def test_command_lines_that_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        convert.main(["rows.jsonl", "out", *options])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------ stages
TOLD = {
    check_preferences: ("judgements", "ratings", "ranks", "thumbs"),
    check_texts: ("judgements", "UltraFeedback", "Nectar"),
    check_prompts: ("judgements", "PandaLM"),
}


@pytest.mark.parametrize(("check", "layout"), [(check, layout) for check, of in TOLD.items() for layout in of])
def test_a_stage_names_the_command_that_converts_its_file(check, layout, tmp_path):
    path = tmp_path / "my rows.jsonl"
    path.write_text(json.dumps(LAYOUTS[layout][0]) + "\n")
    with pytest.raises(ValueError, match=r"Convert the file: python -m data\.convert '.*my rows\.jsonl' FOLDER$"):
        check(load_rows(str(path), "train"), str(path))
