"""Hand sampled tokens from one thread to another, and cut a text into the texts of its tokens."""

from queue import SimpleQueue

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from pipeline.backbone.sampling import Sample


PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to


class Stopped(Exception):
    """Raised in the sampling thread once nobody waits for its tokens."""


class Tokens(TextStreamer):
    """Hand the tokens of `generate` to another thread as they are drawn.

    transformers' TextIteratorStreamer would hand over text and cannot be stopped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True)
        self.queue: SimpleQueue[list[int] | Sample | BaseException] = SimpleQueue()
        self.stopped = False
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take the next tokens; the first call brings the prompt."""
        if self.stopped:
            raise Stopped
        if self._begun:
            self.queue.put(value.flatten().tolist())
        self._begun = True

    def end(self) -> None:
        """Do nothing: `sample` says when it is done."""


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token. Together they are the whole text, with special tokens.

    A token may be part of a character. The whole character then belongs to the last of its tokens.
    """
    found, done = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if end < len(ids):
            text = text.rstrip(PART_OF_CHARACTER)
        found.append(text[done:])
        done = max(done, len(text))
    return found
