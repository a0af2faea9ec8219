"""Show the figures of a run as curves, each with its healthy range."""

from html import escape

from pipeline.pages.dashboard_charts import Series, chart, short
from pipeline.pages.escaping import words
from pipeline.reports.healthy import HELD_OUT, find, healthy_range, is_figure, is_outside
from pipeline.reports.metric_table import Metric
from pipeline.reports.run_files import Run


# The figures that a person follows, with the words for them. All others stand under "All figures".
HEADLINES = {
    "SFT": (("loss", "Loss"), ("mean_token_accuracy", "Token accuracy"), ("entropy", "Entropy")),
    "reward": (("loss", "Loss"), ("accuracy", "Accuracy"), ("margin", "Margin")),
    "PPO": (
        ("score", "Score"), ("kl", "KL to the reference"), ("explained_variance", "Explained variance"),
        ("loss/value", "Value loss"), ("completions/mean_length", "Length"), ("entropy", "Entropy"),
    ),
    "RLOO": (
        ("reward", "Reward"), ("kl", "KL to the reference"), ("frac_reward_zero_std", "Prompts without a signal"),
        ("clip_ratio/region_mean", "Clipped"), ("completions/mean_length", "Length"), ("entropy", "Entropy"),
    ),
    "DPO": (
        ("loss", "Loss"), ("rewards/accuracies", "Accuracy"), ("rewards/margins", "Margin"),
        ("rewards/chosen", "Reward of chosen"), ("rewards/rejected", "Reward of rejected"), ("entropy", "Entropy"),
    ),
}  # fmt: skip
HEADLINES["GRPO"] = HEADLINES["RLOO"]
TARGETS = {"kl": "kl_target"}  # the option that a figure is to reach


def judged(run: Run, name: str, metric: Metric | None) -> tuple[str, tuple[float | None, float | None]]:
    """Return whether a figure is healthy (`good`), outside of its range (`bad`) or neither (empty), and the range."""
    if metric is None:
        return "", (None, None)
    low, high = healthy_range(metric, run.history, run.options, name)
    _, values = run.points(name)
    if is_outside(metric, values, low, high):
        return "bad", (low, high)
    return "good" if (low is not None or high is not None) and len(values) > metric.settles else "", (low, high)


def headlines(run: Run) -> list[tuple[str, str]]:
    """Return name and title of the figures to follow that the run has logged."""
    return [(name, title) for name, title in HEADLINES.get(run.stage or "", ()) if run.points(name)[1]]


def lower(text: str) -> str:
    """Return a sentence of the table of metrics for the middle of a line."""
    return escape(text[:1].lower() + text[1:] if not text[:2].isupper() else text)


def curves(run: Run, key: str) -> str:
    """Return the section of all curves; `key` tells its folded parts from those of other runs."""
    if not run.history:
        return ""
    shown = headlines(run)
    names = [name for name, _ in shown]
    cards = "".join(_card(run, name, title, key) for name, title in shown)
    held_out = any(name.startswith(HELD_OUT) for row in run.history for name in row)
    legend = '<span><i class="training"></i>training</span>' + (
        '<span><i class="held-out"></i>held-out rows</span>' if held_out else ""
    )
    legend += '<span><i class="band"></i>healthy range</span>'
    legend += '<span><i class="target"></i>target</span>' if is_figure(run.options.get("kl_target")) else ""
    groups: dict[str, list[str]] = {}
    for name in run.names():
        metric = find(name, run.stage)
        if name not in names:
            groups.setdefault(metric.group if metric else "your own", []).append(name)
    more = "".join(_group(run, group, of_group) for group, of_group in groups.items())
    count = sum(map(len, groups.values()))
    rest = (
        f'<details class="more" data-key="{words(key)} more"><summary>All figures: {count} more</summary>{more}</details>'
        if count
        else ""
    )
    return f'<h2>Curves</h2><p class="legend">{legend}</p><div class="curves">{cards}</div>{rest}'


def _series(run: Run, name: str) -> list[Series]:
    found = [
        Series("training", "training", *run.points(name)),
        Series("held out", "held-out", *run.points(HELD_OUT + name)),
    ]
    return [series for series in found if series.values]


def _drawn(run: Run, name: str, kind: str, title: str, *, small: bool = False) -> str:
    metric = find(name, run.stage)
    series = _series(run, name)
    target = run.options.get(TARGETS.get(name, ""))
    first, last = series[0].values[0], series[0].values[-1]
    return chart(
        series,
        last_step=run.step,
        label=f"{title}: from {short(first)} to {short(last)}, steps {series[0].steps[0]} to {series[0].steps[-1]}",
        band=judged(run, name, metric)[1],
        target=target if is_figure(target) else None,
        resumed=run.resumed,
        settles=metric.settles if metric else 0,
        small=small,
    )


def _card(run: Run, name: str, title: str, key: str) -> str:
    metric = find(name, run.stage)
    kind, _ = judged(run, name, metric)
    chip = {
        "good": '<span class="chip good">healthy</span>',
        "bad": '<span class="chip bad">look here</span>',
        "": "",
    }[kind]
    unit, about = "", ""
    if metric:
        unit = escape(metric.unit if metric.unit != "none" else "")
        about = (
            f'<details data-key="{words(key)} {words(name)}"><summary>How to read it</summary><p>{escape(metric.meaning)}</p>'
            f"<p><b>Healthy:</b> {lower(metric.healthy)}</p><p><b>Outside:</b> {lower(metric.remedy)}</p></details>"
        )
    value = short(run.points(name)[1][-1])
    return (
        f'<div class="card"><div class="top"><h3>{title}{chip}</h3><b>{value}</b></div><p class="unit">'
        f"<code>{words(name)}</code>{', ' + unit if unit else ''}</p>{_drawn(run, name, kind, title)}{about}</div>"
    )


def _group(run: Run, group: str, names: list[str]) -> str:
    """Return a heading and small charts; figures of one value are a list."""
    cards, single = [], []
    for name in names:
        series = _series(run, name)
        if not series:
            continue
        value = short(series[0].values[-1])
        metric = find(name, run.stage)
        meaning = f' title="{escape(metric.meaning)}"' if metric else ""
        if all(len(one.values) == 1 for one in series):
            single.append(f"<span{meaning}>{words(name)} <b>{value}</b></span>")
            continue
        kind, _ = judged(run, name, metric)
        chip = '<span class="chip bad">look here</span>' if kind == "bad" else ""
        cards.append(
            f'<div class="card"{meaning}><div class="top"><h3><code>{words(name)}</code>{chip}</h3><b>{value}</b></div>'
            f"{_drawn(run, name, kind, name, small=True)}</div>"
        )
    drawn = f'<div class="curves many">{"".join(cards)}</div>' if cards else ""
    listed = f'<p class="figures">{"".join(single)}</p>' if single else ""
    return f"<h3>{escape(group)}</h3>{drawn}{listed}"
