"""Score the two sides of preference pairs with any rewards, each distinct text once."""

import inspect
import json
from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from data.prompts import tokenize_prompts
from data.reading import dataset_of
from reward_models.composite import Composite, async_runner, call_rewards
from reward_models.ranking import up_to_the_end


def distinct_texts(pairs: Dataset, columns: list[str]) -> tuple[Dataset, np.ndarray]:
    """Return each distinct text of the pairs once, and for each pair the numbers of its two texts (chosen, rejected).

    Args:
        columns: other columns that the rewards read. Texts that differ in them are different.

    Returns:
        Rows of `prompt`, `completion` and `columns`; and (pairs, 2).
    """
    rows: list[dict] = []
    numbers: dict[str, int] = {}
    of = []
    for pair in pairs.select_columns(["prompt", "chosen", "rejected", *columns]):
        given = {column: pair[column] for column in columns}
        for side in ("chosen", "rejected"):
            key = json.dumps([pair["prompt"], pair[side], given], sort_keys=True, default=str)
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append({"prompt": pair["prompt"], "completion": pair[side], **given})
            of.append(numbers[key])
    names = ("prompt", "completion", *columns)
    return dataset_of({name: [row[name] for row in rows] for name in names}, "pairs"), np.array(of).reshape(-1, 2)


def completion_tokens(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each completion after those of its prompt, with the token that ends it.

    Prompt and completion are tokenized together, as the reward stage does it. Where their tokens do not begin with those of
    the prompt, the completion is tokenized by itself, as a completion that was sampled after this prompt.
    """
    prompts, completions = texts["prompt"][:], texts["completion"][:]
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    if isinstance(completions[0], str):
        whole = [a + b for a, b in zip(prompts, completions, strict=True)]
        wholes = tokenizer([text if text.endswith(end) else text + end for text in whole])["input_ids"]
    else:
        turns = [a + b for a, b in zip(prompts, completions, strict=True)]
        wholes = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        wholes = [up_to_the_end(ids, tokenizer) for ids in wholes]
    found = []
    for prompt, ids, completion in zip(tokenize_prompts(prompts, tokenizer), wholes, completions, strict=True):
        if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
            found.append(ids[len(prompt) :])
        else:
            text = completion if isinstance(completion, str) else completion[0]["content"]
            found.append([*tokenizer(text, add_special_tokens=False)["input_ids"], end_id])
    return found


def needs_tokens(function: Callable) -> bool:
    """Tell whether a reward function cannot be called without the tokens of the completions."""
    parameter = inspect.signature(function).parameters.get("completion_ids")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def score_texts(
    composite: Composite, texts: Dataset, completion_ids: list[list[int]] | None, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of each text, and what each reward function gives it (NaN for None).

    Processes share the texts, and all get all scores. All of them call this together.

    Args:
        composite: the rewards and their weights.
        completion_ids: tokens of each completion; None if no function needs them.
        batch_size: texts of one call.

    Raises:
        RewardError: see `Composite.total`; errors of the first batch come before the rest is scored.
        ValueError: there are fewer texts than processes.
    """
    state = PartialState()
    if len(texts) < state.num_processes:
        raise ValueError(f"{len(texts)} texts are fewer than {state.num_processes} processes. Launch fewer processes.")
    sizes = [len(str(text)) for text in texts["completion"]]
    order = sorted(range(len(texts)), key=lambda i: -sizes[i])  # the longest first: if memory lacks, it lacks at once
    mine = order[state.process_index :: state.num_processes]
    parts: list[tuple[int, list[float]]] = []
    with async_runner() as runner:
        batches = range(0, len(mine), batch_size)
        for start in tqdm(batches, desc="scoring", unit="batch", disable=not state.is_main_process):
            chunk = mine[start : start + batch_size]
            rows = texts.select(chunk)
            completions = rows["completion"][:]
            ids = [[] if completion_ids is None else completion_ids[i] for i in chunk]
            found = call_rewards(composite.functions, rows, completions, ids, runner).tolist()
            if start == 0:
                composite.check_batch(found, rows["prompt"][:], completions)
            parts += zip(chunk, found, strict=True)
    columns = torch.tensor([row for _, row in sorted(gather_object(parts))], dtype=torch.float64)
    total = composite.total(columns, texts["prompt"][:], texts["completion"][:])
    return total.numpy(), columns.numpy()
