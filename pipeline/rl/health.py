"""What goes wrong in PPO, told while it happens: one message for each symptom, with its likely cause and the knob."""

import math
from dataclasses import dataclass, field


@dataclass
class Health:
    """Looks at each update's figures, remembers what it has said, and says everything once.

    `observe` returns the messages that are new. What is not finite ends training: `pipeline.runs.divergence`.
    """

    said: set[str] = field(default_factory=set)
    first_entropy: float | None = None
    flat_rollouts: int = 0

    def observe(
        self,
        *,
        kl: list[float] | None = None,
        scores: list[float] | None = None,
        length: float | None = None,
        entropy: float | None = None,
    ) -> list[str]:
        """New messages on what was measured.

        Args:
            kl: KL to the reference of each completion of a rollout (the sampled log-ratio), in nats.
            scores: score of each completion.
            length: mean tokens of a completion.
            entropy: mean of the policy, in nats a token.
        """
        found = {}
        if kl:
            mean = sum(kl) / len(kl)
            error = math.sqrt(sum((x - mean) ** 2 for x in kl) / len(kl) / max(len(kl) - 1, 1))
            if len(kl) > 1 and mean < -0.1 and mean < -3 * error:
                found["negative KL"] = (
                    f"The KL to the reference is {mean:.2f} nats a sequence, which sampling noise ({error:.2f}) does "
                    f"not explain: the tokens are not sampled from the policy that is scored. Sample from the whole "
                    f"distribution (top_p: 1, top_k: 0, repetition_penalty: 1)."
                )
            if length and mean > length:
                found["exploding KL"] = (
                    f"The KL to the reference is {mean:.1f} nats a sequence, more than 1 a token: the policy has left "
                    f"what the reference writes, and the reward model what it was trained on. Raise beta, set "
                    f"kl_target, or lower learning_rate or num_iterations."
                )
        if scores:
            self.flat_rollouts = self.flat_rollouts + 1 if max(scores) == min(scores) else 0
            if self.flat_rollouts == 5:
                found["flat reward"] = (
                    f"Every completion of the last 5 rollouts scored {scores[0]:g}: there is nothing to learn from. "
                    f"Look at the reward functions, at reward_clip_range, and whether the policy still varies."
                )
        if entropy is not None:
            self.first_entropy = self.first_entropy or entropy
            if entropy < 0.1 * self.first_entropy:
                found["collapsed entropy"] = (
                    f"The entropy fell from {self.first_entropy:.2f} to {entropy:.2f} nats a token: the policy writes "
                    f"the same again and again. Raise beta or entropy_coef, or lower learning_rate."
                )
        fresh = {name: message for name, message in found.items() if name not in self.said}
        self.said |= fresh.keys()
        return list(fresh.values())
