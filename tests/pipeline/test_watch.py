"""`pipeline.watch`: each symptom has its message, is said once, and is not seen where there is none."""

import math
import re

import pytest

from pipeline.watch import Watch


SYMPTOMS = {
    # name: observations in order, and what the message of the last of them says
    "negative KL": ([{"kl": [-1.0, -1.1, -0.9, -1.0]}], r"is -1\.00 nats a sequence, which sampling noise \(0\.04\)"),
    "exploding KL": ([{"kl": [30.0, 32.0], "length": 24.0}], r"is 31\.0 nats a sequence, more than 1 a token"),
    "flat reward": ([{"scores": [2.0, 2.0]}] * 5, r"of the last 5 rollouts scored 2: there is nothing to learn"),
    "collapsed entropy": ([{"entropy": 4.0}, {"entropy": 0.3}], r"fell from 4\.00 to 0\.30 nats a token"),
    "nan": ([{"loss": math.nan}], r"^The loss is nan: the step was not taken and training stops"),
}


def test_a_step_that_was_taken_is_not_said_to_be_left_out():
    (said,) = Watch().observe(grad_norm=math.inf, taken=True)
    assert said.startswith(
        "The gradient's norm is inf: the step was taken, so these weights are of no use, and training"
    )


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_symptom_is_said_once(name):
    observations, message = SYMPTOMS[name]
    watch = Watch()
    for observed in observations[:-1]:
        assert watch.observe(**observed) == []
    (said,) = watch.observe(**observations[-1])
    assert re.search(message, said)
    assert watch.said == {name}
    for observed in observations * 3:
        assert watch.observe(**observed) == []


def test_what_is_wrong_together_is_said_together():
    everything = {"kl": [-50.0, -50.0], "scores": [0.0, 1.0], "length": 10.0, "entropy": 5.0, "loss": math.inf}
    assert len(Watch().observe(**everything)) == 2


@pytest.mark.parametrize(
    "observed",
    [
        {"kl": [0.0, 0.0]},  # the first rollout
        {"kl": [-0.05, -0.05]},  # noise of rounding
        {"kl": [-3.0, 2.0, -1.0, 1.5]},  # noise of sampling: mean -0.1, error 1.1
        {"kl": [-5.0]},  # of one completion nobody can say
        {"kl": [20.0, 26.0], "length": 24.0},
        {"kl": [5.0, 5.0]},  # of no known length
        {"entropy": 0.5},  # low from the start
        {"loss": -1e30, "grad_norm": 1e30},
        {"scores": [1.0, 1.0]},
        {},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_is_no_symptom(observed):
    watch = Watch()
    assert watch.observe(**observed) == [] and watch.stop is None


def test_the_noise_of_the_kl_by_hand():
    # Mean -1 in both; the standard error of -1.2, -0.8 is 0.28 / sqrt(2) = 0.2, a fifth; of -3, 1 it is 2, the double.
    assert len(Watch().observe(kl=[-1.2, -0.8])) == 1
    assert Watch().observe(kl=[-3.0, 1.0]) == []


def test_flat_rollouts_are_counted_in_a_row():
    watch = Watch()
    for scores in ([[1.0, 1.0]] * 4 + [[1.0, 2.0]]) * 3:
        assert watch.observe(scores=scores) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_no_number_is_a_reason_to_stop(name, value):
    watch = Watch()
    (said,) = watch.observe(**{name: value})
    assert watch.stop == said and "Lower learning_rate, set max_grad_norm" in said
    assert {"loss": "The loss is", "grad_norm": "The gradient's norm is"}[name] in said


def test_nothing_else_is_a_reason_to_stop():
    watch = Watch()
    for name in ("negative KL", "exploding KL", "flat reward", "collapsed entropy"):
        for observed in SYMPTOMS[name][0]:
            watch.observe(**observed)
    assert watch.said == SYMPTOMS.keys() - {"nan"} and watch.stop is None
