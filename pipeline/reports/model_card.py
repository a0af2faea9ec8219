"""Write the model card of a merged model: what it is, what it was trained on, its figures, and what it was made from."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.reports.markdown import markdown_cell, markdown_table, number
from pipeline.reports.report import figures
from pipeline.runs.outputs import rows_table


# Methods by the tag that TRL writes into the card of an adapter.
METHODS = {
    "sft": "supervised fine-tuning (SFT)",
    "ppo": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO",
    "reward-trainer": "reward modelling",
}
# Figures of the last update that a card states: key in the log, name with unit, format.
LAST = (
    ("score", "score", "+.3f"),
    ("reward", "reward", "+.3f"),
    ("kl", "KL to the reference (nats a sequence)", ".2f"),
    ("completions/mean_length", "mean length (tokens)", ".1f"),
    ("loss", "loss", ".4f"),
)
REWARD_MODEL = (
    ("accuracy", "accuracy on held-out pairs", ".1%"),
    ("human_ceiling", "agreement of one rater with the mean rating", ".1%"),
    ("ece", "expected calibration error", ".3f"),
    ("pairs", "held-out pairs", ",d"),
)
POLICY_USE = """```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
print(generator({prompt}, max_new_tokens=64)[0]["generated_text"])
```"""
REWARD_USE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}").eval()
{rows}
score = model(**rows).logits.squeeze(-1)  # higher is better; the unit is that of the training
```"""


@dataclass(frozen=True)
class Merged:
    """Facts of a merged model for its card.

    Attributes:
        base: name of the base model; `licence` is its licence, if it is known.
        tag: TRL's tag of the method, if the adapter's card has one.
        scores: whether the model is a sequence classifier with one score.
        chat: whether its tokenizer has a chat template.
        scale: mean and deviation of the scores on the policy's completions, if they were measured.
        parts: what is recorded so that the model can be made again, by name.
    """

    name: str
    base: str
    licence: str | None
    tag: str | None
    scores: bool
    chat: bool
    scale: tuple[float, float] | None
    parts: dict[str, str]


def method_of(card: str) -> str | None:
    """Return the tag of the method in the text of an adapter's card, or None."""
    tags = re.findall(r"^- ([\w-]+)$", card.split("\n---", 1)[0], re.MULTILINE)
    return next((tag for tag in METHODS if tag in tags), None)


def model_card(model: Merged, metrics: dict[str, Any], report: dict[str, Any] | None) -> str:
    """Return the text of README.md.

    Args:
        metrics: metrics.json of the adapter, or an empty dict.
        report: report.json of the evaluation of this policy, if there is one.
    """
    kind = "text-classification" if model.scores else "text-generation"
    tags = ["spine", "trl", *([model.tag] if model.tag else [])]
    head: dict[str, Any] = {"license": model.licence, "base_model": model.base if "/" in model.base else None}
    head |= {"library_name": "transformers", "pipeline_tag": kind, "tags": tags}
    what = "A reward model, which gives a text one score" if model.scores else "A language model"
    method = METHODS.get(model.tag or "", "training")
    parts = [
        "---\n" + yaml.safe_dump({key: value for key, value in head.items() if value}, sort_keys=False) + "---",
        f"# {model.name}",
        f"{what}: `{model.base}` after {method} with Spine and TRL. The LoRA adapter is merged into the weights, so "
        f"transformers and vLLM load the model without peft.",
        "## Use",
        _use(model),
    ]
    parts += _figures(model, metrics, report)
    if metrics.get("rows"):
        parts += ["## Data", rows_table(metrics["rows"])]
    licence = f"that of the base model: {model.licence}." if model.licence else "that of the base model."
    parts += ["## Licence", f"The licence is {licence}"]
    rows = [[markdown_cell(key), markdown_cell(value)] for key, value in model.parts.items()]
    parts += ["## Made from", markdown_table(["", ""], rows)]
    return "\n\n".join(parts) + "\n"


def _use(model: Merged) -> str:
    if not model.scores:
        prompt = '[{"role": "user", "content": "Hello!"}]' if model.chat else '"The film"'
        return POLICY_USE.format(name=model.name, prompt=prompt)
    if model.chat:
        turns = '[{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi, how can I help?"}]'
        rows = f'rows = tokenizer.apply_chat_template({turns}, return_tensors="pt", return_dict=True)'
    else:
        rows = 'rows = tokenizer(["The film is a quiet triumph." + tokenizer.eos_token], return_tensors="pt")'
    return REWARD_USE.format(name=model.name, rows=rows)


def _figures(model: Merged, metrics: dict[str, Any], report: dict[str, Any] | None) -> list[str]:
    """Return the paragraphs of figures: those of the reward model, of the last update, and of the report."""
    parts: list[str] = []
    if model.scores and "accuracy" in metrics:
        rows = [[name, format(metrics[key], form)] for key, name, form in REWARD_MODEL if key in metrics]
        parts += ["## Figures", markdown_table(["", ""], rows, numbers=(1,))]
    if model.scale:
        parts.append(
            f"On completions of the SFT policy the scores have the mean {model.scale[0]:.3f} and the standard deviation "
            f"{model.scale[1]:.3f}."
        )
    trained = [row for row in metrics.get("history", []) if "loss" in row]
    if trained:
        last = trained[-1]
        shown = [row for row in LAST if last.get(row[0]) is not None and not (row[0] == "loss" and "kl" in last)]
        rows = [[name, number(last[key], form)] for key, name, form in shown]
        rewards = sorted(
            {found[1] for row in trained for key in row if (found := re.fullmatch(r"rewards/(.+)/mean", key))}
        )
        named = f" The rewards were {', '.join(map(markdown_cell, rewards))}." if rewards else ""
        parts += [
            "## Training",
            f"{len(trained)} entries of the log, the last at step {last.get('step')}.{named}",
            markdown_table(["at the end", ""], rows, numbers=(1,)),
        ]
    if report:
        parts += ["## Evaluation", *(part for part in figures(report) if part)]
    return parts
