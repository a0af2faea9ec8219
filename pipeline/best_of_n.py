r"""Best-of-n: sample n completions of the SFT policy and keep the one that the reward scores highest.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.best_of_n \
        --config pipeline/recipes/demo/best_of_n.yaml

This trains nothing. It shows how good the reward model is before PPO optimises it (Stiennon et al. 2020, arXiv 2009.01325;
Gao et al. 2022, arXiv 2210.10760). One pool of completions for each prompt serves all n. The figures are exact expectations
over the pool's subsets of size n (`pipeline.reports.metrics.best_of_n`). Wins are against one more completion of each prompt,
which is in no pool. Distinct-2 belongs to a set of texts and has no such expectation: it is that of the best completions among
the first n of each pool.

Saves best_of_n.json, best_of_n.md and best_of_n.png in `output_dir`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import tqdm
from trl import ModelConfig

from data.json_files import write_json
from data.prompts import tokenize_prompts
from data.saving import save
from pipeline.backbone.loading import context_length
from pipeline.backbone.members import check_rewards
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import load_backbone
from pipeline.backbone.sampling import as_answers, gathered, rounds, sample
from pipeline.reports.metrics import best_of_n, best_of_n_kl, bootstrap_interval, wins
from pipeline.reports.plots import draw_best_of_n
from pipeline.reports.report import best_of_n_table, read_report
from pipeline.runs.agreement import check_same_options
from pipeline.runs.arguments import CompletionArguments, PolicyArguments
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.output_lock import lock_output
from pipeline.runs.outputs import rows_table, seconds_running
from pipeline.runs.ownership import FILES, former_files
from reward_models.composite import Composite, async_runner, call_rewards, load_judge
from reward_models.functions import RewardArguments, load_functions
from reward_models.rules import distinct_n


@dataclass
class BestOfNArguments(CompletionArguments):
    """Options of best-of-n."""

    n: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Numbers of completions to choose from."}
    )
    report: str | None = field(
        default=None, metadata={"help": "report.json of pipeline.evaluation; its policy is added to the plot."}
    )

    def __post_init__(self):
        super().__post_init__()
        if min(self.n, default=0) < 1:
            raise ValueError(f"n={self.n} must be a list of numbers of completions, each 1 or more.")
        if self.report is not None and not Path(self.report).is_file():
            raise FileNotFoundError(f"report={self.report!r}: no such file. Run pipeline.evaluation first.")


OPTIONS = (BestOfNArguments, PolicyArguments, RewardArguments, ModelConfig)


def main(args: BestOfNArguments, start: PolicyArguments, rewards: RewardArguments, model: ModelConfig) -> None:
    state = check_launch()
    check_same_options(args, start, rewards, model)
    compared = read_report(args.report) if args.report else None
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=(start.sft_adapter,),
        rewards=rewards.reward_adapter,
        data=(args.dataset_name, args.report),
        writes=FILES["best_of_n"],
    )
    check_rewards(rewards, args.reward_weights)
    lock_output(args.output_dir, writes=state.is_main_process)
    prompts = args.prompts()
    functions = load_functions(rewards.reward_funcs, prompts, args.dataset_name)
    judge = load_judge(args.judge, prompts, args.dataset_name)
    backbone, tokenizer = load_backbone(
        model, start.sft_adapter, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    prompts, read = args.check_lengths(prompts, tokenizer, context_length(backbone))
    composite = Composite(learned_rewards(rewards, backbone, tokenizer) + functions, args.reward_weights)
    backbone.to(state.device).eval()

    asked, prompt_ids = prompts["prompt"][:], tokenize_prompts(prompts["prompt"][:], tokenizer)
    together = rounds(len(prompts), args.batch_size)
    texts, tokens, judged, scored = [], [], [], []  # each (draws, prompts); the last draw is the opponent
    draws = max(args.n) + 1
    total = draws * -(-len(prompts) // (args.batch_size * state.num_processes))
    progress = tqdm(total=total, desc="completions", unit="batch", disable=not state.is_main_process)
    with async_runner() as runner, progress:
        for draw in range(draws):
            batches = sample(
                backbone,
                "policy",
                prompt_ids,
                tokenizer,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                batch_size=args.batch_size,
                share_seed=(args.seed, draw),
            )
            parts = []
            for number, batch in enumerate(batches):
                ids = batch.rows()
                of_batch = prompts.select(range(batch.first, batch.first + len(ids)))
                answers = as_answers(tokenizer.batch_decode(ids, skip_special_tokens=True), asked)
                columns = call_rewards(composite.functions, of_batch, answers, ids, runner).tolist()
                if number < together:
                    composite.check_batch(columns, of_batch["prompt"][:], answers)
                parts.append((batch.first, ids, columns))
                progress.update()
            ids, columns = gathered(parts)
            texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
            answers = as_answers(texts[-1], asked)
            tokens.append([len(row) for row in ids])
            scored.append(composite.total(torch.tensor(columns, dtype=torch.float64), asked, answers).tolist())
            if judge:
                found = call_rewards(judge.functions, prompts, answers, ids, runner)
                judged.append(judge.total(found, asked, answers).tolist())
    if not state.is_main_process:
        return

    scores, lengths = (np.transpose(columns[:-1]) for columns in (scored, tokens))
    verdicts, opponent = np.transpose(judged[:-1]), np.transpose(judged[-1:])
    won = wins(verdicts, np.broadcast_to(opponent, verdicts.shape))
    rows = []
    for n in args.n:
        best = scores[:, :n].argmax(axis=1)
        of_judge = {}
        if judge:
            gain = best_of_n(scores, verdicts, n) - best_of_n(scores, verdicts, 1)
            of_judge = {
                "judge": float(best_of_n(scores, verdicts, n).mean()),
                "judge_gain": bootstrap_interval(gain),
                "win_rate": bootstrap_interval(best_of_n(scores, won, n)),
            }
        rows.append(
            {
                "n": n,
                "score": float(best_of_n(scores, scores, n).mean()),
                **of_judge,
                "kl": best_of_n_kl(n),
                "distinct_2": distinct_n([texts[draw][prompt] for prompt, draw in enumerate(best)], 2),
                "mean_length": float(best_of_n(scores, lengths, n).mean()),
            }
        )
    result: dict[str, Any] = {
        "seed": args.seed,
        **({"judge": args.judge} if judge else {}),
        "prompts": len(prompts),
        "read": read,
        "rows": rows,
    }
    result["seconds"] = round(seconds_running(), 1)
    table = best_of_n_table(rows)
    if any(found["dropped"] for found in read.values()):
        table += f"\n\n## Data\n{rows_table(read)}"

    def write(folder: Path) -> None:
        write_json(folder / "best_of_n.json", result)
        (folder / "best_of_n.md").write_text(table + "\n", encoding="utf-8")
        draw_best_of_n(rows, folder / "best_of_n.png", compared)

    save(args.output_dir, "best_of_n", write, former=former_files(args.output_dir, "best_of_n"))
    print(best_of_n_table(rows))


if __name__ == "__main__":
    main(*parse(*OPTIONS))
