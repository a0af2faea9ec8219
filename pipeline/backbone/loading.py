"""Load a pretrained model and its tokenizer, and check both."""

import math
import re
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, get_quantization_config

from data.caches import check_cache
from data.embedded import find_embedded
from data.json_files import read_json
from data.quoting import escaped, quoted
from data.saving import check_saved
from data.schemas import MODEL_CONFIG
from pipeline.backbone.adapter_config import ADAPTER_CONFIG
from pipeline.backbone.adapters import load_tokenizer
from pipeline.backbone.architecture import check_finite, check_model
from pipeline.backbone.gguf import SMOLLM2, is_gguf
from pipeline.backbone.model_files import check_vocabulary, model_config, reached, read_weights
from pipeline.backbone.padding import choose_pad_token, set_pad_token
from pipeline.backbone.sharding import kind_of


def check_model_folder(name: str | None, *, classifies: bool = False) -> None:
    """Check a model's folder or GGUF file, without loading the model.

    `smollm2` and hub ids are checked when they are fetched. With `classifies`, the folder may hold a classifier.

    Raises:
        FileNotFoundError: there is no such folder or file, or the folder has no tokenizer or no safetensors.
        ValueError: no model is named; the folder holds an adapter or a classifier; or the file is not a GGUF file.
    """
    if name is None:
        raise ValueError("model_name_or_path is not set. Name a hub id or a folder, such as data/backbone.")
    folder = Path(name).expanduser()
    if is_gguf(name):
        if not folder.is_file():
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such file. Correct the path.")
        with folder.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(
                    f"model_name_or_path={name!r}: not a GGUF file (it does not begin with GGUF). Download it anew."
                )
        return
    if name == SMOLLM2:
        return
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder. Correct the path.")
        if find_embedded(name) == name:
            _check_hub_cache(name)
        return
    check_saved(folder, "model")
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load the base and the adapter on it
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(
            f"model_name_or_path={name!r} is the folder of an adapter, not of a model. Name its base there "
            f"({escaped(base)}). Name the adapter as sft_adapter, reward_adapter or policy_adapter."
        )
    config = read_json(folder / "config.json", MODEL_CONFIG) if (folder / "config.json").is_file() else {}
    kinds = [] if classifies else config.get("architectures") or []
    if kinds and all(re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$", kind) for kind in kinds):
        raise ValueError(
            f"{folder}: the model folder holds a classifier ({escaped(kinds[0])}), which has no language model head. Name the "
            f"language model that it was made from in model_name_or_path. Name its adapter in reward_adapter."
        )
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"{folder}: the model folder has no tokenizer (tokenizer.json). Save it there with "
            f"`tokenizer.save_pretrained({str(folder)!r})`."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        found = f"only {pickled.name}, which is a pickle and is not read" if pickled else "no weights"
        raise FileNotFoundError(
            f"{folder}: the model folder has no model.safetensors ({found}). Save the model there with "
            f"`model.save_pretrained({str(folder)!r})`."
        )


def _check_hub_cache(name: str) -> None:
    """Check, before a model is fetched from the hub, that it can be kept. Raises the error of `check_cache`."""
    with suppress(HFValidationError):
        if not constants.HF_HUB_OFFLINE and try_to_load_from_cache(name, "config.json") is None:
            check_cache(Path(constants.HF_HUB_CACHE), "the cache of the hub's models", "HF_HUB_CACHE or HF_HOME")


def load_pretrained(
    model: ModelConfig, *, head: bool = False, trust_remote_code: bool = False, pad_token: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pretrained model, frozen, and its tokenizer, from a hub id, a folder, a GGUF file or `smollm2`.

    The path of a local folder is made absolute, so that adapters that name it load from anywhere. If `pad_token` is None,
    `choose_pad_token` chooses one. With `head`, the model is a sequence classifier with one score, whose head starts at
    N(0, 1/sqrt(D + 1)) (Stiennon et al. 2020, arXiv 2009.01325). With `load_in_4bit`, the linear layers are quantised, but
    not the head.

    The model is loaded with all its tensors or not at all. `check_model` tests it on a few tokens.

    Raises the errors of `check_model_folder`, `model_source`, `quantization`, `check_size`, `check_finite`,
    `set_pad_token` and `check_model`, and:
        ValueError: config.json cannot be used; a file of the model is damaged, lacks tensors, or has tensors that the model
            lacks; the tokenizer has no end-of-text token, or more tokens than the model; or the architecture has no language
            model, or no sequence classifier with its head in `score`.
        OSError: the model is no local folder, and the hub does not give it.
    """
    check_model_folder(model.model_name_or_path)
    bits = quantization(model)
    name, source, config = model_config(model, trust_remote_code=trust_remote_code)
    with reached(name):
        tokenizer = load_tokenizer(name, **source)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{name}: the tokenizer has no end-of-text token. Set eos_token in its tokenizer_config.json."
        )
    if pad_token is not None:
        set_pad_token(tokenizer, pad_token, name)

    options = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if bits:  # by default transformers uses the first GPU, even with `use_cpu`
        options |= {"quantization_config": bits, "device_map": {"": PartialState().device}}
    if head:
        base, found = read_weights(AutoModelForSequenceClassification, name, config, num_labels=1, **source, **options)
    else:
        base, found = read_weights(AutoModelForCausalLM, name, config, **source, **options)
    check_finite(base.base_model if head else base, name)
    check_vocabulary(base, tokenizer, name)
    if head and not isinstance(getattr(base, "score", None), nn.Linear):
        raise ValueError(
            f"{name}: {type(base).__name__} does not keep its head in `score`. Use a decoder-only model "
            f"(GPT-2, Llama, Qwen, Mistral ...)."
        )
    _check_whole(base, found, name)
    if head:
        nn.init.normal_(base.score.weight, std=(base.score.in_features + 1) ** -0.5)
    ends = ends_of(base, name, model.model_revision)
    if pad_token is None:
        choose_pad_token(tokenizer, ends)
    pad_with(base, tokenizer.pad_token_id)
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # In eval mode, bitsandbytes would repack the weights for these CPUs, with scales rounded to bfloat16. A later
            # training pass would use them without gradients.
            layer.support_avx512bf16_for_cpu = False
    check_model(base, name)
    return fuse_gelu(base).requires_grad_(False), tokenizer


def _check_whole(base: PreTrainedModel, found: dict, name: str) -> None:
    """Check the loading report of transformers: the files had each tensor of the model and no others.

    The `score` of a classifier is new. Its files may also hold a language model head, which is not read.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; or the config ties tensors that differ in the files.
    """
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if base.get_output_embeddings() is None:
        missing -= {"score.weight"}
        unexpected = {key for key in unexpected if key.startswith(f"{base.base_model_prefix}.")}
    if getattr(base.config, "quantization_config", None):  # its scales, which are not tensors of the model
        unexpected = {key for key in unexpected if ".weight." not in key}
    shapes = sorted(f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, theirs, ours in found["mismatched_keys"])
    for problem, keys in (
        ("are missing from its files", sorted(missing)),
        ("in its files belong to no part of the model", sorted(unexpected)),
        ("in its files differ in shape from config.json", shapes),
    ):
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} tensors of {type(base).__name__} {problem} (first: {escaped(keys[0])}). Copy the "
                f"model anew, or correct `architectures` and `tie_word_embeddings` in config.json."
            )
    # transformers leaves them untied. Code that ties them later (a merged copy, vLLM, FSDP) would lose one of them.
    if apart := sorted(
        base.get_expanded_tied_weights_keys(all_submodels=True).keys() - base.all_tied_weights_keys.keys()
    ):
        raise ValueError(
            f"{name}: config.json ties {apart[0]} to another tensor (tie_word_embeddings), but their values in its files "
            f"differ. Set tie_word_embeddings to false in config.json."
        )


def ends_of(base: PreTrainedModel, name: str, revision: str | None) -> set[int]:
    """Return the ids of the tokens that end a text or a turn, from the model's config and its generation config."""
    found = [base.config.get_text_config().eos_token_id]
    try:  # a classifier is loaded without its generation config
        found.append(GenerationConfig.from_pretrained(name, revision=revision).eos_token_id)
    except OSError:  # the model has none; transformers treats the error in the same way
        pass
    ends = [end for ids in found if ids is not None for end in (ids if isinstance(ids, list) else [ids])]
    if odd := [end for end in ends if not isinstance(end, int) or isinstance(end, bool)]:
        raise ValueError(
            f"{name}: eos_token_id names {quoted(odd[0])}, which is no token's id. Correct generation_config.json."
        )
    return set(ends)


def pad_with(base: PreTrainedModel, pad_token_id: int) -> None:
    base.config.get_text_config().pad_token_id = pad_token_id
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.pad_token_id = pad_token_id
    embeddings = base.get_input_embeddings()
    # An adapter on the embeddings gets no gradient for the token of `padding_idx`.
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = pad_token_id


def quantization(model: ModelConfig) -> BitsAndBytesConfig | None:
    """Return the config that quantises the base to 4 bits (QLoRA; Dettmers et al. 2023, arXiv 2305.14314), or None.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: an option has no effect here; no dtype is named for the computation; or the launch would shard the
            weights.
    """
    if model.load_in_8bit:
        raise ValueError("load_in_8bit=True is not supported. Set load_in_4bit, or leave both unset.")
    if not model.load_in_4bit:
        return None
    if model.bnb_4bit_quant_storage:
        raise ValueError(
            f"bnb_4bit_quant_storage={model.bnb_4bit_quant_storage!r} is only for sharding, but a 4-bit base cannot be "
            f"sharded. Leave it unset."
        )
    if model.dtype in (None, "auto"):
        raise ValueError(
            f"dtype={model.dtype!r} names no dtype for load_in_4bit to compute in. Set dtype to bfloat16."
        )
    if (kind := kind_of(PartialState())) in ("FSDP", "ZeRO-3"):
        raise ValueError(
            f"load_in_4bit=True does not run under {kind}, which would shard the quantised weights. Launch with "
            f"accelerate_configs/ddp.yaml. Each GPU then holds the base, in a quarter of its bfloat16 memory."
        )
    if not is_bitsandbytes_available():
        raise ImportError("load_in_4bit=True needs bitsandbytes. Install it: pip install 'spine-rlhf[quantization]'.")
    return get_quantization_config(model)


def train_in_float32(model: nn.Module) -> None:
    """Convert all trainable parameters to float32.

    On a quantised base TRL rounds them to bfloat16, which loses the steps of a small learning rate.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the activation of GPT-2 by one kernel instead of eight, equal up to rounding, and return the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return model


# Config fields for the longest text of a model: of most families, MPT, BLOOM, Whisper.
CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length", "max_target_positions")


def context_length(model: PreTrainedModel | PeftModel) -> float:
    """Return how many tokens the model can read at once.

    It is infinite if the config has no bound, as for models without position embeddings (alibi, recurrent models).
    """
    config = model.config.get_text_config()
    return next((length for name in CONTEXTS if (length := getattr(config, name, None))), math.inf)
