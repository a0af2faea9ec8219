"""The shapes in the signatures of the backbone: right ones pass, and a wrong one of any argument is refused."""

import inspect
import re

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import checked, has_shapes, wrong

from pipeline.backbone import architecture, logprobs, padding, roles, sampling, trunk
from pipeline.backbone.architecture import attention
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import FiniteLogits, Sample, SampledLogprobs, Ticks, sample


MODULES = (architecture, logprobs, padding, roles, sampling, trunk)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [3, 12, 13, 14, 15, 16, 17]])  # (B, P + T)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
COMPLETIONS = IDS[:, -4:]  # (B, T)
HIDDEN, VOCABULARY = 32, 50  # D of the tiny model, V of the logits made here
STATES = torch.ones(2, 7, HIDDEN)
LOGITS = torch.ones(2, VOCABULARY)
TEXT = {"input_ids": IDS, "attention_mask": MASK}
COMPLETED = TEXT | {"role": "policy", "completion_ids": COMPLETIONS, "trunk": STATES}
# Functions by their names, each with arguments: what is "model" or "head" is the tiny one's; `self` is the backbone.
CASES = {
    "attention": {"model": None, "attention_mask": MASK},
    "own_logits": {"model": None, "hidden": STATES[0]},
    "positions": {"attention_mask": MASK},
    "probe": {"model": None},
    "token_logprobs": {"head": None, "hidden": STATES[:, -4:], "tokens": COMPLETIONS, "temperature": 0.7},
    "lower": {"model": None, "depth": 1},
    "middle": {"model": None, "start": 0, "depth": 1, "states": STATES},
    "upper": {"model": None, "depth": 1, "states": STATES},
    "trunk_fault": {"model": None, "depth": 1, "input_ids": IDS},
    "Sample": {**TEXT, "completion_ids": COMPLETIONS, "mask": COMPLETIONS > 5, "logprobs": torch.zeros(2, 4)},
    "SampledLogprobs.__call__": {"input_ids": IDS, "scores": LOGITS},
    "SampledLogprobs.read": {"sequences": IDS},
    "FiniteLogits.__call__": {"input_ids": IDS, "scores": LOGITS},
    "Ticks.__call__": {"input_ids": IDS, "scores": LOGITS},
    "Backbone.trunk": TEXT | {"role": "value"},
    "Backbone.hidden_states": TEXT | {"role": None, "trunk": STATES},
    "Backbone.logprobs": COMPLETED,
    "Backbone.logprobs_and_entropy": COMPLETED,
    "Backbone.values": TEXT | {"length": 4, "trunk": STATES},
    "Backbone.scores": TEXT | {"trunk": STATES},
    "Backbone.prefix_scores": TEXT | {"length": 4},
    "Backbone.member_scores": TEXT | {"roles": ("reward", "value"), "trunk": STATES},
    "Backbone.forward": TEXT | {"completion_ids": COMPLETIONS, "trunk": STATES, "value_trunk": STATES},
}
MORE = {  # inputs of any name
    "lower": TEXT,
    "middle": {"attention_mask": MASK},
    "upper": {"attention_mask": MASK},
    "trunk_fault": {"attention_mask": MASK},
}


def functions() -> dict:
    """Functions and methods of the backbone's modules that others call, and that name shapes."""
    found = {}
    for module in MODULES:
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                found[name] = thing
            elif inspect.isclass(thing) and issubclass(thing, tuple):
                found[name] = thing.__new__
            elif inspect.isclass(thing):
                found |= {f"{name}.{own}": f for own, f in vars(thing).items() if inspect.isfunction(f)}
    return {
        name: f for name, f in found.items() if has_shapes(f) and not re.search(r"(^|\.)_[a-z]", name, re.IGNORECASE)
    }


FUNCTIONS = functions()


@pytest.fixture
def make(backbone):
    """Makes the arguments of a function: those of `CASES`, with the parts of the tiny backbone that it runs."""
    base = backbone.get_base_model()
    backbone.trunk_depth, backbone.value_has_trunk = 1, True

    def arguments(name: str) -> dict:
        parts = {"model": base, "head": base.get_output_embeddings()}
        owner = {
            "Backbone": backbone,
            "FiniteLogits": FiniteLogits("policy"),
            "SampledLogprobs": SampledLogprobs(1.0),
            "Ticks": Ticks(lambda rows: None),
        }
        given = {key: parts.get(key, value) for key, value in CASES[name].items()}
        if name == "Sample":
            return {"_cls": Sample} | given
        self = {"self": owner[name.split(".")[0]]} if "." in name else {}
        if name == "SampledLogprobs.read":
            self["self"](IDS, LOGITS)
        return self | given

    return arguments


def test_every_function_that_names_shapes_is_here():
    assert FUNCTIONS.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_right_shapes_pass(name, make):
    checked(FUNCTIONS[name])(**make(name), **MORE.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, given in CASES.items() if any(map(torch.is_tensor, given.values()))])
def test_a_wrong_shape_is_refused(name, make):
    faults = list(wrong(FUNCTIONS[name], CASES[name]))
    assert len(faults) >= 3
    for argument, fault, value in faults:
        with pytest.raises(TypeCheckError):
            checked(FUNCTIONS[name])(**make(name) | {argument: value}, **MORE.get(name, {}))
            pytest.fail(f"{name} takes {argument} with {fault}")


@pytest.mark.parametrize("texts", [None, (IDS, MASK)], ids=["completions", "texts too"])
def test_the_training_pass_returns_what_it_says(texts, make):
    logprobs, entropy, values, *of_texts = checked(Backbone.forward)(**make("Backbone.forward"), texts=texts)
    assert logprobs.shape == entropy.shape == values.shape == (2, 4)
    assert [x.shape for x in of_texts] == ([] if texts is None else [(2, 6)])


def test_samples_are_what_they_say(backbone, tokenizer, monkeypatch):
    """Also a mask of one kind, and logprobs of the tokens that were drawn."""
    monkeypatch.setattr(sampling, "Sample", checked(Sample.__new__).__get__(Sample))
    options = {"max_completion_length": 4, "temperature": 1.0, "batch_size": 2, "keep_logprobs": True}
    batches = list(sample(backbone, "policy", [[5, 6, 7], [8], [9, 10]], tokenizer, **options))
    assert [len(batch.input_ids) for batch in batches] == [2, 1]


def test_a_result_of_another_shape_is_refused(make, monkeypatch):
    monkeypatch.setattr(Backbone, "_read", lambda self, role, hidden: hidden[..., 0].T)
    with pytest.raises(TypeCheckError):
        checked(Backbone.values)(**make("Backbone.values"))


def test_attention_gives_positions_of_the_masks_shape(backbone):
    inputs = attention(backbone.get_base_model(), MASK.bool())
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]]
