"""Warn of an unhealthy PPO run while it trains: one message for each symptom, with its cause and the option to change."""

import math
from dataclasses import dataclass, field


STILL = 10  # updates after which a policy should have moved


@dataclass
class Health:
    """The state of a run's warnings: each warning is given once.

    `observe` returns the new messages. A value that is not finite ends training: see `pipeline.runs.divergence`.
    """

    said: set[str] = field(default_factory=set)
    first_entropy: float | None = None
    flat_rollouts: int = 0
    rollouts: int = 0  # of a policy that trains

    def observe(
        self,
        *,
        kl: list[float] | None = None,
        scores: list[float] | None = None,
        length: float | None = None,
        entropy: float | None = None,
        warming_up: bool = False,
    ) -> list[str]:
        """Return the new warnings about measured figures.

        Args:
            kl: KL of each completion of a rollout to the reference (the sampled log-ratio), in nats.
            scores: score of each completion.
            length: mean number of tokens of a completion.
            entropy: mean entropy of the policy, in nats a token.
            warming_up: whether only the value trains yet.
        """
        found = {}
        if kl:
            mean = sum(kl) / len(kl)
            error = math.sqrt(sum((x - mean) ** 2 for x in kl) / len(kl) / max(len(kl) - 1, 1))
            if len(kl) > 1 and mean < -0.1 and mean < -3 * error:
                found["negative KL"] = (
                    f"The KL to the reference is {mean:.2f} nats a sequence. Sampling noise ({error:.2f}) does not "
                    f"explain a negative KL: the tokens are not sampled from the policy that is scored. Sample from the "
                    f"whole distribution (top_p: 1, top_k: 0, repetition_penalty: 1)."
                )
            if length and mean > length:
                found["exploding KL"] = (
                    f"The KL to the reference is {mean:.1f} nats a sequence, more than 1 a token. The policy now writes "
                    f"texts that the reference would not write and that the reward model was not trained on. Raise beta, "
                    f"set kl_target, or lower learning_rate or num_iterations."
                )
            self.rollouts += not warming_up
            # Half the mean square of the log-ratio is the KL of two policies that are close, and is never negative.
            moved = sum(x * x for x in kl) / len(kl) / 2
            if self.rollouts > STILL and moved < 1e-3:
                found["still policy"] = (
                    f"After {STILL} updates the KL to the reference is {moved:.1g} nats a sequence: the policy has hardly "
                    f"moved. Raise learning_rate (LoRA usually wants 10 to 100 times the rate for all weights) or "
                    f"num_iterations, or lower beta."
                )
        if scores:
            self.flat_rollouts = self.flat_rollouts + 1 if max(scores) == min(scores) else 0
            if self.flat_rollouts == 5:
                found["flat reward"] = (
                    f"Every completion of the last 5 rollouts has the score {scores[0]:g}: there is nothing to learn from. "
                    f"Check the reward functions, reward_clip_range, and whether the completions still vary."
                )
        if entropy is not None:
            self.first_entropy = self.first_entropy or entropy
            if entropy < 0.1 * self.first_entropy:
                found["collapsed entropy"] = (
                    f"The entropy fell from {self.first_entropy:.2f} to {entropy:.2f} nats a token: the policy hardly "
                    f"varies what it writes. That is right where each prompt has one answer. Otherwise raise beta or "
                    f"entropy_coef, or lower learning_rate."
                )
        fresh = {name: message for name, message in found.items() if name not in self.said}
        self.said |= fresh.keys()
        return list(fresh.values())
