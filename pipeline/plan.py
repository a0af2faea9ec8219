"""Plan the GPU memory of a PPO recipe; only the model's config is downloaded.

    python -m pipeline.plan --config pipeline/recipes/gpt2/ppo.yaml --prompt_tokens 512 --processes 8

The roles are made as PPO makes them, but on torch's meta device, where tensors have shapes and no values. The memory that a
training pass keeps for its backward pass is measured there, with autograd. The context of torch (about half a GB on a GPU)
and fragmentation are not counted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from pipeline.backbone.architecture import attention, switch_off_dropout
from pipeline.backbone.gguf import model_source
from pipeline.backbone.loading import fuse_gelu
from pipeline.backbone.logprobs import LOGITS
from pipeline.backbone.lora import LoraArguments, lora_config
from pipeline.backbone.members import planned_members
from pipeline.backbone.roles import ADAPTERS, Backbone
from pipeline.backbone.trunk import decoder_layers
from pipeline.reports.markdown import markdown_table
from pipeline.rl.config import OPTIONS, PPOConfig
from pipeline.runs.arguments import DataArguments, PolicyArguments, TextArguments
from pipeline.runs.command_line import parse
from pipeline.runs.errors import report_errors
from reward_models.functions import RewardArguments


LAYOUTS = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP")
# Kinds of memory that are sharded, so that each process holds only its share.
SHARDED = {
    "DDP": (),
    "ZeRO-2": ("gradients", "optimizer"),
    "ZeRO-3": ("weights", "gradients", "optimizer"),
    "FSDP": ("weights", "gradients", "optimizer"),
}


@dataclass
class PlanArguments:
    """Options of the plan that are not in a recipe."""

    prompt_tokens: int = field(default=512, metadata={"help": "Length of the longest prompts, in tokens."})
    processes: int = field(default=8, metadata={"help": "Number of GPUs that share the sharded memory."})
    device: str = field(default="cuda", metadata={"help": "Device of the run: cuda or cpu."})

    def __post_init__(self):
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device={self.device!r} is not one of cuda, cpu.")


@dataclass(frozen=True)
class Item:
    """Bytes that a role or a phase holds; `kind` is weights, gradients, optimizer or another name."""

    who: str
    kind: str
    bytes: int


def _config(model: ModelConfig, trust_remote_code: bool) -> PreTrainedConfig:
    """Read the config of the model.

    Raises:
        ValueError: no model is named; or it has no config that can be read.
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path: no model is named. Set it in the recipe.")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder. Correct the path.")
    try:
        source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
        return AutoConfig.from_pretrained(model_source(name), **source)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model_name_or_path={name!r}: its config cannot be read ({said}). Correct the name."
        ) from error


def roles(rewards: RewardArguments, lora: LoraArguments, model: ModelConfig, args: PPOConfig, policy) -> Backbone:
    """Make the roles of a PPO run on the meta device; all adapters have the shape of `lora_*`, even saved ones."""
    config = _config(model, args.trust_remote_code)
    config.get_text_config().pad_token_id = 0  # any value: the plan does not depend on it, but some models need one
    options = {"dtype": torch.float32 if model.dtype in (None, "auto") else getattr(torch, model.dtype)}
    if model.attn_implementation == "eager":  # it keeps attention weights; flash attention keeps as much as sdpa
        options["attn_implementation"] = "eager"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code, **options)
        fuse_gelu(base).requires_grad_(False)
        adapter = lora_config(model, task_type="CAUSAL_LM", lora=lora, base=base)
        backbone = Backbone(base, adapter)
        if policy:  # a trained policy needs a reference adapter
            backbone.add_adapter(ADAPTERS["reference"], adapter)
        for number in range(1, 1 + sum(map(planned_members, rewards.reward_adapter))):
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
    """Yield the memory that lasts from step to step: weights, gradients and Adam's two float32 moments, role by role."""
    ours = {id(p) for role in (*ADAPTERS, *backbone.heads) for p in backbone.role_parameters(role)}
    yield Item("backbone", "weights", sum(p.nbytes for p in backbone.parameters() if id(p) not in ours))
    for role in dict.fromkeys((*ADAPTERS, *backbone.heads)):
        # A value that is only a head has no adapter of its own, so the policy's is not counted again.
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
    """Return the bytes that 4-bit weights save in the base's linear layers, and the bytes of its largest weight now.

    A matrix product dequantises one weight at a time, so the largest counts. bitsandbytes keeps a float32 scale for each 64
    weights. With `nested`, it keeps one byte for each scale, and a float32 for each 256 scales.
    """
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
    """Collect the bytes of each storage that autograd keeps, without weights, while the code inside runs."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a saved output would otherwise keep its own graph alive forever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _shapes_alone(model: nn.Module) -> None:
    """Replace meta tensors by fake tensors, which use the kernels of a CPU.

    With meta tensors, attention would use the kernel that keeps every attention weight.
    """
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
    """Run a layer norm in float32, as autocast does on CUDA; on a CPU autocast would run it in bfloat16."""
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
    """Return the bytes that one training pass keeps for its backward pass, without logits.

    With gradient checkpointing, these are the input of each layer, and what one layer keeps while it is recomputed.
    `backbone` cannot be used for anything else afterwards.
    """
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
    """Return the bytes of the model's own cache for ids (B, S): keys, values and the states of recurrent layers."""
    cache = base.base_model(input_ids=ids, **attention(base, mask), use_cache=True).past_key_values
    tensors = (leaf for layer in cache.layers for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())  # without counters


def phases(backbone: Backbone, args: PPOConfig, prompt: int, device: str = "cuda") -> Iterator[Item]:
    """Yield the memory of a rollout, and the memory that sampling and training add.

    Sampling holds whole logits. Training computes them in pieces.
    """
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
    """Yield the memory of sharded weights that a process holds whole for a while.

    Sampling and scoring gather all weights. Training gathers those of two layers (one is fetched ahead) and the embeddings.
    """
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
    """Return the items of one process under each layout; a 4-bit base has no layout that shards weights."""
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
    """Return the bytes at the worst moment: the lasting memory, plus that of sampling or of training."""
    moments = {"sampling": 0, "training": 0}
    standing = 0
    for item in items:
        if item.who in moments:
            moments[item.who] += item.bytes
        else:
            standing += item.bytes
    return standing + max(moments.values())


def table(planned: dict[str, list[Item]]) -> str:
    """Return a table with a row for each item and a column for each layout, in GB (10^9 bytes) of one GPU."""
    cells = {layout: {(item.who, item.kind): item.bytes for item in items} for layout, items in planned.items()}
    names = list(dict.fromkeys(name for column in cells.values() for name in column))
    order = {who: i for i, who in enumerate(("sampling", "training"))}
    names.sort(key=lambda name: order.get(name[0], -1))  # the sort is stable, so roles stay in their order

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
    report_errors()
    # The plan runs on a CPU, because this machine may not have the planned GPUs.
    main(*parse(*OPTIONS, PlanArguments, args=[*sys.argv[1:], "--use_cpu", "true"]))
