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
LEAST = 50  # pairs of each half


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what temperatures do to pairs that they were not fitted on.

    For the latter the pairs are divided into halves that share no text. Each half is measured with the temperature of the
    other.

    Attributes:
        temperature: T, which margins are divided by; it is fitted on all pairs.
        pairs: number of pairs.
        measured: number of those that are in a half.
        ece_before, ece: expected calibration error with T = 1, and with the temperatures of the other halves, in 0..1.
        nll_before, nll: the same of the cross-entropy of the raters' shares, in nats a pair.
        half_temperatures, half_eces: of each half its temperature, and its ECE with that of the other half.
        source: the dataset of the pairs.
    """

    temperature: float
    pairs: int
    measured: int
    ece_before: float
    ece: float
    nll_before: float
    nll: float
    half_temperatures: tuple[float, ...]
    half_eces: tuple[float, ...]
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
    halves: dict[str, Any] = {name: tuple(found[name]) for name in ("half_temperatures", "half_eces")}
    return Calibration(**{name: found[name] for name in Calibration.__dataclass_fields__} | halves)


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
    margins: np.ndarray, agreement: np.ndarray, sides: tuple[np.ndarray, np.ndarray], source: str
) -> tuple[Calibration, dict[str, Any], dict[str, Any]]:
    """Fit a temperature on all pairs, and measure on each half what the temperature of the other half does.

    Args:
        sides: two halves of the pairs, each (pairs,) bool; a pair may be in neither.
        source: name of the dataset.

    Returns:
        The temperature; and the `reward_model_report` of the pairs that are in a half with T = 1, and with the temperatures of
        the other halves.

    Raises:
        ValueError: an error of `fit_temperature`; or a half has fewer than `LEAST` pairs. The message is a clause.
    """
    if min(side.sum() for side in sides) < LEAST:
        raise ValueError(
            f"no temperature was fitted: the two halves of {len(margins):,} pairs that share no text have "
            f"{int(sides[0].sum()):,} and {int(sides[1].sum()):,}, and each needs {LEAST} or more"
        )
    fitted = [fit_temperature(margins[side], agreement[side]) for side in sides]
    scaled = np.select(sides, [margins / fitted[1], margins / fitted[0]])
    measured = sides[0] | sides[1]
    shares = agreement[measured]
    before, after = (reward_model_report(values[measured], shares) for values in (margins, scaled))
    found = Calibration(
        temperature=fit_temperature(margins, agreement),
        pairs=len(margins),
        measured=int(measured.sum()),
        ece_before=before["ece"],
        ece=after["ece"],
        nll_before=cross_entropy(margins[measured], shares),
        nll=cross_entropy(scaled[measured], shares),
        half_temperatures=(fitted[0], fitted[1]),
        half_eces=tuple(reward_model_report(scaled[side], agreement[side])["ece"] for side in sides),
        source=source,
    )
    return found, before, after
