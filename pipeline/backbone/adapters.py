"""Find adapters in standard peft folders, check them without loading a model, and read them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data.json_files import read_json
from data.quoting import escaped, quoted
from data.saving import check_saved
from data.schemas import IDENTITY, METRICS
from pipeline.backbone.adapter_config import ADAPTER_CONFIG, peft_config, read_adapter_config
from pipeline.backbone.adapter_tensors import HEAD, WEIGHTS, check_fits, is_lora, module_of, read_header
from pipeline.backbone.architecture import LARGEST_WEIGHT, all_finite
from pipeline.backbone.identity import IDENTITY as IDENTITY_FILE
from pipeline.backbone.identity import fingerprint, precision_of
from pipeline.backbone.padding import check_pad_token


def adapter_folder(name: str) -> Path:
    """Return the local folder of an adapter; fetch it from the hub if `name` is not a local folder.

    On the hub, an adapter is `owner/name` or `owner/name@revision`, where a revision is a branch, a tag or a commit. Only
    JSON and safetensors are fetched.

    Raises:
        FileNotFoundError: there is no such folder, and no such adapter on the hub; or an error of `check_saved`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        check_saved(path, "adapter")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise FileNotFoundError(
            f"adapter {name!r}: {path / ADAPTER_CONFIG}: no such file. Name the folder that `trainer.save_model` wrote "
            f"({ADAPTER_CONFIG} and {WEIGHTS}). An adapter on the hub is named `owner/name` or `owner/name@revision`."
        )
    repository, _, revision = name.partition("@")
    offline = is_offline_mode()  # huggingface_hub 1 would ask the hub about a commit that the cache has
    only = ["*.json", "*.safetensors"]
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=only, local_files_only=offline)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        if offline:
            reason = "HF_HUB_OFFLINE is set, and the cache does not have it"
        raise FileNotFoundError(
            f"{name}: no such folder (looked for {path.absolute()}), and no such adapter on the hub ({reason}). Train the "
            f"adapter first, or correct the path. A private adapter needs `hf auth login`."
        ) from error


def check_adapter(name: str, *, needs_head: bool | None) -> Path:
    """Check that `name` is a LoRA adapter, by its config and the header of its weights, and return its local folder.

    Args:
        needs_head: True: it must have a score head; False: it must not have one; None: both are accepted.

    Raises the errors of `read_header`, `read_adapter_config` and, for an adapter that must have a head, `read_metrics`, and:
        FileNotFoundError: the folder, its config or its safetensors file is missing.
        ValueError: the head is missing, of another size, or not allowed here.
    """
    folder = adapter_folder(name)
    for file in (ADAPTER_CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            model = any(folder.glob("model*.safetensors"))
            hint = ""
            if model and needs_head:
                hint = (
                    f" This is a whole model. Write reward_models.pretrained.get_model(name={name!r}) in reward_funcs, or "
                    f"name a LoRA adapter on the policy's backbone."
                )
            elif model:
                hint = " This is a whole model. Name a merged model in model_name_or_path."
            raise FileNotFoundError(
                f"adapter {name!r}: {folder / file}: no such file. Name the folder that `trainer.save_model` wrote "
                f"({ADAPTER_CONFIG} and {WEIGHTS}).{hint}"
            )
    tensors = read_header(folder / WEIGHTS)
    if needs_head and is_of_classifier(folder, tensors):
        raise ValueError(
            f"{name}: an adapter on a classifier of its own, not on the policy's backbone. Write "
            f"pipeline.backbone.rewards.get_reward_adapter(folder={name!r}) in reward_funcs."
        )
    read_adapter_config(name, folder, modules={module_of(key) for key in tensors if is_lora(key)})
    head = tensors.get(HEAD)
    if needs_head and head is None:
        raise ValueError(
            f"{name}: {WEIGHTS} holds no score head ({HEAD}), so it cannot score. Train the reward adapter with "
            f"modules_to_save=['score'] (pipeline.reward does)."
        )
    if needs_head and head is not None and (len(head) != 2 or head[0] != 1):
        outputs = f"{head[0]} outputs" if len(head) == 2 else f"the shape {head}"
        raise ValueError(
            f"{name}: the score head has {outputs}, but a reward adapter has 1 output. Train it with num_labels=1."
        )
    if head is not None and needs_head is False:
        raise ValueError(
            f"{name}: {WEIGHTS} holds a score head ({HEAD}), so it is a reward or value adapter. A policy cannot start from "
            f"it. Name an adapter of pipeline.sft here, and this one as reward_adapter."
        )
    if needs_head:
        read_metrics(folder)
    return folder


def is_of_classifier(folder: Path, tensors: Collection[str]) -> bool:
    """Tell whether an adapter is on a classifier that is no backbone: its head is not in `score`.

    Args:
        tensors: the names of its tensors.
    """
    head = any(not is_lora(key) for key in tensors) and HEAD not in tensors
    return head and read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"


def read_metrics(folder: str | Path) -> dict:
    """Read the metrics file beside an adapter; return an empty dict if there is none (the adapter was made elsewhere).

    Raises:
        ValueError: the file does not fit `data.schemas.METRICS`.
    """
    path = adapter_folder(str(folder)) / "metrics.json"
    remedy = "Restore the file. Without it, the figures of the adapter's training are left out."
    return read_json(path, METRICS, remedy=remedy) if path.is_file() else {}


def load_tokenizer(name: str, **source) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        ValueError: its files are damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except (ImportError, OSError):  # a package that is missing, or no such tokenizer
        raise
    except Exception as error:  # the readers raise types of all kinds, also a bare Exception
        if "trust_remote_code" in str(error):
            raise
        raise ValueError(
            f"{name}: the tokenizer's files are damaged ({escaped(error)}). Save the tokenizer there anew."
        ) from error
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or isinstance(longest, bool):
        raise ValueError(
            f"{name}: tokenizer_config.json has model_max_length={quoted(longest)}. Write a whole number."
        )
    return tokenizer


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
    """Read a standard peft adapter (a folder, a hub id or `owner/name@revision`) and check that it fits.

    Only safetensors are read. The adapter must fit the `base`, the pad token of the `tokenizer`, and its vocabulary, if a
    tokenizer was saved beside the adapter. If the adapter does not say with which pad token it was trained, the pad token
    is checked only for an adapter with a head: a policy does not depend on padding.

    Raises the errors of `check_adapter`, and:
        ValueError: the adapter was trained on another base, or with another tokenizer or pad token; or its tensors are
            not finite, or too large.
    """
    folder = check_adapter(name, needs_head=needs_head)
    made_for = check_base(name, folder, base)
    beside = None
    if tokenizer is not None and (folder / "tokenizer.json").is_file():
        beside = load_tokenizer(str(folder), trust_remote_code=False)
        vocabulary, ours = beside.get_vocab(), tokenizer.get_vocab()
        if vocabulary != ours:
            odd = next(iter(sorted(vocabulary.items() ^ ours.items())))[0]
            raise ValueError(
                f"{name}: the adapter was trained with another tokenizer ({len(vocabulary)} tokens, here {len(ours)}; "
                f"{quoted(odd)} is one that differs). Train the adapter with this tokenizer, or give the model its tokenizer."
            )
    config = peft_config(name, read_adapter_config(name, folder))
    if base is not None:
        check_fits(name, config, read_header(folder / WEIGHTS), base)
    tensors = load_file(folder / WEIGHTS)
    check_weights(folder, tensors)
    head = tensors.pop(HEAD, None)
    stored = made_for.get("pad_token_id")
    if tokenizer is not None and (stored is not None or (head is not None and (made_for or beside))):
        check_pad_token(name, stored, beside, tokenizer)
    return Adapter(name, config, tensors, head)


def check_base(
    name: str, folder: Path, base: PreTrainedModel | None, *, learned: Collection[str] = ()
) -> dict[str, Any]:
    """Return what an adapter's identity file says of its base; an empty dict without the file.

    Args:
        base: the model that it is to be used on; None checks nothing.
        learned: modules of the base that the adapter brings whole.

    Raises:
        ValueError: the adapter was trained on another base.
    """
    identity = folder / IDENTITY_FILE
    made_for = read_json(identity, IDENTITY) if identity.is_file() else {}
    if base is not None and identity.is_file():
        ours = fingerprint(base, learned=learned)
        theirs = made_for["fingerprint"]
        # A reward adapter does not depend on the language model head, and older adapters do not store its fingerprint.
        differ = [pair for pair in zip(theirs.split("+"), ours.split("+"), strict=False) if pair[0] != pair[1]]
        if differ:
            theirs, ours = differ[0]
            raise ValueError(
                f"{name}: the adapter was trained on another base, {escaped(made_for.get('model_name_or_path'))} "
                f"({escaped(made_for.get('precision', 'not quantised'))}, fingerprint {escaped(theirs[:12])}), than "
                f"{base.config._name_or_path} ({precision_of(base.config)}, {ours[:12]}). Train the adapter on this "
                f"base, or set model_name_or_path, load_in_4bit and bnb_4bit_quant_type to those of its own base."
            )
    return made_for


def check_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that the tensors of an adapter are finite numbers of a usual size.

    Raises:
        ValueError: one is not.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not all_finite([tensor], LARGEST_WEIGHT):
            problem = f"is of {tensor.dtype}, not of a floating-point type"
            if tensor.is_floating_point():
                problem = (
                    "is not finite" if not all_finite([tensor]) else "has weights above 1e8: its training diverged"
                )
            raise ValueError(f"{folder / WEIGHTS}: {escaped(key)} {problem}. Train the adapter anew.")
