"""Score texts with a trained reward model in plain transformers: nothing of Spine is imported.

    python -m pipeline.merge runs/demo/reward runs/merged-reward
    python examples/score_texts.py

The first command makes a plain sequence classifier of the reward adapter that `make demo` leaves.
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/merged-reward"
texts = ["The film is a quiet triumph.", "The film is a long yawn.", "The film has a beginning."]

model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
# The reward model learned from texts that end with the end-of-text token: it reads the score there.
rows = tokenizer(
    [text + tokenizer.eos_token for text in texts], padding=True, padding_side="right", return_tensors="pt"
)
with torch.no_grad():
    scores = model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits.squeeze(-1)

for text, score in zip(texts, scores.tolist(), strict=True):
    print(f"{score:+.3f}  {text}")
# Scores compare: sigmoid of a difference is the probability that people prefer the first text.
print(f"The first rather than the second: {torch.sigmoid(scores[0] - scores[1]):.1%}")
