"""`docs/families.md`: every family of the installed transformers has a row, and rows are what models do."""

import re

import pytest
from accelerate.utils import compare_versions
from families import TABLE, row
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


ROWS = {line.split("|")[1].strip(): line for line in TABLE.read_text().splitlines() if re.match(r"\| [a-z0-9]", line)}
(WRITTEN_WITH,) = re.findall(r"transformers ([\d.]+),", TABLE.read_text())
REMEDY = "Run `python -m tests.families`, and look at what it changes in docs/families.md."
FEW = {
    "llama": "nothing after the head",
    "gemma2": "soft caps, sliding windows",
    "cohere": "a logit scale",
    "granite": "multipliers, logits scaling",
    "qwen2": "layer types computed from a sliding window",
    "opt": "embeddings narrower than the layers, dropout as a function, layer drop",
    "gemma3n_text": "layers that share keys and need inputs of their own",
    "gpt2": "a tied or untied head, dropout modules",
    "bert": "an encoder",
    "bloom": "alibi: no positions",
}


def test_every_family_has_a_row():
    """A release older than the one that the page was written with lacks families that came after it."""
    older = compare_versions("transformers", "<", WRITTEN_WITH)
    families = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert families <= set(ROWS) if older else list(ROWS) == sorted(families), REMEDY


@pytest.mark.parametrize("family", FEW)
def test_a_row_is_what_a_model_does(family):
    assert ROWS[family] == row(family), REMEDY
