"""Use a learned reward as a reward function of TRL's protocol, on the backbone that is already in memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm
from trl.trainer.utils import pad

from data.prompts import tokenize_prompts


# Column in which PPO gives a learned reward the scores that it has already measured. Each row maps roles to scores.
KNOWN_SCORES = "scores:known"


def with_known_scores(rows: list[dict], scores: dict[str, Tensor]) -> list[dict]:
    """Add scores that were already measured, by role, each (B,), to dataset rows (B), for `LearnedReward` to find."""
    if not scores:
        return rows
    known = {role: values.tolist() for role, values in scores.items()}
    return [{**row, KNOWN_SCORES: {role: known[role][i] for role in known}} for i, row in enumerate(rows)]


@torch.no_grad()
def score_rows(
    score: Callable[[Tensor, Tensor], Tensor],
    rows: list[list[int]],
    *,
    pad_token_id: int,
    batch_size: int,
    device,
    share: bool = False,
    bar: str = "",
) -> list[Any]:
    """Return the scores of token rows, in their order.

    `score` maps ids and mask, right-padded (B, S), to scores (B,), or to those of several roles, (B, M). Rows are scored in
    order of length, which keeps padding small. With `share`, processes that have the same rows share the batches, and all get
    all scores. Each process runs the same number of batches, because a sharded model runs in all processes together. `bar` is
    the name of a progress bar of the batches; without a name there is none.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    chunks = [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if share:
        with PartialState().split_between_processes(chunks, apply_padding=True) as mine:
            chunks = mine
    found: list[tuple[int, Any]] = []
    tokens = sum(len(rows[i]) for chunk in chunks for i in chunk)  # the last batches are the longest
    drawn = bool(bar) and PartialState().is_main_process
    with tqdm(total=tokens, desc=bar, unit="token", unit_scale=True, disable=not drawn) as progress:
        for chunk in chunks:
            tensors = [torch.tensor(rows[i]) for i in chunk]
            ids = pad(tensors, padding_value=pad_token_id).to(device)
            mask = pad([torch.ones_like(tensor) for tensor in tensors], padding_value=0).to(device)
            found += zip(chunk, score(ids, mask).tolist(), strict=True)
            progress.update(sum(map(len, tensors)))
    return [value for _, value in sorted(dict(gather_object(found) if share else found).items())]


class Scorer(Protocol):
    """Model with reward roles, such as `pipeline.backbone.roles.Backbone`."""

    training: bool

    def scores(self, input_ids: Tensor, attention_mask: Tensor, role: str) -> Tensor:
        """Return the scores of a role, (B, S) -> (B,)."""

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor, roles: Sequence[str]) -> Tensor:
        """Return the scores of M roles, (B, S) -> (B, M)."""

    def get_base_model(self) -> nn.Module: ...

    def train(self, mode: bool = True) -> nn.Module: ...

    def eval(self) -> nn.Module: ...


class LearnedReward:
    """Score completions with a reward role of a backbone.

    TRL calls it like any reward function. It reads the sampled tokens themselves, so it scores exactly what was sampled.
    """

    def __init__(
        self,
        backbone: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        role: str = "reward",
        name: str = "reward_model",
        shift: float = 0.0,
        folder: str | None = None,
    ):
        self.backbone, self.tokenizer, self.batch_size, self.role = backbone, tokenizer, batch_size, role
        self.shift = shift  # subtracted from every score
        self.folder = folder  # or hub id of the adapter
        self.__name__ = name  # TRL logs a reward function under this name

    @property
    def adapters(self) -> dict[str, str | None]:
        """Return the roles that score, each with the name of its adapter."""
        return {self.role: self.folder}

    def __call__(
        self, prompts: list, completion_ids: list[list[int]], known_scores: list[dict] | None = None, **kwargs
    ) -> list[float]:
        """Return a score for each completion; use those in `known_scores`, by role, if they are there."""
        if known_scores and self.role in known_scores[0]:
            scores = [row[self.role] for row in known_scores]
        else:
            scores = self._scores(prompts, completion_ids)
        return [score - self.shift for score in scores]

    def _scores(self, prompts: list, completion_ids: list[list[int]]) -> list[float]:
        return score_prompts(self, prompts, completion_ids)


def score_prompts(
    reward: LearnedReward, prompts: list, completion_ids: list[list[int]], roles: Sequence[str] | None = None
) -> list[Any]:
    """Return a score for each completion, without dropout; with `roles`, a list with the score of each."""
    backbone = reward.backbone
    score = partial(backbone.member_scores, roles=roles) if roles else partial(backbone.scores, role=reward.role)
    prompt_ids = tokenize_prompts(prompts, reward.tokenizer)
    training = backbone.training
    backbone.eval()  # no dropout while scoring, even during training
    scores = score_rows(
        score,
        [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)],
        pad_token_id=reward.tokenizer.pad_token_id,
        batch_size=reward.batch_size,
        device=backbone.get_base_model().device,
    )
    backbone.train(training)
    return scores
