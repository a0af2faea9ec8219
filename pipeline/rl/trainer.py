"""PPO on TRL's online machinery.

TRL's RLOOTrainer samples completions, calls reward functions, logs, saves and runs on any accelerate launch. What
makes PPO of it is here: roles on one backbone, a reward for each token, generalised advantages, two clipped losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedTokenizerBase
from trl import RLOOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad, split_tensor_dict

from data.prompts import tokenize_prompts
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.architecture import check_dropout_is_off, switch_off_dropout
from pipeline.backbone.roles import ADAPTERS, Backbone, backbone_copies
from pipeline.backbone.sampling import sample, sampling_options
from pipeline.backbone.trunk import decoder_layers
from pipeline.rl.advantages import gae, token_rewards
from pipeline.rl.config import PPOConfig
from pipeline.rl.health import Watch
from pipeline.rl.importance import disagreement, importance_weights
from pipeline.rl.kl import adapted_kl_coef, kl_per_token
from pipeline.rl.losses import approx_kl, policy_loss, text_loss, value_loss
from pipeline.rl.masking import masked_mean, masked_sums, whiten
from pipeline.rl.rollout import WIDTH, Rollout, columns, row_lengths, sorted_steps, trimmed
from pipeline.runs.checkpoints import Checkpointed
from pipeline.runs.outputs import completions_sampled
from reward_models.composite import Composite
from reward_models.learned import LearnedReward


logger = get_logger(__name__)


class PPOTrainer(Checkpointed, RLOOTrainer):
    """Proximal policy optimisation (Schulman et al. 2017) of the policy role of a `Backbone`.

    Each update: sample completions, score them, give every token its reward, estimate advantages, then
    `num_iterations` epochs of minibatches, reshuffled each epoch. Policy and value adapters train; all else is frozen.
    `docs/ppo-details.md` lists what it does and why.

    Args:
        backbone: its policy adapter is trained, and cloned before as the reference.
        reward_funcs: functions of TRL's reward protocol; `reward_models.learned.LearnedReward` is one.
        train_dataset: rows with a `prompt`; other columns reach the reward functions.
        texts: token rows that PTX draws from, with `ptx_coef`.
    """

    _tag_names = ["trl", "ppo", "spine"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": "@article{ziegler2019finetuning,\n"
        "    title  = {{Fine-Tuning Language Models from Human Preferences}},\n"
        "    author = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and "
        "Dario Amodei and Paul Christiano and Geoffrey Irving},\n"
        "    year   = 2019,\n    eprint = {arXiv:1909.08593}\n}",
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
            raise ValueError(f"ptx_coef={args.ptx_coef} and ptx_dataset_name belong together; set both or neither.")
        if "value" not in backbone.heads:
            weight = args.reward_weights[0] if args.reward_weights else 1.0  # of the reward that the value starts from
            backbone.add_value(init=args.value_init, critic=args.critic, reward_weight=weight)
        self.composite = Composite(reward_funcs, args.reward_weights)
        super().__init__(
            model=backbone,
            reward_funcs=self.composite.functions,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_deepspeed_enabled:
            for name in ("max_approx_kl", "critic_warmup_updates"):
                if getattr(args, name):
                    raise ValueError(
                        f"{name}={getattr(args, name)} leaves gradients out of optimizer steps, which DeepSpeed makes as "
                        f"one with the backward pass; leave it unset, or launch with accelerate_configs/ddp.yaml or "
                        f"fsdp2.yaml."
                    )
        if args.use_vllm:
            vllm = self.vllm_generation
            # TRL's own would merge in place whichever role is active, unmerge it to rounding, and send the heads too.
            vllm._iter_named_params = partial(backbone.merged_weights, "policy")
            # A completion ends where `generate` ends it, whatever the model's own generation config says.
            vllm.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **vllm.generation_kwargs}
            vllm.logprobs = 0  # of the sampled tokens alone; RLOO asks for none
        self.sharded = self._dist.is_fsdp or self._dist.is_zero3
        if self._dist.is_fsdp:
            # accelerate's policy for bf16 would round logprobs and values to bfloat16 as they leave the model, and gather the
            # heads in it. The passes run under autocast, as without FSDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        args.ds3_gather_for_generation = False  # `whole` gathers, for all that a rollout does
        if backbone.policy_is_bare:
            backbone.delete_adapter(
                ADAPTERS["reference"]
            )  # TRL's clone of nothing: the reference is the bare backbone
        backbone.train_only("policy", "value")  # adding adapters toggles requires_grad
        self._share_trunk()
        self._scored_on_trunk = [
            reward
            for reward in reward_funcs
            if isinstance(reward, LearnedReward) and backbone.starts_at_trunk(reward.role)
        ]
        self.texts = texts
        self.watch = Watch()
        self._sampled_logprobs = None  # of the tokens that were sampled last, until `_generate` returns them
        self._far = self._skip = False  # whether this update has gone too far, and what is left of it is skipped
        self._approx_kl = 0.0  # of the optimizer step under way, as far as it has come

    def _share_trunk(self) -> None:
        """Compute the layers below the policy's adapter once a rollout, where dropout does not change them."""
        if not self.args.disable_dropout:
            if depth := self.model.layers_below_policy():
                logger.warning(
                    f"The lowest {depth} layers run in every pass: disable_dropout=False changes their states."
                )
            return
        switch_off_dropout(self.model)
        check_dropout_is_off(self.model.get_base_model(), self.model.name_or_path)
        self.model.share_trunk()
        if self.model.value_has_trunk:
            logger.warning(
                f"The value adapter is frozen in the lowest {self.model.trunk_depth} layers, which the policy leaves as "
                f"they are: they run once a rollout."
            )

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights in every process and no gradients, for what runs the backbone elsewhere than in the wrapped module's
        forward.

        Sharded (FSDP, ZeRO-3), they are gathered once. So processes whose completions differ in length, or that
        sample different numbers of them, never wait for each other inside.
        """
        shards = self._shards()
        if shards:
            # FSDP takes the first module that runs for its root.
            with torch.no_grad():
                self.model_wrapped(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.accelerator.device))
            for module in shards:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        try:
            with torch.no_grad(), unwrap_model_for_generation(self.model_wrapped, self.accelerator):
                yield
        finally:  # a checkpoint is written after rewards have failed in here
            for module in shards:
                module.reshard()

    def _shards(self) -> list[FSDPModule]:
        if not self._dist.is_fsdp:
            return []
        return [module for module in self.model_wrapped.modules() if isinstance(module, FSDPModule)]

    def _keep_shared_shards(self) -> None:
        """Under FSDP, keep what lies beside the decoder layers whole from a training pass to the end of its backward pass.

        accelerate shards embeddings, last norm and language-model head as one group, since two of them may be tied, and
        FSDP expects each to run once a forward pass. Ours runs them as often as it has roles, and backward found them
        resharded.
        """
        layers = set(decoder_layers(self.model.get_base_model())[2])
        for module in self._shards():
            once = module in layers
            module.set_reshard_after_forward(
                once and self.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False
            )
            module.set_reshard_after_backward(once, recurse=False)

    # ------------------------------------------------------------------------------------------ one update
    @property
    def steps_per_update(self) -> int:
        """Forward and backward passes of one update: all epochs, all minibatches, all pieces of them."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def warming_up(self) -> bool:
        """In the first updates the value alone trains (`critic_warmup_updates`)."""
        return self._step < self.args.critic_warmup_updates * self.steps_per_update

    def _prepare_inputs(self, generation_batch):
        """The next minibatch: of a fresh rollout at the start of an update, reshuffled at the start of each epoch."""
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps = self.args.steps_per_generation
        position = self._step % self.steps_per_update
        if position == 0:
            self._rollout = self._generate_and_score_completions(generation_batch)
        if position % steps == 0:
            self._order = torch.randperm(len(self._rollout["prompt_ids"]))
            self._buffered_inputs = self._minibatches()
        return self._buffered_inputs[position % steps]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One forward and backward pass; none where this update has ended early.

        Without gradients the optimizer leaves weights and its own state as they are.
        """
        position = self._step % self.steps_per_update
        if position == 0:
            self._far = self._skip = False
        if position % self.args.gradient_accumulation_steps == 0:
            self._skip = self._far  # a step that has begun is taken
            self._approx_kl = 0.0
        if self._skip:
            model.train()  # as a pass would have: after an evaluation, logs go by it
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        warming_up = self.warming_up
        self._keep_shared_shards()
        loss = super().training_step(model, inputs, num_items_in_batch)
        for module in self._shards():
            module.reshard()  # the optimizer steps the shards
        if warming_up:
            for parameter in self.model.role_parameters("policy"):
                parameter.grad = None
        return loss

    def _minibatches(self) -> list[dict[str, Tensor]]:
        """The rollout, in this epoch's order and cut, the pieces of a step by length. Each carries its share of the tokens of
        its optimizer step over all processes, so that neither gradient accumulation nor the number of processes changes the
        gradient."""
        accumulation, order = self.args.gradient_accumulation_steps, self._order
        if accumulation > 1:
            lengths = row_lengths(self._rollout["prompt_mask"], self._rollout["completion_mask"]).cpu()
            order = sorted_steps(order, lengths, accumulation * self.args.per_device_train_batch_size)
        shuffled = {name: x if x is None else x[order] for name, x in self._rollout.items()}
        pieces = split_tensor_dict(shuffled, self.args.steps_per_generation)
        tokens = torch.stack([piece["completion_mask"].sum() for piece in pieces]).float()
        of_step = self.accelerator.reduce(tokens.view(-1, accumulation).sum(dim=1), reduction="sum")
        # Trainer averages over the pieces of a step, and the backend over processes: what they divide by comes back.
        shares = tokens / of_step.repeat_interleave(accumulation) * accumulation * self.accelerator.num_processes
        return [{**trimmed(piece), "share": share} for piece, share in zip(pieces, shares, strict=True)]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """Sample a completion to each prompt, score it, and work out advantages and returns -> fields of `Rollout`."""
        with self.whole():
            return self._roll_out(inputs)

    def _roll_out(self, inputs: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in inputs]
        prompt_rows, completion_rows, completions, sampled_rows = self._generate(prompts)
        prompt_ids, prompt_mask = self._pad(prompt_rows, side="left")
        completion_ids, mask = self._pad(completion_rows, side="right")
        short = -(prompt_ids.shape[1] + mask.shape[1]) % WIDTH
        prompt_ids = F.pad(prompt_ids, (short, 0), value=self._tokenizer.pad_token_id)
        prompt_mask = F.pad(prompt_mask, (short, 0))
        sampled = pad([torch.tensor(row) for row in sampled_rows], padding_value=0.0)
        sampled = F.pad(sampled, (0, mask.shape[1] - sampled.shape[1])).to(mask.device)
        logprobs, ref_logprobs, values, trunk, value_trunk = self._measure(
            prompt_ids, prompt_mask, completion_ids, mask
        )
        weights = self._correct_sampler(logprobs, sampled, mask)
        scores = self._scores(inputs, prompts, completions, completion_rows)
        rewards = token_rewards(
            scores, logprobs, ref_logprobs, mask, kl_coef=self.beta, kl_estimator=self.args.kl_estimator
        )
        if self.args.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=self.args.gamma, lam=self.args.lam)
        if self.args.normalize_advantages:
            advantages = self._whiten(advantages, mask)

        kl = kl_per_token(logprobs, ref_logprobs, mask).sum(dim=1)
        self._record(score=scores, kl=kl, reward=rewards.sum(dim=1))
        self._record(tokens=mask.sum(), value=masked_mean(values, mask))
        self._metrics[self._mode]["beta"].append(self.beta)
        if self.model.training:
            self._end_of_rollout(*self.accelerator.gather(torch.stack([kl, scores.to(kl), mask.sum(dim=1)], dim=1)).T)
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        self._logs["advantages"].extend(gather_object(advantages.sum(dim=1).tolist()))
        measured = (prompt_ids, prompt_mask, completion_ids, mask, logprobs, values)
        return Rollout(*measured, advantages, returns, weights, trunk, value_trunk)._asdict()

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        """Override `_tokenize_prompts`: a prompt that ends in the assistant's turn is continued, not closed."""
        return tokenize_prompts(prompts, self.processing_class), None, {}

    def _generate(self, prompts: list) -> tuple[list[list[int]], list[list[int]], list, list[list[float]]]:
        """Override `_generate`: return the logprobs of the sampled tokens too, as the sampler had them."""
        generated = super()._generate(prompts)
        # Of what `_generate_single_turn` finds, TRL passes on the tokens alone.
        logprobs, self._sampled_logprobs = self._sampled_logprobs, None
        return (*generated, logprobs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Override `_generate_single_turn`: sample as all of Spine does, or with vLLM, and keep the tokens' logprobs."""
        if self.use_vllm:
            if self.state.global_step != self._last_loaded_step:
                self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            of_prompt = self.num_generations if self._mode == "train" else self.num_generations_eval
            _, rows, logprobs, _ = self.vllm_generation.generate(
                prompts=prompt_ids, images=None, num_generations=of_prompt
            )
            unknown = float("nan")  # a token that vLLM could not score
            self._sampled_logprobs = [[unknown if x is None else x for (x,) in row] for row in logprobs]
            return [list(row) for row in rows]
        with self.accelerator.autocast():  # as what is learned from is computed
            (batch,) = sample(
                self.model,
                "policy",
                prompt_ids,
                self._tokenizer,
                max_completion_length=self.max_completion_length,
                temperature=self.temperature,
                batch_size=len(prompt_ids),
                options=sampling_options(self.args),
                keep_logprobs=True,
            )
        self._sampled_logprobs = [row[real].tolist() for row, real in zip(batch.logprobs, batch.mask, strict=True)]
        return batch.rows()

    def _correct_sampler(self, logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor | None:
        """Log what the sampler and the trained policy disagree about, (B, T) each, and return the weights of the policy
        loss that correct for it where vLLM samples."""
        found = disagreement(logprobs, sampled, mask)
        names = {
            "difference": "sampling/sampling_logp_difference/mean",
            "ratio": "sampling/importance_sampling_ratio/mean",
        }
        self._record(tokens=mask.sum(), **{name: found[key] for key, name in names.items()})
        largest = self.accelerator.gather(found["largest"].view(1)).max().item()
        self._metrics[self._mode]["sampling/sampling_logp_difference/max"].append(largest)
        if not (self.use_vllm and self.args.vllm_importance_sampling_correction):
            return None
        weights = importance_weights(
            logprobs,
            sampled,
            mask,
            mode=self.args.vllm_importance_sampling_mode,
            clip_min=self.args.vllm_importance_sampling_clip_min,
            clip_max=self.args.vllm_importance_sampling_clip_max,
        )
        self._record(tokens=mask.sum(), **{"sampling/importance_weight/mean": masked_mean(weights, mask)})
        return weights

    def _measure(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Logprobs of policy and reference, values, and the states from which training begins, as `Rollout` has them.

        Rows of about one length share a pass. Reward models that begin at the trunk score in it too, and keep it.
        """
        order = row_lengths(prompt_mask, mask).argsort(stable=True)
        chunks = []
        with self.accelerator.autocast():
            for rows in order.split(self.args.per_device_train_batch_size):
                begin, end = columns(prompt_mask[rows], mask[rows])
                chosen, after = completion_ids[rows, :end], mask.shape[1] - end
                ids = torch.cat([prompt_ids[rows, begin:], chosen], dim=1)
                attend = torch.cat([prompt_mask[rows, begin:], mask[rows, :end]], dim=1)
                trunk = self.model.trunk(ids, attend) if self.model.trunk_depth else None
                value_trunk = self.model.trunk(ids, attend, "value") if self.model.value_has_trunk else None
                policy, reference = (
                    self.model.logprobs(role, ids, attend, chosen, self.temperature, trunk)
                    for role in ("policy", "reference")
                )
                values = self.model.values(ids, attend, end, trunk if value_trunk is None else value_trunk)
                scores = [self.model.scores(ids, attend, reward.role, trunk) for reward in self._scored_on_trunk]
                of_tokens = [F.pad(x, (0, after)) for x in (policy, reference, values)]
                states = [x if x is None else F.pad(x, (0, 0, begin, after)) for x in (trunk, value_trunk)]
                chunks.append((*of_tokens, *states, *scores))
        back = order.argsort()
        logprobs, ref_logprobs, values, trunk, value_trunk, *known = (
            None if parts[0] is None else torch.cat(parts)[back] for parts in zip(*chunks, strict=True)
        )
        for reward, scores in zip(self._scored_on_trunk, known, strict=True):
            reward.known = scores.tolist()
        return logprobs, ref_logprobs, values, trunk, value_trunk

    def _whiten(self, values: Tensor, mask: Tensor, **options) -> Tensor:
        return whiten(values, mask, self.accelerator.reduce(masked_sums(values, mask), reduction="sum"), **options)

    def _end_of_rollout(self, kl: Tensor, scores: Tensor, lengths: Tensor) -> None:
        """Look at a rollout of all processes, each (all B,), and adapt the KL coefficient for the next one."""
        self._warn(kl=kl.tolist(), scores=scores.tolist(), length=lengths.mean().item())
        # In the warm-up the policy cannot move, and its KL says nothing.
        if self.args.kl_target and not self.warming_up and kl.isfinite().all():
            self.beta = adapted_kl_coef(
                self.beta,
                kl.mean().item(),
                target=self.args.kl_target,
                horizon=self.args.kl_horizon,
                batch_size=len(kl),
            )

    def _warn(self, **measured) -> None:
        for message in self.watch.observe(**measured):
            logger.warning(message, main_process_only=True)

    def _pad(self, rows: list[list[int]], *, side: str) -> tuple[Tensor, Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        options = {"padding_side": side, "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(tensors, padding_value=self._tokenizer.pad_token_id, **options)
        mask = pad([torch.ones_like(tensor) for tensor in tensors], padding_value=0, **options).bool()
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _scores(self, inputs: list[dict], prompts: list, completions: list, completion_rows: list) -> Tensor:
        """Weighted sum of the reward functions, clipped and penalised as configured, (B,) of this process."""
        # gathered, (all B, functions)
        columns = self._calculate_rewards(inputs, prompts, completions, completion_rows)
        scores = self.composite.total(columns, prompts, completions)
        for name, column in zip(self.reward_func_names, columns.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
            self._metrics[self._mode][f"rewards/{name}/mean"].append(column.nanmean().item())
        self._flush_reward_logs(len(prompts))
        start = self.accelerator.process_index * len(prompts)
        scores = scores[start : start + len(prompts)]
        if self.args.missing_eos_penalty is not None:
            ended = torch.tensor([row[-1] in self.eos_token_ids for row in completion_rows], device=scores.device)
            scores = scores - self.args.missing_eos_penalty * ~ended
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        return scores

    def _flush_reward_logs(self, count: int) -> None:
        """Log what reward functions gave to TRL's `log_extra` and `log_metric`. Names are sorted, so that all processes
        gather them in one order."""
        for name in sorted(set(gather_object(list(self._pending_extra_logs)))):
            self._logs["extra"][name].extend(gather_object(self._pending_extra_logs.get(name, [None] * count)))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self._metrics[self._mode][name].append(sum(values) / len(values))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()

    def _compute_loss(self, model, inputs: dict[str, Tensor]) -> Tensor:
        rollout = Rollout(**{name: inputs[name] for name in Rollout._fields})
        mask, args = rollout.completion_mask, self.args
        texts = self._next_texts() if args.ptx_coef and self.model.training else None
        with self.accelerator.autocast():
            logprobs, entropy, values, *of_texts = model(
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
            logprobs, rollout.logprobs, rollout.advantages, mask, clip=args.epsilon, weights=rollout.weights
        )
        value, value_clipped = value_loss(values, rollout.values, rollout.returns, mask, clip=args.value_clip)
        entropy = masked_mean(entropy, mask)
        of_policy = policy - args.entropy_coef * entropy if args.entropy_coef else policy
        of_texts = text_loss(*of_texts, texts[1][:, 1:]) if texts else torch.zeros_like(policy)
        approxkl = approx_kl(logprobs, rollout.logprobs, mask).detach()
        if texts:
            self._record(**{"loss/ptx": of_texts})
        self._record(
            tokens=mask.sum(),
            **{"loss/policy": policy, "loss/value": value},
            **{"clipfrac/policy": policy_clipped, "clipfrac/value": value_clipped},
            approxkl=approxkl,
            entropy=entropy,
        )
        share = inputs.get("share", 1.0)
        loss = (of_policy + args.vf_coef * value) * share + args.ptx_coef * of_texts
        if self.model.training:
            if args.max_approx_kl is not None:
                self._approx_kl += self._mean(approxkl * share) / args.gradient_accumulation_steps
                self._far |= self._approx_kl > args.max_approx_kl
            self._warn(entropy=self._last("entropy"))
        return loss

    def _next_texts(self) -> tuple[Tensor, Tensor]:
        """Texts for this pass, right-padded ids and mask: as many as the minibatch has completions, in a shuffled
        order that depends on the seed and the pass alone."""
        world, size = self.accelerator.num_processes, self.args.per_device_train_batch_size
        first = (self._step * world + self.accelerator.process_index) * size
        epochs = {}
        rows = []
        for i in range(first, first + size):
            epoch, index = divmod(i, len(self.texts))
            if epoch not in epochs:
                generator = torch.Generator().manual_seed(self.args.seed + epoch)
                epochs[epoch] = torch.randperm(len(self.texts), generator=generator)
            rows.append(self.texts[epochs[epoch][index]])
        return self._pad(rows, side="right")

    # ------------------------------------------------------------------------------------------ logs and artifacts
    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _last(self, name: str) -> float:
        """What `_record` wrote last, over all processes."""
        return self._metrics[self._mode][name][-1]

    def _record(self, tokens: Tensor | None = None, **metrics: Tensor) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(self._mean(value, tokens))

    def _mean(self, value: Tensor, tokens: Tensor | None = None) -> float:
        """Over all processes; of means over tokens, each weighs as many as its process has."""
        weight = torch.ones_like(value, dtype=torch.float32).mean() if tokens is None else tokens.float()
        means, weights = self.accelerator.gather(torch.stack([value.detach().float().mean(), weight]).view(1, 2)).T
        return (means * (weights / weights.sum())).sum().item()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The policy as a peft adapter, the value function as one with its head in `value/`, and the tokenizer."""
        folder = Path(output_dir or self.args.output_dir)
        frozen = {}
        if self._dist.is_zero3:  # where Trainer gathers what trains alone; a value may be frozen below the policy
            kept = {id(p) for p in self.model.role_parameters("policy", "value") if not p.requires_grad}
            frozen = {name: p for name, p in self.model.named_parameters() if id(p) in kept}
        with self._dist.gather_params(list(frozen.values())):
            if self.args.should_save:
                whole = None if state_dict is None else {**state_dict, **frozen}
                self.model.save_role("policy", folder, whole)
                self.model.save_role("value", folder / "value", whole)
                self.processing_class.save_pretrained(folder)

    # ------------------------------------------------------------------------------------------ checkpoints
    @property
    def between_updates(self) -> bool:
        return self._step % self.steps_per_update == 0

    def training_state(self) -> dict:
        """With what PPO keeps from step to step; within an update, the rollout and its order in this epoch too."""
        state = super().training_state()
        del state["counters"]["_buffered_inputs"]  # the rollout, cut
        state["ppo"] = {"beta": self.beta, "_far": self._far, "_skip": self._skip}
        state["watch"] = {**asdict(self.watch), "said": sorted(self.watch.said)}
        if not self.between_updates:
            state |= {"rollout": self._rollout, "rollout_order": self._order}
        return state

    def load_training_state(self, state: dict) -> None:
        super().load_training_state(state)
        for name, value in state["ppo"].items():
            setattr(self, name, value)
        names = {field.name for field in fields(Watch)}  # checkpoints of before have more of them
        self.watch = Watch(**{name: value for name, value in state["watch"].items() if name in names})
        self.watch.said = set(self.watch.said) - {"nan"}
        if "rollout" in state:
            self._rollout, self._order = send_to_device(state["rollout"], self.args.device), state["rollout_order"]
            self._buffered_inputs = self._minibatches()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Take the policy and value of a checkpoint."""
        self.model.load_role("policy", read_adapter(resume_from_checkpoint))
        self.model.load_role("value", read_adapter(f"{resume_from_checkpoint}/value", needs_head=True))
        self._last_loaded_step = -1  # TRL's: at whatever step, vLLM has not been sent these

    def summary(self) -> dict:
        """What the metrics file states of the run: backbones held by this process (None where each holds a part of
        one), and the log of every update."""
        return {
            "backbone_copies": None if self.sharded else backbone_copies(self.model),
            "completions": completions_sampled(self),
            "warnings": sorted(self.watch.said),
            "history": self.state.log_history,
        }
