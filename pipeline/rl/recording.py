"""Record what PPO logs: figures over all processes, the table of completions, and warnings of an unhealthy run."""

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.rl.masking import explained_variance, masked_mean, masked_sums


logger = get_logger(__name__)


class Recording:
    """Mixin for an online trainer of TRL: keep the figures of the trainer's steps in its `_metrics` and `_logs`.

    TRL writes the log and the table of completions from these two.
    """

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _mean(self, value: Tensor, tokens: Tensor | None = None) -> float:
        """Return the mean over processes, weighted by the number of `tokens` if it is given."""
        weight = torch.ones_like(value, dtype=torch.float32).mean() if tokens is None else tokens.float()
        means, weights = self.accelerator.gather(torch.stack([value.detach().float().mean(), weight]).view(1, 2)).T
        return (means * (weights / weights.sum())).sum().item()

    def _record(self, tokens: Tensor | None = None, **metrics: Tensor) -> None:
        """Keep means over all processes, for the next line of the log."""
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(self._mean(value, tokens))

    def _record_disagreement(self, found: dict[str, Tensor], mask: Tensor) -> None:
        """Keep the results of `pipeline.rl.importance.disagreement` under TRL's names."""
        self._record(
            tokens=mask.sum(),
            **{
                "sampling/sampling_logp_difference/mean": found["difference"],
                "sampling/importance_sampling_ratio/mean": found["ratio"],
            },
        )
        largest = self.accelerator.gather(found["largest"].view(1)).max().item()
        self._metrics[self._mode]["sampling/sampling_logp_difference/max"].append(largest)

    def _record_rewards(self, columns: Tensor, count: int) -> None:
        """Keep the rewards of each function, (all B, functions), and what it gave to TRL's `log_extra` and `log_metric`.

        `count` is the number of completions of each process. Names are sorted, so that all processes gather them in the
        same order.
        """
        for name, column in zip(self.reward_func_names, columns.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
            self._metrics[self._mode][f"rewards/{name}/mean"].append(column.nanmean().item())
        for name in sorted(set(gather_object(list(self._pending_extra_logs)))):
            self._logs["extra"][name].extend(gather_object(self._pending_extra_logs.get(name, [None] * count)))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self._metrics[self._mode][name].append(sum(values) / len(values))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()

    def _record_value(self, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Keep the mean value of a rollout's tokens, and how much of the variance of the returns the values explain.

        `values`, `returns` and `mask` are (B, T).
        """
        self._record(tokens=mask.sum(), value=masked_mean(values, mask))
        sums = torch.stack([masked_sums(returns, mask), masked_sums(returns - values, mask)])
        explained = explained_variance(*self.accelerator.reduce(sums, reduction="sum"))
        self._metrics[self._mode]["explained_variance"].append(explained.item())

    def _record_rollout(
        self,
        prompts: list,
        completions: list,
        mask: Tensor,
        scores: Tensor,
        kl: Tensor,
        rewards: Tensor,
        advantages: Tensor,
    ) -> None:
        """Keep the figures of a rollout; in training, also check its health and adapt the KL coefficient.

        `mask`, `rewards` and `advantages` are (B, T), `scores` and `kl` (nats a sequence) are (B,).
        """
        self._record(score=scores, kl=kl, reward=rewards.sum(dim=1))
        self._metrics[self._mode]["beta"].append(self.beta)
        if self.model.training:
            kl, scores, lengths = self.accelerator.gather(torch.stack([kl, scores.to(kl), mask.sum(dim=1)], dim=1)).T
            self._warn(
                kl=kl.tolist(), scores=scores.tolist(), length=lengths.mean().item(), warming_up=self.warming_up
            )
            self._adapt_beta(kl)
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        self._logs["advantages"].extend(gather_object(advantages.sum(dim=1).tolist()))

    def _record_losses(
        self,
        mask: Tensor,
        policy: Tensor,
        value: Tensor,
        policy_clipped: Tensor,
        value_clipped: Tensor,
        approxkl: Tensor,
        entropy: Tensor,
    ) -> None:
        """Keep the figures of a minibatch, each a mean over its tokens; in training, also check the entropy."""
        self._record(
            tokens=mask.sum(),
            **{"loss/policy": policy, "loss/value": value},
            **{"clipfrac/policy": policy_clipped, "clipfrac/value": value_clipped},
            approxkl=approxkl,
            entropy=entropy,
        )
        if self.model.training:
            self._warn(entropy=self._metrics[self._mode]["entropy"][-1])

    def _warn(self, **measured) -> None:
        for message in self.health.observe(**measured):
            logger.warning(message, main_process_only=True)
            if self.training_log:
                self.training_log.warn(self.state.global_step + 1, message)
