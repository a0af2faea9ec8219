"""Name every figure that a training stage logs: its meaning, unit, healthy range, and what to do outside of it.

`METRICS` is the one table, and so this module is longer than others. The dashboard draws its ranges and the docs list it. A
test compares it with what the trainer of each stage really logs. `pipeline.reports.healthy` works out a run's ranges.

A range is a help for reading curves, not a law: it comes from LoRA runs of this project's recipes. A bound may be a multiple
(`Times`) of another figure of the run, since many figures have no size of their own.
"""

from dataclasses import dataclass


STAGES = ("SFT", "reward", "PPO", "RLOO", "GRPO", "DPO")
ONLINE = ("PPO", "RLOO", "GRPO")  # stages that sample completions


@dataclass(frozen=True)
class Times:
    """A bound that is a multiple of another figure of the run.

    Attributes:
        factor: the multiple.
        of: an option, the last value of another metric, or `first`: the metric's own first value.
    """

    factor: float
    of: str


Bound = float | Times


@dataclass(frozen=True)
class Metric:
    """One logged figure.

    Attributes:
        name: the name in the log. `*` stands for the name of a reward function. The same figure of held-out rows has
            `eval_` before it.
        stages: the stages that log it.
        group: the heading under which it is shown.
        unit: its unit.
        meaning: what it is.
        healthy: the healthy range, in words.
        remedy: what to do outside of it.
        low, high: the healthy range, as far as it is a number. Of several bounds the first that is known counts.
        settles: number of first entries that may be outside of the range.
    """

    name: str
    stages: tuple[str, ...]
    group: str
    unit: str
    meaning: str
    healthy: str
    remedy: str
    low: tuple[Bound, ...] = ()
    high: tuple[Bound, ...] = ()
    settles: int = 0


METRICS = (
    # -------------------------------------------------------------------------------------- reward
    Metric(
        "score", ("PPO",), "reward", "units of the reward",
        "Mean score of the sampled completions: the weighted sum of the rewards, less missing_eos_penalty, then clipped. With "
        "normalize_scores it counts deviations from the SFT policy's mean.",
        "Rises in the first updates, then flattens.",
        "Flat from the start: raise learning_rate or num_iterations, or lower beta. Rising while the samples get worse: the "
        "policy exploits the reward. Lower kl_target or raise beta, train an ensemble (num_members), or add a rule that "
        "punishes what you see.",
    ),
    Metric(
        "reward", ("PPO",), "reward", "units of the reward",
        "Mean sum of a completion's rewards: its score less the KL penalty. PPO maximises this.",
        "Rises with the score, and stays below it by beta times the KL.",
        "Falling while the score rises: the KL penalty eats the gain. Lower beta, or raise kl_target.",
    ),
    Metric(
        "reward", ("RLOO", "GRPO"), "reward", "units of the reward",
        "Mean of the weighted sum of the rewards, without a KL penalty.",
        "Rises in the first updates, then flattens.",
        "Flat from the start: raise learning_rate or num_generations, or lower beta. Rising while the samples get worse: "
        "raise beta, or train an ensemble of reward models (num_members).",
    ),
    Metric(
        "reward_std", ("RLOO", "GRPO"), "reward", "units of the reward",
        "Standard deviation of the rewards of all completions of a rollout.",
        "Above 0. It shrinks as the policy settles.",
        "At 0 there is nothing to learn from: check the reward functions, raise temperature or num_generations.",
        low=(1e-6,),
    ),
    Metric(
        "frac_reward_zero_std", ("RLOO", "GRPO"), "reward", "share of prompts",
        "Share of prompts whose completions all have the same reward, so that the prompt teaches nothing.",
        "Below 0.5.",
        "Raise num_generations or temperature, or choose prompts that are neither too easy nor too hard.",
        high=(0.5,),
    ),
    Metric(
        "rewards/*/mean", ONLINE, "reward", "units of that reward",
        "Mean reward of one reward function, before weights, penalty and clipping.",
        "Rises for every function that is meant to rise.",
        "One falls while another rises: change reward_weights.",
    ),
    Metric(
        "rewards/*/std", ("RLOO", "GRPO"), "reward", "units of that reward",
        "Standard deviation of one reward function over the completions of a rollout.",
        "Above 0.",
        "At 0 this function teaches nothing: check what it returns.",
    ),
    Metric(
        "rewards/*/disagreement", ONLINE, "reward", "units of that reward",
        "Mean standard deviation between the members of an ensemble of reward models.",
        "At most twice its first value.",
        "Growing: the policy writes texts that the reward models have not learned to judge. Lower kl_target or raise beta, or "
        "set reward_combination: mean_minus_std.",
        high=(Times(2.0, "first"),), settles=2,
    ),
    # ------------------------------------------------------------------------------------------ KL
    Metric(
        "kl", ("PPO",), "KL", "nats a sequence",
        "Mean over completions of the log-ratio of policy to reference, summed over the tokens. It is 0 at the first update.",
        "Rises to kl_target and stays within a factor of 1.5 of it; without a target, below 1 nat a token. Not negative.",
        "Too high: raise beta, set kl_target, or lower learning_rate or num_iterations. Far below its target to the end: "
        "raise learning_rate. Negative: tokens are not sampled from the policy that is scored; set top_p: 1, top_k: 0 and "
        "repetition_penalty: 1.",
        low=(-0.1,), high=(Times(1.5, "kl_target"), Times(1.0, "completions/mean_length")),
    ),
    Metric(
        "kl", ("RLOO", "GRPO"), "KL", "nats a token",
        "Mean over tokens of the KL to the reference: the log-ratio in RLOO, k3 in GRPO, which is never negative. It is "
        "logged unless beta is 0.",
        "Rises from 0 and stays below 1. Not negative.",
        "Too high: raise beta, or lower learning_rate or num_iterations.",
        low=(-0.1,), high=(1.0,),
    ),
    Metric(
        "beta", ("PPO",), "KL", "units of the reward a nat",
        "KL coefficient of the rollout. With kl_target it is adapted after each rollout, by at most 20% of the error.",
        "Settles while the KL is at its target. Without a target it is constant.",
        "It falls without end: the KL stays below its target; raise learning_rate. It rises without end: the KL stays above; "
        "lower learning_rate, or start with a higher beta.",
    ),
    # --------------------------------------------------------------------------------------- value
    Metric(
        "explained_variance", ("PPO",), "value", "share",
        "Share of the variance of the returns that the values explain, over a rollout, before it is learned from. 1 is "
        "perfect; 0 is a constant; below 0 is worse than a constant.",
        "Above 0 after a few updates, often 0.5 to 0.9 later.",
        "Below 0 for long: start the value from the reward model (value_init), raise value_learning_rate or "
        "critic_warmup_updates.",
        low=(0.0,), high=(1.0,), settles=8,
    ),
    Metric(
        "loss/value", ("PPO",), "value", "squared units of the reward",
        "Clipped value loss: half the mean squared error of the values against the returns.",
        "Falls in the first updates, and stays below 1.5 times its first value.",
        "Rising: the scores grow or jump. Clip them (reward_clip_range), scale them (normalize_scores), or lower "
        "value_learning_rate.",
        high=(Times(1.5, "first"),), settles=2,
    ),
    Metric(
        "value", ("PPO",), "value", "units of the reward",
        "Mean value of the rollout's tokens: the return that the value expects.",
        "Follows the reward.",
        "Far from the reward for long: see explained_variance.",
    ),
    Metric(
        "clipfrac/value", ("PPO",), "value", "share of tokens",
        "Share of tokens whose value has moved so far in the update that the clipped branch of the loss is the larger.",
        "Below 0.4 after a few updates. High in the first ones, in which the value learns most.",
        "High for long: raise value_clip, or lower value_learning_rate.",
        low=(0.0,), high=(0.4,), settles=6,
    ),
    # -------------------------------------------------------------------------------------- policy
    Metric(
        "entropy", ONLINE, "policy", "nats a token",
        "Mean entropy of the policy's next-token distribution: how much it varies what it writes.",
        "Falls slowly, and stays above a tenth of its first value. With one right answer to each prompt it may fall further.",
        "Collapsing: the policy repeats one text. Raise beta or entropy_coef, or lower learning_rate.",
        low=(Times(0.1, "first"),),
    ),
    Metric(
        "approxkl", ("PPO",), "policy", "nats a token",
        "KL of the policy from the policy that sampled (k2), over the passes of the update. Exactly 0 in the first pass in "
        "float32.",
        "1e-5 to 0.02. It falls to 0 with the learning rate.",
        "Above: an update goes too far. Lower learning_rate or num_iterations, or set max_approx_kl. At 0 from the start: "
        "raise learning_rate.",
        low=(0.0,), high=(0.02,),
    ),
    Metric(
        "clipfrac/policy", ("PPO",), "policy", "share of tokens",
        "Share of tokens whose ratio of new to old probability is outside the clip range (epsilon), which bounds the loss.",
        "0 to 0.2.",
        "Above: lower learning_rate or num_iterations. 0 from the start to the end: the policy hardly moves; raise "
        "learning_rate.",
        low=(0.0,), high=(0.2,),
    ),
    Metric(
        "loss/policy", ("PPO",), "policy", "none",
        "Clipped policy loss. Advantages are whitened, so it is near 0 in each update and is no sign of progress.",
        "Between -0.2 and 0.2.",
        "Large: an update goes too far; see approxkl.",
        low=(-0.2,), high=(0.2,),
    ),
    Metric(
        "loss/ptx", ("PPO",), "policy", "nats a token",
        "Language-model loss on the texts of ptx_dataset_name (ptx_coef above 0).",
        "At most 1.2 times its first value.",
        "Rising: the policy forgets these texts. Raise ptx_coef.",
        high=(Times(1.2, "first"),), settles=2,
    ),
    Metric(
        "clip_ratio/region_mean", ("RLOO", "GRPO"), "policy", "share",
        "Share of tokens (RLOO: of completions) whose ratio of new to old probability a clip bounds, on either side.",
        "0 to 0.3.",
        "Above: lower learning_rate or num_iterations, or raise epsilon.",
        low=(0.0,), high=(0.3,),
    ),
    *(
        Metric(
            f"clip_ratio/{name}", ("RLOO", "GRPO"), "policy", "share",
            f"Share of tokens (RLOO: of completions) that the {bound} clip bounds: {over}.",
            "As clip_ratio/region_mean.", "See clip_ratio/region_mean.",
        )
        for name, bound, over in (
            ("low_mean", "lower", "mean"), ("low_min", "lower", "smallest over processes and completions"),
            ("high_mean", "upper", "mean"), ("high_max", "upper", "largest over processes and completions"),
        )
    ),
    Metric(
        "policy_loss", ("GRPO",), "policy", "none", "The policy's loss without the entropy bonus (entropy_coef above 0).",
        "Near 0; no sign of progress.", "Nothing to do.",
    ),
    Metric(
        "entropy_coef", ("GRPO",), "policy", "units of the reward a nat",
        "Weight of the entropy bonus, constant or adapted to entropy_target.", "Settles.",
        "At its largest value for long: raise entropy_coef_max, or lower entropy_target.",
    ),
    Metric(
        "cispo_clip_ratio", ("GRPO",), "policy", "share of tokens",
        "Share of tokens whose weight is cut at epsilon_high (loss_type cispo).", "0 to 0.3.",
        "Above: lower learning_rate or num_iterations, or raise epsilon_high.", low=(0.0,), high=(0.3,),
    ),
    Metric(
        "vespo/phi_seq_mean", ("GRPO",), "policy", "none", "Mean weight of a completion (loss_type vespo).", "Near 1.",
        "Near 0: policy and sampler are far apart. Lower learning_rate or num_iterations.",
    ),
    # --------------------------------------------------------------------------------- completions
    Metric(
        "completions/mean_length", ONLINE, "completions", "tokens", "Mean length of the sampled completions.",
        "Between half and twice its first value.",
        "Shrinking: short praise earns the score. Growing to the limit: length does. Reward the length that you want "
        "(get_length), or set missing_eos_penalty.",
        low=(Times(0.5, "first"),), high=(Times(2.0, "first"),),
    ),
    Metric(
        "completions/clipped_ratio", ONLINE, "completions", "share of completions",
        "Share of completions that were cut at max_completion_length before their end-of-text token.",
        "Below 0.5.",
        "Raise max_completion_length, set missing_eos_penalty (PPO), or train SFT on texts that end.",
        low=(0.0,), high=(0.5,),
    ),
    *(
        Metric(
            f"completions/{which}_length", ONLINE, "completions", "tokens", f"The {which}imum length of a completion.",
            "No range of its own.", "See completions/mean_length.",
        )
        for which in ("min", "max")
    ),
    *(
        Metric(
            f"completions/{which}_terminated_length", ONLINE, "completions", "tokens",
            f"The {words} length of the completions that ended by themselves; 0 if none did.",
            "No range of its own.", "At 0, see completions/clipped_ratio.",
        )
        for which, words in (("mean", "mean"), ("min", "minimum"), ("max", "maximum"))
    ),
    # ------------------------------------------------------------------------------------ sampling
    Metric(
        "sampling/sampling_logp_difference/mean", ("PPO", "GRPO"), "sampling", "nats a token",
        "Mean difference between a token's log-probability as it was sampled and as the trainer measures it. GRPO logs it "
        "with vLLM alone.",
        "Below 0.1: about 1e-6 in float32, 0.001 to 0.05 in bfloat16.",
        "Above: sampler and trainer disagree. Check the dtype, and with vLLM its weights and processed_logprobs.",
        low=(0.0,), high=(0.1,),
    ),
    Metric(
        "sampling/sampling_logp_difference/max", ("PPO", "GRPO"), "sampling", "nats a token",
        "Largest of these differences.", "No range of its own: in bfloat16 a rare token may differ by 1.",
        "See sampling/sampling_logp_difference/mean.",
    ),
    Metric(
        "sampling/importance_sampling_ratio/mean", ("PPO", "GRPO"), "sampling", "ratio",
        "Mean ratio of a token's probability under the trained policy to that under the sampler.", "0.9 to 1.1.",
        "Outside: see sampling/sampling_logp_difference/mean.", low=(0.9,), high=(1.1,),
    ),
    Metric(
        "sampling/importance_weight/mean", ("PPO",), "sampling", "ratio",
        "Mean weight that corrects the policy loss for vLLM (vllm_importance_sampling_correction).", "0.7 to 1.3.",
        "Outside: see sampling/sampling_logp_difference/mean.", low=(0.7,), high=(1.3,),
    ),
    *(
        Metric(
            f"sampling/importance_sampling_ratio/{which}", ("GRPO",), "sampling", "ratio",
            f"The {which}imum of these ratios, with vLLM.", "No range of its own.",
            "See sampling/sampling_logp_difference/mean.",
        )
        for which in ("min", "max")
    ),
    # --------------------------------------------------------------------------------------- pairs
    Metric(
        "accuracy", ("reward",), "pairs", "share of pairs",
        "Share of the training pairs since the last entry that the reward model orders as people do. The accuracy on held-out "
        "pairs comes at the end.",
        "From 0.5 to 0.6 to 0.9. On noisy labels it cannot be higher than people agree with each other.",
        "Near 0.5: check the pairs (python -m data.inspect), raise learning_rate, or start from SFT (start_from_sft). Near 1: "
        "the pairs are memorised, or their sides differ in length or format alone.",
        low=(0.55,), high=(0.98,), settles=5,
    ),
    Metric(
        "margin", ("reward",), "pairs", "units of the reward",
        "Mean difference of the scores of chosen and rejected texts.", "Above 0, and rises.",
        "At 0: see accuracy. Growing without end: the model is too sure; fewer epochs, or label_smoothing.",
        low=(0.0,), settles=5,
    ),
    *(
        Metric(
            f"{which}_reward", ("reward",), "pairs", "units of the reward", f"The {words} score of a batch's texts.",
            "Only differences between scores count; normalize_scores removes the level.",
            "A level that drifts far from 0: set center_rewards_coefficient: 0.01.",
        )
        for which, words in (("min", "smallest"), ("mean", "mean"), ("max", "largest"))
    ),
    Metric(
        "rewards/accuracies", ("DPO",), "pairs", "share of pairs",
        "Share of pairs in which the implicit reward of the chosen text is the higher.", "Rises from 0.5 to 0.6 to 0.9.",
        "Near 0.5: raise learning_rate, or check the pairs. Near 1: the pairs are memorised; fewer epochs.",
        low=(0.5,), high=(0.98,), settles=5,
    ),
    Metric(
        "rewards/margins", ("DPO",), "pairs", "nats, times beta",
        "Mean difference of the implicit rewards of chosen and rejected texts.", "Above 0, and rises.",
        "At 0: see rewards/accuracies. Growing without end: raise beta, or fewer epochs.", low=(0.0,), settles=5,
    ),
    *(
        Metric(
            f"rewards/{side}", ("DPO",), "pairs", "nats, times beta",
            f"Implicit reward of the {side} texts: beta times the log-ratio of policy to reference.",
            "The chosen one rises or stays; the rejected one falls.",
            "Both fall: all of these texts become less likely. Raise beta, lower learning_rate, or add sft to loss_type.",
        )
        for side in ("chosen", "rejected")
    ),
    *(
        Metric(
            f"logps/{side}", ("DPO",), "pairs", "nats a sequence", f"Mean log-probability of the {side} texts.",
            "See rewards/chosen and rewards/rejected.", "See rewards/chosen and rewards/rejected.",
        )
        for side in ("chosen", "rejected")
    ),
    *(
        Metric(
            f"logits/{side}", ("DPO",), "pairs", "none", f"Mean logit over the {side} texts.", "No range of its own.",
            "Nothing to do.",
        )
        for side in ("chosen", "rejected")
    ),
    # ------------------------------------------------------------------------------ language model
    Metric(
        "mean_token_accuracy", ("SFT", "DPO"), "language model", "share of tokens",
        "Share of tokens that the model finds most likely (DPO: tokens of the chosen texts).", "Rises.",
        "Falling on held-out texts while it rises in training: fewer epochs.",
    ),
    Metric(
        "entropy", ("SFT", "DPO"), "language model", "nats a token",
        "Mean entropy of the model's next-token distribution.", "SFT: about the loss. DPO: falls slowly.",
        "SFT: far below the loss on held-out texts, the model is too sure; fewer epochs.",
    ),
    Metric(
        "aux_loss", ("SFT", "RLOO", "GRPO", "DPO"), "language model", "none",
        "Load-balancing loss of a mixture of experts (router_aux_loss_coef).", "Stays near its first value.",
        "Rising: raise router_aux_loss_coef.", high=(Times(2.0, "first"),), settles=2,
    ),
    # -------------------------------------------------------------------------------- optimisation
    Metric(
        "loss", ("SFT", "reward", "DPO"), "optimisation", "nats",
        "The loss that is minimised: nats a token in SFT; a pair's in reward and DPO, where chance is 0.693 (ln 2).",
        "Falls.",
        "Flat: raise learning_rate. Falling in training and rising on held-out rows: fewer epochs.",
    ),
    Metric(
        "loss", ONLINE, "optimisation", "none",
        "Sum of the losses with their weights. Each rollout has another loss, so the curve is no sign of progress.",
        "Near 0.", "Look at the score, the KL and the value instead.",
    ),
    Metric(
        "grad_norm", STAGES, "optimisation", "norm",
        "Norm of the gradient before it is clipped to max_grad_norm.", "About the same size all the time.",
        "Peaks with jumps in the other curves: lower learning_rate.",
    ),
    Metric("learning_rate", STAGES, "optimisation", "none", "Learning rate of the next step.", "As its schedule.",
           "Change learning_rate, lr_scheduler_type or warmup_steps."),
    # -------------------------------------------------------------------------------------- counts
    Metric("step", STAGES, "counts", "optimizer steps", "Optimizer steps so far.", "Rises.", "Nothing to do."),
    Metric("epoch", STAGES, "counts", "passes", "Passes over the data so far.", "Rises.", "Nothing to do."),
    Metric("num_tokens", STAGES, "counts", "tokens", "Tokens read so far, padding left out.", "Rises.", "Nothing to do."),
    Metric("num_input_tokens_seen", STAGES, "counts", "tokens", "Input tokens so far (include_num_input_tokens_seen).",
           "Rises.", "Nothing to do."),
    Metric("step_time", ONLINE, "counts", "seconds", "Mean time of an optimizer step since the last entry.",
           "About constant.", "Growing: look at the lengths, and at what else the machine runs."),
    Metric("train_loss", STAGES, "counts", "that of loss", "Mean loss of the whole run, in its last entry.", "See loss.",
           "See loss."),
    Metric("total_flos", STAGES, "counts", "operations", "Floating-point operations, as transformers estimates them; 0 if it "
           "does not.", "No range of its own.", "Nothing to do."),
    *(
        Metric(f"{part}_{name}", STAGES, "counts", unit, f"{words} of {of}.", "No range of its own.", "Nothing to do.")
        for part, of in (("train", "the whole run"), ("eval", "an evaluation"))
        for name, unit, words in (
            ("runtime", "seconds", "Time"), ("samples_per_second", "rows a second", "Speed"),
            ("steps_per_second", "steps a second", "Speed"), ("tokens_per_second", "tokens a second", "Speed"),
        )
    ),
)  # fmt: skip
