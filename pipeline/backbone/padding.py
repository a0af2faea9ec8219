"""The pad token: it decides where a score is read, so every stage pads with the same one.

A sequence classifier reads its score at the last token that is not the pad token. Where the pad token also ends a text or
a turn, that token stands before the ending, and a reward model cannot tell a finished completion from one that is cut.
"""

import difflib
import re
from functools import cache

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase


# Special tokens that may be taken for padding unasked, the best first: by their name they have no other use.
FREE = (
    r"(?<![a-z])pad(ding)?(?![a-z])",  # <|pad|>, [PAD], <|finetune_right_pad_id|>
    r"^<\|endoftext\|>$",  # parted the documents of pretraining, where a chat model ends its turns otherwise
    r"reserved|unused|placeholder|dummy|control_\d|extra_(id_)?\d",  # <|reserved_special_token_0|>, <unused0>
)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str, source: str) -> None:
    """Pad with the token that the user names.

    Raises:
        ValueError: it is not in the vocabulary of the model `source`, or it is a piece of ordinary text.
    """
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    if pad_token not in added:
        problem = f"is no token of {source}"
        if pad_token in tokenizer.get_vocab():
            problem = f"is a piece of ordinary text in {source}, and decoding leaves out the pad token"
        near = difflib.get_close_matches(pad_token, added, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(map(repr, added[:12])) + (", ..." if len(added) > 12 else "")
        raise ValueError(f"pad_token={pad_token!r} {problem}.{hint} Name a special token: {shown}.")
    tokenizer.pad_token = pad_token


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Pad with the tokenizer's own pad token, or, where that is missing or one of the `ends`, with an unused special
    token; with the end-of-text token where there is none. Whatever is not the tokenizer's own is said in a line.

    Args:
        ends: ids of the tokens that end a text or a turn, by the model's configs.
    """
    own, ends = tokenizer.pad_token, ends | {tokenizer.eos_token_id}
    if own is not None and tokenizer.pad_token_id not in ends:
        return
    reason = "the tokenizer has no pad token" if own is None else f"the tokenizer's own, {own!r}, also ends texts"
    unused = unused_tokens(tokenizer, ends)
    if unused:
        tokenizer.pad_token = unused[0]
        _say(f"Pads with {unused[0]!r}: {reason}. --pad_token names another.")
        return
    tokenizer.pad_token = own or tokenizer.eos_token
    _say(
        f"Pads with {tokenizer.pad_token!r}, which also ends texts: {reason}, and the vocabulary has no unused special "
        f"token. A reward model then cannot see whether a completion has ended. Name a special token that the data does not "
        f"use with --pad_token, or take missing_eos_penalty in PPO."
    )


def unused_tokens(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> list[str]:
    """Special tokens that by their name have no use but padding, the best first.

    Left out are those that end a text or a turn (`ends`), open or part one, stand in the chat template, or are written
    by the tokenizer by itself.
    """
    named = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
    used = {*ends, *(getattr(tokenizer, name) for name in named)}
    used |= set(tokenizer("a \U0010ffff")["input_ids"])  # U+10FFFF is no character: an unknown token would show
    template = str(tokenizer.chat_template)
    free = [
        token.content
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in used and token.content not in template
    ]
    ranked = [token for pattern in FREE for token in free if re.search(pattern, token.lower())]
    return list(dict.fromkeys(ranked))


@cache
def _say(line: str) -> None:
    """Print a line once, however often the model is loaded."""
    PartialState().print(line)


def check_pad_token(
    name: str, stored: int | None, beside: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a reward or policy adapter was trained with this `tokenizer`'s pad token.

    Args:
        name: the adapter, for the error.
        stored: id of the pad token that it was trained with, as its identity file has it.
        beside: without it, the tokenizer that was saved beside the adapter; None: the pad token is the base tokenizer's
            own, or its end-of-text token, as it was before any was chosen.

    Raises:
        ValueError: it was trained with another.
    """
    theirs = stored
    if theirs is None:
        found = (beside.pad_token, beside.eos_token) if beside else (tokenizer.init_kwargs.get("pad_token"),)
        token = next(filter(None, found), tokenizer.eos_token)
        theirs = tokenizer.convert_tokens_to_ids(str(token))
    if theirs == tokenizer.pad_token_id:
        return
    known = isinstance(theirs, int) and 0 <= theirs < len(tokenizer)
    token = tokenizer.convert_ids_to_tokens(theirs) if known else theirs
    raise ValueError(
        f"{name}: the adapter was trained with {token!r} as padding, and this run pads with {tokenizer.pad_token!r}; a "
        f"score is read at the last token that is not padding. Set --pad_token {token!r} in every stage, or train the "
        f"adapter anew."
    )
