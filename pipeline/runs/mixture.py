"""The data of the reward stage: pairs, rankings or rated texts, of one dataset or of several."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainingArguments

from data import preferences, rankings, ratings
from data.cells import shorten
from data.mixture import Entry, entries_of, load_mixture
from pipeline.runs.arguments import DataArguments


class Format(NamedTuple):
    """Rows that a loss learns from: their reader, what splits the prompt from them, and the messages' word for a row."""

    load: Callable[..., Dataset]
    with_prompts: Callable[..., Dataset]
    row: str


FORMATS = {
    "bradley_terry": Format(preferences.load_preferences, preferences.explicit_prompts, "pair"),
    "plackett_luce": Format(rankings.load_rankings, rankings.with_prompts, "ranking"),
    "regression": Format(ratings.load_ratings, ratings.with_prompts, "rated text"),
}


def listed(datasets: list[dict] | str | None) -> list[dict] | None:
    """Return the option `datasets`, which is JSON text on a command line, as a list.

    Raises:
        ValueError: the text is no JSON.
    """
    if not isinstance(datasets, str):
        return datasets
    try:
        return json.loads(datasets)
    except ValueError as error:
        raise ValueError(f"datasets={shorten(datasets)} must be a list of entries in JSON ({error}).") from None


@dataclass
class RewardDataArguments(DataArguments):
    """The datasets of the reward stage."""

    datasets: list[dict] | str | None = field(
        default=None,
        metadata={
            "help": "Several datasets to train on: entries of path, split, and weight (passes in an epoch) or fraction "
            "(share, as in TRL)."
        },
    )

    def __post_init__(self):
        self.datasets = listed(self.datasets)
        if self.datasets is None:
            return
        if self.dataset_name != "human_ratings":
            raise ValueError(
                f"dataset_name={self.dataset_name!r} and datasets both say what to train on. Give one: other "
                f"files are other entries of datasets."
            )
        self.entries  # noqa: B018 (checks them)

    @property
    def entries(self) -> list[Entry]:
        """Return the entries of `datasets`; there are none without it."""
        return [] if self.datasets is None else entries_of(self.datasets, self.dataset_train_split)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Override `sources`: return those of `datasets` instead of `dataset_name`."""
        return (*(entry.path for entry in self.entries), self.eval_dataset_name) if self.datasets else super().sources

    @property
    def train_source(self) -> str:
        """Override `train_source`: name all datasets."""
        return ", ".join(entry.path for entry in self.entries) or super().train_source

    @property
    def eval_source(self) -> str | None:
        """Override `eval_source`: held-out rows of several datasets are those of `eval_dataset_name` alone."""
        return (self.eval_dataset_name or None) if self.datasets else super().eval_source

    def load_train(self, read: Callable[..., Dataset], args: TrainingArguments | None = None) -> tuple[str, Dataset]:
        """Override `load_train`: mix the rows of `datasets`, and print how many of each an epoch has.

        Raises the errors of `load_mixture`.
        """
        if not self.datasets:
            return super().load_train(read, args)
        assert args is not None  # the order of the rows has a seed
        seed = args.seed if args.data_seed is None else args.data_seed
        mixed, shares = load_mixture(self.entries, read, seed=seed, drop=self.drop_bad_rows)
        for share in shares:
            PartialState().print(f"train ({share}).")
        return self.train_source, mixed
