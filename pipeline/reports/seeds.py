"""Write the tables of one recipe under several seeds."""

from collections.abc import Mapping, Sequence

from pipeline.reports.markdown import markdown_table, with_interval


def seeds_table(reports: Sequence[dict]) -> str:
    """Return the table and chart of one recipe under several seeds, from each report.json with its `kl_held`."""

    def change(report: dict, key: str, form: str) -> str:
        return f"{report['sft'][key]:{form}} → {report['policy'][key]:{form}}"

    reports = sorted(reports, key=lambda report: report["seed"])
    header = (
        "seed",
        "score, SFT → PPO",
        "judge, SFT → PPO",
        "gain, 95% interval",
        "PPO beats SFT",
        "KL, nats",
        "KL held",
    )
    rows = [
        [
            str(report["seed"]),
            change(report, "score", "+.2f"),
            change(report, "judge", "+.2f"),
            with_interval(report["judge_gain"], "+.2f"),
            with_interval(report["win_rate"], ".0%"),
            f"{report['policy']['kl']:.1f}",
            f"{report['kl_held']:.1f}",
            change(report, "distinct_2", ".2f"),
            f"{report['reward_model']['accuracy']:.3f}",
        ]
        for report in reports
    ]
    bars = {model: ", ".join(f"{report[model]['judge']:.2f}" for report in reports) for model in ("policy", "sft")}
    chart = (
        "```mermaid",
        "xychart-beta",
        '    title "Judge on held-out prompts: SFT (front), PPO (behind)"',
        f'    x-axis "seed" [{", ".join(str(report["seed"]) for report in reports)}]',
        '    y-axis "VADER compound" 0 --> 0.7',
        f"    bar [{bars['policy']}]",
        f"    bar [{bars['sft']}]",
        "```",
    )
    cells = markdown_table((*header, "distinct-2, SFT → PPO", "reward model accuracy"), rows)
    return cells + "\n\n" + "\n".join(chart)


def judges_table(reports: Mapping[int, tuple[dict, dict]]) -> str:
    """Return what two judges say of the same policies, from the report of each judge by seed."""
    header = ("seed", "gain by the first", "PPO beats SFT", "gain by the second", "PPO beats SFT")
    rows = [
        [str(seed)]
        + [
            cell
            for report in reports[seed]
            for cell in (with_interval(report["judge_gain"], "+.2f"), with_interval(report["win_rate"], ".0%"))
        ]
        for seed in sorted(reports)
    ]
    return markdown_table(header, rows)
