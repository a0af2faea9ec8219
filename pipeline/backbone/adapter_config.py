"""Read the config of a LoRA adapter that anybody may have written: accept what we can use, and refuse the rest by name.

peft would take most values as they are: patterns that match for ever, a rank that fills the memory, options that change the
backbone or train nothing. So each field is in one of four groups here. An adapter without options of its own, as any version
of peft from 0.2 on writes it, passes.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType

from data.json_files import RESTORE, check_object, read_json
from data.quoting import escaped, quoted
from data.schemas import (
    ANYTHING,
    BOOLEAN,
    NULL,
    OBJECT,
    TEXT,
    Kind,
    either,
    fault,
    list_of,
    nullable,
    number,
    one_of,
    record,
    text,
    whole,
)


ADAPTER_CONFIG = "adapter_config.json"
# peft reads names in some fields as regular expressions. The characters of a module's name are safe in one, and `^` and `$`,
# which peft's users put around it.
NAME = text(r"\^?[\w.-]{1,300}\$?", "the name of a module, not a pattern,")
NAMES = list_of(NAME, high=20_000)
RANK, ALPHA = whole(1, 2**16), number(1e-6, 1e6)


def _by_name(kind: Kind) -> Kind:
    return Kind(
        f"an object from names of modules, not patterns, to {kind.words}",
        lambda value: isinstance(value, dict) and len(value) <= 20_000 and all(map(NAME.holds, value)),
        each=kind,
    )


# 1. Fields that peft gets.
USED: dict[str, Kind] = {
    "task_type": nullable(one_of(*(str(kind.value) for kind in TaskType))),
    "inference_mode": BOOLEAN,
    "base_model_name_or_path": nullable(TEXT),
    "revision": nullable(TEXT),
    "peft_version": nullable(TEXT),
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": number(0, 0.999),
    "fan_in_fan_out": BOOLEAN,
    "use_rslora": BOOLEAN,
    "use_dora": BOOLEAN,
    "target_modules": either(NAMES, one_of("all-linear", None)),
    "exclude_modules": either(NAMES, NULL),
    "layers_to_transform": nullable(either(whole(0, 10_000), list_of(whole(0, 10_000), high=10_000))),
    "layers_pattern": either(NAMES, NAME, one_of("", None)),
    "rank_pattern": nullable(_by_name(RANK)),
    "alpha_pattern": nullable(_by_name(ALPHA)),
    "modules_to_save": nullable(list_of(one_of("score", "classifier"), high=100)),
    "init_lora_weights": ANYTHING,  # `LEAVES_BASE` says which
    "bias": ANYTHING,
}
# 2. Fields that can make peft change the base as it loads the adapter, and the values that do not.
LEAVES_BASE: dict[str, tuple] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "kasa_config": (None,),
}
# 3. Fields that change nothing here: notes of peft, and how the weights were first drawn.
UNUSED: dict[str, Kind] = {
    "auto_mapping": nullable(OBJECT),
    "megatron_core": nullable(TEXT),
    "merge_weights": BOOLEAN,  # of peft 0.2
    "qalora_group_size": whole(),
    "runtime_config": nullable(OBJECT),
    "loftq_config": nullable(OBJECT),
    "eva_config": nullable(OBJECT),
    "corda_config": nullable(OBJECT),
    "lora_ga_config": nullable(OBJECT),
}
# 4. Any other field asks for a kind of LoRA that the backbone does not run (aLoRA, Arrow, a bias, parameters as targets ...),
# or comes from a later version. It must be off.
OFF: tuple = (None, False, "", [], {})

SCHEMA = record(None, {**USED, **UNUSED})
# An adapter on a classifier of its own may train any modules whole: no role shares them.
OWN_SCHEMA = record(None, {**USED, **UNUSED, "modules_to_save": nullable(list_of(NAME, high=100))})


def read_adapter_config(
    name: str, folder: Path, modules: Collection[str] = (), *, trains_modules: bool = False
) -> dict[str, Any]:
    """Read an adapter's config file, and check each of its fields.

    Args:
        modules: those that its tensors name.
        trains_modules: whether it may name any modules that it trains whole, and not a score head alone.

    Raises:
        ValueError: the file cannot be read; the adapter is not of LoRA; it changes the backbone; or a field has a value that
            cannot be used.
    """
    path = folder / ADAPTER_CONFIG
    found = read_json(path)
    if found.get("peft_type") != "LORA":
        kind = escaped(found.get("peft_type"), 60)
        raise ValueError(f"{name}: the adapter is of type {kind}, not LORA. Name a LoRA adapter.")
    for field, harmless in LEAVES_BASE.items():
        value = found.get(field, harmless[0])
        if not any(type(value) is type(one) and value == one for one in harmless):
            raise ValueError(
                f"{name}: {ADAPTER_CONFIG} has {field}={quoted(value)}, so the adapter changes the backbone itself, which all "
                f"roles share. Train an adapter with {field}={harmless[0]!r}, or merge this one into its model and name the "
                f"merged model in model_name_or_path."
            )
    schema = OWN_SCHEMA if trains_modules else SCHEMA
    check_object(found, escaped(path), schema, remedy=_remedy(found, modules))
    for field in sorted(found.keys() - USED.keys() - UNUSED.keys() - LEAVES_BASE.keys() - {"peft_type"}):
        value = found[field]
        if not any(type(value) is type(off) and value == off for off in OFF):
            known = field in LoraConfig.__dataclass_fields__
            why = "the backbone runs no such adapter" if known else "no version of peft that we know writes it"
            raise ValueError(
                f"{escaped(path)}: {escaped(field, 60)}={quoted(value)} is not supported: {why}. Train the adapter without "
                f"it. If the adapter does not depend on it, remove the field."
            )
    return found


def _remedy(found: dict, modules: Collection[str]) -> str:
    """Return the remedy for a field that does not fit: for a pattern of modules, the names to write instead of it."""
    if fault(found.get("target_modules"), USED["target_modules"]) is None or not isinstance(
        found["target_modules"], str
    ):
        return "Correct the field, or name another adapter."
    names = sorted({module.rpartition(".")[2] for module in modules})
    return f"A pattern may match for ever. Write the names as a list instead, {quoted(names, 300)} by the adapter's tensors."


def peft_config(name: str, found: dict[str, Any]) -> LoraConfig:
    """Return peft's config of an adapter, from fields that `read_adapter_config` checked.

    Raises:
        ValueError: fields contradict each other.
    """
    fields = {field: value for field, value in found.items() if field in USED}
    if isinstance(fields.get("init_lora_weights"), str):
        fields["init_lora_weights"] = True  # the weights come from the file
    for pattern in ("rank_pattern", "alpha_pattern"):
        if fields.get(pattern) is None:
            fields.pop(pattern, None)
    try:
        return LoraConfig(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: {ADAPTER_CONFIG} contradicts itself ({escaped(error).rstrip('. ')}). {RESTORE}"
        ) from error
