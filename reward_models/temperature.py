"""Calibrate a reward model by one number, its temperature T (Guo et al. 2017, arXiv 1706.04599, section 4.2).

P(chosen is preferred) = sigmoid(margin / T). A temperature orders no pair differently, so the accuracy stays. It is fitted on
pairs that the model was not trained on, and stored beside the adapter, not in its head: PPO's scores stay as they are.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data.json_files import read_json, write_json
from data.schemas import CALIBRATION
from reward_models.calibration import reward_model_report


FILE = "calibration.json"
RANGE = (1e-4, 1e4)  # of the temperatures that are looked for
LEAST = 50  # pairs to fit or to measure a temperature on


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to pairs that it was not fitted on.

    Attributes:
        temperature: T, which margins are divided by.
        fitted: number of pairs that it was fitted on.
        measured: number of other pairs, on which the rest was measured.
        ece_before, ece: expected calibration error with T = 1 and with T, in 0..1.
        nll_before, nll: cross-entropy of the raters' shares with T = 1 and with T, in nats a pair.
        source: the dataset of the pairs.
    """

    temperature: float
    fitted: int
    measured: int
    ece_before: float
    ece: float
    nll_before: float
    nll: float
    source: str

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / FILE, asdict(self))


def read_calibration(folder: str | Path) -> Calibration | None:
    """Read the temperature that `pipeline.reward_eval` stored beside a reward adapter; None if there is none.

    Raises:
        ValueError: the file does not fit the schema.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    found = read_json(path, CALIBRATION, remedy="Measure it anew, with pipeline.reward_eval.")
    return Calibration(**{name: found[name] for name in Calibration.__dataclass_fields__})


def probabilities(margins: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Return P(chosen is preferred) = sigmoid(margin / T), (pairs,) -> (pairs,)."""
    return np.exp(-np.logaddexp(0, -np.asarray(margins, dtype=float) / temperature))


def cross_entropy(margins: np.ndarray, agreement: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean cross-entropy of the shares a against sigmoid(d / T), in nats.

    L = mean_i a_i log(1 + exp(-d_i / T)) + (1 - a_i) log(1 + exp(d_i / T))

    Args:
        margins: d, score of chosen minus score of rejected, (pairs,).
        agreement: a, share of raters who prefer the chosen side, (pairs,); 1 where none is known.
    """
    scaled = margins / temperature
    return float(np.mean(agreement * np.logaddexp(0, -scaled) + (1 - agreement) * np.logaddexp(0, scaled)))


def fit_temperature(margins: np.ndarray, agreement: np.ndarray) -> float:
    """Return the temperature of the least cross-entropy.

    In b = 1 / T the cross-entropy is convex, and its derivative is mean_i d_i (sigmoid(b d_i) - a_i). It is halved in on its
    zero.

    Raises:
        ValueError: there is none within `RANGE`: the model is no better than chance, or the more certain it is the better.
    """
    low, high = 1 / RANGE[1], 1 / RANGE[0]

    def slope(b: float) -> float:
        return float(np.mean(margins * (probabilities(margins, 1 / b) - agreement)))

    if slope(low) >= 0:
        raise ValueError(f"no temperature fits {len(margins):,} pairs: the model is no better than chance on them")
    if slope(high) <= 0:
        raise ValueError(f"no temperature fits {len(margins):,} pairs: the model orders all of them rightly")
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def calibrate(
    margins: np.ndarray, agreement: np.ndarray, first: np.ndarray, source: str
) -> tuple[Calibration, dict[str, Any], dict[str, Any]]:
    """Fit the temperature on one half of the pairs, and measure it on the other.

    Args:
        first: (pairs,) bool, the half that it is fitted on.
        source: name of the dataset.

    Returns:
        The temperature; and the `reward_model_report` of the other half with T = 1 and with T.

    Raises:
        ValueError: an error of `fit_temperature`; or a half has fewer than `LEAST` pairs. The message is a clause.
    """
    rest = ~first
    if min(first.sum(), rest.sum()) < LEAST:
        raise ValueError(
            f"no temperature was fitted: of {len(margins):,} pairs, {int(first.sum()):,} and {int(rest.sum()):,} share no "
            f"text, and it takes {LEAST} to fit it and {LEAST} others to measure it"
        )
    temperature = fit_temperature(margins[first], agreement[first])
    before = reward_model_report(margins[rest], agreement[rest])
    after = reward_model_report(margins[rest] / temperature, agreement[rest])
    found = Calibration(
        temperature=temperature,
        fitted=int(first.sum()),
        measured=int(rest.sum()),
        ece_before=before["ece"],
        ece=after["ece"],
        nll_before=cross_entropy(margins[rest], agreement[rest]),
        nll=cross_entropy(margins[rest], agreement[rest], temperature),
        source=source,
    )
    return found, before, after
