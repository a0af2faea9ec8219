r"""Sample pairs of completions for people to compare, two for each prompt, from one policy or two.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.pairs --config pipeline/recipes/loop/pairs.yaml

With one policy both completions are its own. With two, every second pair has a completion of each, and the others are two of
the first: the one kind says which policy people prefer, the other teaches a reward model to tell the first one's completions
apart. Completions that are equal or empty are drawn again.

Saves pairs.jsonl in `output_dir`, for `pipeline.label`: prompt, response_1 and response_2, and `policies`, the numbers of the
policies that wrote them. `scores` are those of the reward adapter, and `judged` those of a judge that stands in for people.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm
from trl import ModelConfig

from data.cells import shorten
from data.conversion import json_lines
from data.prompts import load_prompts, tokenize_prompts
from data.saving import save
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import context_length
from pipeline.backbone.members import check_rewards
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone, load_backbone
from pipeline.backbone.sampling import as_answers, gathered, sample
from pipeline.runs.agreement import check_same_options
from pipeline.runs.arguments import CompletionArguments
from pipeline.runs.command_line import parse
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.output_lock import lock_output
from pipeline.runs.ownership import FILES
from reward_models.composite import Composite, call_rewards, load_judge
from reward_models.functions import RewardArguments


PAIRS = "pairs.jsonl"
DRAWS = 8  # attempts at two different completions of a prompt
ROLES = ("policy", "reference")  # of the first policy and the second


@dataclass
class PairsArguments(CompletionArguments):
    """Options of the pairs."""

    policies: list[str] = field(
        default_factory=lambda: [""],
        metadata={"help": "Policy adapters to sample from, one or two, the newest first; '' is the bare backbone."},
    )
    first_prompt: int = field(
        default=0, metadata={"help": "Number of the first prompt, from 0; after the last one comes the first again."}
    )
    reward_adapter: str | None = field(
        default=None, metadata={"help": "Reward adapter whose scores of both sides are kept with a pair. Unset: none."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.policies) not in (1, 2):
            raise ValueError(f"policies={self.policies} must name one policy or two.")
        if self.reward_weights:
            raise ValueError(f"reward_weights={self.reward_weights} has no effect on pairs. Leave it unset.")

    def prompts(self) -> Dataset:
        """Override `prompts`: begin with `first_prompt`."""
        prompts = load_prompts(self.dataset_name, self.dataset_eval_split, drop=self.drop_bad_rows)
        numbers = (self.first_prompt + np.arange(min(self.max_prompts, len(prompts)))) % len(prompts)
        prompts = prompts.select(numbers)
        self._check_number(prompts)
        return prompts


def roles_of(number: int, policies: int) -> tuple[str, str]:
    """Return the roles that complete the two sides of a pair: every second pair has one of each policy, if there are two."""
    return (ROLES[0], ROLES[1] if policies == 2 and number % 2 else ROLES[0])


def sample_pairs(
    backbone: Backbone,
    roles: list[tuple[str, str]],
    prompts: list,
    tokenizer: PreTrainedTokenizerBase,
    args: PairsArguments,
) -> dict[int, list[list[int]]]:
    """Sample two completions of each prompt that differ, and return their tokens by the number of the prompt.

    Processes share the work, and all of them get all pairs. A prompt whose completions are equal or empty in `DRAWS` draws is
    left out.
    """
    prompt_ids = tokenize_prompts(prompts, tokenizer)
    found: dict[int, list[list[int]]] = {}
    state = PartialState()
    with tqdm(desc="completions", unit="text", disable=not state.is_main_process, total=0) as progress:
        for draw in range(DRAWS):
            missing = [number for number in range(len(prompts)) if number not in found]
            progress.total += 2 * len(missing)
            drawn: list[dict[int, list[int]]] = [{}, {}]
            for side, role in product((0, 1), ROLES):
                mine = [number for number in missing if roles[number][side] == role]
                if not mine:
                    continue
                batches = sample(
                    backbone,
                    role,
                    [prompt_ids[number] for number in mine],
                    tokenizer,
                    max_completion_length=args.max_completion_length,
                    temperature=args.temperature,
                    batch_size=args.batch_size,
                    share_seed=(args.seed, args.first_prompt, draw, side, ROLES.index(role)),
                )
                parts = []
                for batch in batches:
                    parts.append((batch.first, batch.rows()))
                    progress.update(len(parts[-1][1]) * state.num_processes)
                (ids,) = gathered(parts)
                drawn[side] |= zip(mine, ids, strict=True)
            for number in missing:
                both = [side[number] for side in drawn]
                texts = [text.strip() for text in tokenizer.batch_decode(both, skip_special_tokens=True)]
                if all(texts) and texts[0] != texts[1]:
                    found[number] = both
            if len(found) == len(prompts):
                break
    return found


OPTIONS = (PairsArguments, ModelConfig)


def main(args: PairsArguments, model: ModelConfig) -> None:
    state = check_launch()
    check_same_options(args, model)
    check_folders(
        args.output_dir,
        model.model_name_or_path,
        policies=tuple(args.policies),
        rewards=(args.reward_adapter or "",),
        data=(args.dataset_name,),
        writes=FILES["pairs"],
    )
    rewards = RewardArguments([args.reward_adapter]) if args.reward_adapter else None
    if rewards:
        check_rewards(rewards, None)
    lock_output(args.output_dir, writes=state.is_main_process)
    prompts = args.prompts()
    judge = load_judge(args.judge, prompts, args.dataset_name)
    backbone, tokenizer = load_backbone(
        model, args.policies[0] or None, trust_remote_code=args.trust_remote_code, pad_token=args.pad_token
    )
    prompts, _ = args.check_lengths(prompts, tokenizer, context_length(backbone))
    for name in filter(None, args.policies[1:]):
        adapter = read_adapter(name, needs_head=False, base=backbone.get_base_model(), tokenizer=tokenizer)
        backbone.add_role("reference", adapter)
    learned: list[Callable] = [*learned_rewards(rewards, backbone, tokenizer)] if rewards else []
    scorer = Composite(learned) if learned else None
    backbone.to(state.device).eval()

    asked = prompts["prompt"][:]
    roles = [roles_of(number, len(args.policies)) for number in range(len(asked))]
    found = sample_pairs(backbone, roles, asked, tokenizer, args)
    if len(found) < len(asked):
        first = next(number for number in range(len(asked)) if number not in found)
        state.print(
            f"{args.dataset_name}: {len(asked) - len(found):,} of {len(asked):,} prompts are left out: {DRAWS} times their "
            f"completions were equal or empty. The first is {shorten(asked[first])}."
        )
    if not found:
        raise ValueError(
            f"{args.dataset_name}: no prompt has two completions that differ. Raise temperature, or give more prompts."
        )
    kept = sorted(found)
    rows = prompts.select(kept)
    sides = [[found[number][side] for number in kept] for side in (0, 1)]
    answers = [as_answers(tokenizer.batch_decode(ids, skip_special_tokens=True), rows["prompt"][:]) for ids in sides]

    def scores(composite: Composite, runner: asyncio.Runner) -> list[tuple[float, ...]]:
        totals = []
        for texts, ids in zip(answers, sides, strict=True):
            columns = call_rewards(composite.functions, rows, texts, ids, runner)
            totals.append(composite.total(columns, rows["prompt"][:], texts).tolist())
        return list(zip(*totals, strict=True))

    with asyncio.Runner() as runner:
        scored = scores(scorer, runner) if scorer else None
        judged = scores(judge, runner) if judge else None
    if not state.is_main_process:
        return
    made = [
        {
            "prompt": prompt,
            "response_1": one,
            "response_2": two,
            "policies": [ROLES.index(role) for role in roles[number]],
            **({"scores": scored[at]} if scored else {}),
            **({"judged": judged[at]} if judged else {}),
        }
        for at, (number, prompt, one, two) in enumerate(zip(kept, rows["prompt"][:], *answers, strict=True))
    ]

    def write(folder: Path) -> None:
        (folder / PAIRS).write_text(json_lines(made), encoding="utf-8")

    save(args.output_dir, "pairs", write)
    print(f"{Path(args.output_dir) / PAIRS}: {len(made):,} pairs.")


if __name__ == "__main__":
    main(*parse(*OPTIONS))
