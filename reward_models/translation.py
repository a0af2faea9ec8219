"""Score translations against references as sacrebleu does: chrF and sentence BLEU, in 0..1.

Each row has its translations in the column `references`: a text, or a list of texts of which any will do. sacrebleu is
installed by `pip install 'spine-rlhf[translation]'`.
"""

from collections.abc import Callable

from data.quoting import quoted


try:
    from sacrebleu.metrics import BLEU, CHRF
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "chrF and BLEU need sacrebleu: pip install 'spine-rlhf[translation]'", name=error.name
    ) from error


def _texts(completions: list) -> list[str]:
    return [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]


def _references(references: list) -> list[list[str]]:
    """Return the references of each row as a list of texts.

    Raises:
        ValueError: those of a row are neither a text nor a list of texts, or there is none.
    """
    rows = [[row] if isinstance(row, str) else row for row in references]
    for row in rows:
        if not isinstance(row, list) or not row or not all(isinstance(text, str) and text.strip() for text in row):
            raise ValueError(
                f"'references' must be a text or a list of texts, none of them empty, but is {quoted(row)}. Correct or delete "
                f"the row."
            )
    return rows


def get_chrf(word_order: int = 0) -> Callable:
    """Make a function that returns the chrF of a completion, in 0..1 (Popović 2015, https://aclanthology.org/W15-3049).

    chrF is an F-score of the character n-grams (n = 1..6, without spaces) that completion and reference share; recall weighs
    twice as much as precision. Of several references the best one counts. It falls little by little with each wrong letter,
    so it says more about one sentence than BLEU does.

    Args:
        word_order: longest word n-grams that count too; 2 is chrF++.

    Raises:
        ValueError: word_order is below 0.
    """
    if word_order < 0:
        raise ValueError(f"word_order={word_order} is not a number of words. Set 0 (chrF) or 2 (chrF++).")
    metric = CHRF(word_order=word_order)

    def chrf(completions: list, references: list, **kwargs) -> list[float]:
        rows = zip(_texts(completions), _references(references), strict=True)
        return [metric.sentence_score(text, of_row).score / 100 for text, of_row in rows]

    return chrf


def get_bleu(tokenize: str = "13a") -> Callable:
    """Make a function that returns the sentence BLEU of a completion, in 0..1 (Papineni et al. 2002; Chen & Cherry 2014).

    It is sacrebleu's: word n-grams of n = 1..4, fewer for a shorter completion, with exponential smoothing and the brevity
    penalty. Its mean is not the BLEU of a corpus.

    Args:
        tokenize: sacrebleu's tokenizer of the target language: "13a" for most, "zh" for Chinese, "char" for any.

    Raises:
        ValueError: sacrebleu has no such tokenizer.
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"tokenize={tokenize!r} is not one of {', '.join(sorted(BLEU.TOKENIZERS))}.")
    metric = BLEU(tokenize=tokenize, effective_order=True)

    def bleu(completions: list, references: list, **kwargs) -> list[float]:
        rows = zip(_texts(completions), _references(references), strict=True)
        return [min(metric.sentence_score(text, of_row).score / 100, 1.0) for text, of_row in rows]

    return bleu
