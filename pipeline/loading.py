"""What a run starts from: a pretrained model and its tokenizer, and adapters that remember which model they are of."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
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
from transformers.integrations import deepspeed
from trl import ModelConfig
from trl.trainer.reward_trainer import suppress_seqcls_warning

from pipeline.folders import HEAD, WEIGHTS, check_adapter, check_model_folder, damaged, read_json


IDENTITY = "backbone.json"


def load_pretrained(
    model: ModelConfig, *, head: bool = False, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model, frozen, and its tokenizer, from a hub id or a folder.

    A local folder's path is made absolute, so that the adapters which name it load from anywhere. A tokenizer without a
    pad token pads with its end-of-text token, as TRL does. With `head`, the model is a sequence classifier whose one
    score starts at N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020, arXiv 2009.01325).

    Raises what `check_model_folder` raises, and:
        ValueError: a file of it is damaged; the tokenizer has no end-of-text token, or more tokens than the model; the
            architecture keeps its score head elsewhere than in `score`; the model is to be quantized.
    """
    name = model.model_name_or_path
    check_model_folder(name)
    for option in ("load_in_8bit", "load_in_4bit"):
        if getattr(model, option):
            raise ValueError(f"{option}=True is not supported: the backbone is not quantized. Leave it unset.")
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())
    source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: the tokenizer's files are damaged ({error}). Save the tokenizer there anew."
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{name}: the tokenizer has no end-of-text token. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "use_safetensors": True}
    try:
        with _whole(), suppress_seqcls_warning():  # that a score head is fresh is what we want
            if head:
                base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **source, **options)
            else:
                base = AutoModelForCausalLM.from_pretrained(name, **source, **options)
    except SafetensorError as error:
        raise damaged(Path(name), error) from error
    rows = base.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}. Take the tokenizer that the "
            f"model was trained with, or call `model.resize_token_embeddings({len(tokenizer)})`, train and save it."
        )
    if head:
        if not isinstance(getattr(base, "score", None), nn.Linear):
            raise ValueError(
                f"{name}: {type(base).__name__} keeps its head elsewhere than in `score`; take a decoder-only model "
                f"(GPT-2, Llama, Qwen, Mistral ...)."
            )
        nn.init.normal_(base.score.weight, std=(base.score.in_features + 1) ** -0.5)
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return fuse_gelu(base).requires_grad_(False), tokenizer


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with GPT-2's activation in one kernel instead of eight: the same function, to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


@contextmanager
def _whole() -> Iterator[None]:
    """Load a model whole in every process. Under ZeRO-3 transformers would shard it as it loads, and neither its
    fingerprint nor adapters and heads could be read from it or made on it; accelerate shards it all when training
    begins. Its `zero3_init_flag: false` does not reach transformers."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def context_length(model: nn.Module) -> int:
    """Tokens that the model can read at once."""
    return model.config.get_text_config().max_position_embeddings


def fingerprint(base: PreTrainedModel) -> str:
    """Hex digest that tells one pretrained trunk from another, whatever head it carries, in float32 or bfloat16.

    LoRA weights are left out.
    """
    trunk = sorted(base.base_model.state_dict().items())
    return digest((name.replace("base_layer.", ""), tensor) for name, tensor in trunk if "lora_" not in name)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of names, shapes and up to 65,536 evenly spaced values of every tensor, rounded to bfloat16."""
    result = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(-(-flat.numel() // 65_536), 1)].to("cpu", torch.bfloat16)
        result.update(f"{name} {tuple(tensor.shape)}".encode())
        result.update(sample.view(torch.int16).numpy().tobytes())
    return result.hexdigest()


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


def read_adapter(
    name: str,
    *,
    needs_head: bool | None = None,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Read a standard peft adapter (a folder, a hub id or `owner/name@revision`; safetensors only) and check that it
    fits: the `base`, and the `tokenizer` where one was saved beside the adapter.

    Raises what `check_adapter` raises, and:
        ValueError: it was trained on another base, or with another tokenizer; its tensors are not finite.
    """
    folder = check_adapter(name, needs_head=needs_head)
    identity = folder / IDENTITY
    if base is not None and identity.is_file():
        made_for, ours = read_json(identity), fingerprint(base)
        theirs = str(made_for.get("fingerprint"))
        if theirs != ours:
            raise ValueError(
                f"{name}: the adapter was trained on another base, {made_for.get('model_name_or_path')} (fingerprint "
                f"{theirs[:12]}), than {base.config._name_or_path} ({ours[:12]}). Train it on this base, or set "
                f"model_name_or_path to that one."
            )
    if tokenizer is not None and (folder / "tokenizer.json").is_file():
        vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        ours = tokenizer.get_vocab()
        if vocabulary != ours:
            odd = next(iter(sorted(vocabulary.items() ^ ours.items())))[0]
            raise ValueError(
                f"{name}: the adapter was trained with another tokenizer ({len(vocabulary)} tokens, here {len(ours)}; "
                f"{odd!r} is one that differs). Train it with this one, or give the model that one."
            )
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            problem = "is not finite" if tensor.is_floating_point() else f"is of {tensor.dtype}, which no weight is"
            raise ValueError(f"{folder / WEIGHTS}: {key} {problem}. Train the adapter anew.")
    head = tensors.pop(HEAD, None)
    return Adapter(name, PeftConfig.from_pretrained(str(folder)), tensors, head)
