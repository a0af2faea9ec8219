"""A check of the preflight: a measured value and its bound."""

from dataclasses import dataclass

import torch
from torch import Tensor
from trl.trainer.utils import pad

from pipeline.backbone.roles import Backbone
from pipeline.rl.config import PPOConfig


PROMPTS, BATCH = 64, 32
ROWS = 8  # rows that are scored alone; few, since a pass over a single row reads all weights


def whole_pass(args: PPOConfig) -> int:
    """Return how many passes over one token a row, as in sampling, a pass over whole rows counts as in the bar.

    It takes longer than one of them, and not as long as those of all tokens: more on CPUs, less on GPUs.
    """
    return max(1, args.max_completion_length // 4)


@dataclass(frozen=True)
class Check:
    """One check: the measured value, its bound, the result, and why it matters."""

    name: str
    measured: float | None
    bound: str
    result: str  # passed, warning or refused
    why: str

    def __str__(self) -> str:
        measured = "unknown" if self.measured is None else f"{self.measured:.4g}"
        return f"{self.name}: {measured}, bound {self.bound}. {self.why}"


def is_exact(args: PPOConfig, backbone: Backbone) -> bool:
    """Return whether everything that is measured is computed in float32 or better."""
    return backbone.get_base_model().dtype in (torch.float32, torch.float64) and not args.bf16


def held(name: str, measured: float, bound: float, failing: str, why: str, *, least: bool = False) -> Check:
    """Compare a measured value with its bound; `failing` is the result outside of it. `least` makes it a lower bound."""
    fine = measured >= bound if least else measured <= bound
    return Check(name, measured, f"{'at least' if least else 'at most'} {bound:g}", "passed" if fine else failing, why)


def padded(rows: list[Tensor], value: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows as one tensor (B, S), padded at `side`, and its mask."""
    mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side).bool()
    return pad(rows, padding_value=value, padding_side=side).to(device), mask.to(device)
