"""Measure the language-model loss of a role on held-out texts: what a policy unlearns while it learns from a reward."""

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

from data.texts import tokenize_texts
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import gathered
from pipeline.rl.losses import text_loss
from pipeline.runs.arguments import DataArguments, TextArguments
from pipeline.runs.rows import prepare_rows


def rows_of_texts(
    texts: Dataset | None, name: str | None, tokenizer: PreTrainedTokenizerBase, context: float, *, drop: bool
) -> tuple[list[list[int]], dict[str, dict]]:
    """Return texts as token rows of two tokens or more, cut as PTX cuts them, and their counts for the report.

    Args:
        texts: None gives no rows.
        name: name of their dataset, for errors and for the report.
        context: longest text of the model, in tokens.
        drop: whether to leave out rows that cannot be used.

    Raises the errors of `prepare_rows`, and:
        ValueError: there are fewer than two such texts, and an interval needs two.
    """
    if texts is None or name is None:
        return [], {}
    most = int(min(TextArguments.ptx_max_length, context))
    kept, report = prepare_rows(
        {"texts": (name, texts)}, tokenizer, DataArguments(drop_bad_rows=drop), max_length=most
    )
    rows = [row for row in tokenize_texts(kept["texts"], tokenizer, most) if len(row) > 1]
    if len(rows) < 2:
        raise ValueError(f"text_dataset_name={name!r}: {len(rows)} texts, and an interval needs 2. Give more texts.")
    return rows, report


@torch.no_grad()
def losses_of_texts(
    backbone: Backbone, role: str, rows: list[list[int]], *, pad_token_id: int, batch_size: int
) -> list[float]:
    """Return the loss of each text under a role, in nats a token: `pipeline.rl.losses.text_loss` of the text alone.

    Processes take batches in turn, and every process gets all losses.
    """
    state, device, parts = PartialState(), backbone.get_base_model().device, []
    for first in range(0, len(rows), batch_size)[state.process_index :: state.num_processes]:
        batch = [torch.tensor(ids) for ids in rows[first : first + batch_size]]
        ids = pad(batch, padding_value=pad_token_id, padding_side="right").to(device)
        mask = pad([torch.ones_like(row) for row in batch], padding_value=0, padding_side="right").to(device)
        logprobs, real = backbone.logprobs(role, ids, mask, ids[:, 1:]), mask[:, 1:].bool()
        losses = [text_loss(logprobs[n : n + 1], real[n : n + 1]).item() for n in range(len(batch))]
        parts.append((first, losses))
    (found,) = gathered(parts)
    return found
