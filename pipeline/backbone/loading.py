"""What a run starts from: a pretrained model and its tokenizer, and adapters that remember which model they are of."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.integrations import deepspeed
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config
from trl.trainer.reward_trainer import suppress_seqcls_warning

from data.json_files import read_json
from pipeline.backbone.adapters import ADAPTER_CONFIG, damaged
from pipeline.backbone.architecture import check_finite, check_model
from pipeline.backbone.gguf import SMOLLM2, is_gguf, model_source
from pipeline.backbone.padding import choose_pad_token, set_pad_token
from pipeline.backbone.sharding import kind_of


def check_model_folder(name: str | None) -> None:
    """Check a model's folder or GGUF file, as far as it can be seen without loading the model; `smollm2` and a hub id are
    left to those who fetch them.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder holds no tokenizer, or no safetensors.
        ValueError: no model is named; or the folder is an adapter's; or the file does not begin as GGUF does.
    """
    if name is None:
        raise ValueError("model_name_or_path is not set; name a hub id or a folder, such as data/backbone.")
    folder = Path(name).expanduser()
    if is_gguf(name):
        if not folder.is_file():
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such file. Correct the path.")
        with folder.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(
                    f"model_name_or_path={name!r}: not a GGUF file (it does not begin so). Download it anew."
                )
        return
    if name == SMOLLM2:
        return
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
        return
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load its base and put the adapter on it
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"model_name_or_path={name!r} is the folder of an adapter, not of a model. Name its base there ({base}), and "
            f"the adapter as sft_adapter, reward_adapter or policy_adapter."
        )
    kinds = (
        (read_json(folder / "config.json").get("architectures") or []) if (folder / "config.json").is_file() else []
    )
    if kinds and all(
        re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$", str(kind)) for kind in kinds
    ):
        raise ValueError(
            f"{folder}: the model folder holds a classifier ({kinds[0]}), which has no head to write text with. Name the "
            f"language model that it was made from in model_name_or_path; its adapter goes into reward_adapter."
        )
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{folder}: the model folder has no tokenizer (tokenizer.json). Save it there with "
            f"`tokenizer.save_pretrained({str(folder)!r})`."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        found = f"only {pickled.name}, a pickle, which is not read" if pickled else "no weights"
        raise FileNotFoundError(
            f"{folder}: the model folder has no model.safetensors ({found}). Save the model there with "
            f"`model.save_pretrained({str(folder)!r})`."
        )


def load_pretrained(
    model: ModelConfig, *, head: bool = False, trust_remote_code: bool = False, pad_token: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained model, frozen, and its tokenizer, from a hub id, a folder, a GGUF file or `smollm2`.

    A local folder's path is made absolute, so that the adapters which name it load from anywhere. Padding is the
    `pad_token`; unset, it is chosen by `choose_pad_token`. With `head`, the model is a sequence classifier whose one
    score starts at N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020, arXiv 2009.01325). With `load_in_4bit`, its linear layers
    are quantised and the head is not.

    The model is loaded whole or not at all, and shows on a few tokens that roles on it say what it says itself.

    Raises what `check_model_folder`, `model_source`, `quantization`, `check_finite`, `set_pad_token` and `check_model` raise,
    and:
        ValueError: a file of it is damaged, lacks tensors, or has others than the model; the tokenizer has no end-of-text
            token, or more tokens than the model; the architecture is no language model, or has no sequence classifier
            with its head in `score`.
    """
    name = model.model_name_or_path
    check_model_folder(name)
    bits = quantization(model)
    name = model_source(name)
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
    if pad_token is not None:
        set_pad_token(tokenizer, pad_token, name)

    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_whole` names them
    if bits:  # left to itself transformers takes the first GPU, also under `use_cpu`
        options |= {"quantization_config": bits, "device_map": {"": PartialState().device}}
    try:
        with _unsharded(), suppress_seqcls_warning():  # that a score head is fresh is what we want
            if head:
                base, found = AutoModelForSequenceClassification.from_pretrained(
                    name, num_labels=1, **source, **options
                )
            else:
                base, found = AutoModelForCausalLM.from_pretrained(name, **source, **options)
    except SafetensorError as error:
        raise damaged(Path(name), error) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        config = AutoConfig.from_pretrained(name, **source)
        missing = (
            f"{name}: transformers has no {'sequence classifier' if head else 'causal language model'} of the family"
        )
        remedy = "Train PPO against reward functions (reward_funcs), or take" if head else "Take"
        raise ValueError(
            f"{missing} {config.model_type!r}. {remedy} a decoder-only language model (GPT-2, Llama, Qwen, Mistral ...)."
        ) from error
    check_finite(base.base_model if head else base, name)
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
    _check_whole(base, found, name)
    if head:
        nn.init.normal_(base.score.weight, std=(base.score.in_features + 1) ** -0.5)
    if pad_token is None:
        choose_pad_token(tokenizer, _ends(base, name, model.model_revision))
    _pad_with(base, tokenizer.pad_token_id)
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # Outside of training bitsandbytes would repack the weights for these CPUs, with scales rounded to bfloat16,
            # and a later training pass would run on them without gradients.
            layer.support_avx512bf16_for_cpu = False
    check_model(base, name)
    return fuse_gelu(base).requires_grad_(False), tokenizer


def _check_whole(base: PreTrainedModel, found: dict, name: str) -> None:
    """Check what transformers reports of a loading: each tensor of the model was in its files, and no other.

    A classifier's `score` is new, and what its files have beside the trunk is a language model's head.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; or tied by the config and not by the files.
    """
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if base.get_output_embeddings() is None:
        missing -= {"score.weight"}
        unexpected = {key for key in unexpected if key.startswith(f"{base.base_model_prefix}.")}
    if getattr(base.config, "quantization_config", None):  # its scales, which are no tensors of the model
        unexpected = {key for key in unexpected if ".weight." not in key}
    shapes = sorted(f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, theirs, ours in found["mismatched_keys"])
    for problem, keys in (
        ("are missing from its files", sorted(missing)),
        ("in its files belong to no part of the model", sorted(unexpected)),
        ("in its files have another shape than config.json says", shapes),
    ):
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} tensors of {type(base).__name__} {problem} (first: {keys[0]}). Copy the model anew, or "
                f"correct `architectures` and `tie_word_embeddings` in config.json."
            )
    # transformers leaves them apart, and whatever ties weights later (a merged copy, vLLM, FSDP) would drop one of them.
    if apart := sorted(
        base.get_expanded_tied_weights_keys(all_submodels=True).keys() - base.all_tied_weights_keys.keys()
    ):
        raise ValueError(
            f"{name}: config.json ties {apart[0]} to another tensor (tie_word_embeddings), and its files have the two with "
            f"different values. Set tie_word_embeddings to false in config.json."
        )


def _ends(base: PreTrainedModel, name: str, revision: str | None) -> set[int]:
    """Ids of the tokens that end a text or a turn, by the model's config and its generation config, if it has one."""
    found = [base.config.get_text_config().eos_token_id]
    try:  # a classifier is loaded without it
        found.append(GenerationConfig.from_pretrained(name, revision=revision).eos_token_id)
    except OSError:  # as transformers takes it: there is none
        pass
    return {end for ends in found if ends is not None for end in (ends if isinstance(ends, list) else [ends])}


def _pad_with(base: PreTrainedModel, pad_token_id: int) -> None:
    base.config.get_text_config().pad_token_id = pad_token_id
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.pad_token_id = pad_token_id
    embeddings = base.get_input_embeddings()
    if (
        getattr(embeddings, "padding_idx", None) is not None
    ):  # an adapter of the embeddings gets no gradients for this token
        embeddings.padding_idx = pad_token_id


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """How the base is quantised to 4 bits (QLoRA; Dettmers et al. 2023, arXiv 2305.14314), None where it is not.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: an option that has no effect here; no dtype to compute in; weights that would be sharded.
    """
    if model.load_in_8bit:
        raise ValueError("load_in_8bit=True is not supported: set load_in_4bit, or leave both unset.")
    if not model.load_in_4bit:
        return None
    if model.bnb_4bit_quant_storage:
        raise ValueError(
            f"bnb_4bit_quant_storage={model.bnb_4bit_quant_storage!r} serves sharding, which a 4-bit base is refused; "
            f"leave it unset."
        )
    if model.dtype in (None, "auto"):
        raise ValueError(f"dtype={model.dtype!r}: load_in_4bit computes in the dtype that it names; set bfloat16.")
    if (kind := kind_of(PartialState())) in ("FSDP", "ZeRO-3"):
        raise ValueError(
            f"load_in_4bit=True does not run under {kind}, which would shard the quantised weights. Launch with "
            f"accelerate_configs/ddp.yaml: each GPU holds the base, in a quarter of its bfloat16 memory."
        )
    if not is_bitsandbytes_available():
        raise ImportError("load_in_4bit=True needs bitsandbytes: pip install 'spine-rlhf[quantization]'.")
    return get_quantization_config(model)


def train_in_float32(model: nn.Module) -> None:
    """Have what trains in float32, as on any base. TRL rounds it to bfloat16 on a quantised one, where the steps of a
    small learning rate are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with GPT-2's activation in one kernel instead of eight: the same function, to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


@contextmanager
def _unsharded() -> Iterator[None]:
    """Load a model whole in every process. Under ZeRO-3 transformers would shard it as it loads, and neither its
    fingerprint nor adapters and heads could be read from it or made on it; accelerate shards it all when training
    begins. Its `zero3_init_flag: false` does not reach transformers."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


# Where families keep the longest text that they were made for: most, MPT, BLOOM, Whisper.
CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length", "max_target_positions")


def context_length(model: PreTrainedModel | PeftModel) -> float:
    """Return how many tokens the model can read at once: infinite where its config has no bound, as of models that count no
    positions (alibi, recurrent ones)."""
    config = model.config.get_text_config()
    return next((length for name in CONTEXTS if (length := getattr(config, name, None))), math.inf)
