"""`pipeline.rl.health`: each symptom has its message, is said once, and is not seen where there is none."""

import re

import pytest

from pipeline.rl.health import Health


SYMPTOMS = {
    # name: observations in order, and what the message of the last of them says
    "negative KL": (
        [{"kl": [-1.0, -1.1, -0.9, -1.0]}],
        r"is -1\.00 nats a sequence\. Sampling noise \(0\.04\) does not",
    ),
    "exploding KL": ([{"kl": [30.0, 32.0], "length": 24.0}], r"is 31\.0 nats a sequence, more than 1 a token"),
    "still policy": (
        [{"kl": [0.01, -0.02]}] * 11,
        r"After 10 updates the KL to the reference is 0\.0001 nats a sequence",
    ),
    "flat reward": (
        [{"scores": [2.0, 2.0]}] * 5,
        r"of the last 5 rollouts has the score 2: there is nothing to learn",
    ),
    "collapsed entropy": ([{"entropy": 4.0}, {"entropy": 0.3}], r"fell from 4\.00 to 0\.30 nats a token"),
}


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_symptom_is_said_once(name):
    observations, message = SYMPTOMS[name]
    health = Health()
    for observed in observations[:-1]:
        assert health.observe(**observed) == []
    (said,) = health.observe(**observations[-1])
    assert re.search(message, said)
    assert health.said == {name}
    for observed in observations * 3:
        assert health.observe(**observed) == []


def test_what_is_wrong_together_is_said_together():
    everything = {"kl": [-50.0, -50.0], "scores": [0.0, 1.0], "length": 10.0, "entropy": 5.0}
    health = Health(first_entropy=100.0)
    assert len(health.observe(**everything)) == 2


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
        {"scores": [1.0, 1.0]},
        {},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_is_no_symptom(observed):
    health = Health()
    assert health.observe(**observed) == []


def test_the_noise_of_the_kl_by_hand():
    # Mean -1 in both; the standard error of -1.2, -0.8 is 0.28 / sqrt(2) = 0.2, a fifth; of -3, 1 it is 2, the double.
    assert len(Health().observe(kl=[-1.2, -0.8])) == 1
    assert Health().observe(kl=[-3.0, 1.0]) == []


def test_flat_rollouts_are_counted_in_a_row():
    health = Health()
    for scores in ([[1.0, 1.0]] * 4 + [[1.0, 2.0]]) * 3:
        assert health.observe(scores=scores) == []
