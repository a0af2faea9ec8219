"""What a PPO recipe takes of a GPU's memory, before anything is downloaded but the model's config.

    python -m pipeline.plan --config pipeline/recipes/gpt2/ppo.yaml --prompt_tokens 512 --processes 8

The roles are made as PPO makes them, on torch's meta device, where tensors have shapes and no values; what a training
pass keeps for its backward pass is what autograd keeps there. torch's own context, about half a GB on a GPU, and
fragmentation come on top.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from pipeline.backbone.architecture import attention, switch_off_dropout
from pipeline.backbone.gguf import model_source
from pipeline.backbone.loading import fuse_gelu
from pipeline.backbone.logprobs import LOGITS
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.roles import ADAPTERS, Backbone
from pipeline.backbone.trunk import decoder_layers
from pipeline.reports.markdown import markdown_table
from pipeline.rl.config import PPOConfig
from pipeline.runs.arguments import DataArguments, PolicyArguments, TextArguments
from pipeline.runs.command_line import parse
from pipeline.runs.errors import report_errors
from reward_models.functions import RewardArguments


LAYOUTS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP")
# What each process has only its share of.
SHARDED = {
    "DDP": (),
    "ZeRO-2": ("gradients", "optimizer"),
    "ZeRO-3": ("weights", "gradients", "optimizer"),
    "FSDP": ("weights", "gradients", "optimizer"),
}


@dataclass
class PlanArguments:
    """What a recipe does not say."""

    prompt_tokens: int = field(default=512, metadata={"help": "Length of the longest prompts, in tokens."})
    processes: int = field(default=8, metadata={"help": "GPUs that share what is sharded."})
    device: str = field(default="cuda", metadata={"help": "What it runs on: cuda, or cpu."})

    def __post_init__(self):
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device={self.device!r} is not one of cuda, cpu.")


@dataclass(frozen=True)
class Item:
    """Bytes that a role or a phase holds; of `kind` weights, gradients, optimizer, or a name of its own."""

    who: str
    kind: str
    bytes: int


def roles(rewards: RewardArguments, lora: LoraArguments, model: ModelConfig, args: PPOConfig, policy) -> Backbone:
    """The roles of a PPO run on the meta device; adapters are as `lora_*` says, wherever they would be read from."""
    source = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model_source(model.model_name_or_path), **source)
    config.get_text_config().pad_token_id = 0  # of no consequence here; a classifier's head would want one
    options = {"dtype": torch.float32 if model.dtype in (None, "auto") else getattr(torch, model.dtype)}
    if (
        model.attn_implementation == "eager"
    ):  # it keeps attention weights; what flash attention keeps is what sdpa does
        options["attn_implementation"] = "eager"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code, **options)
        fuse_gelu(base).requires_grad_(False)
        adapter = lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base)
        backbone = Backbone(base, adapter)
        if policy:  # one that was trained is not the bare backbone
            backbone.add_adapter(ADAPTERS["reference"], adapter)
        for number, _ in enumerate(rewards.reward_adapter, 1):
            role = "reward" if number == 1 else f"reward_{number}"
            backbone.add_adapter(role, adapter)
            backbone.heads[role] = nn.Linear(backbone.hidden_size, 1, bias=False)
        backbone.add_value(init=args.value_init, critic=args.critic)
    backbone.train_only("policy", "value")
    if args.disable_dropout:
        switch_off_dropout(backbone)
        with FakeTensorMode():
            _shapes_alone(backbone)
            backbone.share_trunk()
    return backbone.train()


def state(backbone: Backbone) -> Iterator[Item]:
    """What lives from step to step: weights, gradients and Adam's two moments in float32, role by role."""
    ours = {id(p) for role in (*ADAPTERS, *backbone.heads) for p in backbone.role_parameters(role)}
    yield Item("backbone", "weights", sum(p.nbytes for p in backbone.parameters() if id(p) not in ours))
    for role in dict.fromkeys((*ADAPTERS, *backbone.heads)):
        # A value that is a head alone has no adapter to count again.
        shared = role == "value" and ADAPTERS["value"] not in backbone.peft_config
        parameters = list(backbone.heads[role].parameters()) if shared else backbone.role_parameters(role)
        if not parameters:
            continue
        yield Item(role, "weights", sum(p.nbytes for p in parameters))
        trained = [p for p in parameters if p.requires_grad]
        if trained:
            yield Item(role, "gradients", sum(p.nbytes for p in trained))
            yield Item(role, "optimizer", sum(8 * p.numel() for p in trained))


def in_4_bits(backbone: Backbone, *, nested: bool) -> tuple[int, int]:
    """Bytes that the base's linear layers take as QLoRA keeps them, less than they take now; and the largest of their
    weights, which a product with it dequantises. bitsandbytes keeps a float32 scale for each 64 weights; nested, a byte,
    and a float32 for each 256 scales."""
    base = backbone.get_base_model()
    head, saved, largest = base.get_output_embeddings(), 0, 0
    for name, layer in base.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and "lora_" not in name and layer is not head:
            weight, scales = layer.weight, -(-layer.weight.numel() // 64)
            kept = -(-weight.numel() // 2) + (scales + 4 * -(-scales // 256) if nested else 4 * scales)
            saved, largest = saved + weight.nbytes - kept, max(largest, weight.nbytes)
    return saved, largest


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, weights apart."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output saved as itself would hold its own graph for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _shapes_alone(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device: they choose kernels as a CPU's do, attention's among
    them, where meta tensors take the one that keeps every attention weight."""
    fakes = {}
    for module in model.modules():
        for tensors, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda x, _: x)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fakes:  # tied weights stay tied
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    fakes[tensor] = kind(fake, tensor.requires_grad)
                if tensor is not None:
                    tensors[name] = fakes[tensor]


def _layer_norm(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """Run a layer norm as CUDA's autocast does, in float32; a CPU's leaves it in bfloat16."""
    weight, bias = (x if x is None else x.float() for x in (norm.weight, norm.bias))
    return F.layer_norm(hidden.float(), norm.normalized_shape, weight, bias, norm.eps)


def activations(
    backbone: Backbone,
    rows: int,
    prompt: int,
    completion: int,
    *,
    bf16: bool,
    checkpointing: bool = False,
    device: str = "cuda",
) -> int:
    """Bytes that one training pass keeps for its backward pass, logits apart; with gradient checkpointing the input of
    each layer, and a layer's share of all that is computed again. `backbone` is fit for nothing else after it."""
    tokens = (rows, prompt + completion)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        _shapes_alone(backbone)
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm) and bf16 and device == "cuda":
                module.forward = partial(_layer_norm, module)  # type: ignore[method-assign]  # of this one module
        ids, mask = torch.ones(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.bool)
        trunk = backbone.trunk(ids, mask) if backbone.trunk_depth else None
        with _kept() as sizes:
            passes = [backbone.hidden_states("policy", ids, mask, trunk)]
            if ADAPTERS["value"] in backbone.peft_config:
                passes.append(backbone.hidden_states("value", ids, mask, trunk))
        kept, states = sum(sizes.values()), sum(hidden.nbytes for hidden in passes)
    if checkpointing:
        layers = len(decoder_layers(backbone.get_base_model())[2]) - backbone.trunk_depth
        return states * (layers + 1) + kept // (layers * len(passes))
    return kept + states


@torch.no_grad()
def cache_size(base: PreTrainedModel, ids: Tensor, mask: Tensor) -> int:
    """Return the bytes that the model's own cache takes of ids (B, S): keys and values, and the states of recurrent layers."""
    cache = base.base_model(input_ids=ids, **attention(base, mask), use_cache=True).past_key_values
    tensors = (leaf for layer in cache.layers for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())  # counters apart


def phases(backbone: Backbone, args: PPOConfig, prompt: int, device: str = "cuda") -> Iterator[Item]:
    """What a rollout leaves, and what sampling and training take beside it. Logits are in pieces but while sampling."""
    base, completion = backbone.get_base_model(), args.max_completion_length
    batch, tokens = args.per_device_train_batch_size * args.steps_per_generation, prompt + completion
    vocabulary = base.get_output_embeddings().weight.shape[0]
    with FakeTensorMode():
        _shapes_alone(backbone)
        ids, mask = torch.ones(batch, tokens, dtype=torch.long), torch.ones(batch, tokens, dtype=torch.long)
        if backbone.trunk_depth:
            trunks = 1 + backbone.value_has_trunk
            yield Item("rollout", "trunk cache", trunks * backbone.trunk(ids, mask).nbytes)
        yield Item("sampling", "KV cache", cache_size(base, ids, mask))
    yield Item("sampling", "logits", 4 * batch * vocabulary * 4)  # logits, scores, probabilities, noise
    # Logits, their softmax, its exponential and a gradient, in float32.
    positions = args.per_device_train_batch_size * completion
    yield Item("training", "logits", 4 * 4 * min(LOGITS, positions * vocabulary))
    size = args.per_device_train_batch_size
    options = {"bf16": args.bf16, "checkpointing": args.gradient_checkpointing, "device": device}
    yield Item("training", "activations", activations(backbone, size, prompt, completion, **options))


def gathered(backbone: Backbone, layout: str) -> Iterator[Item]:
    """Weights that a process has whole for a while though they are sharded: all of them in sampling and scoring, and in
    training those of two layers, one of them fetched ahead, with the embeddings."""
    if "weights" not in SHARDED[layout]:
        return
    base = backbone.get_base_model()
    layers = decoder_layers(base)[2]
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    whole = sum(p.nbytes for p in backbone.parameters())
    yield Item("sampling", "gathered weights", whole)
    yield Item("training", "gathered weights", 2 * max(sizes) + whole - sum(sizes))


def plan(
    start: PolicyArguments,
    rewards: RewardArguments,
    lora: LoraArguments,
    model: ModelConfig,
    args: PPOConfig,
    asked: PlanArguments,
) -> dict[str, list[Item]]:
    """Items of one process under each layout; a base in 4 bits is not sharded."""
    backbone = roles(rewards, lora, model, args, start.sft_adapter)
    standing = list(state(backbone))
    layouts = [layout for layout in LAYOUTS if not (model.load_in_4bit and "weights" in SHARDED[layout])]
    whole = {layout: list(gathered(backbone, layout)) for layout in layouts}
    dequantised = []
    if model.load_in_4bit:
        saved, largest = in_4_bits(backbone, nested=model.use_bnb_nested_quant)
        standing = [Item(i.who, i.kind, i.bytes - saved * (i.who == "backbone")) for i in standing]
        dequantised = [Item(phase, "dequantised weight", largest) for phase in ("sampling", "training")]
    passing = [*phases(backbone, args, asked.prompt_tokens, asked.device), *dequantised]
    result = {}
    for layout in layouts:
        share = {kind: asked.processes for kind in SHARDED[layout]}
        mine = [Item(item.who, item.kind, item.bytes // share.get(item.kind, 1)) for item in standing]
        result[layout] = mine + whole[layout] + passing
    return result


def peak(items: list[Item]) -> int:
    """Bytes at the worst moment: what stands, with sampling or with training."""
    moments = {"sampling": 0, "training": 0}
    standing = 0
    for item in items:
        if item.who in moments:
            moments[item.who] += item.bytes
        else:
            standing += item.bytes
    return standing + max(moments.values())


def table(planned: dict[str, list[Item]]) -> str:
    """A row an item, a column a layout, in GB (10^9 bytes) of one GPU."""
    cells = {layout: {(item.who, item.kind): item.bytes for item in items} for layout, items in planned.items()}
    names = list(dict.fromkeys(name for column in cells.values() for name in column))
    order = {who: i for i, who in enumerate(("sampling", "training"))}
    names.sort(key=lambda name: order.get(name[0], -1))  # stable: roles stay in their order

    def gigabytes(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e9:.3f}"

    rows = [[*name, *(gigabytes(cells[layout].get(name)) for layout in planned)] for name in names]
    rows.append(["**peak**", "", *(f"**{peak(items) / 1e9:.2f}**" for items in planned.values())])
    return markdown_table(["", "GB a GPU", *planned], rows, numbers=range(2, 2 + len(planned)))


def main(
    data: DataArguments,
    start: PolicyArguments,
    texts: TextArguments,
    rewards: RewardArguments,
    lora: LoraArguments,
    model: ModelConfig,
    args: PPOConfig,
    asked: PlanArguments,
) -> None:
    print(table(plan(start, rewards, lora, model, args, asked)))


if __name__ == "__main__":
    kinds = (
        DataArguments,
        PolicyArguments,
        TextArguments,
        RewardArguments,
        LoraArguments,
        ModelConfig,
        PPOConfig,
        PlanArguments,
    )
    report_errors()
    # The machine that plans need not have the GPUs that are planned for.
    main(*parse(*kinds, args=[*sys.argv[1:], "--use_cpu", "true"]))
