r"""Evaluation of a reward model on held-out preference pairs: how often it is right, where, and how certain it may be.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.reward_eval \
        --config pipeline/recipes/demo/reward_eval.yaml

The reward model is a reward adapter, any reward function (`reward_funcs`), or a weighted sum. Measures accuracy with an
interval, by dataset, domain, rating gap, length and rater; and calibration before and after temperature scaling. Saves
reward_eval.json, reward_eval.md and plots in `output_dir`, and with `save_temperature` the temperature beside the adapter.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from data.evaluation_pairs import domains_of, load_evaluation_pairs
from data.json_files import write_json
from data.reading import dataset_of
from data.rows import left_out
from data.saving import save
from data.tokens import check_max_length, prepare_tokens
from pipeline.backbone.adapters import load_tokenizer
from pipeline.backbone.gguf import model_source
from pipeline.backbone.loading import context_length
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from pipeline.reports.plots import draw_accuracy_by_gap
from pipeline.reports.reward_plots import draw_accuracies, draw_reliability
from pipeline.reports.reward_report import FIGURES, groups_of, markdown_reward_report
from pipeline.runs.agreement import check_same_options, check_same_rows
from pipeline.runs.arguments import PAD_TOKEN
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders, check_ours, check_output_dir
from pipeline.runs.launch import check_launch
from pipeline.runs.output_lock import lock_output
from pipeline.runs.outputs import seconds_running
from pipeline.runs.ownership import FILES, former_files
from reward_models.breakdowns import halves, share_with_interval, shares_right
from reward_models.calibration import reward_model_report
from reward_models.composite import Composite
from reward_models.functions import RewardArguments, extra_columns, load_functions
from reward_models.pair_figures import agreement_of, mistakes, pair_figures
from reward_models.scoring import completion_tokens, distinct_texts, needs_tokens, score_texts
from reward_models.temperature import FILE as CALIBRATION
from reward_models.temperature import Calibration, calibrate


MISTAKES = 8  # pairs of the report's last table
# Columns of pairs that no reward function gets: they tell the answer.
UNREAD = ("chosen", "rejected", "margin", "agreement", "votes")


@dataclass
class RewardEvalArguments:
    """Options of the evaluation of a reward model."""

    output_dir: str = field(metadata={"help": "Folder for the results."})
    dataset_name: list[str] = field(
        default_factory=lambda: ["human_ratings"],
        metadata={
            "help": "Held-out preference pairs: hub ids, folders or files. human_ratings is the embedded default (film); "
            "human_ratings:products, :tweets and :editorials are its other domains. The temperature is fitted on the first."
        },
    )
    dataset_eval_split: str = field(
        default="test", metadata={"help": "Split to evaluate on (a single file has none)."}
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "Column that names the domain of a pair. Unset: subset, if the rows have it."}
    )
    form: str | None = field(
        default=None,
        metadata={
            "choices": ("text", "conversation"),
            "help": "conversation: make texts the turns of a user and an assistant. text: score them as they are. Unset: as "
            "they are, but texts that would run together are refused.",
        },
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Pairs of each dataset, drawn at random. Unset: all."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Leave out pairs of which a side has more tokens. Unset: the model's context, if adapters score."
        },
    )
    min_kept: float = field(default=0.5, metadata={"help": "Refuse if a smaller share of a dataset is short enough."})
    drop_bad_rows: bool = field(default=False, metadata={"help": "Leave out and count pairs that cannot be used."})
    batch_size: int = field(default=64, metadata={"help": "Number of texts scored at once."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the rewards, as in PPO. Unset: 1 each."}
    )
    save_temperature: bool = field(
        default=False, metadata={"help": "Save the temperature beside the reward adapter, as calibration.json."}
    )
    seed: int = 0
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())  # as Trainer's arguments do
        twice = [name for number, name in enumerate(self.dataset_name) if name in self.dataset_name[:number]]
        if twice or not all(self.dataset_name):
            raise ValueError(f"dataset_name={self.dataset_name} must name datasets, each once. Correct it.")

    def temperature_folder(self, rewards: RewardArguments) -> Path | None:
        """Return the folder of the adapter that the temperature is saved in; None without `save_temperature`.

        Raises:
            ValueError: the scores are not those of one reward adapter; or it is not in a folder here.
        """
        if not self.save_temperature:
            return None
        alone = len(rewards.reward_adapter) == 1 and not rewards.reward_funcs and self.reward_weights in (None, [1.0])
        if not alone or rewards.normalize_scores:
            raise ValueError(
                "save_temperature=True saves the temperature of one reward adapter's own scores. Set one reward_adapter, and "
                "no reward_funcs, reward_weights or normalize_scores; or leave save_temperature unset."
            )
        folder = Path(rewards.reward_adapter[0]).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"save_temperature=True: the adapter {rewards.reward_adapter[0]!r} is not in a folder here. Copy it into one, "
                f"or leave save_temperature unset."
            )
        return folder

    def load(self) -> dict[str, Dataset]:
        """Read the pairs of each dataset.

        Raises the errors of `load_evaluation_pairs`, `domains_of` and `joined`.
        """
        found = {}
        for name in self.dataset_name:
            found[name] = load_evaluation_pairs(name, self.dataset_eval_split, form=self.form, drop=self.drop_bad_rows)
            domains_of(found[name], name, self.domain_column)
        joined(found)
        return found

    def fitting(
        self, rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> tuple[Dataset, dict[str, Any]]:
        """Return the pairs that are short enough, at most `max_pairs` of them drawn at random, and the counts for the report.

        Raises:
            ValueError: an error of `prepare_tokens`; or fewer than two pairs, or than the share `min_kept`, are left.
        """
        bad, read, longest = left_out(rows), len(rows), None
        if tokenizer is not None:
            rows, lengths = prepare_tokens(rows, tokenizer, name, drop=self.drop_bad_rows)
            bad, read, longest = lengths.bad, len(rows), max(lengths.rows)
            if max_length is not None:
                lengths.counts(max_length, drops=True).check(name, max_length, self.min_kept, "pair")
                rows = rows.select([i for i, length in enumerate(lengths.rows) if length <= max_length])
        long = read - len(rows)
        if self.max_pairs is not None and len(rows) > self.max_pairs:
            chosen = np.random.default_rng(self.seed).permutation(len(rows))[: self.max_pairs]
            rows = rows.select(np.sort(chosen))
        if len(rows) < 2:
            raise ValueError(f"{name}: 1 pair, and intervals need 2 or more. Give more pairs.")
        return rows, {"rows": read + bad, "bad": bad, "long": long, "longest": longest}


def joined(parts: dict[str, Dataset]) -> Dataset:
    """Return the pairs of all datasets as one, with the columns that all of them have.

    Raises:
        ValueError: some datasets are texts and others conversations.
    """
    kinds = {name: "texts" if isinstance(rows[0]["chosen"], str) else "conversations" for name, rows in parts.items()}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{name} has {kind}" for name, kind in kinds.items())
        raise ValueError(f"dataset_name: {said}. Set form: conversation, or evaluate them in two runs.")
    first = next(iter(parts.values()))
    columns = [name for name in first.column_names if all(name in rows.column_names for rows in parts.values())]
    return dataset_of(
        {name: [cell for rows in parts.values() for cell in rows[name]] for name in columns}, "the pairs"
    )


class Loaded(NamedTuple):
    """The rewards of a run, and what they read.

    Attributes:
        composite: all rewards, with their weights.
        columns: columns of the pairs that reward functions get.
        tokenizer: tokenizer of the model that is named, if any.
        longest: most tokens of a text, if that is bounded.
    """

    composite: Composite
    columns: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    longest: int | None


def load_rewards(args: RewardEvalArguments, rewards: RewardArguments, model: ModelConfig, pairs: Dataset) -> Loaded:
    """Load the reward functions, which is where a wrong name or column shows, and then the adapters on their backbone.

    Raises the errors of `load_functions`, `load_backbone` and `learned_rewards`, and:
        ValueError: tokens must be counted, and no model is named whose tokenizer does it; or `max_length` exceeds the context.
    """
    functions: list[Callable] = []
    columns = [column for column in extra_columns(pairs) if column not in UNREAD] if rewards.reward_funcs else []
    if rewards.reward_funcs:
        of_functions = pairs.select_columns(["prompt", *columns])
        functions = load_functions(rewards.reward_funcs, of_functions, ", ".join(args.dataset_name))
    if not model.model_name_or_path and (args.max_length is not None or any(map(needs_tokens, functions))):
        what = f"max_length={args.max_length}" if args.max_length is not None else "a reward function"
        raise ValueError(f"{what} counts tokens. Name the model whose tokenizer does it in model_name_or_path.")
    tokenizer, learned, context = None, [], math.inf
    if rewards.reward_adapter:
        backbone, tokenizer = load_backbone(
            model, None, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
        )
        context = context_length(backbone)
        learned = learned_rewards(rewards, backbone, tokenizer)
        backbone.to(PartialState().device).eval()
    elif model.model_name_or_path:
        tokenizer = load_tokenizer(model_source(model.model_name_or_path), trust_remote_code=args.trust_remote_code)
    if args.max_length is not None:
        check_max_length(args.max_length, context)
    longest = args.max_length or (int(context) if context < math.inf else None)
    return Loaded(Composite([*learned, *functions], args.reward_weights), columns, tokenizer, longest)


def measure(
    args: RewardEvalArguments, parts: dict[str, Dataset], total: np.ndarray, columns: np.ndarray, of: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of all datasets, and the reliability of the first with T = 1 and with T (empty without T).

    Args:
        total, columns: the score of each text, and what each reward gives it.
        of: numbers of the texts of each pair, (pairs, 2), of all datasets in turn.
    """
    margins, each = total[of[:, 0]] - total[of[:, 1]], columns[of[:, 0]] - columns[of[:, 1]]
    ends = np.cumsum([len(rows) for rows in parts.values()]).tolist()
    places = [slice(end - len(rows), end) for rows, end in zip(parts.values(), ends, strict=True)]
    sets: list[dict[str, Any]] = []
    for (name, rows), mine in zip(parts.items(), places, strict=True):
        domains = domains_of(rows, name, args.domain_column)
        sets.append({"source": name, **pair_figures(margins[mine], of[mine], rows, domains)})
    report: dict[str, Any] = {"seed": args.seed, "datasets": sets}
    if len(sets) > 1:
        report["all"] = {"pairs": len(margins), "accuracy": share_with_interval(shares_right(margins), of)}
    if each.shape[1] > 1 and np.isfinite(each).all():
        report["each"] = [share_with_interval(shares_right(column), of) for column in each.T]
    name, rows = next(iter(parts.items()))
    scored, reliability, temperature = margins[places[0]], {}, 1.0
    try:
        found, before, after = calibrate(scored, agreement_of(rows), halves(of[places[0]], args.seed), name)
    except ValueError as error:
        report["no_temperature"] = str(error)
    else:
        temperature, reliability = found.temperature, {"before": before, "after": after}
        report |= {"calibration": asdict(found), "reliability": reliability}
        sets[0] |= {"ece_before": found.ece_before, "ece": found.ece}
        for one, others, mine in zip(sets[1:], list(parts.values())[1:], places[1:], strict=True):
            one["ece"] = reward_model_report(margins[mine] / temperature, agreement_of(others))["ece"]
    report["mistakes"] = mistakes(rows, scored, temperature, MISTAKES)
    return report, reliability


OPTIONS = (RewardEvalArguments, RewardArguments, ModelConfig)


def main(args: RewardEvalArguments, rewards: RewardArguments, model: ModelConfig) -> None:
    state = check_launch()
    check_same_options(args, rewards, model)
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        rewards=rewards.reward_adapter,
        data=tuple(args.dataset_name),
        writes=FILES["reward_eval"],
        needs_model=bool(rewards.reward_adapter),  # reward functions can do without
    )
    rewards.check_weights(args.reward_weights)
    beside = args.temperature_folder(rewards)
    if beside is not None:
        check_output_dir(str(beside))
        check_ours(str(beside), (CALIBRATION,))
    lock_output(args.output_dir, writes=state.is_main_process)
    loaded = args.load()
    composite, columns, tokenizer, longest = load_rewards(args, rewards, model, joined(loaded))
    parts, counts = {}, {}
    for name, rows in loaded.items():
        parts[name], counts[name] = args.fitting(rows, name, tokenizer, longest)
    check_same_rows(counts)
    texts, of = distinct_texts(joined(parts), columns)
    state.print(f"{len(of):,} pairs, with {len(texts):,} different texts.")
    ids = None if tokenizer is None else completion_tokens(texts, tokenizer)
    scores = score_texts(composite, texts, ids, batch_size=args.batch_size)
    if not state.is_main_process:
        return

    report, reliability = measure(args, parts, *scores, of)
    report = {"reward": " + ".join(composite.names), **report}
    if "each" in report:
        report["rewards"] = dict(zip(composite.names, report.pop("each"), strict=True))
    report["datasets"] = [one | counts[one["source"]] for one in report["datasets"]]
    if beside is not None and "calibration" in report:
        found = Calibration(**report["calibration"])
        save(beside, "adapter", found.save, former=former_files(beside, "adapter"), adds=True)
        report["saved_temperature"] = str(beside / CALIBRATION)
    report["seconds"] = round(seconds_running(), 1)
    first, domains = report["datasets"][0], groups_of(report)
    drawn = {"length"} | ({"domain"} if domains else set()) | ({"reliability"} if reliability else set())
    drawn |= {"gap"} if first["gap"] == "ratings" else set()

    def write(folder: Path) -> None:
        groups = first["by_length"]["groups"]
        draw_accuracies(groups, "Accuracy by the lengths of the two sides", folder / FIGURES["length"])
        if domains:
            draw_accuracies(domains, "Accuracy by dataset and domain", folder / FIGURES["domain"])
        if reliability:
            temperature = report["calibration"]["temperature"]
            draw_reliability(**reliability, temperature=temperature, path=folder / FIGURES["reliability"])
        if "gap" in drawn:
            draw_accuracy_by_gap(first["by_gap"], folder / FIGURES["gap"])
        write_json(folder / "reward_eval.json", report)
        (folder / "reward_eval.md").write_text(markdown_reward_report(report, drawn), encoding="utf-8")

    save(args.output_dir, "reward_eval", write, former=former_files(args.output_dir, "reward_eval"))
    print(summary(args, report))


def summary(args: RewardEvalArguments, report: dict) -> str:
    """Return the line that the command prints last."""
    first = report["datasets"][0]
    low, mean, high = (first["accuracy"][key] for key in ("low", "mean", "high"))
    where, found = Path(args.output_dir) / "reward_eval.md", report.get("calibration")
    text = f"{where}: accuracy {mean:.3f} [{low:.3f}, {high:.3f}] of {first['pairs']:,} pairs"
    if found is None:
        return f"{text}; {report['no_temperature']}"
    return f"{text}, ECE {found['ece_before']:.3f} -> {found['ece']:.3f} with T = {found['temperature']:.2f}"


if __name__ == "__main__":
    main(*parse(*OPTIONS))
