"""Check the shapes in a signature, and make arguments of wrong ones."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from beartype import beartype
from jaxtyping import jaxtyped


def checked(function: Callable) -> Callable:
    """Return the same function, which refuses arguments and results that are not as its signature says."""
    return jaxtyped(typechecker=beartype)(function)


def axes(annotation: Any) -> list[str] | None:
    """The names of a tensor's axes, also of one of several kinds or of one that may be None."""
    found = {each.dim_str for each in (annotation, *get_args(annotation)) if hasattr(each, "dim_str")}
    return found.pop().split() if found else None


def has_shapes(function: Callable) -> bool:
    """Tell whether a signature names the axes of an argument, or of what is returned, alone or in a tuple."""
    notes = inspect.get_annotations(function).values()
    return any(axes(part) is not None for note in notes for part in (note, *get_args(note)))


def wrong(function: Callable, given: dict) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Each way in which one tensor alone can be wrong: the argument, the fault, and what to pass in its place."""
    notes = inspect.get_annotations(function)
    shapes = {name: axes(notes[name]) for name, value in given.items() if torch.is_tensor(value)}
    for name, own in shapes.items():
        right = given[name]
        yield name, "another kind of number", right.long() if right.is_floating_point() else right.float()
        yield name, "one axis more", right.unsqueeze(-1)
        if own:
            yield name, "one axis fewer", right[0]
        elsewhere = {axis for other in shapes if other != name for axis in shapes[other]}
        for at, axis in enumerate(own):
            if axis in elsewhere or "+" in axis:
                yield name, f"one more along {axis}", torch.cat([right, right.narrow(at, 0, 1)], dim=at)
