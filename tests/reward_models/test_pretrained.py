"""`reward_models.pretrained`: the scores are those of transformers' own pipeline, whatever the architecture and the batch."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
)

from reward_models.functions import load_function
from reward_models.pretrained import get_model, log_odds


WORDS = "[PAD] [UNK] [CLS] [SEP] the film is a quiet loud triumph yawn and very long user assistant : ! .".split()
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": SIZES | {"embedding_size": 16},
    "deberta-v2": SIZES | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]},
    "modernbert": SIZES,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": SIZES | {"num_key_value_heads": 1},
    "mistral": SIZES | {"num_key_value_heads": 2},
}
DECODERS = ("gpt2", "llama", "mistral")
PROMPTS = ["the film is", "the film", "the film is a very very long"]
COMPLETIONS = [" a quiet triumph .", " is a yawn", " yawn and a loud yawn !"]
TEXTS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


def make_tokenizer(family: str, *, pads: bool = True, **options) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if family not in DECODERS:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"pad_token": "[PAD]"} if pads else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **special, **options
    )


@pytest.fixture
def make_classifier(tmp_path):
    """Makes the folder of a random classifier whose scores differ well, with a tokenizer."""

    def make(family: str = "bert", labels=("NEGATIVE", "POSITIVE"), *, pads=True, tokenizer=None, **options) -> str:
        torch.manual_seed(len(family))
        config = AutoConfig.for_model(
            family,
            **FAMILIES[family],
            vocab_size=len(WORDS),
            pad_token_id=0 if pads else None,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            initializer_range=0.5,
            **options,
        )
        model = AutoModelForSequenceClassification.from_config(config)
        folder = str(tmp_path / f"my-{family}")
        model.save_pretrained(folder)
        make_tokenizer(family, pads=pads, **(tokenizer or {})).save_pretrained(folder)
        return folder

    return make


def by_pipeline(folder: str, texts: list[str], label: str, function: str = "none") -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run = TextClassificationPipeline(model=model, tokenizer=tokenizer, function_to_apply=function, top_k=None)
    return [next(entry["score"] for entry in found if entry["label"] == label) for found in run(texts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family, make_classifier):
    folder = make_classifier(family)
    shares = by_pipeline(folder, TEXTS, "POSITIVE", "softmax")
    for batch_size in (1, 2, 8):
        score = get_model(folder, "POSITIVE", batch_size=batch_size)
        found = score(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 3)
        assert found == pytest.approx([math.log(p / (1 - p)) for p in shares], abs=1e-4)
        assert max(found) - min(found) > 0.01
    found = get_model(folder, "NEGATIVE", probability=True)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == pytest.approx([1 - p for p in shares], abs=1e-5)
    assert score.__name__ == f"my-{family}"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_single_score_is_the_output_itself(family, make_classifier):
    folder = make_classifier(family, labels=("LABEL_0",))
    raw = by_pipeline(folder, TEXTS, "LABEL_0")
    assert get_model(folder)(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(raw, abs=1e-5)
    squashed = [1 / (1 + math.exp(-x)) for x in raw]
    found = get_model(folder, probability=True)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == pytest.approx(squashed, abs=1e-5)


def test_log_odds_by_hand():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    # p of the last: e^4 / (e + e^2 + e^4); p / (1 - p) = e^4 / (e + e^2).
    assert log_odds(logits, 2).item() == pytest.approx(4 - math.log(math.e + math.e**2))
    assert log_odds(logits, 1, "multi_label_classification").item() == 2
    assert log_odds(torch.tensor([[-3.0]]), 0).item() == -3


def test_the_completion_alone(make_classifier):
    folder = make_classifier()
    alone = by_pipeline(folder, COMPLETIONS, "POSITIVE", "softmax")
    found = get_model(folder, "POSITIVE", completion_only=True, probability=True)(
        prompts=PROMPTS, completions=COMPLETIONS
    )
    assert found == pytest.approx(alone, abs=1e-5)


TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} ! {% endfor %}"


def test_a_conversation_is_written_with_its_own_template(make_classifier):
    prompts = [[{"role": "user", "content": "the film"}], [{"role": "user", "content": "very long"}]]
    completions = [[{"role": "assistant", "content": "is a yawn"}], [{"role": "assistant", "content": "and loud"}]]
    folder = make_classifier("gpt2", tokenizer={"chat_template": TEMPLATE})
    texts = ["user : the film ! assistant : is a yawn ! ", "user : very long ! assistant : and loud ! "]
    expected = by_pipeline(folder, texts, "POSITIVE", "softmax")
    found = get_model(folder, "POSITIVE", probability=True)(prompts=prompts, completions=completions)
    assert found == pytest.approx(expected, abs=1e-5)
    alone = get_model(folder, "POSITIVE", probability=True, completion_only=True)(
        prompts=prompts, completions=completions
    )
    assert alone == pytest.approx(by_pipeline(folder, ["is a yawn", "and loud"], "POSITIVE", "softmax"), abs=1e-5)
    plain = make_classifier("llama")
    with pytest.raises(ValueError, match=r"my-llama: its tokenizer has no chat template.*Set completion_only=True"):
        get_model(plain, "POSITIVE")(prompts=prompts, completions=completions)


@pytest.mark.parametrize("limit", [{"tokenizer": {"model_max_length": 6}}, {"max_position_embeddings": 6}])
def test_the_end_of_a_long_text_is_scored_and_said_once(limit, make_classifier, caplog):
    folder = make_classifier(**limit)
    score = get_model(folder, "POSITIVE", probability=True)
    long, short = score(prompts=["very " * 50, ""], completions=["a quiet loud yawn", "a quiet loud yawn"])
    assert long == pytest.approx(short, abs=1e-6)  # [CLS] a quiet loud yawn [SEP]
    score(prompts=["very " * 50], completions=["yawn"])
    assert caplog.text.count("1 of 2 texts are longer than 6 tokens, and only their ends are scored") == 1
    assert caplog.text.count("longer") == 1


def test_without_a_pad_token_texts_are_scored_one_by_one(make_classifier, caplog):
    folder = make_classifier("gpt2", pads=False)
    found = get_model(folder, "POSITIVE", probability=True)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == pytest.approx(by_pipeline(folder, TEXTS, "POSITIVE", "softmax"), abs=1e-5)
    assert "has no pad token, so texts are scored one by one" in caplog.text


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "label is not set. Set label to one of 'NEGATIVE', 'POSITIVE'"),
        ("positive", "label='positive' is not one of its labels. Set label to one of 'NEGATIVE', 'POSITIVE'"),
    ],
)
def test_a_label_that_is_not_there(label, message, make_classifier):
    with pytest.raises(ValueError, match=message):
        get_model(make_classifier(), label)


def test_a_model_without_a_head_is_refused(tmp_path):
    config = AutoConfig.for_model("gpt2", **FAMILIES["gpt2"], vocab_size=len(WORDS))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors of GPT2ForSequenceClassification are missing.*score.weight"):
        get_model(str(tmp_path), "LABEL_0")


def test_the_error_for_an_adapter_names_what_takes_it(reward_adapter):
    with pytest.raises(ValueError, match=r"is the folder of an adapter.*rewards.get_reward_adapter\(folder="):
        get_model(reward_adapter)


def test_a_recipe_names_it_in_one_line(make_classifier):
    folder = make_classifier()
    function = load_function(f"reward_models.pretrained.get_model(name={folder!r}, label='POSITIVE')")
    assert len(function(prompts=PROMPTS, completions=COMPLETIONS)) == 3


@pytest.mark.slow
def test_ppo_trains_against_a_classifier_of_berts_kind(make_classifier, make_trainer):
    """The reward's texts are decoded from what a GPT-2 with another tokenizer has sampled."""
    reward = get_model(make_classifier(), "POSITIVE")
    trainer = make_trainer([reward])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert all(
        math.isfinite(row["rewards/my-bert/mean"]) and row["score"] == row["rewards/my-bert/mean"] for row in rows
    )
