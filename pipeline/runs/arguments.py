"""Options of the stages that TRL's configs do not have: data, adapters, prompts to complete."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from data.files import has_splits
from data.prompts import check_prompt_lengths, load_prompts
from pipeline.runs.outputs import rows_report


@dataclass
class DataArguments:
    """The datasets of a stage."""

    dataset_name: str = field(
        default="human_ratings",
        metadata={
            "help": "Hub id, folder or .jsonl/.json/.csv/.tsv/.parquet file (or .gz); human_ratings is the embedded default."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on (a single file has none)."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on. Unset: the evaluation split of dataset_name. '': no evaluation."},
    )
    dataset_eval_split: str = field(
        default="test", metadata={"help": "Split to evaluate on (a single file has none)."}
    )
    drop_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows that cannot be used, and count them, instead of refusing them."},
    )
    min_kept: float = field(
        default=0.5,
        metadata={"help": "Refuse to train if a smaller share of the rows fits into max_length uncut (0 to 1)."},
    )

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Return the datasets that the run reads."""
        return self.dataset_name, self.eval_dataset_name

    @property
    def train_source(self) -> str:
        """Return the name of the dataset to train on, for messages."""
        return self.dataset_name

    @property
    def eval_source(self) -> str | None:
        """Return the dataset of the evaluation rows, or None if there is none.

        Without `eval_dataset_name` it is `dataset_name`, but only if that has splits. A single file has no splits, and the
        evaluation would be on the training rows.
        """
        if self.eval_dataset_name is not None:
            return self.eval_dataset_name or None
        return self.dataset_name if has_splits(self.dataset_name) else None

    def load(
        self, read: Callable[..., Dataset], args: TrainingArguments | None = None
    ) -> dict[str, tuple[str, Dataset]]:
        """Read the training rows and, if there are any, the held-out rows, and return each with its source.

        `read` is a reader of `data`, such as `data.texts.load_texts`.

        Raises the errors of `read`, and:
            ValueError: `args` ask for an evaluation, and there are no held-out rows.
        """
        if args and not self.eval_source and (args.eval_strategy != "no" or args.eval_on_start):
            raise ValueError(
                f"eval_strategy={args.eval_strategy.value!r}, eval_on_start={args.eval_on_start} need held-out rows, and "
                f"{self.train_source} has none. Name a dataset in eval_dataset_name."
            )
        parts = {"train": self.load_train(read, args)}
        if self.eval_source:
            held_out = read(self.eval_source, self.dataset_eval_split, drop=self.drop_bad_rows)
            parts["held_out"] = self.eval_source, held_out
        return parts

    def load_train(self, read: Callable[..., Dataset], args: TrainingArguments | None = None) -> tuple[str, Dataset]:
        """Read the training rows, and return them with their source."""
        return self.dataset_name, read(self.dataset_name, self.dataset_train_split, drop=self.drop_bad_rows)


# TRL's SFTConfig, RewardConfig and DPOConfig have an option `pad_token`. The other stages get the same option here.
PAD_TOKEN = {
    "help": "Padding token, the same in all stages. Unset: the tokenizer's own, unless that token also ends texts."
}

# The option `judge` of PPO, evaluation and best-of-n.
JUDGE = {
    "help": "Reward function that judges completions, and trains nothing; written as in reward_funcs. Unset: none."
}


@dataclass
class PolicyArguments:
    """The start of a policy."""

    sft_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter of the policy's start and of the reference. Unset: the bare backbone."},
    )


@dataclass
class TextArguments:
    """The texts of the language-model loss (PTX), which keeps the policy from forgetting how to write them."""

    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Texts of the language-model loss (ptx_coef)."}
    )
    ptx_dataset_split: str = field(
        default="train", metadata={"help": "Split of these texts (a single file has none)."}
    )
    ptx_max_length: int = field(default=1024, metadata={"help": "Cut these texts to this number of tokens."})


@dataclass
class OnlineArguments(PolicyArguments):
    """Options of RLOO and GRPO that TRL's configs do not have."""

    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)


@dataclass
class CompletionArguments:
    """Options of held-out prompts and of their completions."""

    output_dir: str = field(metadata={"help": "Folder for the results."})
    dataset_name: str = field(default="human_ratings", metadata={"help": "Prompts: hub id, folder or file."})
    dataset_eval_split: str = field(default="test", metadata={"help": "Split to take prompts from."})
    drop_bad_rows: bool = field(default=False, metadata={"help": "Leave out and count prompts that cannot be used."})
    max_prompts: int = field(default=512, metadata={"help": "Number of prompts, the first ones."})
    max_completion_length: int = field(default=24, metadata={"help": "Most tokens sampled for a prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, as in PPO."})
    batch_size: int = field(default=64, metadata={"help": "Number of completions sampled at once."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the rewards, as in PPO. Unset: 1 each."}
    )
    judge: str | None = field(default=None, metadata=JUDGE)
    seed: int = 0
    disable_tqdm: bool = field(default=False, metadata={"help": "Draw no progress bars, as in training."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())  # as Trainer's arguments do

    def prompts(self) -> Dataset:
        """Read the prompts.

        Raises the errors of `load_prompts`, and a ValueError for fewer than two prompts: an interval needs two.
        """
        prompts = load_prompts(self.dataset_name, self.dataset_eval_split, drop=self.drop_bad_rows)
        prompts = prompts.select(range(min(self.max_prompts, len(prompts))))
        self._check_number(prompts)
        return prompts

    def check_lengths(
        self, prompts: Dataset, tokenizer: PreTrainedTokenizerBase, context: float
    ) -> tuple[Dataset, dict[str, dict]]:
        """Check the lengths of the prompts in tokens, and return the usable prompts and their counts for the report.

        Raises the errors of `check_prompt_lengths` and `prompts`.
        """
        options = (tokenizer, context, self.max_completion_length, self.dataset_name)
        prompts, found = check_prompt_lengths(prompts, *options, drop=self.drop_bad_rows)
        self._check_number(prompts)
        return prompts, rows_report({"prompts": (self.dataset_name, found)})

    def _check_number(self, prompts: Dataset) -> None:
        if len(prompts) < 2:
            raise ValueError(
                f"{self.dataset_name}: 1 prompt (max_prompts={self.max_prompts}), and intervals need 2 or more. Give more "
                f"prompts."
            )
