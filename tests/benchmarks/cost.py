"""What an update must cost: floating-point operations by the shapes, and the rate at which this machine multiplies.

Counted are multiplications of matrices, at 2 operations each; a training pass costs 3 forward passes where all weights
are trained and 2 where they are frozen under an adapter. All else (softmax, norms, adapters) is left out, so the
seconds are a floor.
"""

import time

import torch

from tests.benchmarks.work import Work


def layer_weights(work: Work) -> int:
    """Weights of a decoder layer's projections: 12 D^2 in GPT-2."""
    if not work.key_heads:
        return 12 * work.hidden**2
    keys = work.hidden * work.key_heads // work.heads
    return work.hidden * (2 * work.hidden + 2 * keys + 3 * work.inner)


def layer_flops(work: Work, tokens: int) -> float:
    """One decoder layer on the batch's first `tokens` tokens: 2 for each of its weights, and 4 T D in attention, a
    token."""
    return work.batch * tokens * (2 * layer_weights(work) + 4 * tokens * work.hidden)


def head_flops(work: Work) -> float:
    """The vocabulary projection on every position of the batch's completions."""
    return work.batch * work.completion * 2 * work.hidden * work.vocabulary


def decoding_flops(work: Work) -> float:
    """Sampling with a cache: each token goes through each layer once."""
    return work.layers * layer_flops(work, work.prompt + work.completion) + head_flops(work)


def update_flops(work: Work, row: str) -> float:
    """Scoring and training of one update, by row.

    Three passes score: the reference's, the value's and the reward's. Sampling leaves the policy's own logprobs.
    """
    tokens, epochs = work.prompt + work.completion, work.epochs
    layer, head = layer_flops(work, tokens), head_flops(work)
    if row == "trl_full":
        return (3 + 6 * epochs) * work.layers * layer + (1 + 3 * epochs) * head
    if row == "trl_lora":  # the policy's weights are frozen, the value model's are trained
        return (3 + 5 * epochs) * work.layers * layer + (1 + 2 * epochs) * head
    adapted = work.top if row == "spine_top" else work.layers
    below = work.layers - adapted
    return ((3 + 4 * epochs) * adapted + below) * layer + (1 + 2 * epochs) * head


@torch.no_grad()
def rate(rows: int, work: Work, dtype: torch.dtype) -> float:
    """Operations a second of the MLP's first projection on so many rows: the best of several, each over as many weights
    as the model has, so that they come from memory as they do in decoding."""
    inner = work.inner or 4 * work.hidden
    inputs = torch.randn(rows, work.hidden).to(dtype)
    weights = [torch.randn(work.hidden, inner).to(dtype) for _ in range(2 * work.layers)]
    bias = torch.zeros(inner, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for weight in weights:
            torch.addmm(bias, inputs, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * work.hidden * inner * len(weights) / best


class Floor:
    """Seconds of an update at the machine's own rates, in one precision."""

    def __init__(self, work: Work, dtype: str):
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.training_rate = rate(work.batch * (work.prompt + work.completion), work, kind)
        self.decoding_rate = rate(work.batch, work, kind)

    def seconds(self, work: Work, row: str) -> float:
        return update_flops(work, row) / self.training_rate + decoding_flops(work) / self.decoding_rate
