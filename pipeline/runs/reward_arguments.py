"""Options of a reward model: its losses, its start, its scale, its members; and what contradicts what."""

from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset
from trl import RewardConfig

from pipeline.backbone.classifiers import RewardModelConfig
from pipeline.backbone.sharding import kind_of


@dataclass
class RewardModelArguments:
    """Options of the reward stage that TRL's RewardConfig does not have."""

    loss_type: Literal["bradley_terry", "plackett_luce", "regression"] = field(
        default="bradley_terry",
        metadata={
            "help": "Learn pairs (bradley_terry), rankings of several completions (plackett_luce), or ratings (regression)."
        },
    )
    use_margin: bool = field(
        default=False,
        metadata={
            "help": "Subtract the `margin` column in the loss (Llama 2). Scores spread, and calibration gets worse."
        },
    )
    use_agreement: bool = field(
        default=False,
        metadata={
            "help": "Learn the share of raters in the `agreement` column (soft labels; 0.5 is a tie), not that all agree."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Share of labels that are taken to be the wrong way round, from 0 to below 0.5; as in DPO."},
    )
    sft_adapter: str | None = field(
        default=None,
        metadata={"help": "Policy that PPO starts from: measure mean and deviation of its completions' scores."},
    )
    start_from_sft: bool = field(
        default=False,
        metadata={
            "help": "Start from the LoRA weights of sft_adapter, with a fresh head, instead of a fresh adapter."
        },
    )
    sft_completions: int = field(default=256, metadata={"help": "Number of completions of sft_adapter."})
    max_completion_length: int = field(default=64, metadata={"help": "Most tokens sampled for each of them."})
    num_members: int = field(
        default=1,
        metadata={
            "help": "Train an ensemble of this many adapters, with seeds of their own, in output_dir/member_0 ..."
        },
    )

    def __post_init__(self):
        if 0.5 <= self.label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} must be below 0.5: at 0.5 labels say nothing, and above it they "
                f"say the opposite. Set it to 0.1, for example."
            )
        if self.use_margin and self.use_agreement:
            raise ValueError(
                "use_margin=True and use_agreement=True contradict each other: both say how far apart two scores are to be. "
                "Set one of them."
            )
        of_pairs = ("use_margin", "use_agreement", "label_smoothing")
        if self.loss_type != "bradley_terry" and (given := [name for name in of_pairs if getattr(self, name)]):
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} is for pairs, and loss_type={self.loss_type!r} has no labels of them."
                f" Leave {given[0]} unset, or set loss_type: bradley_terry."
            )
        if self.start_from_sft and not self.sft_adapter:
            raise ValueError("start_from_sft=True needs an adapter to start from. Name it in sft_adapter.")

    def check_own(self, model: RewardModelConfig, args: RewardConfig) -> None:
        """Check the options of a reward model of its own, which shares the backbone of no policy.

        Raises:
            ValueError: an option is about a shared backbone, the weights to train would be of 16 bits, or the launch would
                shard the model.
        """
        if model.use_peft:
            own, also = f"model_name_or_path={model.model_name_or_path!r} is an encoder, and so a model of its own", ""
        else:
            own, also = "use_peft=False trains a model of its own", ", or train a LoRA adapter (use_peft: true)"
        if self.sft_adapter:
            raise ValueError(
                f"sft_adapter={self.sft_adapter!r} is about a backbone that the reward model shares with the policy, but "
                f"{own}. Leave sft_adapter and start_from_sft unset (--sft_adapter ''){also}."
            )
        if self.num_members != 1:
            raise ValueError(
                f"num_members={self.num_members} makes adapters on a shared backbone, but {own}. Leave it unset{also}."
            )
        if self.loss_type != "bradley_terry":
            raise ValueError(
                f"loss_type={self.loss_type!r} needs the shared backbone, but {own}, which learns from pairs. Set loss_type: "
                f"bradley_terry{also}."
            )
        if not model.use_peft and model.dtype != "float32":
            raise ValueError(
                f"dtype={model.dtype!r} with use_peft=False may train weights of 16 bits, in which most steps of "
                f"learning_rate={args.learning_rate:g} are lost to rounding. Leave dtype unset (float32), and set bf16: true "
                f"to compute in bfloat16."
            )
        if (kind := kind_of(args.distributed_state)) not in ("no wrapper", "DDP"):
            raise ValueError(
                f"{own}, which does not run under {kind}. Launch with accelerate_configs/ddp.yaml, or in one process{also}."
            )

    def check_columns(self, parts: dict[str, tuple[str, Dataset]], args: RewardConfig) -> None:
        """Check that the rows whose loss is computed have the columns that it needs, and that its options suit it.

        Args:
            parts: `train`, and `held_out` if any, each with the source of its rows.

        Raises:
            ValueError: a column is missing; or `center_rewards_coefficient` is set where ratings say where 0 is.
        """
        if self.loss_type == "regression" and args.center_rewards_coefficient is not None:
            raise ValueError(
                f"center_rewards_coefficient={args.center_rewards_coefficient!r} and loss_type='regression' contradict each "
                f"other: ratings say where 0 is. Set one of them."
            )
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        for part, (source, rows) in parts.items():
            for option, column in (("use_margin", "margin"), ("use_agreement", "agreement")):
                if getattr(self, option) and column not in rows.column_names and (part == "train" or evaluates):
                    raise ValueError(
                        f"{source}: no column {column!r}, which {option}=True reads. Add it to the rows, or leave {option} "
                        f"unset."
                    )
            if self.loss_type == "regression" and "rating" not in rows.column_names and (part == "train" or evaluates):
                raise ValueError(
                    f"{source}: no column 'rating', which loss_type='regression' learns. Give rated texts (pairs will do for "
                    f"held-out rows that are scored after training alone), or set loss_type: bradley_terry."
                )
