"""PPO as a trainer of TRL.

TRL's RLOOTrainer samples completions, calls reward functions, logs, saves and runs under any accelerate launch. This module
makes it PPO: roles on one backbone, a reward for each token, generalised advantages, and two clipped losses.
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase
from trl import RLOOTrainer
from trl.trainer.utils import pad

from pipeline.backbone.architecture import without_dropout
from pipeline.backbone.roles import ADAPTERS, Backbone
from pipeline.backbone.sharding import fsdp_modules, gathered_weights, keep_shared_shards
from pipeline.backbone.trunk import decoder_layers
from pipeline.rl.advantages import final_scores, gae, token_rewards
from pipeline.rl.config import PPOConfig
from pipeline.rl.health import Health
from pipeline.rl.kl import adapted_kl_coef, kl_per_token
from pipeline.rl.losses import approx_kl, policy_loss, text_loss, value_loss
from pipeline.rl.masking import masked_mean, masked_sums, whiten
from pipeline.rl.measuring import measure
from pipeline.rl.optimizing import Optimizing
from pipeline.rl.policy_sampler import PolicySampler
from pipeline.rl.ptx import drawn_texts
from pipeline.rl.recording import Recording
from pipeline.rl.rollout import WIDTH, Rollout, minibatches
from pipeline.rl.saving import SavesRoles
from reward_models.learned import LearnedReward, with_known_scores


logger = get_logger(__name__)


class PPOTrainer(Recording, Optimizing, SavesRoles, PolicySampler, RLOOTrainer):
    """Proximal policy optimisation (Schulman et al. 2017) of the policy role of a `Backbone`.

    The steps of an update in order, with the function of each step:

    1. sample a completion for each prompt (`_generate_single_turn`);
    2. measure logprobs under policy and reference, and values (`pipeline.rl.measuring.measure`);
    3. score the completions with the reward functions (`_scores`);
    4. give every token its reward: KL penalty, and the score at the last token (`pipeline.rl.advantages.token_rewards`);
    5. estimate advantages and returns (`pipeline.rl.advantages.gae`);
    6. go through the rollout `num_iterations` times, in minibatches of a new order each time (`_prepare_inputs`);
    7. run a forward and a backward pass of the clipped losses for each minibatch (`training_step`, `_compute_loss`).

    `_roll_out` does steps 1 to 5. Trainer's loop calls `_prepare_inputs` and `training_step`, and steps the optimizer.
    The policy and value adapters train; everything else is frozen. `docs/ppo-details.md` lists every detail and its source.

    Args:
        backbone: its policy adapter is first cloned as the reference, and then trained.
        reward_funcs: functions of TRL's reward protocol; `reward_models.learned.LearnedReward` is one.
        train_dataset: rows with a `prompt`; other columns reach the reward functions.
        texts: token rows that PTX draws from, with `ptx_coef`.
    """

    scores_every_row = True
    beta: float  # KL coefficient of the next rollout

    _tag_names = ["trl", "ppo", "spine"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": "@article{ziegler2019finetuning, eprint = {arXiv:1909.08593}, year = 2019,\n"
        "    title = {{Fine-Tuning Language Models from Human Preferences}},\n    author = {Daniel M. Ziegler and Nisan "
        "Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and Dario Amodei and Paul Christiano and Geoffrey "
        "Irving}\n}",
    }

    def __init__(
        self,
        backbone: Backbone,
        reward_funcs: list,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        texts: list[list[int]] | None = None,
        **kwargs,
    ):
        if bool(args.ptx_coef) != bool(texts):
            raise ValueError(f"ptx_coef={args.ptx_coef} and ptx_dataset_name belong together. Set both or neither.")
        if "value" not in backbone.heads:
            weight = args.reward_weights[0] if args.reward_weights else 1.0  # of the reward that the value starts from
            backbone.add_value(init=args.value_init, critic=args.critic, reward_weight=weight)
        super().__init__(
            model=backbone,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._check_deepspeed()
        if args.use_vllm:
            self._connect_vllm()
        self._prepare_sharding()
        if backbone.policy_is_bare:  # the bare backbone is the reference, and TRL's clone is not needed
            backbone.delete_adapter(ADAPTERS["reference"])
        backbone.train_only("policy", "value")  # adding adapters changes requires_grad
        self._share_trunk()
        learned = [list(reward.adapters) for reward in reward_funcs if isinstance(reward, LearnedReward)]
        self._roles_on_trunk = [r for roles in learned if all(map(backbone.starts_at_trunk, roles)) for r in roles]
        self.texts = texts or []
        self.health = Health()
        self._kl_exceeded = False  # whether approxkl of this update has exceeded max_approx_kl
        self._skipping = False  # whether the rest of this update is skipped
        self._approx_kl = 0.0  # mean so far in the current optimizer step

    def _prepare_sharding(self) -> None:
        """Have FSDP and DeepSpeed leave precision and gathering to this trainer."""
        if self._dist.is_fsdp:
            # accelerate's policy for bf16 would gather the heads in bfloat16, and round logprobs and values to it when they
            # leave the model. The passes run under autocast, as without FSDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        self.args.ds3_gather_for_generation = False  # `gathered_weights` gathers once for the whole rollout

    def _share_trunk(self) -> None:
        """Compute the layers below the policy's adapter once a rollout, unless dropout changes them."""
        if not self.args.disable_dropout:
            if depth := self.model.layers_below_policy():
                logger.warning(
                    f"The lowest {depth} layers run in every pass: disable_dropout=False changes their states."
                )
            return
        without_dropout(self.model.get_base_model(), self.model.name_or_path)
        self.model.share_trunk()
        if self.model.value_has_trunk:
            logger.warning(
                f"The value adapter is frozen in the lowest {self.model.trunk_depth} layers, which the policy's adapter does "
                f"not change: these layers run once a rollout."
            )

    def gathered_weights(self) -> AbstractContextManager[None]:
        """Hold all weights in every process, for passes that do not go through the wrapped module's forward."""
        return gathered_weights(self.model_wrapped, self.accelerator)

    # ------------------------------------------------------------------------------------------ steps 1 to 5
    def _generate_and_score_completions(self, inputs: list[dict]) -> Rollout:
        """Override `_generate_and_score_completions`: run steps 1 to 5 of an update."""
        with self.gathered_weights():
            return self._roll_out(inputs)

    def _roll_out(self, inputs: list[dict]) -> Rollout:
        prompts = [row["prompt"] for row in inputs]
        # 1. Sample a completion for each prompt.
        prompt_rows, completion_rows, completions, sampled_rows = self._generate(prompts)
        prompt_ids, prompt_mask, completion_ids, mask = self._padded(prompt_rows, completion_rows)
        sampled = pad([torch.tensor(row) for row in sampled_rows], padding_value=0.0)
        sampled = F.pad(sampled, (0, mask.shape[1] - sampled.shape[1])).to(mask.device)
        # 2. Measure the completions under policy, reference and value.
        with self.accelerator.autocast():
            found = measure(
                self.model,
                prompt_ids,
                prompt_mask,
                completion_ids,
                mask,
                temperature=self.temperature,
                batch_size=self.args.per_device_train_batch_size,
                reward_roles=self._roles_on_trunk,
            )
        weights = self._correct_sampler(found.logprobs, sampled, mask)
        # 3. Score the completions.
        rows = with_known_scores(inputs, found.scores)
        scores = self._scores(rows, prompts, completions, completion_rows)
        # 4. Give every token its reward.
        rewards = token_rewards(
            scores, found.logprobs, found.ref_logprobs, mask, kl_coef=self.beta, kl_estimator=self.args.kl_estimator
        )
        if self.args.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        # 5. Estimate advantages and returns.
        lambdas = {"lam": self.args.lam, "value_lam": self.args.value_lam}
        advantages, returns = gae(rewards, found.values, mask, gamma=self.args.gamma, **lambdas)
        if self.args.normalize_advantages:
            advantages = self._whiten(advantages, mask)
        kl = kl_per_token(found.logprobs, found.ref_logprobs, mask).sum(dim=1)
        self._record_value(found.values, returns, mask)
        self._record_rollout(prompts, completions, mask, scores, kl, rewards, advantages)
        tokens = (prompt_ids, prompt_mask, completion_ids, mask, found.logprobs, found.values)
        return Rollout(*tokens, advantages, returns, weights, found.trunk, found.value_trunk)

    def _padded(self, prompts: list[list[int]], completions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return token rows in the layout of `Rollout`: prompts and their mask, completions and their mask."""
        prompt_ids, prompt_mask = self._pad(prompts, side="left")
        completion_ids, mask = self._pad(completions, side="right")
        short = -(prompt_ids.shape[1] + mask.shape[1]) % WIDTH
        prompt_ids = F.pad(prompt_ids, (short, 0), value=self._tokenizer.pad_token_id)
        return prompt_ids, F.pad(prompt_mask, (short, 0)), completion_ids, mask

    def _pad(self, rows: list[list[int]], *, side: str) -> tuple[Tensor, Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        options = {"padding_side": side, "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, **options)
        mask = pad([torch.ones_like(tensor) for tensor in tensors], padding_value=0, **options).bool()
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _scores(self, inputs: list[dict], prompts: list, completions: list, completion_rows: list) -> Tensor:
        """Return this process's scores (step 3), (B,): the weighted sum of the rewards, then penalised, then clipped."""
        # gathered, (all B, functions)
        columns = self._calculate_rewards(inputs, prompts, completions, completion_rows)
        self._record_rewards(columns, len(prompts))
        start = self.accelerator.process_index * len(prompts)
        scores = self.composite.weigh(columns)[start : start + len(prompts)]
        ended = torch.tensor([row[-1] in self.eos_token_ids for row in completion_rows], device=scores.device)
        options = {"missing_eos_penalty": self.args.missing_eos_penalty, "clip_range": self.reward_clip_range}
        return final_scores(scores, ended, **options)

    def _whiten(self, values: Tensor, mask: Tensor, **options) -> Tensor:
        return whiten(values, mask, self.accelerator.reduce(masked_sums(values, mask), reduction="sum"), **options)

    def _adapt_beta(self, kl: Tensor) -> None:
        """Adapt the KL coefficient of the next rollout to the KL of this rollout's completions, (all B,)."""
        # In the warm-up the policy does not train, so its KL tells nothing about beta.
        if self.args.kl_target and not self.warming_up and kl.isfinite().all():
            self.beta = adapted_kl_coef(
                self.beta,
                kl.mean().item(),
                target=self.args.kl_target,
                horizon=self.args.kl_horizon,
                batch_size=len(kl),
            )

    # ------------------------------------------------------------------------------------------ steps 6 and 7
    @property
    def steps_per_update(self) -> int:
        """Count the forward and backward passes of one update: all epochs, all minibatches, all their pieces."""
        return self.args.steps_per_generation * self.num_iterations

    def _prepare_inputs(self, generation_batch: list[dict]) -> Rollout:
        """Override `_prepare_inputs` (step 6): return the next minibatch; the first call of an update rolls out."""
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps = self.args.steps_per_generation
        position = self._step % self.steps_per_update
        if position == 0:
            self._rollout = self._generate_and_score_completions(generation_batch)
        if position % steps == 0:
            self._order = torch.randperm(len(self._rollout))
            self._buffered_inputs = self._minibatches()
        return self._buffered_inputs[position % steps]

    def _minibatches(self) -> list[Rollout]:
        """Cut the rollout in this epoch's order.

        Each piece carries its share of the tokens of its optimizer step, over all processes. So neither gradient
        accumulation nor the number of processes changes the gradient.
        """
        accumulation = self.args.gradient_accumulation_steps
        pieces = minibatches(
            self._rollout, self._order, pieces=self.args.steps_per_generation, accumulation=accumulation
        )
        tokens = torch.stack([piece.completion_mask.sum() for piece in pieces]).float()
        of_step = self.accelerator.reduce(tokens.view(-1, accumulation).sum(dim=1), reduction="sum")
        # Trainer divides by the pieces of a step, and the backend by the processes: multiply by both.
        shares = tokens / of_step.repeat_interleave(accumulation) * accumulation * self.accelerator.num_processes
        return [replace(piece, share=share) for piece, share in zip(pieces, shares, strict=True)]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Override `training_step` (step 7): run one forward and backward pass, unless this update has ended early.

        Without gradients the optimizer changes neither the weights nor its own state.
        """
        position = self._step % self.steps_per_update
        if position == 0:
            self._kl_exceeded = self._skipping = False
        if position % self.args.gradient_accumulation_steps == 0:
            self._skipping = self._kl_exceeded  # an optimizer step that has begun is completed
            self._approx_kl = 0.0
        if self._skipping:
            model.train()  # as a pass would do: after an evaluation, the logs depend on it
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        warming_up = self.warming_up
        if self._dist.is_fsdp:
            layers = decoder_layers(self.model.get_base_model())[2]
            again = self.accelerator.state.fsdp_plugin.reshard_after_forward
            keep_shared_shards(self.model_wrapped, layers, again)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._dist.is_fsdp:
            for module in fsdp_modules(self.model_wrapped):
                module.reshard()  # the optimizer updates the shards
        if warming_up:
            for parameter in self.model.role_parameters("policy"):
                parameter.grad = None
        return loss

    def _compute_loss(self, model, rollout: Rollout) -> Tensor:
        """Override `_compute_loss` (step 7): sum a minibatch's clipped losses, the entropy bonus and the texts' loss."""
        mask, args = rollout.completion_mask, self.args
        texts = self._next_texts() if args.ptx_coef and self.model.training else None
        with self.accelerator.autocast():
            logprobs, entropy, values, *text_logprobs = model(
                input_ids=torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
                attention_mask=torch.cat([rollout.prompt_mask, mask], dim=1),
                completion_ids=rollout.completion_ids,
                temperature=self.temperature,
                entropy_requires_grad=args.entropy_coef != 0,
                texts=texts,
                trunk=rollout.trunk,
                value_trunk=rollout.value_trunk,
            )
        policy, policy_clipped = policy_loss(
            logprobs,
            rollout.logprobs,
            rollout.advantages,
            mask,
            **{"clip": args.epsilon, "clip_high": args.epsilon_high, "dual_clip": args.dual_clip},
            weights=rollout.weights,
        )
        value, value_clipped = value_loss(values, rollout.values, rollout.returns, mask, clip=args.value_clip)
        entropy = masked_mean(entropy, mask)
        of_policy = policy - args.entropy_coef * entropy if args.entropy_coef else policy
        of_texts = text_loss(text_logprobs[0], texts[1][:, 1:]) if texts else torch.zeros_like(policy)
        approxkl = approx_kl(logprobs, rollout.logprobs, mask).detach()
        if texts:
            self._record(**{"loss/ptx": of_texts})
        self._record_losses(mask, policy, value, policy_clipped, value_clipped, approxkl, entropy)
        share = 1.0 if rollout.share is None else rollout.share
        if self.model.training and args.max_approx_kl is not None:
            self._approx_kl += self._mean(approxkl * share) / args.gradient_accumulation_steps
            self._kl_exceeded |= self._approx_kl > args.max_approx_kl
        return (of_policy + args.vf_coef * value) * share + args.ptx_coef * of_texts

    def _next_texts(self) -> tuple[Tensor, Tensor]:
        """Return the texts of this pass as right-padded ids and mask: one text for each completion of the minibatch."""
        size = self.args.per_device_train_batch_size
        first = (self._step * self.accelerator.num_processes + self.accelerator.process_index) * size
        return self._pad(drawn_texts(self.texts, first, size, self.args.seed), side="right")
