"""Normalise scores to mean 0 and deviation 1 on completions of the SFT policy (Ziegler et al. 2019, section 2.1).

A reward model is trained on differences, so the scale and the zero of its scores are arbitrary. So would be the meaning of
a KL coefficient. The two numbers are stored beside the adapter, not in its head, so that the head keeps its calibration.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from data.json_files import read_json, write_json
from data.schemas import NORMALIZATION


FILE = "score_normalization.json"


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of a reward adapter's scores on completions of the SFT policy."""

    mean: float
    std: float
    completions: int

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / FILE, asdict(self))


def read_normalization(folder: str | Path) -> Normalization:
    """Read the normalization that `pipeline.reward` stored beside a reward adapter.

    Raises:
        ValueError: there is none, or its numbers cannot be used.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"normalize_scores: {folder} has no {FILE}. Train the reward model with --sft_adapter, which measures its "
            f"scores on that policy's completions, or set normalize_scores: false."
        )
    found = read_json(path, NORMALIZATION, remedy="Measure the scores anew, with pipeline.reward.")
    return Normalization(found["mean"], found["std"], found["completions"])
