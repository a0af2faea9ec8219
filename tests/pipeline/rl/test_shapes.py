"""The shapes in the signatures of the maths: right ones pass, and a wrong one of any argument is refused."""

import inspect

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from pipeline.rl import advantages, importance, kl, losses, masking


BATCH, TOKENS = 3, 5
OPTIONS = {
    "final_scores": {"missing_eos_penalty": 0.5, "clip_range": [-1.0, 1.0]},
    "token_rewards": {"kl_coef": 0.1},
    "gae": {"gamma": 1.0, "lam": 0.95, "value_lam": 1.0},
    "policy_loss": {"clip": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
    "value_loss": {"clip": 0.2},
    "importance_weights": {"mode": "sequence_truncate", "clip_min": None, "clip_max": 2.0},
}
# Shapes of arguments that are not (B, T).
SHAPES = {"scores": (BATCH,), "ended": (BATCH,), "sums": (3,), "return_sums": (3,), "error_sums": (3,)}
MODULES = (advantages, importance, kl, losses, masking)
FUNCTIONS = {
    name: function
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and name != "adapted_kl_coef"  # numbers
}


def checked(name: str):
    return jaxtyped(typechecker=beartype)(FUNCTIONS[name])


def arguments(name: str) -> dict:
    """Tensors of the shapes that a function takes, and its options."""
    options = OPTIONS.get(name, {})
    made = {}
    for argument, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        if argument in ("mask", "ended"):
            made[argument] = torch.ones(SHAPES.get(argument, (BATCH, TOKENS)), dtype=torch.bool)
        elif parameter.default in (inspect.Parameter.empty, None) and argument not in options:
            made[argument] = torch.ones(SHAPES.get(argument, (BATCH, TOKENS)))
    return made | options


TENSORS = [
    (name, argument) for name in FUNCTIONS for argument, value in arguments(name).items() if torch.is_tensor(value)
]


def test_every_function_of_the_maths_is_here():
    assert set(FUNCTIONS) == {
        *(
            "final_scores",
            "token_rewards",
            "gae",
            "log_ratios",
            "importance_weights",
            "disagreement",
            "kl_per_token",
            "policy_loss",
        ),
        *("value_loss", "approx_kl", "text_loss", "masked_mean", "masked_sums", "whiten", "explained_variance"),
    }
    assert ("policy_loss", "weights") in TENSORS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_shapes_pass(name):
    checked(name)(**arguments(name))


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_a_wrong_shape_is_refused(name, argument):
    given = arguments(name)
    right = given[argument]
    wrong = {
        "one row more": torch.cat([right, right[:1]]),
        "one dimension more": right.unsqueeze(-1),
        "one dimension fewer": right[0],
        **({"one token fewer": right[:, 1:]} if right.dim() == 2 else {}),
    }
    for fault, value in wrong.items():
        with pytest.raises(TypeCheckError):
            checked(name)(**given | {argument: value})
            pytest.fail(f"{name} takes {argument} with {fault}")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "mask" in arguments(name)])
def test_a_mask_is_of_booleans(name):
    given = arguments(name)
    with pytest.raises(TypeCheckError):
        checked(name)(**given | {"mask": given["mask"].long()})


def test_the_product_checks_nothing_as_it_runs():
    """Tensors of other ranks pass: only what the test wraps is checked."""
    assert masking.masked_mean(torch.ones(4), torch.ones(4, dtype=torch.bool)).item() == 1
