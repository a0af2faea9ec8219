"""What a run starts from: a pretrained model and its tokenizer, and adapters that remember which model they are of."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import cached_file
from trl import ModelConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning


WEIGHTS = "adapter_model.safetensors"
IDENTITY = "backbone.json"
# Where peft keeps the head of a sequence-classification adapter (`modules_to_save=["score"]`).
HEAD = "base_model.model.score.weight"


def load_pretrained(
    model: ModelConfig, *, head: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model, frozen, and its tokenizer, from a hub id or a folder.

    A local folder's path is made absolute, so that the adapters which name it load from anywhere. A tokenizer without a
    pad token pads with its end-of-text token, as TRL does. With `head`, the model is a sequence classifier whose one
    score starts at N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020, arXiv 2009.01325).

    Raises:
        FileNotFoundError: there is no such folder, or it holds no tokenizer.
        ValueError: the architecture keeps its score head elsewhere than in `score`.
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is not set; name a hub id or a folder, such as data/backbone.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder.resolve())
        if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
            raise FileNotFoundError(
                f"{folder}: the model folder has no tokenizer (tokenizer.json). Save it there with "
                f"`tokenizer.save_pretrained({str(folder)!r})`."
            )
    elif name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
    source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "use_safetensors": True}
    if head:
        with suppress_seqcls_warning():  # that the score head is fresh is what we want
            base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **source, **options)
        if not isinstance(getattr(base, "score", None), nn.Linear):
            raise ValueError(
                f"{name}: {type(base).__name__} keeps its head elsewhere than in `score`; take a decoder-only model "
                f"(GPT-2, Llama, Qwen, Mistral ...)."
            )
        nn.init.normal_(base.score.weight, std=(base.score.in_features + 1) ** -0.5)
    else:
        base = AutoModelForCausalLM.from_pretrained(name, **source, **options)
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return fuse_gelu(base).requires_grad_(False), tokenizer


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with GPT-2's activation in one kernel instead of eight: the same function, to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


def context_length(model: nn.Module) -> int:
    """Tokens that the model can read at once."""
    return model.config.get_text_config().max_position_embeddings


def fingerprint(base: PreTrainedModel) -> str:
    """Hex digest that tells one pretrained trunk from another, whatever head it carries, in float32 or bfloat16.

    Names, shapes and up to 65,536 evenly spaced values of every tensor, rounded to bfloat16; LoRA weights are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.base_model.state_dict().items()):
        if "lora_" in name:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // 65_536)].to("cpu", torch.bfloat16)
        digest.update(f"{name.replace('base_layer.', '')} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def stamp(folder: str | Path, model_name_or_path: str, digest: str) -> None:
    """Write beside an adapter which backbone it was trained on."""
    record = {"model_name_or_path": model_name_or_path, "fingerprint": digest}
    (Path(folder) / IDENTITY).write_text(json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter read from its folder: peft's config, the LoRA tensors, and the score head (1, D) if it has one."""

    source: str
    config: LoraConfig
    weights: dict[str, Tensor]
    head: Tensor | None


def read_adapter(folder: str, *, needs_head: bool = False, base: PreTrainedModel | None = None) -> Adapter:
    """Read a standard peft adapter (a folder or a hub id; safetensors only) and check that it fits.

    Raises:
        FileNotFoundError: the folder, its config or its safetensors file is missing.
        ValueError: not a LoRA adapter; its head is missing; it was trained on another base.
    """
    path = Path(folder)
    for name in ("adapter_config.json", WEIGHTS):
        if (path.exists() or folder.startswith((".", "/", "~"))) and not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name}: no such file. Name the folder that `trainer.save_model` wrote (adapter_config.json "
                f"and {WEIGHTS})."
            )
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: the adapter is of type {config.peft_type}, not LORA.")
    tensors = load_file(cached_file(folder, WEIGHTS))
    head = tensors.pop(HEAD, None)
    if needs_head and head is None:
        raise ValueError(
            f"{folder}: {WEIGHTS} holds no score head ({HEAD}), so it cannot score. Train the reward adapter with "
            f"modules_to_save=['score'] (pipeline.reward does)."
        )
    if needs_head and head.shape[0] != 1:
        raise ValueError(
            f"{folder}: the score head has {head.shape[0]} outputs; a reward adapter has 1 (num_labels=1)."
        )
    identity = path / IDENTITY
    if base is not None and identity.is_file():
        made_for, ours = json.loads(identity.read_text()), fingerprint(base)
        if made_for["fingerprint"] != ours:
            raise ValueError(
                f"{folder}: the adapter was trained on another base, {made_for['model_name_or_path']} (fingerprint "
                f"{made_for['fingerprint'][:12]}), than {base.config._name_or_path} ({ours[:12]}). Train it on this "
                f"base, or set model_name_or_path to that one."
            )
    return Adapter(folder, config, tensors, head)
