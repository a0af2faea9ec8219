"""Rewards that are written, not learned: functions of TRL's reward protocol."""


def contains(completions: list, contains: list[str], **kwargs) -> list[float]:
    """1 when the completion contains the text in the row's `contains` column, else 0."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [1.0 if needle in text else 0.0 for text, needle in zip(texts, contains, strict=True)]
