"""Compare runs of PPO with PTX as minima of L + lambda R: their lambda, their language-model loss, their reward."""

import statistics
from collections.abc import Sequence

from pipeline.reports.markdown import markdown_table, number, with_interval


SWEEP_NOTE = (
    "Minima of L - lambda R: L is the language-model loss in nats a token, R the score of a completion in standard deviations "
    "of SFT's scores. lambda = 1 / (ptx_coef T), T the mean length of the completions that PPO learned from. L is measured on "
    "held-out texts, the judge (-1 to 1) and the score on held-out prompts. Changes are from SFT, intervals are of 95%."
)


def implied_lambda(ptx_coef: float, length: float, weight: float = 1.0) -> float | None:
    """Return lambda of the objective L - lambda R that PPO with PTX minimises; None, for infinity, without PTX.

        loss = policy loss + ptx_coef L,  whose gradient is  -(weight / length) dE[R] + ptx_coef dL
        lambda = weight / (ptx_coef length)

    The policy loss is a mean over tokens and R is a sum over a completion, so its gradient has the factor 1 / length. Any
    constant in front of the whole loss leaves its minimum where it is. This holds at a ratio of 1, with gamma and lam of 1 and
    without a KL penalty or whitened advantages; whitening divides by the standard deviation of the advantages too.

    Args:
        length: mean number of tokens of the completions.
        weight: weight of the reward (`reward_weights`).
    """
    return weight / (ptx_coef * length) if ptx_coef else None


def sweep_row(ptx_coef: float, report: dict, history: Sequence[dict]) -> dict:
    """Return the row of one run, from its report and from PPO's log."""
    lengths = [row["completions/mean_length"] for row in history if row.get("completions/mean_length") is not None]
    length, policy = statistics.fmean(lengths), report["policy"]
    return {
        "ptx_coef": ptx_coef,
        "length": length,
        "lambda": implied_lambda(ptx_coef, length),
        "judge_gain": report["judge_gain"],
        "text_loss_change": report["text_loss_change"],
        **{key: policy[key] for key in ("text_loss", "score", "judge", "kl", "distinct_2")},
        "start": {key: report["sft"][key] for key in ("text_loss", "score", "judge")},
    }


def sweep_table(rows: Sequence[dict]) -> str:
    """Return the markdown table of a sweep, from rows of `sweep_row`, with SFT first."""
    header = ["lambda", "ptx_coef", "T", "L", "change of L", "judge gain", "score", "KL, nats", "distinct-2"]
    start = rows[0]["start"]
    cells = [["SFT", "–", "–", f"{start['text_loss']:.3f}", "–", "–", f"{start['score']:+.2f}", "–", "–"]]
    cells += [
        [
            "∞" if row["lambda"] is None else f"{row['lambda']:.2g}",
            f"{row['ptx_coef']:g}",
            f"{row['length']:.1f}",
            f"{row['text_loss']:.3f}",
            with_interval(row["text_loss_change"], "+.3f"),
            with_interval(row["judge_gain"], "+.2f"),
            f"{row['score']:+.2f}",
            number(row["kl"], ".1f"),
            f"{row['distinct_2']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells, numbers=range(len(header)))
