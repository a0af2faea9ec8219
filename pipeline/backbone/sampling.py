"""Sample completions of any role to any prompts; every stage samples with this module."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from trl import RLOOConfig
from trl.trainer.utils import pad

from pipeline.backbone.roles import Backbone


class Sample(NamedTuple):
    """A batch of B completions of at most T tokens; prompts are padded at the left, completions at the right."""

    input_ids: Int[Tensor, "B S"]  # prompts and completions
    attention_mask: Int[Tensor, "B S"]
    completion_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]  # True up to and including the end-of-text token
    logprobs: Float[Tensor, "B T"] | None  # logprobs of the tokens in sampling, in nats, if they are kept
    first: int = 0  # number of the first prompt of the batch

    def rows(self) -> list[list[int]]:
        """Return the real tokens of each completion."""
        return [row[keep].tolist() for row, keep in zip(self.completion_ids, self.mask, strict=True)]


def as_answers(texts: list[str], prompts: list) -> list:
    """Return completions as reward functions get them: texts, or, for conversations, one assistant turn each."""
    if isinstance(prompts[0], str):
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]


def sampling_options(args: RLOOConfig) -> dict[str, Any]:
    """Return the fields of GenerationConfig that a trainer's options set."""
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
    return {name: getattr(args, name) for name in names} | (args.generation_kwargs or {})


class SampledLogprobs(LogitsProcessor):
    """Keep the logprob of each token that `generate` draws, with the logits of only one step in memory.

    `generate` gives a processor the logits before it draws from them. The drawn tokens come with the next logits.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.logits: Tensor | None = None
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if self.logits is not None:
            self._keep(self.logits, input_ids[:, -1])
        self.logits = scores
        return scores

    def _keep(self, scores: Tensor, tokens: Tensor) -> None:
        logits = scores.float() / self.temperature
        self.kept.append(logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1))

    def read(self, sequences: Int[Tensor, "B S"]) -> Float[Tensor, "B T"]:
        """Return the logprobs of the last T tokens of `sequences`, once all are drawn."""
        assert self.logits is not None  # `generate` has drawn a token
        self._keep(self.logits, sequences[:, -1])
        self.logits = None
        return torch.stack(self.kept, dim=1)


class FiniteLogits(LogitsProcessor):
    """Refuse to draw from logits that are not finite.

    torch would raise "probability tensor contains inf", and on a GPU this would end the process.
    """

    def __init__(self, role: str):
        self.role = role

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if not scores.amax(dim=-1).isfinite().all():  # NaN, +inf, or only -inf
            raise FloatingPointError(f"The {self.role} gives logits that are not finite, so it cannot be sampled from")
        return scores


class Ticks(LogitsProcessor):
    """Tell of each pass of `generate`, which draws one token for each row, so that a bar can count them."""

    def __init__(self, tell: Callable[[int], object]):
        self.tell = tell

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        self.tell(1)
        return scores


@contextmanager
def _no_config_of_its_own(backbone: Backbone) -> Iterator[None]:
    """Hide the model's generation config, because `generate` would take every field from it that ours leaves unset."""
    base = backbone.get_base_model()
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def end_tokens(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion: that of the tokenizer and those of the model's generation config.

    TRL uses the same tokens.
    """
    ends = backbone.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


@torch.no_grad()
def sample(
    backbone: Backbone,
    role: str,
    prompt_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_completion_length: int,
    temperature: float,
    batch_size: int,
    options: dict[str, Any] | None = None,
    keep_logprobs: bool = False,
    share_seed: tuple[int, ...] | None = None,
    tell: Callable[[int], object] | None = None,
    streamer: TextStreamer | None = None,
) -> Iterator[Sample]:
    """Sample one completion to each prompt, in batches, from the whole distribution at `temperature`.

    The model's own generation config is ignored, except for the tokens that end a text. So a completion ends where TRL's
    trainers end it.

    `options` are fields of GenerationConfig that a user has set (`sampling_options`). With `share_seed`, processes take
    batches in turn, and each batch has a seed of its own. So the completions do not depend on the number of processes.
    `gathered` joins their results. `tell` is called with 1 for each token that a batch draws. `streamer` gets the prompt, and
    then each token as it is drawn; transformers allows it for batches of one prompt.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    ends = end_tokens(backbone, tokenizer)
    device = backbone.get_base_model().device
    fields = {
        "max_new_tokens": max_completion_length,
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": ends,
        "disable_compile": True,
    }
    generation = GenerationConfig(**fields | (options or {}))
    state = PartialState()
    mine = slice(state.process_index, None, state.num_processes) if share_seed is not None else slice(None)
    for start in range(0, len(prompt_ids), batch_size)[mine]:
        if share_seed is not None:
            torch.manual_seed(int(np.random.SeedSequence([*share_seed, start]).generate_state(1)[0]))
        rows = [torch.tensor(ids) for ids in prompt_ids[start : start + batch_size]]
        ids = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left").to(device)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
        recorder = SampledLogprobs(temperature)
        processors = [FiniteLogits(role), *([recorder] if keep_logprobs else []), *([Ticks(tell)] if tell else [])]
        with backbone.role(role), _no_config_of_its_own(backbone):
            # Every process has all weights here, so it need not wait for the longest completion of another process.
            sequences = backbone.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=generation,
                logits_processor=LogitsProcessorList(processors),
                synced_gpus=False,
                streamer=streamer,
            )
        completion_ids = sequences[:, ids.shape[1] :]
        is_end = torch.isin(completion_ids, torch.tensor(ends, device=device))
        real = is_end.cumsum(dim=1) - is_end.long() == 0  # no end-of-text token before this one
        logprobs = recorder.read(sequences) if keep_logprobs else None
        yield Sample(sequences, torch.cat([mask, real.long()], dim=1), completion_ids, real, logprobs, start)


def rounds(prompts: int, batch_size: int) -> int:
    """Return the number of rounds of `sample(share_seed=...)` in which every process has a batch."""
    return -(-prompts // batch_size) // PartialState().num_processes


def gathered(parts: Sequence[tuple[int, *tuple[list, ...]]]) -> list[list]:
    """Gather results of all processes, and return their columns in the order of the prompts.

    Each part is the result of one batch: the number of its first prompt, and one list a column.
    """
    ordered = sorted(gather_object(parts), key=lambda part: part[0])
    return [list(chain.from_iterable(column)) for column in list(zip(*ordered, strict=True))[1:]]
