"""Check a PPO run before it trains, in seconds, since a fault here would make all later curves impossible to explain.

The bounds separate rounding from faults: `tests/benchmarks/NOTES.md` gives the size of both on a real model. Two passes
with the same arithmetic must agree to the bit or nearly so, in any precision. Two passes with different arithmetic, such
as sampling with a cache and scoring whole sequences, differ by rounding; for them only means over many tokens have a bound.
"""

import math
from dataclasses import replace

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import tqdm
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import pad

from data.prompts import tokenize_prompts
from pipeline.backbone.adapters import read_metrics
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import sample, sampling_options
from pipeline.rl.checks import BATCH, PROMPTS, Check, held, padded, whole_pass
from pipeline.rl.config import PPOConfig
from pipeline.rl.policy_checks import adapters_that_run, own_checks, policy_checks, sampling_checks
from pipeline.rl.score_checks import reward_model_checks, score_checks


POLICY_PASSES = 3  # of `policy_checks` over a batch: the policy twice, and the reference


@torch.no_grad()
def preflight(
    backbone: Backbone,
    prompts: list,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    reward_adapters: dict[str, str] | None = None,
    vllm: VLLMGeneration | None = None,
) -> list[Check]:
    """Check the policy at step 0, its reward models and vLLM on completions of the first 64 prompts, and return the checks.

    Call this in the precision of PPO (`accelerator.autocast`), with the backbone in the state in which PPO samples.

    Args:
        reward_adapters: role and folder of each reward model.
        vllm: vLLM's client, if vLLM is to sample.

    Raises:
        ValueError: at least one check refuses the run. The message names every check that does.
    """
    set_seed(args.seed)
    was_training = backbone.training
    backbone.train()  # as in PPO, so that dropout is found
    rows = tokenize_prompts(prompts[:PROMPTS], tokenizer)
    number, whole = len(range(0, len(rows), BATCH)), whole_pass(args)
    checked = POLICY_PASSES + len(reward_adapters or {})
    progress = tqdm(
        total=number * (args.max_completion_length + checked * whole) + whole * (1 + bool(vllm)),
        desc="preflight",
        unit="pass",
        disable=args.disable_tqdm or not PartialState().is_main_process,
    )
    batches, checks = [], []
    with progress:
        with adapters_that_run(backbone) as sampling:
            for batch in sample(
                backbone,
                "policy",
                rows,
                tokenizer,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                batch_size=BATCH,
                options=sampling_options(args),
                keep_logprobs=True,
                tell=progress.update,
            ):
                batches.append(batch)
                progress.update(args.max_completion_length - batch.completion_ids.shape[1])
        checks += [*policy_checks(backbone, batches, sampling, args)]
        progress.update(POLICY_PASSES * len(batches) * whole)
        checks += [*own_checks(backbone, batches[0], args)]
        progress.update(whole)
        checks += sampling_checks(args)
        if vllm:
            checks.append(_vllm_check(backbone, vllm, rows, tokenizer, args))
            progress.update(whole)
        completions = [row for batch in batches for row in batch.rows()]
        for role, folder in (reward_adapters or {}).items():
            of_role = [*reward_model_checks(read_metrics(folder), args)]
            of_role += score_checks(backbone, role, rows, completions, tokenizer, args, progress)
            checks += (
                of_role if role == "reward" else [replace(check, name=f"{check.name} ({role})") for check in of_role]
            )
    backbone.train(was_training)
    refused = [str(check) for check in checks if check.result == "refused"]
    if refused:
        raise ValueError("PPO is refused before it starts. " + " ".join(refused))
    return checks


def _vllm_check(
    backbone: Backbone,
    vllm: VLLMGeneration,
    prompt_rows: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Check:
    """Compare the logprobs of tokens that vLLM sampled: those of vLLM and those of PPO's training pass."""
    vllm.sync_weights()
    _, completions, sampled, _ = vllm.generate(prompts=prompt_rows, images=None, num_generations=1)
    device, differences = backbone.get_base_model().device, []
    for start in range(0, len(prompt_rows), BATCH):
        rows = slice(start, start + BATCH)
        drawn = [torch.tensor(row) for row in completions[rows]]
        theirs = [torch.tensor([math.nan if x is None else x for (x,) in row]) for row in sampled[rows]]
        asked = [torch.tensor(row) for row in prompt_rows[rows]]
        prompts, prompt_mask = padded(asked, tokenizer.pad_token_id, "left", device)
        completion_ids, mask = padded(drawn, tokenizer.pad_token_id, "right", device)
        inputs = torch.cat([prompts, completion_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
        ours = backbone.logprobs("policy", *inputs, completion_ids, args.temperature)
        differences.append((ours.float() - pad(theirs, padding_value=0.0).to(device)).abs()[mask])
    return held(
        "vLLM samples from the policy",
        torch.cat(differences).mean().item(),
        0.1,
        "warning",
        "Mean difference (nats) between a token's logprob in vLLM, which has its own kernels and precision, and in PPO's "
        "training pass. The bound is that for generation: SmolLM2 in bfloat16 reaches 0.05 by rounding. Above the bound, "
        "check vLLM's dtype, and on a server set `--logprobs-mode processed_logprobs`, which temperature needs.",
    )
