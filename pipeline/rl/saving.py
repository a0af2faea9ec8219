"""Save PPO's policy and value, and the state of PPO in a checkpoint."""

from dataclasses import asdict, fields
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from data.json_files import check_object
from data.listing import json_digest
from data.schemas import PPO_STATE
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.roles import ADAPTERS
from pipeline.rl.health import Health
from pipeline.rl.rollout import Rollout
from pipeline.runs.optimizer_shards import weights_by_name
from pipeline.runs.outputs import completions_sampled


VALUE_HEAD = "heads.value.weight"  # the name of the parameter
# Names in older checkpoints, and what they are called now. There `health` is called `watch`, and has more fields.
FORMER = {"_far": "_kl_exceeded", "_skip": "_skipping"}


class SavesRoles:
    """Mixin for a `Checkpointed` trainer of a `Backbone`: save and load the policy, the value and PPO's own state."""

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Override `_save`: write the policy adapter, the value adapter and head in `value/`, and the tokenizer."""
        folder = Path(output_dir or self.args.output_dir)
        frozen = {}
        if self._dist.is_zero3:  # Trainer gathers only trained weights, and part of the value may be frozen
            kept = {id(p) for p in self.model.role_parameters("policy", "value") if not p.requires_grad}
            frozen = {name: p for name, p in self.model.named_parameters() if id(p) in kept}
        with self._dist.gather_params(list(frozen.values())):
            if self.args.should_save:
                whole = None if state_dict is None else {**state_dict, **frozen}
                self.model.save_role("policy", folder, whole)
                self.model.save_role("value", folder / "value", whole)
                self.processing_class.save_pretrained(folder)

    @property
    def between_updates(self) -> bool:
        return self._step % self.steps_per_update == 0

    @property
    def end_of_update(self) -> int:
        left = self.steps_per_update - self._step % self.steps_per_update
        return min(self.state.global_step + -(-left // self.args.gradient_accumulation_steps), self.state.max_steps)

    def training_state(self) -> dict:
        """Override `training_state`: add PPO's own state, and within an update the rollout and its order in this epoch."""
        state = super().training_state()
        del state["counters"]["_buffered_inputs"]  # pieces of the rollout
        state["ppo"] = {"beta": self.beta, "_kl_exceeded": self._kl_exceeded, "_skipping": self._skipping}
        state["health"] = {**asdict(self.health), "said": sorted(self.health.said)}
        if not self.between_updates:
            state |= {"rollout": vars(self._rollout), "rollout_order": self._order}
        return state

    def contents(self) -> dict:
        """Override `contents`: add the texts of the language-model loss."""
        return {**super().contents(), "texts": json_digest(self.texts) if self.texts else None}

    def load_training_state(self, state: dict) -> None:
        check_object(state, "the checkpoint's state", PPO_STATE, remedy="Resume from another checkpoint.")
        super().load_training_state(state)
        for name, value in state["ppo"].items():
            setattr(self, FORMER.get(name, name), value)
        self._take_up_beta()
        health = state["health"] if "health" in state else state["watch"]
        self.health = Health(**{field.name: health[field.name] for field in fields(Health) if field.name in health})
        self.health.said = set(self.health.said)
        if "rollout" in state:
            self._rollout = Rollout(**send_to_device(state["rollout"], self.args.device))
            self._order = state["rollout_order"]
            self._buffered_inputs = self._minibatches()

    def _take_up_beta(self) -> None:
        """Take the recipe's beta if it has changed, or is not adapted from here on. An adapted one goes on."""
        changed, adapted, beta = self._changed, self.beta, self.args.beta
        constant = not self.args.kl_target and (changed is None or "kl_target" in changed)
        if constant or "beta" in (changed or {}):
            self.beta = beta
            if beta != adapted and "beta" not in (changed or {}):
                PartialState().print(f"beta: {beta:g} instead of the adapted {adapted:g} from here on.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Override `_load_from_checkpoint`: load the policy and the value of a checkpoint."""
        self.model.load_role("policy", read_adapter(resume_from_checkpoint))
        self.model.load_role("value", read_adapter(f"{resume_from_checkpoint}/value", needs_head=True))
        self._last_loaded_step = -1  # TRL's: vLLM does not have these weights yet, at any step

    def _saved_weights(self, checkpoint: str) -> dict[str, Tensor]:
        """Override `_saved_weights`: the policy and the value are two adapters, and the value has a head."""
        value = read_adapter(f"{checkpoint}/value", needs_head=True)
        assert value.head is not None
        found = {VALUE_HEAD: value.head}
        for role, adapter in (("policy", read_adapter(checkpoint)), ("value", value)):
            names = self._trained.keys() - found.keys()
            found |= weights_by_name(self.model, names, adapter.weights, ADAPTERS[role])
        return found

    def summary(self) -> dict:
        """Return what the metrics file holds: completions sampled, warnings, and the log of every update."""
        return {
            "completions": completions_sampled(self),
            "warnings": sorted(self.health.said),
            "history": self.state.log_history,
        }
