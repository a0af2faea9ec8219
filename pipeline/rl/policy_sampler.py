"""Sample from the policy, here or with vLLM, and keep what the sampler said of each token (step 1 of an update)."""

from functools import partial

from torch import Tensor

from pipeline.rl.importance import disagreement, importance_weights
from pipeline.rl.masking import masked_mean
from pipeline.rl.online import Online


class PolicySampler(Online):
    """Put before TRL's RLOO trainer of a `Backbone`: `_generate` returns the logprobs of the sampled tokens too.

    It relies on the trainer's `_record` methods (`pipeline.rl.recording.Recording`).
    """

    _sampled_logprobs: list[list[float]] | None = None  # of the tokens sampled last, until `_generate` returns them

    def _connect_vllm(self) -> None:
        """Have vLLM sample from the policy role, and stop where all of Spine stops."""
        vllm = self.vllm_generation
        # TRL's own would merge in place whichever role is active, unmerge it to rounding, and send the heads too.
        vllm._iter_named_params = partial(self.model.merged_weights, "policy")
        # A completion ends where `generate` ends it, whatever the model's own generation config says.
        vllm.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **vllm.generation_kwargs}
        vllm.logprobs = 0  # of the sampled tokens alone; RLOO asks for none

    def _generate(self, prompts: list) -> tuple[list[list[int]], list[list[int]], list, list[list[float]]]:
        """Override `_generate`: return the logprobs of the sampled tokens too, as the sampler had them."""
        generated = super()._generate(prompts)
        # Of what `_generate_single_turn` finds, TRL passes on the tokens alone.
        logprobs, self._sampled_logprobs = self._sampled_logprobs, None
        return (*generated, logprobs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Override `_generate_single_turn` (step 1): sample as all of Spine does, or with vLLM, and keep the tokens' logprobs."""
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
            batch = self.sample(prompt_ids, keep_logprobs=True)
        self._sampled_logprobs = [row[real].tolist() for row, real in zip(batch.logprobs, batch.mask, strict=True)]
        return batch.rows()

    def _correct_sampler(self, logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor | None:
        """Log what the sampler and the trained policy disagree about, (B, T) each, and return the weights of the policy
        loss that correct for it where vLLM samples."""
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
