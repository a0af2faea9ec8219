"""`pipeline.rl.held_out_texts`: the loss of each text is the model's own, in any batch."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from pipeline.rl.held_out_texts import losses_of_texts, rows_of_texts


TEXTS = Dataset.from_list(
    [{"text": text} for text in ("A film", "One of the best films of the year", "It's dull", "Not")]
)


@pytest.mark.slow
def test_losses_are_those_of_each_text_alone(backbone, tokenizer):
    rows, counts = rows_of_texts(TEXTS, "films", tokenizer, 128, drop=False)
    assert [tokenizer.decode(row) for row in rows] == [f"{text}{tokenizer.eos_token}" for text in TEXTS["text"]]
    assert counts["texts"]["source"] == "films" and counts["texts"]["kept"] == 4
    expected = []
    backbone.eval()
    with torch.no_grad(), backbone.role("policy"):
        for row in rows:
            ids = torch.tensor([row])
            logits = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            expected.append(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    for batch_size in (1, 3, 8):
        found = losses_of_texts(backbone, "policy", rows, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4


def test_long_texts_are_cut_and_one_is_not_enough(tokenizer):
    rows, counts = rows_of_texts(TEXTS, "films", tokenizer, 6, drop=False)
    assert max(map(len, rows)) == 6 and counts["texts"]["cut"] == 1
    with pytest.raises(ValueError, match="text_dataset_name='films': 1 texts, and an interval needs 2"):
        rows_of_texts(TEXTS.select([0]), "films", tokenizer, 128, drop=False)
    assert rows_of_texts(None, None, tokenizer, 128, drop=False) == ([], {})
