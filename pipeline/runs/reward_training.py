"""Train a reward model with checkpoints, and score its held-out pairs."""

import math
from typing import Any

import torch

from data.listing import json_digest
from pipeline.backbone.adapters import Adapter
from pipeline.backbone.identity import digest
from pipeline.runs.checkpoints import Checkpointed
from reward_models.learned import score_rows
from reward_models.listwise import comparisons
from reward_models.ranking import RankingTrainer


class RewardModel(Checkpointed, RankingTrainer):
    """RankingTrainer, with Spine's checkpoints.

    Args:
        start: the policy's adapter that the reward adapter starts from, if any.
        earlier: seconds of this process that earlier members of an ensemble took.
    """

    def __init__(self, *args, start: Adapter | None = None, earlier: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.start, self.earlier = start, earlier
        self.seconds_before = -earlier

    def load_training_state(self, state: dict) -> None:
        """Override `load_training_state`: do not count the time of earlier members."""
        super().load_training_state(state)
        self.seconds_before -= self.earlier

    def contents(self) -> dict[str, Any]:
        """Override `contents`: a run that started from a policy resumes with the same one."""
        found = super().contents()
        if self.start:
            found["frozen"] = json_digest([found["frozen"], digest(sorted(self.start.weights.items()))])
        return found


def held_out_margins(trainer: RewardModel) -> dict[str, Any]:
    """Score the trainer's evaluation rows as pairs, and return the columns that `reward_model_report` takes.

    A text of several pairs is scored once. Processes share the texts.
    """
    rows, model = trainer.eval_dataset, trainer.model_wrapped  # only the wrapper can run a sharded model
    model.eval()

    def score(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)

    chosen, rejected, agreement, gaps = comparisons(rows)
    texts = list(dict.fromkeys(chosen + rejected))
    scores = score_rows(
        score,
        [list(text) for text in texts],
        pad_token_id=trainer.processing_class.pad_token_id,
        batch_size=trainer.args.per_device_eval_batch_size,
        device=trainer.accelerator.device,
        share=True,
        bar="scores of held-out pairs",
    )
    score_of = dict(zip(texts, scores, strict=True))
    margins = [score_of[c] - score_of[r] for c, r in zip(chosen, rejected, strict=True)]
    if not all(map(math.isfinite, margins)):
        trainer.diverged = "A score of a held-out text is not finite"
        raise trainer.divergence()
    return {"margins": margins, "agreement": agreement, "gaps": gaps}
