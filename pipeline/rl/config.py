"""PPO's options: those of TRL's RLOOConfig, and more for the value function."""

from dataclasses import dataclass, field

from trl import ModelConfig, RLOOConfig

from pipeline.backbone.lora import LoraArguments
from pipeline.rl.importance import MODES
from pipeline.runs.arguments import JUDGE, PAD_TOKEN, DataArguments, PolicyArguments, TextArguments
from pipeline.runs.recipe import check_ranges
from reward_models.functions import RewardArguments


# Options that the score, the rewards and the advantages of a completion depend on. PPO leaves them in metrics.json, so that
# `pipeline.compare` can show later what PPO saw.
OF_TOKENS = (
    *("beta", "kl_estimator", "gamma", "lam", "missing_eos_penalty", "reward_clip_range", "reward_weights"),
    *("whiten_rewards", "temperature", "max_completion_length"),
)
# Options of RLOOConfig and Trainer that PPO would have to ignore.
UNSUPPORTED = (
    "fp16",  # its loss scaler expects gradients in every step, and infinite gradients in some
    "vllm_structured_outputs_regex",  # completions would not be drawn from the policy that is scored
    "use_transformers_continuous_batching",  # with bf16 TRL rounds the adapters to bfloat16 permanently
    "mask_truncated_completions",
    "sync_ref_model",
    "router_aux_loss_coef",
    "chat_template_kwargs",
)


@dataclass
class PPOConfig(RLOOConfig):
    """PPO's options: those of TRL's RLOOConfig, with the same meaning, and more for the value function.

    The most important inherited options are `beta` (KL coefficient), `epsilon` (policy clip range) and `epsilon_high` (the
    range above 1, where it differs), `num_iterations` (PPO epochs an update), `steps_per_generation` (minibatches an epoch
    times gradient accumulation), `temperature`, `max_completion_length`, `reward_weights`, `reward_clip_range` (bounds of
    the score).
    """

    # options of TRL's class, with PPO's defaults
    num_generations: int = field(
        default=1, metadata={"help": "Completions for each prompt. PPO's baseline is the value."}
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    normalize_advantages: bool = field(default=True, metadata={"help": "Whiten advantages over each rollout."})
    reward_clip_range: list[float] | None = field(  # TRL's tuple cannot be given on a command line
        default=None, metadata={"help": "Lowest and highest score; scores outside are clipped."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off, so that ratios start at 1."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam, as in OpenAI's PPO."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Keep only the input of each layer; compute the rest again."}
    )
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    # the correction for vLLM, which rounds in its own way: names, meaning and defaults of TRL's GRPOConfig
    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={"help": "With use_vllm, weight the policy loss by the ratio of trained to sampled probability."},
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": f"Ratio of a token or a sequence; beyond the bounds truncate or mask it: {', '.join(MODES)}."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of the ratio."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of the ratio."}
    )

    # the reward of a token
    kl_estimator: str = field(default="k1", metadata={"help": "KL of a token: k1 (unbiased) or k3 (never negative)."})
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL in nats a sequence; beta is adapted to hold it. Unset: beta stays constant."},
    )
    kl_horizon: float = field(
        default=10_000,
        metadata={"help": "Number of sequences in which an adaptive beta can change by a factor of e^0.2."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion without an end-of-text token."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to unit variance; the mean is kept."})

    # the advantage and the value
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    value_lam: float | None = field(
        default=None, metadata={"help": "Lambda of the returns that the value learns. Unset: that of lam."}
    )
    critic: str = field(
        default="adapter",
        metadata={"help": "adapter: a separate value adapter with a head. head: only a head, on the policy's trunk."},
    )
    value_init: str = field(
        default="auto",
        metadata={
            "help": "Start of the value adapter: reward, policy (with a zero head), or auto (reward if there is one)."
        },
    )
    critic_warmup_updates: int = field(
        default=0, metadata={"help": "Number of first updates in which only the value trains."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value. Unset: that of the policy, learning_rate."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_clip: float = field(default=0.2, metadata={"help": "Clip range of the value loss."})

    # the update
    dual_clip: float | None = field(
        default=None,
        metadata={
            "help": "Highest ratio that counts where the advantage is negative; above 1 + epsilon_high, often 3."
        },
    )
    max_approx_kl: float | None = field(
        default=None, metadata={"help": "Skip the rest of an update when a minibatch's approxkl (nats) exceeds this."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on the texts of ptx_dataset_name."}
    )

    # before and during training
    min_reward_accuracy: float = field(
        default=0.55, metadata={"help": "Refuse a reward model with a lower accuracy on held-out pairs."}
    )
    sample_updates: int = field(
        default=0, metadata={"help": "Write completions of fixed prompts to samples.jsonl every this many updates."}
    )
    judge: str | None = field(default=None, metadata=JUDGE)  # of samples.jsonl
    sample_prompts: int = field(default=8, metadata={"help": "Number of fixed prompts."})
    eval_prompts: int = field(
        default=256, metadata={"help": "Number of held-out prompts, the first ones (eval_strategy)."}
    )

    def __post_init__(self):
        check_ranges(vars(self))
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check asks for two completions of each prompt, for its baseline. PPO's baseline is the value.
            if "at least 2 generations" not in str(error):
                raise
        for name in UNSUPPORTED:
            if getattr(self, name):
                once = " (once use_transformers_paged)" if name == "use_transformers_continuous_batching" else ""
                raise ValueError(f"{name}={getattr(self, name)!r}{once} is not supported by PPO; leave it unset.")
        for name, known in (
            ("vllm_mode", ("server", "colocate")),
            ("vllm_importance_sampling_mode", MODES),
            ("kl_estimator", ("k1", "k3")),
            ("critic", ("adapter", "head")),
            ("value_init", ("auto", "reward", "policy")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.critic == "head" and self.value_init != "auto":
            raise ValueError(
                f"value_init={self.value_init!r} is for a value adapter, and critic='head' has no value adapter. Leave "
                f"value_init unset."
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and not _ascends([low, high]):
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}."
            )
        if self.reward_clip_range is not None and not _ascends(self.reward_clip_range):
            raise ValueError(
                f"reward_clip_range={self.reward_clip_range} must be two numbers, the lower first, such as [-5, 5]."
            )
        if self.kl_target and self.beta <= 0:
            raise ValueError(f"beta={self.beta} cannot be adapted to kl_target={self.kl_target}. Set beta above 0.")
        if self.kl_target and self.kl_horizon < self.generation_batch_size:
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g} is shorter than one rollout of {self.generation_batch_size} sequences over "
                f"all processes. In one rollout beta may change by at most a fifth. Set kl_horizon to several rollouts."
            )
        if self.judge and not self.sample_updates:
            raise ValueError(
                f"judge={self.judge!r} judges the completions of samples.jsonl, and sample_updates is 0. Set sample_updates, "
                f"or leave judge unset."
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.dual_clip is not None and self.dual_clip <= 1 + high:
            raise ValueError(
                f"dual_clip={self.dual_clip:g} must be above 1 + {high:g}, the highest ratio that the clip range allows. 3 is "
                f"usual."
            )
        minibatches = self.steps_per_generation / self.gradient_accumulation_steps
        if minibatches != int(minibatches):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"steps_per_generation={self.steps_per_generation}. Their ratio is the number of minibatches an epoch. Set "
                f"steps_per_generation to a multiple of gradient_accumulation_steps."
            )


def _ascends(bounds: list[float]) -> bool:
    return len(bounds) == 2 and bounds[0] < bounds[1]


# The options of pipeline.ppo, and of what plans it.
OPTIONS = (DataArguments, PolicyArguments, TextArguments, RewardArguments, LoraArguments, ModelConfig, PPOConfig)
