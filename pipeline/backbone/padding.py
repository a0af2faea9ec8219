"""Choose the pad token, which decides where a score is read, so that every stage pads with the same one.

A sequence classifier reads its score at the last token that is not the pad token. If the pad token also ends a text or a
turn, the score is read before the ending. Then a reward model cannot tell a finished completion from one that is cut.
"""

import difflib
import re
from functools import cache

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase


# Patterns of special tokens that may be used for padding, the best first. Their names show that they have no other use.
FREE = (
    r"(?<![a-z])pad(ding)?(?![a-z])",  # <|pad|>, [PAD], <|finetune_right_pad_id|>
    r"^<\|endoftext\|>$",  # it separated documents in pretraining; a chat model ends its turns with another token
    r"reserved|unused|placeholder|dummy|control_\d|extra_(id_)?\d",  # <|reserved_special_token_0|>, <unused0>
)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str, source: str) -> None:
    """Pad with the token that the user names.

    Raises:
        ValueError: the token is not in the vocabulary of the model `source`, or is a piece of ordinary text.
    """
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    if pad_token not in added:
        problem = f"is not a token of {source}"
        if pad_token in tokenizer.get_vocab():
            problem = f"is a piece of ordinary text in {source}, but decoding leaves out the pad token"
        near = difflib.get_close_matches(pad_token, added, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(map(repr, added[:12])) + (", ..." if len(added) > 12 else "")
        raise ValueError(f"pad_token={pad_token!r} {problem}.{hint} Name a special token: {shown}.")
    tokenizer.pad_token = pad_token


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Pad with the tokenizer's own pad token, or with an unused special token.

    The own pad token is not used if it is missing or one of the `ends`. If there is no unused special token, padding is the
    own pad token, or else the end-of-text token. A line says so if padding is not the own token, or also ends texts.

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
        _say(f"Padding is {unused[0]!r}: {reason}. To use another token, set --pad_token.")
        return
    tokenizer.pad_token = own or tokenizer.eos_token
    _say(
        f"Padding is {tokenizer.pad_token!r}, which also ends texts: {reason}, and the vocabulary has no unused special "
        f"token. A reward model then cannot see whether a completion has ended. Set --pad_token to a special token that the "
        f"data does not use, or use missing_eos_penalty in PPO."
    )


def unused_tokens(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> list[str]:
    """Return the special tokens whose names show no other use than padding, the best first.

    Left out are tokens that end a text or a turn (`ends`), tokens that begin or separate texts, tokens of the chat
    template, and tokens that the tokenizer itself writes.
    """
    named = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
    used = {*ends, *(getattr(tokenizer, name) for name in named)}
    # U+10FFFF is not a character, so an unknown token would appear here.
    used |= set(tokenizer("a \U0010ffff")["input_ids"])
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
        name: the adapter's name, for errors.
        stored: id of the pad token that it was trained with, from its identity file; None if the file has none.
        beside: the tokenizer that was saved beside the adapter, which is read if `stored` is None. If both are None, the
            adapter is old: it was padded with the base tokenizer's own pad token, or with its end-of-text token.

    Raises:
        ValueError: the adapter was trained with another pad token.
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
        f"{name}: the adapter was trained with {token!r} as padding, but this run pads with {tokenizer.pad_token!r}. A "
        f"score is read at the last token that is not padding. Set --pad_token {token!r} in every stage, or train the "
        f"adapter anew."
    )
