"""Run four or more roles on one frozen backbone.

Policy, reference, rewards and value are LoRA adapters on a single pretrained causal language model. Linear heads, one for
each reward and one for the value, read its last hidden state. To run a role, its adapter is named on every LoRA layer. This
does not touch `requires_grad`, so several roles can run inside one differentiable forward pass.

The module is longer than others, because a `PeftModel` is one class.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from pipeline.backbone.adapter_tensors import HEAD, WEIGHTS, check_tensors, without_the_base
from pipeline.backbone.adapters import Adapter, read_adapter
from pipeline.backbone.architecture import Mask, attention, head_is_all, own_logits, positions, probe, takes_positions
from pipeline.backbone.identity import fingerprint, write_identity
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.logprobs import token_logprobs
from pipeline.backbone.lora import LoraArguments, check_lora, lora_config
from pipeline.backbone.merging import merged_weights
from pipeline.backbone.trunk import decoder_layers, first_adapted_layer, lower, middle, trunk_fault, upper


logger = get_logger(__name__)

# The name of each role's adapter. peft calls the first adapter "default"; TRL's online trainers train it and clone it as
# "ref". Further reward roles (reward_2, ...) have the names of their adapters.
ADAPTERS = {"policy": "default", "reference": "ref", "reward": "reward", "value": "value"}
# Attributes that a role changes on each of peft's LoRA layers, and restores.
SWITCHES = ("_active_adapter", "_disable_adapters", "cast_input_dtype_enabled")


class Backbone(PeftModelForCausalLM):
    """A frozen causal language model that plays several roles, each a LoRA adapter on it.

    It is a `PeftModel` like any other: `generate`, `save_pretrained` and TRL's trainers use its policy adapter.
    `forward(..., completion_ids=...)` is the training pass of PPO.
    """

    # False even for a 4-bit base: otherwise TRL's trainers would round the trainable weights to bfloat16, and the policy of
    # PPO would no longer start equal to its reference.
    is_loaded_in_4bit = False

    def __init__(self, base: PreTrainedModel, policy: Adapter | LoraConfig):
        fresh = isinstance(policy, LoraConfig)
        plain = head_is_all(base)  # before peft adds its own layers
        super().__init__(base, policy if fresh else _language_config(policy.config), adapter_name=ADAPTERS["policy"])
        self.heads = nn.ModuleDict()
        self.trunk_depth, self.value_has_trunk = 0, False
        self._starts_at: dict[int, bool] = {}  # whether a pass can start from the inputs of a layer
        self._logits = None if plain else partial(own_logits, base)
        self._role: str | None = "policy"  # the role that peft and TRL's trainers expect
        self._autocast = False  # whether autocast was on when it became active
        # A fresh LoRA adapter changes nothing, because B is zero. Until it is trained, the policy is the bare backbone.
        self.policy_is_bare = isinstance(policy, LoraConfig) and policy.init_lora_weights is True
        # Computed now, because FSDP and ZeRO-3 shard the weights later. A plan (on the meta device) has no weights.
        self.fingerprint = "" if base.device.type == "meta" else fingerprint(base)
        base.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self._find_tuned()
        if not fresh:
            self._set_weights("policy", policy.weights, policy.source)

    def add_adapter(self, adapter_name: str, *args, **kwargs) -> None:
        """Override `add_adapter`: the reference starts as a copy of the policy in the embeddings too.

        TRL's trainers add it, and copy each parameter with `.default.` in its name. Those of an adapter on embeddings end in
        `.default`, so TRL would leave them at zero.
        """
        super().add_adapter(adapter_name, *args, **kwargs)
        self._find_tuned()
        if adapter_name == ADAPTERS["reference"]:
            for layer in self._tuned:
                for part in (layer.lora_embedding_A, layer.lora_embedding_B):
                    ours = part[ADAPTERS["policy"]] if ADAPTERS["policy"] in part else None
                    if ours is not None and adapter_name in part and part[adapter_name].shape == ours.shape:
                        part[adapter_name].data.copy_(ours.data)

    def _find_tuned(self) -> None:
        self._tuned = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]

    def add_role(self, role: str, adapter: Adapter) -> None:
        """Add a role from an adapter that `read_adapter` read, with its head if it has one."""
        self.add_adapter(ADAPTERS.get(role, role), _language_config(adapter.config))
        self._set_weights(role, adapter.weights, adapter.source)
        if adapter.head is not None:
            self._add_head(role, adapter.head)

    def load_role(self, role: str, adapter: Adapter) -> None:
        """Replace the weights of an existing role, and of its head, by those of an adapter."""
        self._set_weights(role, adapter.weights, adapter.source)
        if adapter.head is not None:
            self.role_head(role).weight.data.copy_(adapter.head)

    def add_value(self, *, init: str = "auto", critic: str = "adapter", reward_weight: float = 1.0) -> None:
        """Add the value role.

        Args:
            init: start of an adapter. `reward`: the reward adapter and its head times `reward_weight`, so that the first
                values are scores. `policy`: the policy adapter and a head of zeros. `auto`: `reward` if there is one.
            critic: `adapter`: the value has an adapter of its own. `head`: the value is a head of zeros on the hidden
                states of the policy, which it then trains too. This saves one forward pass and one adapter.
            reward_weight: factor of the reward head.

        Raises:
            ValueError: `init` is `reward`, but the backbone has no reward role.
        """
        if init == "reward" and "reward" not in self.heads:
            raise ValueError(
                "value_init='reward' needs a reward adapter. Name one in reward_adapter, or set value_init to policy."
            )
        origin = "reward" if init != "policy" and critic == "adapter" and "reward" in self.heads else "policy"
        if critic == "adapter":
            self.add_adapter(ADAPTERS["value"], deepcopy(self.peft_config[ADAPTERS[origin]]))
            weights = get_peft_model_state_dict(self, adapter_name=ADAPTERS[origin], save_embedding_layers=False)
            self._set_weights("value", weights, origin)
        hidden_size = self.hidden_size
        start = self.role_head("reward").weight * reward_weight if origin == "reward" else torch.zeros(1, hidden_size)
        self._add_head("value", start)

    def _add_head(self, role: str, weight: Tensor) -> None:
        hidden_size = self.hidden_size
        if weight.shape[1] != hidden_size:
            raise ValueError(
                f"the score head of {role!r} reads {weight.shape[1]} hidden units, but the backbone has {hidden_size}. "
                f"The adapter was trained on another base. Name an adapter of this base."
            )
        head = nn.Linear(weight.shape[1], 1, bias=False)
        head.weight.data.copy_(weight)
        self.heads[role] = head.to(self.get_base_model().device)

    def role_head(self, role: str) -> nn.Linear:
        """Return the head of a role that has one, (1, D)."""
        return cast(nn.Linear, self.heads[role])

    @property
    def hidden_size(self) -> int:
        """Return the width of the last hidden states, which the heads read; the config's `hidden_size` can differ."""
        return self.get_base_model().get_output_embeddings().weight.shape[1]

    def _set_weights(self, role: str, weights: dict[str, Tensor], source: str) -> None:
        self.policy_is_bare = self.policy_is_bare and role != "policy"
        weights = without_the_base(source, weights, self.get_base_model())
        expected = get_peft_model_state_dict(self, adapter_name=self._adapter(role), save_embedding_layers=False)
        shapes, needed = ({key: tuple(of.shape) for key, of in found.items()} for found in (weights, expected))
        check_tensors(source, shapes, needed)
        set_peft_model_state_dict(self, weights, adapter_name=self._adapter(role))

    def _adapter(self, role: str) -> str:
        """Return the name that peft has for a role's adapter.

        LoRA layers ignore an adapter that they lack. So a role of `ADAPTERS` without an adapter is the bare backbone.

        Raises:
            ValueError: the role is not known.
        """
        if role == "value" and "value" in self.heads and ADAPTERS[role] not in self.peft_config:
            role = "policy"  # the value is only a head on the policy
        if role not in ADAPTERS and role not in self.peft_config:
            raise ValueError(f"role {role!r} is not known. The backbone's adapters are {', '.join(self.peft_config)}.")
        return ADAPTERS.get(role, role)

    def role_parameters(self, *roles: str) -> list[nn.Parameter]:
        """Return the parameters of the adapters and heads of these roles."""
        names = {self._adapter(role) for role in roles} | set(roles)
        return [p for name, p in self.named_parameters() if _is_ours(name) and not names.isdisjoint(name.split("."))]

    def train_only(self, *roles: str) -> None:
        """Make the adapters and heads of these roles trainable, and freeze everything else."""
        self.requires_grad_(False)
        for parameter in self.role_parameters(*roles):
            parameter.requires_grad_(True)

    def merged_weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and weights of the plain model with a role's adapter merged into them, one layer at a time.

        Raises the errors of `pipeline.backbone.merging.merged_weights`.
        """
        return merged_weights(self.get_base_model(), self._adapter(role), role)

    @contextmanager
    def role(self, role: str | None, *, autocast: bool | None = None) -> Iterator[None]:
        """Run the code inside as this role, or as the bare backbone with None.

        `set_adapter` of peft would toggle `requires_grad`, and so drop gradients of the role before. Instead, the adapter is
        named on each LoRA layer. The attribute is private to peft, so its minor version is pinned.

        Args:
            autocast: whether to leave it to autocast to cast the inputs of LoRA layers; None: if autocast is on.
        """
        active = [self._adapter(role)] if role else []
        # Autocast already casts the inputs of a plain LoRA layer. It would undo peft's cast to the adapter's precision.
        autocast = torch.is_autocast_enabled(self.device.type) if autocast is None else autocast
        before = [(layer, *(getattr(layer, name) for name in SWITCHES)) for layer in self._tuned]
        for layer in self._tuned:
            layer._active_adapter = active
            layer._disable_adapters = role is None
            layer.cast_input_dtype_enabled = not autocast or bool(layer.lora_variant)
        active_before = self._role, self._autocast
        self._role, self._autocast = role, autocast
        try:
            yield
        finally:
            self._role, self._autocast = active_before
            for layer, *values in before:
                for name, value in zip(SWITCHES, values, strict=True):
                    setattr(layer, name, value)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Override `activation_checkpointing_enable`: recompute each layer with the role of its forward pass.

        Otherwise a layer would be recomputed with the role that is active in the backward pass. Its gradients would be
        wrong, without an error.
        """
        options = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": self._contexts}
        base = self.get_base_model()
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:  # the oldest transformers that we allow has the old name alone
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Enable activation checkpointing under the name that TRL uses."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts for a layer's forward pass and for its recomputation, which casts as the forward pass did."""
        return nullcontext(), self.role(self._role, autocast=self._autocast)

    def layers_below_policy(self) -> int:
        """Return how many of the lowest layers the policy's adapter does not change; the last layer never counts."""
        base = self.get_base_model()
        return min(first_adapted_layer(base, self._adapter("policy")), len(decoder_layers(base)[2]) - 1)

    def share_trunk(self) -> None:
        """Run the `trunk_depth` layers below the policy's adapter once a rollout, instead of in every pass.

        A value adapter may begin lower, for example one that starts from a reward model. It is then frozen in these layers,
        and the value has a trunk of its own. If a pass from the trunk does not give the results of the full pass, nothing
        is shared.
        """
        base = self.get_base_model()
        layers = decoder_layers(base)[2]
        self.trunk_depth = self.layers_below_policy()
        if self.trunk_depth:
            ids, mask = probe(base)
            with self.role(None):
                fault = trunk_fault(base, self.trunk_depth, ids, **attention(base, mask))
            if fault:
                PartialState()  # without it, accelerate's logger cannot tell which process this is
                logger.warning(
                    f"The lowest {self.trunk_depth} layers run in every pass: {type(base).__name__} gives other results when "
                    f"it starts from their states ({fault})."
                )
                self.trunk_depth = 0
                return
        self.value_has_trunk = first_adapted_layer(base, self._adapter("value")) < self.trunk_depth
        if self.value_has_trunk:
            below = (base.get_input_embeddings(), *layers[: self.trunk_depth])
            frozen = {id(parameter) for part in below for parameter in part.parameters()}
            for parameter in self.role_parameters("value"):
                if id(parameter) in frozen:
                    parameter.requires_grad_(False)

    def trunk(
        self, input_ids: Int[Tensor, "B S"], attention_mask: Mask, role: str | None = None
    ) -> Float[Tensor, "B S D"]:
        """Return the inputs of the first layer that the policy adapts.

        They are those of the bare backbone, which any role has whose adapter begins at this layer or above, or those of
        `role`.
        """
        base = self.get_base_model()
        inputs = attention(base, attention_mask)
        with self.role(role):
            return lower(base, self.trunk_depth, input_ids=input_ids, **inputs)

    def starts_at_trunk(self, role: str) -> bool:
        """Tell whether a role's adapter changes no layer of the trunk."""
        return 0 < self.trunk_depth <= first_adapted_layer(self.get_base_model(), self._adapter(role))

    def hidden_states(
        self,
        role: str | None,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        trunk: Float[Tensor, "B S D"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Return the last hidden states of a role.

        Positions count real tokens, so padding may be on either side. `trunk` has the states that `trunk()` returned for
        these tokens and this role. The pass then starts from them.
        """
        base = self.get_base_model()
        inputs = attention(base, attention_mask)
        with self.role(role):
            if trunk is not None:
                return upper(base, self.trunk_depth, trunk, **inputs)
            return base.base_model(input_ids=input_ids, **inputs, use_cache=False).last_hidden_state

    def logprobs(
        self,
        role: str | None,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        completion_ids: Int[Tensor, "B T"],
        temperature: float = 1.0,
        trunk: Float[Tensor, "B S D"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """Return the log-probability of each completion token, in nats.

        `input_ids` ends with `completion_ids`. The vocabulary projection runs on the T positions only. Logits are divided by
        `temperature`, as they are in sampling.
        """
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)[:, -completion_ids.shape[1] - 1 : -1]
        return self._token_logprobs(role, hidden, completion_ids, temperature, entropy=False)[0]

    def logprobs_and_entropy(
        self,
        role: str | None,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        completion_ids: Int[Tensor, "B T"],
        temperature: float = 1.0,
        trunk: Float[Tensor, "B S D"] | None = None,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Return `logprobs` and the entropy at each position, in nats."""
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)[:, -completion_ids.shape[1] - 1 : -1]
        logprobs, entropy = self._token_logprobs(role, hidden, completion_ids, temperature)
        assert entropy is not None  # asked for
        return logprobs, entropy

    def _token_logprobs(
        self,
        role: str | None,
        hidden: Float[Tensor, "B T D"],
        completion_ids: Int[Tensor, "B T"],
        temperature: float,
        **options: bool,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        head = self.get_base_model().get_output_embeddings()
        with self.role(role):  # an adapter may change the head
            return token_logprobs(head, hidden, completion_ids, temperature, logits=self._logits, **options)

    def values(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        length: int,
        trunk: Float[Tensor, "B S D"] | None = None,
        role: str = "value",
    ) -> Float[Tensor, "B {length}"]:
        """Return the value of the state before each of the last `length` tokens."""
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)[:, -length - 1 : -1]
        return self._read(role, hidden)

    def scores(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        role: str = "reward",
        trunk: Float[Tensor, "B S D"] | None = None,
    ) -> Float[Tensor, " B"]:
        """Return the scores of a reward role for sequences padded on either side.

        A score is read at the last token that is not the pad token, as in the sequence classifiers of transformers.
        """
        return self._score(role, self.hidden_states(role, input_ids, attention_mask, trunk), input_ids)

    def prefix_scores(
        self, input_ids: Int[Tensor, "B S"], attention_mask: Mask, length: int, role: str = "reward"
    ) -> Float[Tensor, "B {length}"]:
        """Return what `scores` gives each beginning of a sequence that ends with one of the last `length` tokens.

        One pass is enough, because the states of a causal model do not depend on later tokens.
        """
        hidden = self.hidden_states(role, input_ids, attention_mask)
        last = self._last_real(input_ids)[:, -length:]
        return self._read(role, hidden[torch.arange(len(last), device=last.device).unsqueeze(1), last])

    def member_scores(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Mask,
        roles: Sequence[str],
        trunk: Float[Tensor, "B S D"] | None = None,
    ) -> Float[Tensor, "B M"]:
        """Return the `scores` of M reward roles. The layers below all their adapters run once.

        All of them must start from the `trunk`, if it is given.
        """
        base, below = self.get_base_model(), 0 if trunk is None else self.trunk_depth
        depth = self._shared_depth(roles) if len(roles) > 1 else below
        if depth <= below:
            columns = [self.scores(input_ids, attention_mask, role, trunk) for role in roles]
            return torch.stack(columns, dim=1)
        inputs = attention(base, attention_mask)
        with self.role(None):
            if trunk is None:
                states = lower(base, depth, input_ids=input_ids, **inputs)
            else:
                states = middle(base, below, depth, trunk, **inputs)
        columns = []
        for role in roles:
            with self.role(role):
                hidden = upper(base, depth, states, **inputs)
            columns.append(self._score(role, hidden, input_ids))
        return torch.stack(columns, dim=1)

    def _shared_depth(self, roles: Sequence[str]) -> int:
        """Count the lowest layers that no adapter of these roles changes; 0 if a pass cannot start above them."""
        base = self.get_base_model()
        first = min(first_adapted_layer(base, self._adapter(role)) for role in roles)
        depth = min(first, len(decoder_layers(base)[2]) - 1)
        if depth and depth not in self._starts_at:
            ids, mask = probe(base)
            with self.role(None):
                self._starts_at[depth] = trunk_fault(base, depth, ids, **attention(base, mask)) is None
        return depth if depth and self._starts_at[depth] else 0

    def _score(self, role: str, hidden: Float[Tensor, "B S D"], input_ids: Int[Tensor, "B S"]) -> Float[Tensor, " B"]:
        last = self._last_real(input_ids)[:, -1]
        return self._read(role, hidden[torch.arange(len(last), device=last.device), last])

    def _last_real(self, input_ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
        """Return the place of the last token up to each one that is not the pad token; 0 if there is none."""
        real = input_ids != self.get_base_model().config.get_text_config().pad_token_id
        return (torch.arange(input_ids.shape[1], device=input_ids.device) * real).cummax(dim=1).values

    def _read(self, role: str, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
        """Apply a role's head to hidden states, in the head's own precision, also under autocast."""
        head = self.role_head(role)
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).squeeze(-1)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        attention_mask: Mask | None = None,
        completion_ids: Int[Tensor, "B T"] | None = None,
        temperature: float = 1.0,
        entropy_requires_grad: bool = False,
        texts: tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]] | None = None,
        trunk: Float[Tensor, "B S D"] | None = None,
        value_trunk: Float[Tensor, "B S D"] | None = None,
        **kwargs,
    ) -> (
        dict[str, Any]  # the output of transformers
        | tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]]
        | tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "N L-1"]]
    ):
        """Run the policy as a language model, or, with `completion_ids`, run the training pass of PPO.

        As a language model it counts positions over real tokens, as `generate` does. GPT-2 by itself would count padding at
        the left too, and its logprobs would differ from those in sampling.

        The training pass returns logprobs, entropy and values. With `texts`, a pair of right-padded ids and mask, it also
        returns the policy's logprobs of them. All of it runs in this one call, so that DDP, FSDP and DeepSpeed see a single
        forward of the module that they wrap.
        """
        if completion_ids is None:
            decoder = type(self.get_base_model().base_model)
            if attention_mask is not None and takes_positions(decoder):  # type: ignore[arg-type]  # as in `attention`
                kwargs.setdefault("position_ids", positions(attention_mask))
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        assert input_ids is not None and attention_mask is not None
        length = completion_ids.shape[1]
        hidden = self.hidden_states("policy", input_ids, attention_mask, trunk)[:, -length - 1 : -1]
        logprobs, entropy = self._token_logprobs(
            "policy", hidden, completion_ids, temperature, entropy_requires_grad=entropy_requires_grad
        )
        assert entropy is not None  # asked for
        if ADAPTERS["value"] in self.peft_config:
            values = self.values(input_ids, attention_mask, length, value_trunk if self.value_has_trunk else trunk)
        else:
            values = self._read("value", hidden)
        if texts is None:
            return logprobs, entropy, values
        text_ids, text_mask = texts
        return logprobs, entropy, values, self.logprobs("policy", text_ids, text_mask, text_ids[:, 1:])

    def save_pretrained(self, save_directory, selected_adapters: list[str] | None = None, **kwargs) -> None:
        """Override `save_pretrained`: save only the policy's adapter, unless adapters are named.

        TRL's trainers train this adapter, and peft would save the other roles too.
        """
        super().save_pretrained(save_directory, selected_adapters=selected_adapters or [ADAPTERS["policy"]], **kwargs)

    def save_role(self, role: str, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save one role as a standard peft folder.

        A role with a head becomes a sequence-classification adapter, which
        `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads. If the weights are sharded,
        `state_dict` must hold the whole weights.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = deepcopy(self.peft_config[self._adapter(role)])
        base = self.get_base_model()
        config.inference_mode, config.base_model_name_or_path = True, base.config._name_or_path
        whole = self.state_dict() if state_dict is None else state_dict
        weights = get_peft_model_state_dict(self, whole, adapter_name=self._adapter(role))
        if role in self.heads:
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
            weights[HEAD] = whole[f"heads.{role}.weight"]
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(folder)
        write_identity(folder, base.config, self.fingerprint)


def load_backbone(
    model: ModelConfig,
    policy: str | None,
    *,
    lora: LoraArguments | None = None,
    trust_remote_code: bool = False,
    pad_token: str | None = None,
) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """Load a backbone and its tokenizer.

    The policy is a saved adapter, or, if `policy` is None, a fresh one (`lora_*`). A fresh adapter is drawn from torch's
    generator and changes nothing until it is trained.

    Raises the errors of `load_pretrained` and `read_adapter`, and:
        ValueError: an option of `lora` or `model` contradicts the saved adapter.
    """
    base, tokenizer = load_pretrained(model, trust_remote_code=trust_remote_code, pad_token=pad_token)
    if not policy:
        return Backbone(base, lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base)), tokenizer
    adapter = read_adapter(policy, needs_head=False, base=base, tokenizer=tokenizer)
    if lora:
        check_lora(adapter.config, model, lora, base, policy)
    return Backbone(base, adapter), tokenizer


def _language_config(config: LoraConfig) -> LoraConfig:
    """Return an adapter's config for a causal language model, without its head, which is kept beside the model."""
    config = deepcopy(config)
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    config.base_model_name_or_path = None  # peft writes the name of the current base when it saves the adapter
    return config


def _contiguous(head: nn.Module, inputs: tuple) -> tuple:
    """Return the inputs of the head with its hidden states in one block of memory.

    `generate` passes a slice of the prompt's states. For a slice, torch would copy the weights of the head once a row,
    which takes a quarter of the sampling time of GPT-2 in bfloat16 on a CPU.
    """
    return (inputs[0].contiguous(), *inputs[1:])


def _is_ours(name: str) -> bool:
    return "lora_" in name or ".heads." in f".{name}"
