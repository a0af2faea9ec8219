"""Sample from the policy, here or with vLLM, and keep the sampler's logprob of each token (step 1 of an update)."""

from functools import partial

from torch import Tensor

from pipeline.rl.importance import disagreement, importance_weights
from pipeline.rl.masking import masked_mean
from pipeline.rl.online import Online


class PolicySampler(Online):
    """Mixin for TRL's RLOO trainer of a `Backbone`: `_generate` also returns the logprobs of the sampled tokens.

    It uses the trainer's `_record` methods (`pipeline.rl.recording.Recording`).
    """

    _sampled_logprobs: list[list[float]] | None = None  # of the last sampled tokens, until `_generate` returns them

    def _connect_vllm(self) -> None:
        """Make vLLM sample from the policy role, and end completions where Spine ends them."""
        vllm = self.vllm_generation
        # TRL's own function merges the active role in place, unmerges it with rounding errors, and also sends the heads.
        vllm._iter_named_params = partial(self.model.merged_weights, "policy")
        # A completion ends where `generate` ends it, not where the model's own generation config ends it.
        vllm.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **vllm.generation_kwargs}
        vllm.logprobs = 0  # only those of the sampled tokens; RLOO asks for none

    def _generate(self, prompts: list) -> tuple[list[list[int]], list[list[int]], list, list[list[float]]]:
        """Override `_generate`: also return the sampler's logprobs of the sampled tokens."""
        generated = super()._generate(prompts)
        # TRL passes on only the tokens that `_generate_single_turn` returns.
        logprobs, self._sampled_logprobs = self._sampled_logprobs, None
        return (*generated, logprobs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Override `_generate_single_turn` (step 1): sample with `sample` or vLLM, and keep the tokens' logprobs."""
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
        with self.accelerator.autocast():  # in the precision of the training pass
            batch = self.sample(prompt_ids, keep_logprobs=True)
        assert batch.logprobs is not None
        self._sampled_logprobs = [row[real].tolist() for row, real in zip(batch.logprobs, batch.mask, strict=True)]
        return batch.rows()

    def _correct_sampler(self, logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor | None:
        """Log how far the sampler and the trained policy disagree, and return the weights that correct for it, (B, T).

        They are weights of the policy loss. They are None unless vLLM samples and the correction is on.
        """
        self._record_disagreement(disagreement(logprobs, sampled, mask), mask)
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
