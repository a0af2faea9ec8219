"""Train a reward model on pairs, rankings or ratings: each completion is scored once for all the comparisons that it is in."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Value
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import RewardConfig, RewardTrainer

from reward_models.listwise import (
    CollateTexts,
    RatingScale,
    kind_of_rows,
    longest,
    outcome,
    tokenize_once,
    with_tokens,
)
from reward_models.losses import centering_loss, preference_loss, soft_labels


def groups_of(dataset: Dataset, most: int) -> list[list[int]]:
    """Return the row numbers of tokenized pairs in groups of at most `most`.

    A row joins the group before it if they share a text.
    """
    groups: list[list[int]] = []
    texts: set[tuple] = set()
    for number, ids in enumerate(zip(dataset["chosen_ids"][:], dataset["rejected_ids"][:], strict=True)):
        pair = set(map(tuple, ids))
        if groups and len(groups[-1]) < most and not texts.isdisjoint(pair):
            groups[-1].append(number)
            texts |= pair
        else:
            groups.append([number])
            texts = pair
    return groups


class GroupSampler(Sampler):
    """Shuffle groups of rows, and keep the rows of a group together.

    Args:
        groups: the row numbers of each group.
        lengths: tokens of the longest row of each group, to put groups of similar length together; None: any order.
        size: number of rows in a batch of all processes.
        seed: seed that fixes the order, together with the epoch.
    """

    def __init__(self, groups: list[list[int]], lengths: list[int] | None, size: int, seed: int):
        self.groups, self.lengths, self.seed, self.epoch = groups, lengths, seed, 0
        self.rows = sum(map(len, groups))
        self.groups_at_once = max(1, round(size * len(groups) / max(1, self.rows)))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            order = torch.randperm(len(self.groups), generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self.groups_at_once, generator=generator)
        return (row for group in order for row in self.groups[group])


def score_each_text_once(model: nn.Module) -> None:
    """Make a sequence classifier run on the distinct rows of its input only, and give each row its logits.

    Its outputs and gradients do not change.
    """
    inverse = []

    def distinct(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        rows, where = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
        inverse.append(where)
        return args, {**kwargs, "input_ids": rows[:, : ids.shape[1]], "attention_mask": rows[:, ids.shape[1] :]}

    def spread(module: nn.Module, args: tuple, kwargs: dict, output):
        output.logits = output.logits[inverse.pop()]
        return output

    model.register_forward_pre_hook(distinct, with_kwargs=True)
    model.register_forward_hook(spread, with_kwargs=True)


def up_to_the_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a conversation's tokens without the white space that a chat template writes after the last turn.

    A completion ends with the token that ends the turn, and PPO reads its score there.
    """
    kept = len(ids)
    while kept and not tokenizer.decode(ids[kept - 1]).strip():
        kept -= 1
    known = tokenizer.added_tokens_decoder
    return ids[:kept] if kept and ids[kept - 1] in known and known[ids[kept - 1]].special else ids


@dataclass
class WithAgreement:
    """Put the rows' column `agreement` into a batch, as (B,), beside what TRL's collator makes of them."""

    collate: Callable[[list[dict]], dict[str, Any]]

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        agreement = torch.tensor([row["agreement"] for row in rows], dtype=torch.float32)
        return {**self.collate(rows), "agreement": agreement}


class RankingTrainer(RewardTrainer):
    """RewardTrainer of TRL for pairs that share texts.

    Pairs that share texts and follow each other in the dataset share a batch. Each text of a batch is scored once. Each
    plain text is also tokenized once.

    So all comparisons of one prompt enter the same step. This costs less and overfits less than pairs drawn one by one
    (Ouyang et al. 2022, arXiv 2203.02155, section 3.5). Pairs that share no text are shuffled and scored as in TRL.

    Rows that are rankings are learned by the likelihood of Plackett and Luce, and rated texts by squared error: see
    `reward_models.listwise`.

    Args:
        use_margin: subtract the column `margin`, if the rows have it, as TRL does.
        use_agreement: learn the shares in the column `agreement`, which the rows must have.
        label_smoothing: part of a label that goes to the other side, from 0 to below 0.5.
    """

    data_collator: Callable[[list[dict]], dict[str, Any]]

    def __init__(
        self,
        *args,
        use_margin: bool = True,
        use_agreement: bool = False,
        label_smoothing: float = 0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.use_margin, self.use_agreement, self.label_smoothing = use_margin, use_agreement, label_smoothing
        if use_agreement:
            self.data_collator = WithAgreement(self.data_collator)
        self.rating_scale = None
        kind = kind_of_rows(self.train_dataset)
        if kind:
            if kind == "rating":
                self.rating_scale = RatingScale.of(self.train_dataset["rating"][:])
            self.data_collator = CollateTexts(self.data_collator, self.rating_scale)
        score_each_text_once(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        """Override `_set_signature_columns_if_needed`: keep the column `agreement` where it is learned, and other rows'."""
        super()._set_signature_columns_if_needed()
        ours = ["ranking_ids", "text_ids", "rating", *(["agreement"] if self.use_agreement else [])]
        self._signature_columns += [name for name in ours if name not in self._signature_columns]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Override `compute_loss`: return TRL's loss, or ours where labels are not all 1. TRL records its figures."""
        if "sizes" in inputs or "ratings" in inputs:
            return self._loss_of_texts(model, dict(inputs), return_outputs)
        labels = inputs.get("agreement")
        unread = {"agreement"} if self.use_margin else {"agreement", "margin"}
        inputs = {name: value for name, value in inputs.items() if name not in unread}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if labels is not None or self.label_smoothing:
            chosen, rejected = outputs.logits.float().squeeze(-1).chunk(2)
            agreement = torch.ones_like(chosen) if labels is None else labels
            labels = soft_labels(agreement, label_smoothing=self.label_smoothing)
            loss = preference_loss(chosen, rejected, labels, inputs.get("margin"))
            if self.args.center_rewards_coefficient is not None:
                loss = loss + self.args.center_rewards_coefficient * centering_loss(chosen, rejected)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_texts(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool):
        """Return the loss of a batch of rankings or rated texts, and record TRL's figures over all processes."""
        sizes, ratings = inputs.pop("sizes", None), inputs.pop("ratings", None)
        outputs = model(**inputs, use_cache=False)
        scores = outputs.logits.float().squeeze(-1)
        loss, gaps = outcome(scores, sizes, ratings, self.args.center_rewards_coefficient)
        mode, found, tokens = (
            "train" if self.model.training else "eval",
            scores.detach(),
            inputs["attention_mask"].sum(),
        )
        counts = [gaps.new_tensor(len(of)) for of in (found, gaps)]
        sums = [tokens, found.sum(), (gaps > 0).sum(), gaps.sum(), *counts, found.min(), found.max()]
        of_all = self.accelerator.gather(torch.stack([each.float() for each in sums])).view(-1, len(sums))
        tokens, score, right, apart, texts, compared = of_all[:, :6].sum(dim=0).tolist()
        if mode == "train":
            self._total_train_tokens += round(tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        figures = {"min_reward": of_all[:, 6].min(), "mean_reward": score / texts, "max_reward": of_all[:, 7].max()}
        if compared:
            figures |= {"accuracy": right / compared, "margin": apart / compared}
        for name, figure in figures.items():
            self._metrics[mode][name].append(float(figure))
        return (loss, outputs) if return_outputs else loss

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: RewardConfig, dataset_name: str
    ) -> Dataset:
        prepare = super()._prepare_dataset
        whole = copy(args)
        whole.max_length = None  # a long text is left out together with its row

        def tokenized(pairs: Dataset) -> Dataset:
            return prepare(pairs, processing_class, whole, dataset_name)

        def tokens_of(texts: list) -> list[list[int]]:
            found = tokenize_once(texts, tokenized)
            turns = bool(texts) and not isinstance(texts[0], str)
            return [up_to_the_end(ids, processing_class) for ids in found] if turns else found

        if kind_of_rows(dataset):
            return with_tokens(dataset, tokens_of, args.max_length)
        if isinstance(dataset.features.get("chosen"), Value):  # plain texts, not conversations and not tokens
            prompts = dataset["prompt"][:] if "prompt" in dataset.column_names else [""] * len(dataset)
            pairs = {
                name: [prompt + text for prompt, text in zip(prompts, dataset[name][:], strict=True)]
                for name in ("chosen", "rejected")
            }
            ids = tokenize_once(pairs["chosen"] + pairs["rejected"], tokenized)
            dataset = dataset.add_column("chosen_ids", ids[: len(dataset)])
            dataset = dataset.add_column("rejected_ids", ids[len(dataset) :])
            return prepare(dataset, processing_class, args, dataset_name)
        given = dataset.column_names
        dataset = prepare(dataset, processing_class, args, dataset_name)
        if "chosen" not in given:  # tokens
            return dataset
        columns = ("chosen_ids", "rejected_ids")
        return dataset.map(lambda row: {name: up_to_the_end(row[name], processing_class) for name in columns})

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> GroupSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.world_size  # so that the order is the same as in one process
        groups = [[row] for row in range(len(rows))] if kind_of_rows(rows) else groups_of(rows, most=size)
        lengths = None
        if self.args.train_sampling_strategy == "group_by_length":
            of_rows = longest(rows)
            lengths = [max(of_rows[number] for number in group) for group in groups]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupSampler(groups, lengths, size, seed)
