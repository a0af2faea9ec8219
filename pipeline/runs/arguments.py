"""What stages take from a recipe beside TRL's own configs: data, adapters, prompts to complete."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data.files import has_splits
from data.prompts import check_prompt_lengths, load_prompts
from pipeline.runs.outputs import rows_report


@dataclass
class DataArguments:
    """Where a stage reads its rows."""

    dataset_name: str = field(
        default="human_ratings",
        metadata={
            "help": "Hub id, folder or .jsonl/.json/.csv/.tsv/.parquet file (or .gz); human_ratings is the embedded default."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on (a single file has none)."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on; unset: the evaluation split of dataset_name; '': none."},
    )
    dataset_eval_split: str = field(
        default="test", metadata={"help": "Split to evaluate on (a single file has none)."}
    )
    drop_bad_rows: bool = field(
        default=False, metadata={"help": "Leave rows that cannot be used out, and say so, instead of refusing them."}
    )
    min_kept: float = field(
        default=0.5,
        metadata={"help": "Refuse to train if max_length leaves fewer than this share of the rows whole (0 to 1)."},
    )

    @property
    def eval_source(self) -> str | None:
        """Where evaluation rows come from: None where no other dataset is named and dataset_name has no splits, so that
        they would be those that are trained on."""
        if self.eval_dataset_name is not None:
            return self.eval_dataset_name or None
        return self.dataset_name if has_splits(self.dataset_name) else None

    def load(self, read: Callable[..., Dataset]) -> dict[str, tuple[str, Dataset]]:
        """Read the rows to train on and, if there are any, those held out, each with where they come from.

        `read` is a reader of `data`, such as `data.texts.load_texts`; raises what it raises.
        """
        parts = {"train": (self.dataset_name, self.dataset_train_split)}
        if self.eval_source:
            parts["held_out"] = self.eval_source, self.dataset_eval_split
        return {part: (name, read(name, split, drop=self.drop_bad_rows)) for part, (name, split) in parts.items()}


# SFTConfig, RewardConfig and DPOConfig of TRL have an option `pad_token`; the other stages get one of that name.
PAD_TOKEN = {
    "help": "Token used for padding, the same in all stages; unset: the tokenizer's own, unless it ends texts."
}


@dataclass
class PolicyArguments:
    """Where a policy starts."""

    sft_adapter: str | None = field(
        default=None, metadata={"help": "Adapter the policy starts from and is held to; unset: the bare backbone."}
    )


@dataclass
class TextArguments:
    """The texts of the language-model loss (PTX), which keep the policy from forgetting."""

    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Texts of the language-model loss (ptx_coef)."}
    )
    ptx_dataset_split: str = field(default="train", metadata={"help": "Split of them (a single file has none)."})
    ptx_max_length: int = field(default=1024, metadata={"help": "Tokens that they are cut at."})


@dataclass
class OnlineArguments(PolicyArguments):
    """Add to TRL's configs what RLOO and GRPO need here."""

    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)


@dataclass
class CompletionArguments:
    """Held-out prompts, and how they are completed."""

    output_dir: str = field(metadata={"help": "Where the figures go."})
    dataset_name: str = field(default="human_ratings", metadata={"help": "Prompts: hub id, folder or file."})
    dataset_eval_split: str = field(default="test", metadata={"help": "Split to take prompts from."})
    drop_bad_rows: bool = field(default=False, metadata={"help": "Leave prompts that cannot be used out, and say so."})
    max_prompts: int = field(default=512, metadata={"help": "The first so many prompts."})
    max_completion_length: int = field(default=24, metadata={"help": "Tokens sampled at most."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, as in PPO."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at once."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "As in PPO; unset: 1 each."})
    seed: int = 0
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())  # as Trainer's arguments do

    def prompts(self) -> Dataset:
        """Raises what `load_prompts` raises, and a ValueError if there are fewer than two: no interval can be given."""
        prompts = load_prompts(self.dataset_name, self.dataset_eval_split, drop=self.drop_bad_rows)
        prompts = prompts.select(range(min(self.max_prompts, len(prompts))))
        self._check_number(prompts)
        return prompts

    def check_lengths(
        self, prompts: Dataset, tokenizer: PreTrainedTokenizerBase, context: int
    ) -> tuple[Dataset, dict[str, dict]]:
        """Check the prompts as tokens, say how many are used and return them, and what is said for the report.

        Raises what `check_prompt_lengths` and `prompts` raise.
        """
        options = (tokenizer, context, self.max_completion_length, self.dataset_name)
        prompts, found = check_prompt_lengths(prompts, *options, drop=self.drop_bad_rows)
        self._check_number(prompts)
        return prompts, rows_report({"prompts": (self.dataset_name, found)})

    def _check_number(self, prompts: Dataset) -> None:
        if len(prompts) < 2:
            raise ValueError(
                f"{self.dataset_name}: 1 prompt (max_prompts={self.max_prompts}), and intervals need 2 or more. Name more."
            )
