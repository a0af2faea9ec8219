"""Check the tensors of an adapter from the header of its file, before a tensor is read or peft makes one.

A tensor is as large as its file says, and peft makes tensors of the ranks and for the layers that the adapter's config names.
So both are compared with the base first.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.quoting import escaped


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of all tensors in an adapter
# Name under which peft keeps the head of a sequence-classification adapter (`modules_to_save=["score"]`).
HEAD = f"{PREFIX}score.weight"
DTYPES = ("F32", "BF16", "F16", "F64")
LONGEST_HEADER = 32 * 2**20  # bytes, of the names and shapes of about 200,000 tensors
LEAST_RANK = 64  # a rank up to this one is accepted, however small the layers are
MANY = 1000  # names of modules; the names of more are looked at before peft compares each with each module

Shape = tuple[int, ...]


def read_header(path: Path, *, any_type: bool = False) -> dict[str, Shape]:
    """Return the name and shape of each tensor in a safetensors file, without reading a tensor.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged; or, without `any_type`, a tensor is of a type that is not trained.
    """
    shapes = {}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if LONGEST_HEADER < length <= path.stat().st_size:
            raise ValueError(
                f"{path}: the header takes {length:,} bytes, and at most {LONGEST_HEADER:,} are read. Name another file."
            )
        with safe_open(path, "np") as opened:  # "pt" would reserve memory for the whole file
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_slice(key)
                if not any_type and tensor.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path}: {escaped(key)} is of {tensor.get_dtype()}, not of a floating-point type that is trained "
                        f"({', '.join(DTYPES)}). Convert the tensors, or train the adapter anew."
                    )
                shapes[key] = tuple(tensor.get_shape())
    except SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error}). Correct its permissions.") from error
    return shapes


def damaged(path: Path, error: SafetensorError) -> ValueError:
    """Return the error for a safetensors file that cannot be read."""
    return ValueError(
        f"{path}: the file is damaged, perhaps by a copy or download that was cut short ({escaped(error)}). Copy or train it "
        f"anew."
    )


def is_lora(key: str) -> bool:
    return ".lora_" in key


def module_of(key: str) -> str:
    """Return the name of the module that a LoRA tensor belongs to."""
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def check_fits(name: str, config: LoraConfig, shapes: Mapping[str, Shape], base: PreTrainedModel) -> None:
    """Check that the tensors of an adapter are those that peft makes of its config on the base.

    `target_modules` that leave the choice to peft become the modules that the tensors name. Names and patterns that are of no
    module are dropped where there are many.

    Raises:
        ValueError: a rank is larger than the layers; or a tensor is missing, unknown, or of another shape.
    """
    output = base.get_output_embeddings()
    if output is None:  # a classifier: what an adapter of the language model changes in its head has no place here
        shapes = {key: of for key, of in shapes.items() if key.startswith(f"{PREFIX}{base.base_model_prefix}.")}
    elif HEAD in shapes and shapes[HEAD][-1] != output.weight.shape[1]:
        raise ValueError(
            f"{name}: the score head reads {shapes[HEAD][-1]} hidden units, but the backbone has {output.weight.shape[1]}. "
            f"The adapter was trained on another base. Name an adapter of this base."
        )
    lora = {key: of for key, of in shapes.items() if is_lora(key)}
    layers = _layers(base)
    if config.target_modules in (None, "all-linear"):
        config.target_modules = {module_of(key) for key in lora}
    elif len(config.target_modules) > MANY:
        config.target_modules &= {end for module in layers for end in _ends(module)}
    adapted = {module: layers[module] for module in layers if check_target_module_exists(config, module)}
    ranks = _ranks(name, config, adapted)
    expected = {
        f"{PREFIX}{module}.lora_{part}": of
        for module, layer in adapted.items()
        for part, of in _tensors(layer, ranks[module], config.use_dora).items()
    }
    of_others = {f"{PREFIX}{module}" for module, layer in adapted.items() if isinstance(layer, OTHERS)}
    check_tensors(name, {k: of for k, of in lora.items() if k.rpartition(".lora_")[0] not in of_others}, expected)
    if rest := shapes.keys() - lora.keys() - {HEAD}:
        ours = {base_name(key): tuple(tensor.shape) for key, tensor in base.state_dict().items()}
        for key in sorted(rest):
            if ours.get(base_name(key)) != shapes[key]:
                raise ValueError(of_the_base(name, key))


def check_tensors(name: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Check the names and shapes of an adapter's tensors.

    Raises:
        ValueError: they are not the expected ones.
    """
    if odd := sorted(found.keys() ^ expected.keys()):
        raise ValueError(
            f"{name}: {len(odd)} tensors of the adapter do not match the backbone (first: {escaped(odd[0])!r}). Name an "
            f"adapter of this base."
        )
    for key, shape in found.items():
        if shape != expected[key]:
            raise ValueError(
                f"{name}: {key} has shape {shape}, but needs {expected[key]} on this backbone. Its config names another rank, "
                f"or it was trained on another base. Name an adapter of this base."
            )


def without_the_base(name: str, weights: dict[str, Tensor], base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the LoRA tensors of an adapter.

    peft saves the embeddings and the head too when an adapter is on them. They must be those of the base.

    Raises:
        ValueError: a tensor would change the base.
    """
    lora = {key: tensor for key, tensor in weights.items() if is_lora(key)}
    if len(lora) < len(weights):
        ours = {base_name(key): tensor for key, tensor in base.state_dict().items()}
        for key in sorted(weights.keys() - lora.keys()):
            own = ours.get(base_name(key))
            if own is None or own.shape != weights[key].shape or not (weights[key].to(own) == own).all():
                raise ValueError(of_the_base(name, key))
    return lora


def of_the_base(name: str, key: str) -> str:
    """Return the message for a tensor that would change the base."""
    return (
        f"{name}: {WEIGHTS} holds {escaped(key)!r}, which is not a LoRA tensor and not the backbone's own. It would change "
        f"the backbone, which all roles share. Train the adapter without it, or merge it into its model and name the merged "
        f"model in model_name_or_path."
    )


def base_name(key: str) -> str:
    """Return the name of a tensor in the bare base."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


# ------------------------------------------------------------------------------------ what peft makes of a config
OTHERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)  # peft adapts them too, and their shapes are its own


def _layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of a base by name. Where it has adapters, their modules are left out."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None  # modules come right after the one that holds them
    for name, module in base.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        inside = None
        if isinstance(module, BaseTunerLayer):
            inside, module = f"{name}.", module.get_base_layer()
        found[name] = module
    return found


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return the inputs and outputs of a layer, or None if it has none."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if None in sizes else sizes  # type: ignore[return-value]  # of linear layers, also quantised ones


def _tensors(layer: nn.Module, rank: int, dora: bool) -> dict[str, Shape]:
    """Return the tensors of an adapter on a layer; their names follow `lora_`."""
    sizes = _sizes(layer)
    if sizes is None:
        return {}
    inputs, outputs = sizes
    made: dict[str, Shape] = {"A.weight": (rank, inputs), "B.weight": (outputs, rank)}
    if isinstance(layer, nn.Embedding):
        made = {"embedding_A": (rank, inputs), "embedding_B": (outputs, rank)}
    return made | ({"magnitude_vector": (outputs,)} if dora else {})


def _ranks(name: str, config: LoraConfig, adapted: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the rank of the adapter on each module. Patterns that are of no module are dropped from the config.

    Raises:
        ValueError: a module is none that LoRA adapts, or a rank is larger than the layers.
    """
    sizes = []
    for module, layer in adapted.items():
        size = _sizes(layer)
        if size is None and not isinstance(layer, OTHERS):
            raise ValueError(
                f"{name}: target_modules names {escaped(module)!r}, a {type(layer).__name__}, which no LoRA adapter changes. "
                f"Name an adapter of this base."
            )
        sizes.append(min(size) if size else 0)
    by_module = {}
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute)
        by_module[attribute] = keys = _first_keys(patterns, adapted)
        setattr(config, attribute, {key: patterns[key] for key in patterns if key in set(keys.values())})
    most = max([LEAST_RANK, *sizes])
    for rank in (config.r, *config.rank_pattern.values()):
        if rank > most:
            raise ValueError(
                f"{name}: the adapter's config names the rank {rank}, but the layers that it adapts have ranks of at most "
                f"{max(sizes, default=0)}. Correct r and rank_pattern, or name an adapter of this base."
            )
    keys = by_module["rank_pattern"]
    return {module: config.rank_pattern[keys[module]] if module in keys else config.r for module in adapted}


def _ends(module: str) -> list[str]:
    """Return a module's name and the ends of it that peft takes for the whole."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _first_keys(patterns: Collection[str], modules: Collection[str]) -> dict[str, str]:
    """Return the first of the patterns that names each module, as peft does: one with `^` names the whole."""
    if not patterns:
        return {}
    places: dict[str, tuple[int, str]] = {}
    for place, key in enumerate(patterns):
        places.setdefault(key.removesuffix("$"), (place, key))
    found = {}
    for module in modules:
        named = [places[end] for end in (f"^{module}", *_ends(module)) if end in places]
        if named:
            found[module] = min(named)[1]
    return found
