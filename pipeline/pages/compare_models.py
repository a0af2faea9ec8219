"""Sample from several policies on one frozen backbone, and measure in their completions what PPO sees.

Policies, references, values and rewards are adapters on the backbone, as in training. An adapter is read when it is first
needed. The figures of a completion come from the functions that PPO's trainer calls, in the order of its steps.
"""

import asyncio
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from data.prompts import tokenize_prompts
from data.reading import dataset_of
from data.tokens import check_prompt_ids, write_turns
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import context_length
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone, load_backbone
from pipeline.backbone.sampling import Sample, as_answers, end_tokens, sample
from pipeline.pages.compare_runs import Policy, Run, normalizes
from pipeline.pages.compare_tokens import PART_OF_CHARACTER, Tokens, pieces
from pipeline.rl.advantages import final_scores, gae, token_rewards
from pipeline.rl.kl import kl_per_token
from pipeline.rl.measuring import measure
from pipeline.runs.recipe import check_ranges
from reward_models.composite import Composite, call_rewards
from reward_models.ensembles import EnsembleReward, combine
from reward_models.functions import RewardArguments
from reward_models.learned import LearnedReward


BARE = "reference"  # a role without an adapter of its own here, which is the bare backbone (`Backbone.role`)
KL, REWARD, VALUE, ADVANTAGE, PREFIX = "KL", "reward", "value", "advantage", "score by prefix"


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    temperature: float = 1.0
    max_completion_length: int = 64
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None:
                raise ValueError(f"{name} is empty. Write a number.")
        check_ranges(vars(self))


@dataclass(frozen=True)
class Completion:
    """A completion and its figures.

    Attributes:
        pieces: text of each token; together they are the whole text.
        answer: the text without special tokens, as reward functions get it.
        layers: figures of each token: KL in nats, reward, value, advantage, and the score of each beginning.
        rewards: what each reward function gives, before its weight; None where it gives nothing.
        score: their weighted sum, penalised and clipped as in PPO; None without rewards.
    """

    pieces: list[str]
    answer: str
    ended: bool
    layers: dict[str, list[float]]
    rewards: dict[str, float | None]
    score: float | None


class Comparison:
    """Several policies on one backbone.

    One thread at a time uses the model, because a role is a state of the model's layers.

    Args:
        policies: in the order of the page. The first is the backbone's `policy` role.
        composites: the rewards of each run, by `Policy.run`; None scores nothing. Runs may share one.
        learned: the rewards that are adapters on the backbone, by their names.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        policies: list[Policy],
        composites: list[Composite | None],
        learned: dict[str, LearnedReward],
    ):
        self.backbone, self.tokenizer = backbone, tokenizer
        self.policies = {policy.name: policy for policy in policies}
        self.composites, self.learned = composites, learned
        self._roles: dict[str | None, str] = {None: BARE, policies[0].folder: "policy"}
        self._lock = Lock()
        self._runner = asyncio.Runner()

    @property
    def layers(self) -> list[str]:
        """Return the names of the figures that a token can have."""
        values = any(policy.value for policy in self.policies.values())
        scored = any(self.composites)
        of_ppo = [
            KL,
            *([REWARD] if scored else []),
            *([VALUE] if values else []),
            *([ADVANTAGE] * (scored and values)),
        ]
        return [*of_ppo, *map(self._prefix_layer, self.learned)]

    def _prefix_layer(self, reward: str) -> str:
        return PREFIX if len(self.learned) == 1 else f"{PREFIX}: {reward}"

    def role(self, folder: str | None, *, needs_head: bool = False) -> str:
        """Return the role of an adapter on the backbone, and read the adapter if it is a new one.

        Raises the errors of `read_adapter`.
        """
        if folder not in self._roles:
            base = self.backbone.get_base_model()
            assert folder is not None
            adapter = read_adapter(folder, needs_head=needs_head, base=base, tokenizer=self.tokenizer)
            role = f"adapter_{len(self._roles)}"
            with torch.random.fork_rng(devices=[]):  # peft draws weights, which the adapter's replace
                self.backbone.add_role(role, adapter)
            self.backbone.requires_grad_(False).eval()  # peft's new layers train, and have dropout
            self._roles[folder] = role
        return self._roles[folder]

    def tokens_of(self, prompt: str | list[dict], max_completion_length: int) -> list[int]:
        """Return the tokens of a prompt, as the stages write them.

        Raises:
            ValueError: the prompt is empty, is refused by the chat template, or leaves no room for a completion.
        """
        if not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
            raise ValueError("The prompt is empty. Write the beginning of a text, or a message.")
        if not isinstance(prompt, str):
            write_turns("the page", "prompt", prompt, self.tokenizer, ask=True)
        (ids,) = tokenize_prompts([prompt], self.tokenizer)
        check_prompt_ids("the page", prompt, ids, self.tokenizer)
        context = context_length(self.backbone)
        if len(ids) + max_completion_length > context:
            raise ValueError(
                f"The prompt has {len(ids)} tokens. With max_completion_length={max_completion_length} it exceeds the "
                f"model's context of {context} tokens. Shorten the prompt, or sample fewer tokens."
            )
        return ids

    def complete(
        self, name: str, prompt: str | list[dict], sampling: Sampling
    ) -> Generator[str | Completion, None, None]:
        """Sample a completion of the policy `name`: yield its text so far, again and again, and then the completion.

        Another thread samples. It stops when this generator is closed.

        Raises the errors of `tokens_of`, `role` and `sample`, and of the reward functions.
        """
        policy, prompt_ids = self.policies[name], self.tokens_of(prompt, sampling.max_completion_length)
        ids: list[int] = []
        with closing(self._sampled(policy, prompt_ids, sampling)) as drawn:
            for ids in drawn:
                yield self.tokenizer.decode(ids, skip_special_tokens=True).rstrip(PART_OF_CHARACTER)
        yield self.measured(name, prompt, prompt_ids, ids, sampling.temperature)

    def _sampled(self, policy: Policy, prompt_ids: list[int], sampling: Sampling) -> Generator[list[int], None, None]:
        """Yield the tokens of a completion that are drawn so far, again and again."""
        tokens = Tokens(self.tokenizer)

        def work() -> None:
            try:
                with self._lock:
                    role = self.role(policy.folder)
                    batches = sample(
                        self.backbone,
                        role,
                        [prompt_ids],
                        self.tokenizer,
                        max_completion_length=sampling.max_completion_length,
                        temperature=sampling.temperature,
                        batch_size=1,
                        options={"top_p": sampling.top_p, "top_k": sampling.top_k},
                        share_seed=(sampling.seed,),
                        streamer=tokens,
                    )
                    tokens.queue.put(next(batches))
            except BaseException as error:  # the thread that waits must know of any error
                tokens.queue.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        ids: list[int] = []
        try:
            while not isinstance(found := tokens.queue.get(), Sample):
                if isinstance(found, BaseException):
                    raise found
                ids = ids + found
                yield ids
            yield found.rows()[0]
        finally:
            tokens.stopped = True
            thread.join()

    @torch.no_grad()
    def measured(
        self, name: str, prompt: str | list[dict], prompt_ids: list[int], ids: list[int], temperature: float
    ) -> Completion:
        """Measure a completion as PPO does: the numbers are the steps of an update (`pipeline.rl.trainer.PPOTrainer`).

        Rewards and advantages are those before whitening, which needs a whole rollout.

        Raises:
            RewardError: a reward function failed.
        """
        policy = self.policies[name]
        options = policy.options
        assert options is not None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ended = ids[-1] in end_tokens(self.backbone, self.tokenizer)
        layers: dict[str, list[float]] = {}
        with self._lock:
            # 2. Measure the completion under policy, reference and value.
            device = self.backbone.get_base_model().device
            prompts, completions = (torch.tensor([row], device=device) for row in (prompt_ids, ids))
            whole = torch.cat([prompts, completions], dim=1)
            masks = [torch.ones_like(x).bool() for x in (prompts, completions)]
            own, reference = self.role(policy.folder), self.role(policy.reference)
            if policy.value:
                found = measure(
                    self.backbone,
                    *(prompts, masks[0], completions, masks[1]),
                    temperature=temperature,
                    batch_size=1,
                    reward_roles=[],
                    policy=own,
                    reference=reference,
                    value=self.role(policy.value, needs_head=True),
                )
                logprobs, ref_logprobs, values = found.logprobs, found.ref_logprobs, found.values
                layers[VALUE] = values[0].tolist()
            else:
                logprobs, ref_logprobs = (
                    self.backbone.logprobs(role, whole, torch.ones_like(whole), completions, temperature)
                    for role in (own, reference)
                )
            mask = masks[1]
            layers[KL] = kl_per_token(logprobs, ref_logprobs, mask)[0].tolist()
            # 3. Score the completion.
            rewards, score = self._scores(policy, prompt, text, ids, ended)
            if score is not None:
                scores = torch.tensor([score], device=device)
                # 4. Give every token its reward.
                coefficients = {"kl_coef": options.beta, "kl_estimator": options["kl_estimator"]}
                of_tokens = token_rewards(scores, logprobs, ref_logprobs, mask, **coefficients)
                layers[REWARD] = of_tokens[0].tolist()
                # 5. Estimate advantages.
                if policy.value and not options["whiten_rewards"]:
                    advantages, _ = gae(of_tokens, values, mask, gamma=options["gamma"], lam=options["lam"])
                    layers[ADVANTAGE] = advantages[0].tolist()
            for reward, learned in self.learned.items():
                layers[self._prefix_layer(reward)] = self._prefix_scores(learned, whole, len(ids)).tolist()
        layers = {name: layers[name] for name in self.layers if name in layers}
        return Completion(pieces(ids, self.tokenizer), text, ended, layers, rewards, score)

    def _scores(
        self, policy: Policy, prompt: str | list[dict], text: str, ids: list[int], ended: bool
    ) -> tuple[dict[str, float | None], float | None]:
        """Return what each reward gives a completion, and the score that PPO makes of those of the policy's own run."""
        rows, answers = dataset_of({"prompt": [prompt]}, "the page"), as_answers([text], [prompt])
        given: dict[str, float | None] = {}
        score = None
        for composite in {id(each): each for each in self.composites if each}.values():
            columns = call_rewards(composite.functions, rows, answers, [ids], self._runner)
            found = columns[0].tolist()
            given |= {name: None if x != x else x for name, x in zip(composite.names, found, strict=True)}
            if columns.isnan().all():  # no function applies to this prompt
                continue
            total = composite.total(columns, [prompt], answers)
            if composite is self.composites[policy.run]:
                assert policy.options is not None
                limits = {"missing_eos_penalty": policy.options["missing_eos_penalty"]}
                limits["clip_range"] = policy.options["reward_clip_range"]
                score = final_scores(total, torch.tensor([ended]), **limits).item()
        return given, score

    def _prefix_scores(self, reward: LearnedReward, whole: Tensor, length: int) -> Tensor:
        """Return what a learned reward gives each beginning of a completion, (T,), in the unit of its scores."""
        members = reward.members if isinstance(reward, EnsembleReward) else [reward]
        mask = torch.ones_like(whole)
        columns = [self.backbone.prefix_scores(whole, mask, length, each.role)[0] - each.shift for each in members]
        scores = torch.stack(columns, dim=1).double()
        if isinstance(reward, EnsembleReward):
            return combine(scores, reward.combination, std_coef=reward.std_coef)
        return scores[:, 0]


def load(
    runs: list[Run],
    policies: list[Policy],
    model: ModelConfig,
    rewards: RewardArguments | None,
    functions: list[Callable],
    *,
    weights: list[float] | None = None,
    **options: Any,
) -> Comparison:
    """Load the backbone with the first policy and all learned rewards.

    Args:
        policies: those of the page; the first has an adapter.
        rewards: rewards of all runs, as a recipe names them; None takes those in the folders of the runs.
        functions, weights: reward functions and weights of the recipe.
        options: `trust_remote_code` and `pad_token` of `load_backbone`.

    Raises the errors of `load_backbone` and `learned_rewards`.
    """
    with torch.random.fork_rng(devices=[]):  # peft draws weights, which the adapters' replace
        backbone, tokenizer = load_backbone(model, policies[0].folder, **options)
        named = [reward for run in runs for reward in run.rewards]
        given = rewards or (RewardArguments(named, normalize_scores=normalizes(runs)) if named else None)
        learned = learned_rewards(given, backbone, tokenizer) if given else []
    composites: list[Composite | None] = []
    if rewards:
        composites = [Composite([*learned, *functions], weights) if learned or functions else None] * len(runs)
    else:
        several, rest = sum(bool(run.rewards) for run in runs) > 1, iter(learned)
        for run in runs:
            own = [next(rest) for _ in run.rewards]
            for reward in own if several else []:
                reward.__name__ = f"{run.name}/{reward.__name__}"
            seen = next((policy.options["reward_weights"] for policy in run.policies if policy.options), None) or []
            weights = seen[: len(own)] if len(seen) >= len(own) else None
            composites.append(Composite([*own], weights) if own else None)
        first = next((each for each in composites if each), None)
        composites = [each or first for each in composites]
    names = Composite([*learned]).names if learned else []
    backbone.requires_grad_(False).to(PartialState().device).eval()
    return Comparison(backbone, tokenizer, policies, composites, dict(zip(names, learned, strict=True)))
