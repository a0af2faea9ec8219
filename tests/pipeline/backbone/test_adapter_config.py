"""A stranger's adapter: each field of its config and each tensor is usable, or is refused by name, in no time and memory."""

import copy
import dataclasses
import json
import resource
import shutil
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from pipeline.backbone.adapter_config import LEAVES_BASE, UNUSED, USED, read_adapter_config
from pipeline.backbone.adapter_tensors import HEAD, WEIGHTS
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone


pytestmark = pytest.mark.slow


SECONDS, BYTES = 5, 10**9
HANGS = r"((a|[a-z.0-9_])+)+!"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"
# Values that no field but the one they are for can use.
HOSTILE = [
    None,
    True,
    "text",
    HANGS,
    ESCAPES,
    "x" * 100_000,
    -1,
    0,
    0.5,
    3e7,
    30_000_000,
    10**400,
    float("nan"),
    float("inf"),
    [],
    {},
    [HANGS],
    [[0, 9], [0, 9]],
    [5, 6],
    {HANGS: 4},
    {"c_attn": HANGS},
    {"a": [{"b": ESCAPES}]},
    ["x"] * 50_000,
]
FIELDS = sorted(
    {field.name for field in dataclasses.fields(LoraConfig)} | UNUSED.keys() | {"enable_lora", "of_peft_9"}
)
# Values of the lists above with which an adapter is another one, and a good one.
OTHERWISE = {"use_rslora", "lora_dropout", "lora_alpha", "exclude_modules"}


@pytest.fixture(scope="module")
def base(tiny):
    return load_pretrained(ModelConfig(tiny))[0]


@contextmanager
def within_bounds() -> Iterator[None]:
    """Bound time and memory of the code inside."""
    used = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line
    )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + BYTES, before[1]))
    signal.signal(signal.SIGALRM, lambda *args: pytest.fail(f"{SECONDS} seconds have passed"))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def with_config(folder: Path, **fields) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


def logits(base, folder: Path) -> torch.Tensor:
    """Return the logits of the policy that an adapter makes of a copy of the base."""
    backbone = Backbone(copy.deepcopy(base), read_adapter(str(folder), base=base)).eval()
    with torch.no_grad():
        return backbone(input_ids=torch.arange(5, 13)[None]).logits


def outcome(work):
    """Return what comes out, or the message of our error: one line that a terminal shows as it is."""
    try:
        return work(), None
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.isprintable() and len(message) < 900, message
        assert "copy" in message  # the folder's name
        return None, message


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_with_hostile_values(field, base, sft_adapter, tmp_path):
    good = logits(base, Path(sft_adapter))
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "copy"))
    config = json.loads((folder / "adapter_config.json").read_text())
    refused = 0
    for value in HOSTILE:
        (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        with within_bounds():
            found, message = outcome(lambda: logits(base, folder))
        if found is not None and field not in OTHERWISE:
            assert torch.equal(found, good), (field, value)
        if message is not None:
            refused += 1
            assert any(word in message for word in (field, "rank", "do not match", "not LORA")), (
                field,
                value,
                message,
            )
    assert refused >= len(HOSTILE) // 2


def test_every_field_of_peft_has_a_group():
    """A field of a new peft must be thought about: it is refused until then, unless it is off."""
    off = {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known - {"peft_type"} == (USED.keys() | UNUSED.keys() | LEAVES_BASE.keys() | off) - {"merge_weights"}


# What each version of peft wrote into the config of a plain adapter, besides what those before it did.
VERSIONS = {
    "0.2": {"merge_weights": False, "enable_lora": None, "lora_alpha": 8, "lora_dropout": 0.0},
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "revision": None, "layers_to_transform": None, "layers_pattern": None},
    "0.6": {"rank_pattern": {}, "alpha_pattern": {}},
    "0.7": {"megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.15": {"trainable_token_indices": None, "corda_config": None},
    "0.16": {"use_qalora": False, "qalora_group_size": 16},
    "0.17": {"target_parameters": None},
    "0.18": {
        "peft_version": "0.18.1",
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
    },
    "0.19": {"lora_ga_config": None, "use_bdlora": None},
}
MADE_ELSEWHERE = {
    "no task": {"task_type": None, "auto_mapping": {"base_model_class": "GPT2LMHeadModel", "parent_library": "own"}},
    "trained and converted": {"corda_config": {"corda_method": "kpm"}, "loftq_config": {"loftq_bits": 4}},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "rank_pattern": {"transformer.h.0.attn.c_attn": 4}},
    "patterns that are of no layer": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"^model.layers.0$": 3}},
    "alpha by layer": {"lora_alpha": 99, "alpha_pattern": {"c_attn": 8, "^transformer.h.0.attn.c_proj$": 8, "c_fc": 8,
                                                         "c_proj": 8}},
    "layers by number": {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    "all linear layers": {"target_modules": "all-linear"},
    "peft's choice": {"target_modules": None},
    "names of other families too": {"target_modules": ["c_attn", "c_proj", "c_fc", "q_proj"]},
    "a field of a later version that is off": {"of_peft_9": None, "and_another": False},
}  # fmt: skip


def configs() -> dict[str, dict]:
    plain = {
        "base_model_name_or_path": "owner/model",
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "task_type": "CAUSAL_LM",
    }
    found = {}
    for version, fields in VERSIONS.items():
        plain = {**plain, **fields}
        if version == "0.3":
            del plain["merge_weights"], plain["enable_lora"]
        found[version] = plain
    return found | {name: {**plain, **fields} for name, fields in MADE_ELSEWHERE.items()}


@pytest.mark.parametrize("config", configs().values(), ids=configs())
def test_adapters_of_every_version_and_of_others(config, base, sft_adapter, tmp_path):
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "copy"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(base, folder), logits(base, Path(sft_adapter)))


def test_what_is_not_used_is_not_handed_on(base, sft_adapter, tmp_path):
    """A run's own adapter does not name what a stranger would have others import."""
    folder = with_config(Path(shutil.copytree(sft_adapter, tmp_path / "copy")), auto_mapping={"parent_library": "own"})
    Backbone(copy.deepcopy(base), read_adapter(str(folder), base=base)).save_role("policy", tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["auto_mapping"] is None


def test_a_pattern_is_told_the_names_to_write(base, sft_adapter, tmp_path):
    folder = with_config(Path(shutil.copytree(sft_adapter, tmp_path / "copy")), target_modules=r".*c_(attn|fc)")
    message = (
        r"'target_modules' is .*Write the names as a list instead, \['c_attn', 'c_fc', 'c_proj'\] by the adapter's t"
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(str(folder), base=base)


def test_an_adapter_of_patterns_and_ranks_by_layer(base, tmp_path):
    """Compare with what peft makes of ranks by layer, also where the base has adapters already."""
    options = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["c_attn", "c_fc", "transformer.wte"],
        "fan_in_fan_out": True,
    }
    ranks = {"h.0.attn.c_attn": 2, "^transformer.wte": 3, "c_fc$": 5}
    config = LoraConfig(**options, rank_pattern=ranks, init_lora_weights=False, use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "saved")
    backbone = Backbone(copy.deepcopy(base), read_adapter(str(tmp_path / "saved"), base=base))
    backbone.add_role("reference", read_adapter(str(tmp_path / "saved"), base=backbone.get_base_model()))
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert torch.equal(backbone.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# ------------------------------------------------------------------------------------ tensors
def sparse(folder: Path, key: str, shape: list[int], dtype: str = "F32") -> None:
    """Replace or add a tensor that takes no room on the disk."""
    rest = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items() if name != key}
    header, place = {}, 0
    for name, tensor in sorted(rest.items()):
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    size = {"F32": 4, "F8_E4M3": 1, "I64": 8}[dtype]
    for side in shape:
        size *= side
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(rest.items()):
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + place + size)


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
TENSORS = {
    "4 GB": (FIRST, [2**25, 32], "F32", r"has shape \(33554432, 32\), but needs \(4, 32\)"),
    "4 GB of another name": (f"{FIRST}.x", [2**25, 32], "F32", r"1 tensors of the adapter do not match"),
    "4 GB for the embeddings": (
        "base_model.model.transformer.wte.weight",
        [2**25, 32],
        "F32",
        r"holds 'base_model\.model\.transformer\.wte\.weight', which is not a LoRA tensor .*would change the backbone",
    ),
    "4 GB for the head": (HEAD, [1, 2**30], "F32", r"the score head reads 1073741824 hidden units"),
    "a head of no shape": (HEAD, [], "F32", r"has the shape \(\), but a reward adapter has 1 output"),
    "fp8": (FIRST, [4, 32], "F8_E4M3", r"is of F8_E4M3, not of a floating-point type that is trained"),
    "whole numbers": (FIRST, [4, 32], "I64", r"is of I64, not of a floating-point"),
    "no rows": (FIRST, [0, 32], "F32", r"has shape \(0, 32\), but needs \(4, 32\)"),
    "one side": (FIRST, [128], "F32", r"has shape \(128,\), but needs \(4, 32\)"),
    "a name with escapes": (f"{ESCAPES}.lora_A", [4, 32], "F32", r"first: '\\\\?x1b|do not match"),
}


@pytest.mark.parametrize(("key", "shape", "dtype", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_are_compared_before_they_are_read(key, shape, dtype, message, base, reward_adapter, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "copy"))
    sparse(folder, key, shape, dtype)
    with within_bounds():
        _, said = outcome(lambda: read_adapter(str(folder), needs_head=True, base=base))
    assert said is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


def test_a_rank_that_tensors_and_config_agree_on(base, sft_adapter, tmp_path):
    """It would fill the memory, although nothing contradicts it."""
    folder = with_config(Path(shutil.copytree(sft_adapter, tmp_path / "copy")), r=2**16, target_modules=["c_attn"])
    rows = {"A": [2**16, 32], "B": [96, 2**16]}
    save_file({}, folder / WEIGHTS)
    for layer in (0, 1):
        for part in "AB":
            sparse(folder, f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{part}.weight", rows[part])
    with within_bounds():
        _, said = outcome(lambda: read_adapter(str(folder), base=base))
    assert "names the rank 65536, but the layers that it adapts have ranks of at most 32" in said


def test_a_header_that_is_too_long(sft_adapter, tmp_path):
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "copy"))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)
    with within_bounds():
        _, said = outcome(lambda: read_adapter(str(folder)))
    assert "the header takes 67,108,864 bytes" in said


def test_embeddings_beside_an_adapter_must_be_those_of_the_base(tmp_path):
    """peft saves them when an adapter is on `embed_tokens`."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, **shape))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "copy")
    (kept,) = (key for key in load_file(tmp_path / "copy" / WEIGHTS) if "lora_" not in key)
    backbone = Backbone(copy.deepcopy(base), read_adapter(str(tmp_path / "copy"), base=base))
    assert torch.equal(
        backbone.get_base_model().get_input_embeddings().base_layer.weight, base.model.embed_tokens.weight
    )
    tensors = load_file(tmp_path / "copy" / WEIGHTS)
    tensors[kept][0, 0] += 1
    save_file(tensors, tmp_path / "copy" / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"embed_tokens\S*weight', which is not a LoRA tensor and not the backbone's own"
    ):
        Backbone(copy.deepcopy(base), read_adapter(str(tmp_path / "copy"), base=base))


def test_ours_is_read(sft_adapter, reward_adapter):
    for folder in (sft_adapter, reward_adapter):
        assert read_adapter_config(folder, Path(folder))["r"] == 4
