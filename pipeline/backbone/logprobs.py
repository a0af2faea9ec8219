"""Compute log-probabilities of tokens from hidden states, without holding the logits of a whole batch in memory.

The logits are by far the largest tensor of PPO: 50,257 numbers a position with the vocabulary of GPT-2. The log-probability
of a token depends only on the hidden state of its position. So its gradient with respect to that state is computed while the
logits are in memory (as Liger Kernel does for the cross-entropy). Nothing is computed twice, and D numbers a position stay.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from trl.trainer.utils import selective_log_softmax_and_entropy


LOGITS = 2**23  # in memory at a time, 34 MB in float32


def token_logprobs(
    head: nn.Module,
    hidden: Float[Tensor, "B T D"],
    tokens: Int[Tensor, "B T"],
    temperature: float,
    *,
    entropy: bool = True,
    entropy_requires_grad: bool = False,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
    """Return the log-probability of each token and, if asked for, the entropy at its position, in nats.

    `head` maps hidden states (N, D) to logits (N, V), each row by itself. Logits are divided by `temperature`. If the
    entropy requires a gradient, or the head is trained, all logits stay in memory. If the model has operations after its
    head, `logits` maps hidden states to logits instead of `head`.
    """
    logits = logits or head
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    if entropy_requires_grad or any(parameter.requires_grad for parameter in head.parameters()):
        logprobs, entropies = selective_log_softmax_and_entropy(
            _logits(logits, rows), flat, entropy_requires_grad=entropy_requires_grad, temperature=temperature
        )
    else:
        logprobs, entropies = _Chunked.apply(rows, flat, logits, _vocabulary(head), temperature, entropy)
    return logprobs.view(tokens.shape), entropies.view(tokens.shape) if entropy else None


def _vocabulary(head: nn.Module) -> int:
    assert isinstance(head.weight, Tensor)  # (V, D)
    return head.weight.shape[0]


def _logits(head: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    logits = head(rows)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Chunked(torch.autograd.Function):
    """Function from rows (N, D) and tokens (N,) to logprobs and entropies (N,) that computes its gradient on the way."""

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        tokens: Tensor,
        head: Callable[[Tensor], Tensor],
        vocabulary: int,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        differentiate = ctx.needs_input_grad[0]
        pieces = -(-len(rows) * vocabulary // LOGITS)  # of similar size, so that products have similar shapes
        logprobs, entropies = [], []
        gradients: list[Tensor] = []
        for piece, token_ids in zip(rows.tensor_split(pieces), tokens.tensor_split(pieces), strict=True):
            with torch.set_grad_enabled(differentiate):
                piece = piece.detach().requires_grad_(differentiate)
                every = _logits(head, piece).div_(temperature).log_softmax(dim=-1)
                logprob = every.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
                if differentiate:
                    gradients += torch.autograd.grad(logprob.sum(), piece)
            logprobs.append(logprob.detach())
            if entropy:
                # A token of probability 0 (-inf) adds nothing, but 0 * -inf would be NaN.
                every = every.detach().clamp_(min=torch.finfo(every.dtype).min)
                with torch.autocast(every.device.type, enabled=False):  # it would round the product to bfloat16
                    entropies.append(-torch.linalg.vecdot(every.exp(), every))
        if differentiate:
            ctx.save_for_backward(torch.cat(gradients))
        if not entropy:
            return torch.cat(logprobs), None
        all_entropies = torch.cat(entropies)
        ctx.mark_non_differentiable(all_entropies)
        return torch.cat(logprobs), all_entropies

    @staticmethod
    def backward(ctx, of_logprobs: Tensor, of_entropy: Tensor | None) -> tuple:
        (gradient,) = ctx.saved_tensors
        return (of_logprobs.unsqueeze(-1) * gradient).to(gradient.dtype), None, None, None, None, None
