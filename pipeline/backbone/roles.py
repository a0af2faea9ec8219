"""One frozen backbone, four roles or more.

Policy, reference, rewards and value are LoRA adapters on a single pretrained causal language model, and linear heads
(one for each reward, one for the value) read its last hidden state. A role is chosen by naming its adapter on every
LoRA layer, without touching `requires_grad`, so several roles can run inside one differentiable forward pass.

The module is longer than others, since a `PeftModel` is one class.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from pipeline.backbone.adapters import HEAD, WEIGHTS, Adapter, read_adapter
from pipeline.backbone.architecture import attention, head_is_all, own_logits, positions, probe, takes_positions
from pipeline.backbone.identity import fingerprint, write_identity
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.logprobs import token_logprobs
from pipeline.backbone.lora import LoraArguments, check_lora, lora_config
from pipeline.backbone.merging import merged_weights
from pipeline.backbone.trunk import decoder_layers, first_adapted_layer, lower, trunk_fault, upper


logger = get_logger(__name__)

# peft calls the first adapter "default", and TRL's online trainers train that one and clone it as "ref". Further reward
# roles (reward_2, ...) are called what their adapters are.
ADAPTERS = {"policy": "default", "reference": "ref", "reward": "reward", "value": "value"}
# What a role changes on each LoRA layer of peft's, and puts back.
SWITCHES = ("_active_adapter", "_disable_adapters", "cast_input_dtype_enabled")


class Backbone(PeftModelForCausalLM):
    """A frozen causal language model that plays several roles, each a LoRA adapter on it.

    It is a `PeftModel` like any other: `generate`, `save_pretrained` and TRL's trainers work on its policy adapter.
    `forward(..., completion_ids=...)` is PPO's training pass.
    """

    # Whatever the base is: what trains would be rounded to bfloat16 by TRL's trainers, and PPO's policy would no longer
    # start as its reference.
    is_loaded_in_4bit = False

    def __init__(self, base: PreTrainedModel, policy: Adapter | LoraConfig):
        fresh = isinstance(policy, LoraConfig)
        plain = head_is_all(base)  # before peft puts layers of its own into it
        super().__init__(base, policy if fresh else _language_config(policy.config), adapter_name=ADAPTERS["policy"])
        self.heads = nn.ModuleDict()
        self.trunk_depth, self.value_has_trunk = 0, False
        self._logits = None if plain else partial(own_logits, base)
        self._role: str | None = "policy"  # as peft and TRL's own trainers find it
        # LoRA starts as nothing: B is zero. Until it has learned something, the policy is the bare backbone.
        self.policy_is_bare = isinstance(policy, LoraConfig) and policy.init_lora_weights is True
        # While its weights are here: under FSDP and ZeRO-3 they will be sharded. A plan has none (the meta device).
        self.fingerprint = "" if base.device.type == "meta" else fingerprint(base)
        base.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self._find_tuned()
        if not fresh:
            self._set_weights("policy", policy.weights, policy.source)

    def add_adapter(self, *args, **kwargs) -> None:
        super().add_adapter(*args, **kwargs)
        self._find_tuned()

    def _find_tuned(self) -> None:
        self._tuned = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]

    def add_role(self, role: str, adapter: Adapter) -> None:
        """Add a role from an adapter read by `read_adapter`; its head, if it has one, comes along."""
        self.add_adapter(ADAPTERS.get(role, role), _language_config(adapter.config))
        self._set_weights(role, adapter.weights, adapter.source)
        if adapter.head is not None:
            self._add_head(role, adapter.head)

    def load_role(self, role: str, adapter: Adapter) -> None:
        """Give a role that is there the weights of an adapter, and of its head."""
        self._set_weights(role, adapter.weights, adapter.source)
        if adapter.head is not None:
            self.role_head(role).weight.data.copy_(adapter.head)

    def add_value(self, *, init: str = "auto", critic: str = "adapter", reward_weight: float = 1.0) -> None:
        """Add the value role.

        As an `adapter` it starts from the `reward` adapter and its head times `reward_weight`, so that the first values
        are scores, or from the `policy` adapter with a head of zeros; `auto` takes the reward where there is one. As a
        `head` it is a head of zeros on the policy's own hidden states, which it shapes too: one forward pass less, and
        one adapter less.

        Raises:
            ValueError: `init` is `reward` and the backbone has no reward role.
        """
        if init == "reward" and "reward" not in self.heads:
            raise ValueError("value_init='reward' needs a reward adapter; name one, or set value_init to policy.")
        origin = "reward" if init != "policy" and critic == "adapter" and "reward" in self.heads else "policy"
        if critic == "adapter":
            self.add_adapter(ADAPTERS["value"], deepcopy(self.peft_config[ADAPTERS[origin]]))
            weights = get_peft_model_state_dict(self, adapter_name=ADAPTERS[origin])
            self._set_weights("value", weights, origin)
        hidden_size = self.hidden_size
        start = self.role_head("reward").weight * reward_weight if origin == "reward" else torch.zeros(1, hidden_size)
        self._add_head("value", start)

    def _add_head(self, role: str, weight: Tensor) -> None:
        hidden_size = self.hidden_size
        if weight.shape[1] != hidden_size:
            raise ValueError(
                f"the score head of {role!r} reads {weight.shape[1]} hidden units, and the backbone has {hidden_size}: "
                f"the adapter was trained on another base. Name one of this base."
            )
        head = nn.Linear(weight.shape[1], 1, bias=False)
        head.weight.data.copy_(weight)
        self.heads[role] = head.to(self.get_base_model().device)

    def role_head(self, role: str) -> nn.Linear:
        """Return the head of a role that has one, (1, D)."""
        return cast(nn.Linear, self.heads[role])

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states, which the heads read: not always the config's `hidden_size`."""
        return self.get_base_model().get_output_embeddings().weight.shape[1]

    def _set_weights(self, role: str, weights: dict[str, Tensor], source: str) -> None:
        self.policy_is_bare = self.policy_is_bare and role != "policy"
        expected = get_peft_model_state_dict(self, adapter_name=self._adapter(role))
        if weights.keys() != expected.keys():
            odd = sorted(weights.keys() ^ expected.keys())
            raise ValueError(
                f"{source}: {len(odd)} tensors of the adapter do not match the backbone, first {odd[0]!r}."
            )
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, and on this backbone {tuple(expected[name].shape)}: "
                    f"its config names another rank, or it was trained on another base. Name the adapter of this base."
                )
        set_peft_model_state_dict(self, weights, adapter_name=self._adapter(role))

    def _adapter(self, role: str) -> str:
        """peft's name of a role's adapter. LoRA layers skip one that they lack, so a role of `ADAPTERS` without an
        adapter is the bare backbone, and any other name must be an error."""
        if role == "value" and "value" in self.heads and ADAPTERS[role] not in self.peft_config:
            role = "policy"  # a value that is only a head
        if role not in ADAPTERS and role not in self.peft_config:
            raise ValueError(f"role {role!r}: the backbone's adapters are {', '.join(self.peft_config)}.")
        return ADAPTERS.get(role, role)

    def role_parameters(self, *roles: str) -> list[nn.Parameter]:
        """The adapters and heads of these roles."""
        names = {self._adapter(role) for role in roles} | set(roles)
        return [p for name, p in self.named_parameters() if _is_ours(name) and not names.isdisjoint(name.split("."))]

    def train_only(self, *roles: str) -> None:
        """Make the adapters and heads of these roles trainable, and everything else frozen."""
        self.requires_grad_(False)
        for parameter in self.role_parameters(*roles):
            parameter.requires_grad_(True)

    def merged_weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the plain model with a role's adapter merged into them, by the names they have there, one
        layer at a time; raises what `pipeline.backbone.merging.merged_weights` raises."""
        return merged_weights(self.get_base_model(), self._adapter(role), role)

    @contextmanager
    def role(self, role: str | None) -> Iterator[None]:
        """Run the code inside as this role, or as the bare backbone with None.

        peft's `set_adapter` would toggle `requires_grad` and so drop gradients of the role before; we name the adapter
        on each LoRA layer instead. The attribute is private to peft, hence the pin on its minor version.
        """
        active = [self._adapter(role)] if role else []
        # Autocast brings what a plain LoRA layer multiplies to one precision; peft's own cast, to the adapter's, would be
        # undone at once.
        autocast = torch.is_autocast_enabled(self.device.type)
        before = [(layer, *(getattr(layer, name) for name in SWITCHES)) for layer in self._tuned]
        for layer in self._tuned:
            layer._active_adapter = active
            layer._disable_adapters = role is None
            layer.cast_input_dtype_enabled = not autocast or bool(layer.lora_variant)
        role_before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = role_before
            for layer, *values in before:
                for name, value in zip(SWITCHES, values, strict=True):
                    setattr(layer, name, value)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """transformers', where each layer is computed again, in the backward pass, as the role that it ran as. Left to
        itself it would run as whichever role is active then, and give wrong gradients without a word."""
        options = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": self._contexts}
        base = self.get_base_model()
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:  # the oldest transformers that we allow has the old name alone
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """The name that TRL calls it by."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What a layer that begins now runs in, and what it is computed again in."""
        return nullcontext(), self.role(self._role)

    def layers_below_policy(self) -> int:
        """How many of the lowest layers the policy's adapter leaves as they are; the last layer is not counted."""
        base = self.get_base_model()
        return min(first_adapted_layer(base, self._adapter("policy")), len(decoder_layers(base)[2]) - 1)

    def share_trunk(self) -> None:
        """Run the layers below the policy's adapter, `trunk_depth` of them, once a rollout, not in every pass.

        A value adapter that begins lower, as one of a reward model may, is frozen there: it then has a trunk of its own.
        Where a pass from the trunk is not the full pass, which is tried, nothing is shared.
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
                    f"The lowest {self.trunk_depth} layers run in every pass: {type(base).__name__} does not run from their "
                    f"states as it runs in full ({fault})."
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

    def trunk(self, input_ids: Tensor, attention_mask: Tensor, role: str | None = None) -> Tensor:
        """States at the foot of the first layer that the policy adapts, (B, S) -> (B, S, D): those of the bare backbone,
        which a role that begins there or above has too, or those of another role."""
        base = self.get_base_model()
        inputs = attention(base, attention_mask)
        with self.role(role):
            return lower(base, self.trunk_depth, input_ids=input_ids, **inputs)

    def starts_at_trunk(self, role: str) -> bool:
        """Whether a role's adapter leaves the layers of the trunk as they are."""
        return 0 < self.trunk_depth <= first_adapted_layer(self.get_base_model(), self._adapter(role))

    def hidden_states(
        self, role: str | None, input_ids: Tensor, attention_mask: Tensor, trunk: Tensor | None = None
    ) -> Tensor:
        """Last hidden states of a role, (B, S) -> (B, S, D). Positions count real tokens, wherever the padding is.

        With what `trunk` gave for these tokens and this role, the pass starts from there.
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
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_ids: Tensor,
        temperature: float = 1.0,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of each completion token, in nats, (B, T).

        `input_ids` (B, P + T) ends with `completion_ids` (B, T). The vocabulary projection runs on the T positions
        only. Logits are divided by `temperature`, as they are in sampling.
        """
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)[:, -completion_ids.shape[1] - 1 : -1]
        return self._token_logprobs(role, hidden, completion_ids, temperature, entropy=False)[0]

    def logprobs_and_entropy(
        self,
        role: str | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_ids: Tensor,
        temperature: float = 1.0,
        trunk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `logprobs` and the entropy at each position, in nats, both (B, T)."""
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)[:, -completion_ids.shape[1] - 1 : -1]
        logprobs, entropy = self._token_logprobs(role, hidden, completion_ids, temperature)
        assert entropy is not None  # asked for
        return logprobs, entropy

    def _token_logprobs(
        self, role: str | None, hidden: Tensor, completion_ids: Tensor, temperature: float, **options: bool
    ) -> tuple[Tensor, Tensor | None]:
        head = self.get_base_model().get_output_embeddings()
        with self.role(role):  # an adapter may reach the head
            return token_logprobs(head, hidden, completion_ids, temperature, logits=self._logits, **options)

    def values(self, input_ids: Tensor, attention_mask: Tensor, length: int, trunk: Tensor | None = None) -> Tensor:
        """Value of the state before each of the last `length` tokens, (B, P + T) -> (B, T)."""
        hidden = self.hidden_states("value", input_ids, attention_mask, trunk)[:, -length - 1 : -1]
        return self._read("value", hidden)

    def scores(
        self, input_ids: Tensor, attention_mask: Tensor, role: str = "reward", trunk: Tensor | None = None
    ) -> Tensor:
        """A reward model's score of sequences padded on either side, (B, S) -> (B,), read at the last token that is not
        the pad token: where transformers' sequence-classification models read it."""
        hidden = self.hidden_states(role, input_ids, attention_mask, trunk)
        real = input_ids != self.get_base_model().config.get_text_config().pad_token_id
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * real).argmax(dim=-1)
        return self._read(role, hidden[torch.arange(len(last), device=last.device), last])

    def _read(self, role: str, hidden: Tensor) -> Tensor:
        """A role's head on hidden states (..., D) -> (...), in the head's own precision, also under autocast."""
        head = self.role_head(role)
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).squeeze(-1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        completion_ids=None,
        temperature=1.0,
        entropy_requires_grad=False,
        texts=None,
        trunk=None,
        value_trunk=None,
        **kwargs,
    ):
        """The policy's language-model forward; with `completion_ids` (B, T), PPO's training pass.

        As a language model it counts positions as `generate` does, over real tokens: GPT-2 left to itself counts the
        padding at the left too, and would score other logprobs than were sampled.

        The training pass returns logprobs, entropy and values, each (B, T); with `texts`, a pair of right-padded ids
        and mask (N, S), the policy's logprobs of them (N, S - 1) too. All of it runs in this one call, so that DDP,
        FSDP and DeepSpeed see a single forward of the module they wrap.
        """
        if completion_ids is None:
            decoder = type(self.get_base_model().base_model)
            if attention_mask is not None and takes_positions(decoder):  # type: ignore[arg-type]  # as in `attention`
                kwargs.setdefault("position_ids", positions(attention_mask))
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        length = completion_ids.shape[1]
        hidden = self.hidden_states("policy", input_ids, attention_mask, trunk)[:, -length - 1 : -1]
        logprobs, entropy = self._token_logprobs(
            "policy", hidden, completion_ids, temperature, entropy_requires_grad=entropy_requires_grad
        )
        if ADAPTERS["value"] in self.peft_config:
            values = self.values(input_ids, attention_mask, length, value_trunk if self.value_has_trunk else trunk)
        else:
            values = self._read("value", hidden)
        if texts is None:
            return logprobs, entropy, values
        text_ids, text_mask = texts
        return logprobs, entropy, values, self.logprobs("policy", text_ids, text_mask, text_ids[:, 1:])

    def save_pretrained(self, save_directory, selected_adapters: list[str] | None = None, **kwargs) -> None:
        """peft's, but of the policy alone unless adapters are named: what TRL's trainers trained, without the roles
        beside it."""
        super().save_pretrained(save_directory, selected_adapters=selected_adapters or [ADAPTERS["policy"]], **kwargs)

    def save_role(self, role: str, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save one role as a standard peft folder. A role with a head becomes a sequence-classification adapter, which
        `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads. Where the weights are
        sharded, `state_dict` has them whole."""
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
    """A backbone and its tokenizer. The policy is an adapter that was saved, or with None a fresh one (`lora_*`), drawn
    from torch's generator, which changes nothing until it is trained.

    Raises what `load_pretrained` and `read_adapter` raise, and:
        ValueError: `lora` or `model` describe another adapter than the one that was saved.
    """
    base, tokenizer = load_pretrained(model, trust_remote_code=trust_remote_code, pad_token=pad_token)
    if not policy:
        return Backbone(base, lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base)), tokenizer
    adapter = read_adapter(policy, needs_head=False, base=base, tokenizer=tokenizer)
    if lora:
        check_lora(adapter.config, model, lora, base, policy)
    return Backbone(base, adapter), tokenizer


def _language_config(config: LoraConfig) -> LoraConfig:
    """The adapter's config for a causal language model: its head is kept beside the model, not inside."""
    config = deepcopy(config)
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    config.base_model_name_or_path = None  # when it is saved, peft names the base that it is on
    return config


def _contiguous(head: nn.Module, inputs: tuple) -> tuple:
    """The head's hidden states in one block. `generate` takes a slice of the prompt's, and for that torch copies the
    vocabulary's weights once a row: a quarter of the sampling time of GPT-2 in bfloat16 on a CPU."""
    return (inputs[0].contiguous(), *inputs[1:])


def _is_ours(name: str) -> bool:
    return "lora_" in name or ".heads." in f".{name}"
