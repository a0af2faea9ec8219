"""Work out a run's healthy ranges from the table of metrics, and tell which figures are outside of theirs."""

import statistics
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

from data.schemas import LARGEST
from pipeline.reports.metric_table import METRICS, Bound, Metric, Times


HELD_OUT = "eval_"  # begins the name of a figure that is measured on held-out rows
LATEST = 3  # entries of the log of which the median is compared with the range


def find(name: str, stage: str | None = None) -> Metric | None:
    """Return the record of a logged figure, or None if it is not in the table, as one of a reward function of the user's own.

    Args:
        name: the name in the log; one of held-out rows is found by its name without `eval_`.
        stage: one of `STAGES`; None takes the first record of the name.
    """
    for asked in (name, name.removeprefix(HELD_OUT)):
        for metric in METRICS:
            if fnmatchcase(asked, metric.name) and (stage is None or stage in metric.stages):
                return metric
    return None


def healthy_range(
    metric: Metric, history: Iterable[Mapping[str, Any]], options: Mapping[str, Any], name: str | None = None
) -> tuple[float | None, float | None]:
    """Return the lowest and highest healthy value of a run's metric; None where there is no bound, or it is not known.

    Args:
        history: entries of the log so far.
        options: options of the run, such as `kl_target`.
        name: the name in the log, where it is not `metric.name`.
    """
    rows = list(history)
    low, high = (_bound(bounds, name or metric.name, rows, options) for bounds in (metric.low, metric.high))
    return low, high


def _bound(
    bounds: tuple[Bound, ...], name: str, history: list[Mapping[str, Any]], options: Mapping[str, Any]
) -> float | None:
    for bound in bounds:
        if not isinstance(bound, Times):
            return bound
        if bound.of == "first":
            known = values_of(history, name)[:1]
        else:
            option = options.get(bound.of)
            known = [option] if is_figure(option) else values_of(history, bound.of)[-1:]
        if known and known[0]:
            return bound.factor * known[0]
    return None


def values_of(history: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """Return the values of a figure, in the order of the log."""
    return [row[name] for row in history if is_figure(row.get(name))]


def is_figure(value: object) -> TypeGuard[float]:
    """Tell whether a value of the log is a finite number."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]  # False for NaN


def is_outside(metric: Metric, values: list[float], low: float | None, high: float | None) -> bool:
    """Tell whether a figure is outside its healthy range by now: the median of its last three values is, to rounding."""
    if len(values) <= metric.settles:
        return False
    now = statistics.median(values[-LATEST:])
    return (low is not None and now < low - 1e-9) or (high is not None and now > high + 1e-9)
