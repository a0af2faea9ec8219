r"""Evaluation of SFT and PPO on held-out prompts, by their rewards and by a judge that neither was trained on.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.evaluation \
        --config pipeline/recipes/demo/evaluation.yaml

The judge is any reward function or reward model (`judge`), or one that compares two completions (`pairwise_judge`). Without a
judge the report shows score, KL, diversity, length and samples. Saves report.json, report.md and plots in `output_dir`. Any
policy adapter can be evaluated in the place of PPO's, such as that of a baseline.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm
from trl import ModelConfig

from data.json_files import check_object, write_json
from data.prompts import tokenize_prompts
from data.saving import save
from data.schemas import MEASURED, REWARD_MODEL
from data.texts import load_texts
from pipeline.backbone.adapters import adapter_folder, read_adapter, read_metrics
from pipeline.backbone.loading import context_length
from pipeline.backbone.members import check_rewards
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone, load_backbone
from pipeline.backbone.sampling import as_answers, gathered, rounds, sample
from pipeline.reports.metrics import bootstrap_interval, check_both_scored, wins
from pipeline.reports.plots import draw_accuracy_by_gap, draw_calibration, draw_ppo_curves, draw_score_histograms
from pipeline.reports.report import markdown_report
from pipeline.rl.held_out_texts import losses_of_texts, rows_of_texts
from pipeline.runs.agreement import check_same_options
from pipeline.runs.arguments import CompletionArguments
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.output_lock import lock_output
from pipeline.runs.outputs import seconds_running
from pipeline.runs.ownership import FILES, former_files
from reward_models.composite import Composite, Runner, async_runner, call_rewards, load_judge
from reward_models.ensembles import disagreement_in
from reward_models.functions import RewardArguments, extra_columns, load_function, load_functions
from reward_models.judges import prefer
from reward_models.rules import distinct_n
from reward_models.temperature import read_calibration


@dataclass
class EvaluationArguments(CompletionArguments):
    """The adapters that are compared."""

    policy_adapter: str = field(
        kw_only=True, metadata={"help": "Policy adapter to evaluate, of PPO or of a baseline."}
    )
    sft_adapter: str | None = field(
        default=None, metadata={"help": "Adapter that the policy started from. Unset: the bare backbone."}
    )
    policy_name: str = field(default="PPO", metadata={"help": "Name of the policy in report.md."})
    pairwise_judge: str | None = field(
        default=None,
        metadata={
            "help": "Function that compares two completions, such as reward_models.judges.get_llm(url=..., model=...)."
        },
    )
    text_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Texts whose language-model loss is measured, the first max_prompts of them. Unset: none."},
    )
    text_dataset_split: str = field(
        default="test", metadata={"help": "Split of these texts (a single file has none)."}
    )

    def texts(self) -> Dataset | None:
        """Read the texts of `text_dataset_name`; None if it is unset. Raises the errors of `load_texts`."""
        if not self.text_dataset_name:
            return None
        rows = load_texts(self.text_dataset_name, self.text_dataset_split, drop=self.drop_bad_rows)
        return rows.select(range(min(self.max_prompts, len(rows))))


class Completions:
    """One role's completions of the prompts, and the figures of each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[list[int]] = []
        self.kl: list[float] = []  # nats a sequence, to the SFT policy
        self.nll: list[float] = []  # nats a sequence, under the bare backbone
        self.scores = np.zeros(0)
        self.judged: np.ndarray | None = None
        self.disagreement: list[Any] = [None]  # of an ensemble's members; None without one
        self.rewards: dict[str, float] = {}  # mean of each reward, before its weight
        self.text_losses: list[float] = []  # language-model loss of each text, in nats a token

    @property
    def texts(self) -> list[str]:
        return self.tokenizer.batch_decode(self.ids, skip_special_tokens=True)

    def metrics(self) -> dict:
        lengths = np.array([len(row) for row in self.ids])
        return {
            "score": float(self.scores.mean()),
            **({} if self.judged is None else {"judge": float(self.judged.mean())}),
            **({} if None in self.disagreement else {"disagreement": float(np.mean(self.disagreement))}),
            "kl": float(np.mean(self.kl)),
            "distinct_1": distinct_n(self.texts, 1),
            "distinct_2": distinct_n(self.texts, 2),
            "perplexity": float(np.exp(np.sum(self.nll) / lengths.sum())),
            "mean_length": float(lengths.mean()),
            **({"text_loss": float(np.mean(self.text_losses))} if self.text_losses else {}),
            "rewards": self.rewards,
        }


@torch.no_grad()
def complete(
    role: str,
    backbone: Backbone,
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    composite: Composite,
    judge: Composite | None,
    runner: Runner,
    args: EvaluationArguments,
) -> Completions:
    """Sample one completion of each prompt as `role`, and measure it.

    The figures are its KL to the reference, its likelihood under the backbone, its rewards, how far an ensemble disagrees, and
    what the judge says, if there is one. Processes share the batches, and every process gets all results.
    """
    asked, parts = prompts["prompt"][:], []
    judges = {"rewards": composite} | ({"judge": judge} if judge else {})
    prompt_ids = tokenize_prompts(asked, tokenizer)
    batches = sample(
        backbone,
        role,
        prompt_ids,
        tokenizer,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        share_seed=(args.seed,),
    )
    temperatures = {role: args.temperature, "reference": args.temperature, None: 1.0}
    shares = {adapter: adapter is None or backbone.starts_at_trunk(adapter) for adapter in temperatures}
    state = PartialState()
    total = -(-len(prompt_ids) // (args.batch_size * state.num_processes))
    together = rounds(len(prompt_ids), args.batch_size)
    progress = tqdm(batches, total=total, desc=f"{role} completions", unit="batch", disable=not state.is_main_process)
    for number, batch in enumerate(progress):
        ids, mask, completions = batch[:3]
        trunk = backbone.trunk(ids, mask) if backbone.trunk_depth else None
        nats = {
            adapter: backbone.logprobs(
                adapter, ids, mask, completions, temperature, trunk if shares[adapter] else None
            )
            .masked_fill(~batch.mask, 0)
            .sum(dim=1)
            for adapter, temperature in temperatures.items()
        }
        rows = batch.rows()
        of_batch = prompts.select(range(batch.first, batch.first + len(rows)))
        answers = as_answers(tokenizer.batch_decode(rows, skip_special_tokens=True), asked)
        found: dict[str, list] = {}
        extra: dict[str, list] = {}
        for name, rewarding in judges.items():
            logged = extra if name == "rewards" else None
            found[name] = call_rewards(rewarding.functions, of_batch, answers, rows, runner, logged).tolist()
            if number < together:
                rewarding.check_batch(found[name], of_batch["prompt"][:], answers)
        kl = (nats[role] - nats["reference"]).tolist()
        disagreement: list[Any] = disagreement_in(extra) or [None] * len(rows)
        parts.append((batch.first, rows, kl, (-nats[None]).tolist(), disagreement, *found.values()))
    result = Completions(tokenizer)
    result.ids, result.kl, result.nll, result.disagreement, *columns = gathered(parts)
    answers = as_answers(result.texts, asked)
    rewards, *judged = (torch.tensor(column, dtype=torch.float64) for column in columns)
    result.scores = composite.total(rewards, asked, answers).numpy()
    result.rewards = dict(zip(composite.names, rewards.nanmean(dim=0).tolist(), strict=True))
    if judge is not None:
        result.judged = judge.total(judged[0], asked, answers).numpy()
    return result


def judgement(args: EvaluationArguments, sft: Completions, policy: Completions) -> dict:
    """Return what the judge says in report.json: its name, its gain and its wins; nothing without a judge."""
    if sft.judged is None or policy.judged is None:
        return {}
    return {
        "judge": args.judge,
        "judge_gain": bootstrap_interval(policy.judged - sft.judged),
        "win_rate": bootstrap_interval(wins(policy.judged, sft.judged)),
    }


def pairwise_judgement(
    args: EvaluationArguments, judge: Callable, prompts: Dataset, sft: Completions, policy: Completions
) -> dict:
    """Return what the pairwise judge says in report.json: wins of the policy, and how far it can be believed."""
    asked = prompts["prompt"][:]
    ours, theirs = (as_answers(done.texts, asked) for done in (policy, sft))
    found = prefer(judge, asked, ours, theirs, {column: prompts[column][:] for column in extra_columns(prompts)})
    return {
        "judge": args.pairwise_judge,
        "win_rate": bootstrap_interval(found.wins),
        "consistent": float(found.consistent.mean()),
        "undecided": found.undecided,
    }


def text_change(sft: Completions, policy: Completions) -> dict:
    """Return the change of the texts' loss in report.json, with its interval; nothing without texts."""
    change = np.subtract(policy.text_losses, sft.text_losses)
    return {"text_loss_change": bootstrap_interval(change)} if len(change) else {}


def as_text(prompt: str | list[dict]) -> str:
    """Return a prompt for the table of samples: a conversation becomes one line for each turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


OPTIONS = (EvaluationArguments, RewardArguments, ModelConfig)


def main(args: EvaluationArguments, rewards: RewardArguments, model: ModelConfig) -> None:
    state = check_launch()
    check_same_options(args, rewards, model)
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=(args.policy_adapter, args.sft_adapter),
        rewards=rewards.reward_adapter,
        data=(args.dataset_name, args.text_dataset_name),
        writes=FILES["report"],
    )
    first = next(iter(rewards.reward_adapter), None)  # the value started from the first of several
    stages = {"sft": args.sft_adapter, "reward": first, "policy": args.policy_adapter}
    metrics = {stage: read_metrics(folder) if folder else {} for stage, folder in stages.items()}
    measured = {key: value for key, value in metrics["reward"].items() if key in REWARD_MODEL}
    if measured:
        remedy = "Restore the file, or remove it: the report is then silent about the reward model's training."
        check_object(measured, f"{first}/metrics.json", MEASURED, remedy=remedy)
    calibration = read_calibration(adapter_folder(first)) if first else None
    check_rewards(rewards, args.reward_weights)
    lock_output(args.output_dir, writes=state.is_main_process)
    prompts, texts = args.prompts(), args.texts()
    functions = load_functions(rewards.reward_funcs, prompts, args.dataset_name)
    judge = load_judge(args.judge, prompts, args.dataset_name)
    pairwise = load_function(args.pairwise_judge, "pairwise_judge") if args.pairwise_judge else None
    backbone, tokenizer = load_backbone(
        model, args.policy_adapter, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    prompts, rows = args.check_lengths(prompts, tokenizer, context_length(backbone))
    of_texts = (args.text_dataset_name, tokenizer, context_length(backbone))
    text_rows, text_counts = rows_of_texts(texts, *of_texts, drop=args.drop_bad_rows)
    if args.sft_adapter:
        reference = read_adapter(
            args.sft_adapter, needs_head=False, base=backbone.get_base_model(), tokenizer=tokenizer
        )
        backbone.add_role("reference", reference)
    composite = Composite(learned_rewards(rewards, backbone, tokenizer) + functions, args.reward_weights)
    backbone.to(state.device).eval()
    backbone.share_trunk()

    with async_runner() as runner:
        results = {
            name: complete(role, backbone, prompts, tokenizer, composite, judge, runner, args)
            for name, role in (("sft", "reference"), ("policy", "policy"))
        }
    check_both_scored(results["sft"].rewards, results["policy"].rewards)
    if text_rows:
        options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": args.batch_size}
        for name, role in (("sft", "reference"), ("policy", "policy")):
            results[name].text_losses = losses_of_texts(backbone, role, text_rows, **options)
    if not state.is_main_process:
        return
    sft, policy = results["sft"], results["policy"]
    report = {
        "policy_name": args.policy_name,
        "seed": args.seed,
        "prompts": len(prompts),
        "rows": rows | text_counts,
        "sft": sft.metrics(),
        "policy": policy.metrics(),
        **judgement(args, sft, policy),
        **({"pairwise": pairwise_judgement(args, pairwise, prompts, sft, policy)} if pairwise else {}),
        "score_gain": bootstrap_interval(policy.scores - sft.scores),
        "score_win_rate": bootstrap_interval(wins(policy.scores, sft.scores)),
        **text_change(sft, policy),
        **({"reward_model": measured} if measured else {}),
        **({"calibration": asdict(calibration)} if calibration else {}),
        "preflight": metrics["policy"].get("preflight", []),
        "completions": metrics["policy"].get("completions"),
        "seconds": {stage: found["seconds"] for stage, found in metrics.items() if "seconds" in found},
    }
    history = metrics["policy"].get("history", [])
    curves = any("score" in row for row in history)  # only PPO logs these; other trainers log other figures
    samples = [
        {
            "prompt": as_text(prompts["prompt"][i]),
            **{key: done.texts[i] for key, done in results.items()},
            **{f"{key}_score": float(done.scores[i]) for key, done in results.items()},
            **{f"{key}_judge": float(done.judged[i]) for key, done in results.items() if done.judged is not None},
        }
        for i in range(min(12, len(prompts)))
    ]
    report["seconds"]["evaluation"] = round(seconds_running(), 1)

    def write(folder: Path) -> None:
        if curves:
            draw_ppo_curves(history, folder / "ppo_curves.png")
        draw_score_histograms(sft.scores, policy.scores, folder / "score_histograms.png", args.policy_name)
        if measured:
            draw_calibration(measured["reliability"], measured["ece"], folder / "reward_calibration.png")
        if "by_gap" in measured:
            draw_accuracy_by_gap(measured["by_gap"], folder / "accuracy_by_gap.png")
        write_json(folder / "report.json", report)
        (folder / "report.md").write_text(markdown_report(report, samples, curves), encoding="utf-8")

    save(args.output_dir, "report", write, former=former_files(args.output_dir, "report"))
    key, won = ("judge", "win_rate") if judge else ("score", "score_win_rate")
    print(
        f"{Path(args.output_dir) / 'report.md'}: {key} {report['sft'][key]:+.3f} -> {report['policy'][key]:+.3f}, "
        f"win rate {report[won]['mean']:.3f}, KL {report['policy']['kl']:.1f} nats"
    )


if __name__ == "__main__":
    main(*parse(*OPTIONS))
