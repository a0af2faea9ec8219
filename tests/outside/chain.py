"""A language model that is a table: the logits of the next token depend on the last token alone, to the bit."""

from types import SimpleNamespace

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import Sample, sample


NOTHING = float("-inf")


def chain(table: Tensor, ends: int | list[int]) -> Backbone:
    """Return a backbone whose logits after token i are row i of `table` (V, V), whatever stands before it.

    Its layers add nothing to the embeddings, which are unit vectors: the largest entry of a hidden state is the token.
    """
    vocabulary = len(table)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": vocabulary, "n_positions": 64, "vocab_size": vocabulary}
    base = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
        base.transformer.wte.weight.copy_(torch.eye(vocabulary))
        base.transformer.ln_f.weight.fill_(1)
    base.lm_head.register_forward_hook(lambda module, inputs, logits: table[inputs[0].argmax(dim=-1)])
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True))
    backbone.generation_config.eos_token_id = ends
    return backbone.eval()


def complete(
    backbone: Backbone, prompts: list[list[int]], length: int, *, end: int, pad: int = 0, **options
) -> Sample:
    """Sample a completion of at most `length` tokens to each prompt; `options` are fields of GenerationConfig."""
    torch.manual_seed(0)
    tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=pad)
    given = {"max_completion_length": length, "temperature": 1.0, "batch_size": len(prompts), "options": options}
    (batch,) = sample(backbone, "policy", prompts, tokenizer, keep_logprobs=True, **given)
    return batch


def drawn(logits: list[list[float]], prompts: list[list[int]] | None = None, **options) -> list[set[int]]:
    """Return the tokens that come within 500 draws of one token, for each row of logits.

    Row i is the distribution after `prompts[i]`; two prompts that end in the same token share theirs.
    """
    prompts = prompts or [[number] for number in range(len(logits))]
    width = len(logits[0])
    end, pad = width, width + 1  # two tokens more, which never come
    table = torch.full((width + 2, width + 2), NOTHING)
    table[:, 0] = 0
    for prompt, row in zip(prompts, logits, strict=True):
        table[prompt[-1], :width] = torch.tensor(row)
    batch = complete(
        chain(table, end), [prompt for prompt in prompts for _ in range(500)], 1, end=end, pad=pad, **options
    )
    return [set(tokens) for tokens in batch.completion_ids.view(len(prompts), 500).tolist()]
