"""Damage to the files that a stage reads: JSON, field by field, and safetensors."""

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.listing import LISTING
from tests.faults.deaths import left, undisturbed
from tests.faults.verdicts import RIGHT, SILENT, Verdict, judge
from tests.faults.world import Case, unsound


# Which files of which folders a stage reads, and the options with which it does.
READS = {
    "sft": {"base": ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")},
    "reward": {"base": ("config.json", "tokenizer_config.json"), "sft": ("adapter_config.json", "backbone.json")},
    "ppo": {
        "base": ("config.json", "generation_config.json", "tokenizer_config.json"),
        "sft": ("adapter_config.json", "backbone.json", "tokenizer.json", "tokenizer_config.json", "metrics.json"),
        "reward": (
            "adapter_config.json",
            "backbone.json",
            "metrics.json",
            "score_normalization.json",
            "tokenizer_config.json",
        ),
    },
    "evaluation": {
        "base": ("generation_config.json",),
        "sft": ("adapter_config.json", "metrics.json"),
        "ppo": ("adapter_config.json", "backbone.json", "metrics.json", "tokenizer.json"),
        "reward": ("adapter_config.json", "metrics.json", "score_normalization.json"),
    },
    "best_of_n": {"evaluation": ("report.json",), "reward": ("score_normalization.json", "adapter_config.json")},
    "resume": {
        "ppo": ("manifest.json", "trainer_state.json", "state_0.json", "adapter_config.json", "tokenizer_config.json")
    },
}
SCHEMES = {
    "best_of_n": {"report": "evaluation/report.json", "normalize_scores": True},
    "ppo": {"normalize_scores": True},
}
SCHEMES |= {"evaluation": {"normalize_scores": True}}
VALUES = (
    None, True, False, 0, -1, 1, 2, 10**9, 3e7, 1e308, -1e-320, 0.5, "", "a", "1", "\x1b[31m", "é" * 50, "x" * 10000, [], [1],
    ["a"], [[]], {}, {"a": 1}, math.nan, math.inf, "((a|[a-z.0-9_])+)+!", ".*", "all-linear", "../../..", 2**63, 2**64,
    "NaN", {"__tensor__": "nowhere"}, {"__float__": "x"}, [None] * 3, "float8_e4m3fn",
)  # fmt: skip
EXTRA = (
    ("auto_map", {"AutoModel": "x.Y"}), ("alora_invocation_tokens", [1]), ("rank_pattern", {"c_attn": 3}), ("use_dora", True),
    ("alpha_pattern", {"((a|[a-z.0-9_])+)+!": 3}), ("exclude_modules", "((a|[a-z.0-9_])+)+!"), ("use_rslora", True),
    ("layers_to_transform", [0]), ("layers_pattern", "((a|[a-z])+)+!"), ("modules_to_save", ["wte"]), ("bias", "all"),
    ("target_parameters", ["a"]), ("init_lora_weights", "pissa"), ("lora_bias", True), ("quantization_config", {}), ("é", 1),
    ("loftq_config", {"a": 1}), ("megatron_config", {"a": 1}), ("runtime_config", {"a": 1}), ("corda_config", {"a": 1}),
)  # fmt: skip


def nodes(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in a nested value."""
    found = [path]
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))[:3]
    else:
        entries = []
    for key, entry in entries:
        found += nodes(entry, (*path, key))
    return found


def damage_json(draw: random.Random, path: Path) -> tuple[str, list[str], bool]:
    """Damage a JSON file.

    Return what was done, the names of what was damaged, and whether a field is lost or of another type.
    """
    content = path.read_bytes()
    value = json.loads(content)
    how = draw.choice(("set",) * 6 + ("drop", "drop", "rename", "add", "add", "bytes", "root"))
    if how == "bytes":
        at = draw.randrange(len(content))
        kind, damaged = draw.choice(
            (
                ("cut", content[:at]),
                ("a byte", content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]),
                ("empty", b""),
                ("UTF-16", content.decode().encode("utf-16")),
                ("deep", b"[" * 100_000),
                ("a BOM", b"\xef\xbb\xbf" + content),
                ("a long number", content.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
                ("NUL", content + b"\0"),
            )
        )
        path.write_bytes(damaged)
        return kind, [], False
    if how == "root":
        value = draw.choice(VALUES + ([value],))
        path.write_text(json.dumps(value))
        return f"root: {json.dumps(value)[:40]}", [], False
    if how == "add" and isinstance(value, dict):
        key, entry = draw.choice(EXTRA)
        value[key] = entry
        path.write_text(json.dumps(value))
        return f"{key}: {json.dumps(entry)[:40]}", [key], key in ("alora_invocation_tokens", "use_dora", "bias")
    first = draw.choice([key for key in value]) if isinstance(value, dict) and value else None
    if first is None:
        return "nothing", [], False
    *parents, last = draw.choice(nodes(value[first], (first,)))
    holder = value
    for key in parents:
        holder = holder[key]
    where = ".".join(map(str, (*parents, last)))
    odd = True
    if how == "drop":
        del holder[last]
        done = f"without {where}"
    elif how == "rename" and isinstance(holder, dict):
        holder[f"{last}_"] = holder.pop(last)
        done = f"{where} renamed"
    else:
        old, holder[last] = holder[last], draw.choice([entry for entry in VALUES])
        numbers = all(isinstance(value, (int, float)) for value in (old, holder[last]))
        odd = not numbers and old is not None and type(old) is not type(holder[last])
        done = f"{where}: {json.dumps(old)[:30]} -> {json.dumps(holder[last])[:30]}"
    path.write_text(json.dumps(value))
    return done, [str(name) for name in (first, last) if not str(name).isdigit()], odd


def options_for(stage: str) -> tuple[str, dict]:
    """Return the command of a scheme, and its options."""
    if stage == "resume":
        return "ppo", {
            "output_dir": "ppo",
            "save_strategy": "steps",
            "save_steps": 1,
            "resume_from_checkpoint": "auto",
        }
    return stage, SCHEMES.get(stage, {})


def damaged_json(case: Case) -> Verdict:
    """One JSON file that a stage reads is damaged."""
    scheme = case.draw.choice(sorted(READS))
    folder = case.draw.choice(sorted(READS[scheme]))
    name = case.draw.choice(READS[scheme][folder])
    path = case.folder / folder / ("checkpoint-4" if scheme == "resume" else "") / name
    done, fields, odd = damage_json(case.draw, path)
    listed = path.parent / LISTING
    # With the list of a save's files, each file that was changed is refused. Adapters from elsewhere have no such list.
    if scheme != "resume" and listed.exists() and case.draw.random() < 0.5:
        listed.unlink()
        done += ", unlisted"
    case.note(f"{scheme} {folder}/{name}: {done}")
    verdict = run_on_damage(case, scheme, path, fields, refused=scheme == "resume" and done != "nothing")
    if (
        verdict.name == RIGHT
        and odd
        and name in ("adapter_config.json", "score_normalization.json")
        and scheme != "resume"
    ):
        stage, options = options_for(scheme)
        whole = undisturbed(case, f"json {scheme}", stage, {"output_dir": "out", **options})
        now = left(case.folder / "out")
        changed = [
            one
            for one in whole
            if one.endswith((".safetensors", "report.json", "_n.json")) and now.get(one) != whole[one]
        ]
        return Verdict(SILENT, f"it was taken, and changed {changed[0]}") if changed else verdict
    return verdict


def run_on_damage(case: Case, scheme: str, path: Path, fields: list[str], *, refused: bool) -> Verdict:
    stage, options = options_for(scheme)
    out = options.get("output_dir", "out")
    before = case.files()
    if scheme == "resume":
        (case.folder / out / "checkpoint-3").rename(case.folder / "other")
        before = case.files()
        options = options | {"max_steps": 6}
    ended = case.run(stage, **options)
    folder = path.parent.name
    names = [path.name, str(path.parent), f"{folder}/", f"{folder}:", f"'{folder}'", *fields]

    def wrong() -> str | None:
        return "the damaged file was taken" if refused else unsound(stage, case.folder / out)

    return judge(ended, names=names, lost=case.changed(before, but=() if ended.code else (out,)), wrong=wrong)


# ------------------------------------------------------------------------------------ safetensors
WEIGHTS = {
    "sft": ("base/model",),
    "reward": ("base/model", "sft/adapter_model"),
    "ppo": ("base/model", "sft/adapter_model", "reward/adapter_model"),
    "evaluation": ("ppo/adapter_model", "sft/adapter_model", "reward/adapter_model"),
}
STATE = ("adapter_model.safetensors", "state_0.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def damage_weights(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Damage a file of tensors; return what was done, and whether no run may take it."""
    content = path.read_bytes()
    at = draw.randrange(len(content))
    kinds = ["cut", "byte", "header", "empty", "text", "longer", "huge header"]
    if path.suffix == ".safetensors":
        kinds += [
            "nan",
            "inf",
            "dtype",
            "int",
            "gone",
            "renamed",
            "extra",
            "shape",
            "nan",
            "empty tensor",
            "fp8",
            "huge",
        ]
    how = draw.choice(kinds)
    if how in ("nan", "inf", "dtype", "int", "gone", "renamed", "extra", "shape", "empty tensor", "fp8", "huge"):
        tensors = load_file(path)
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        if how in ("nan", "inf"):
            if not tensor.is_floating_point():
                return "nothing", False
            tensor.view(-1)[draw.randrange(tensor.numel())] = math.nan if how == "nan" else math.inf
        elif how == "huge":
            tensors[name] = torch.full_like(tensor, 3e38) if tensor.is_floating_point() else tensor
        elif how == "gone":
            del tensors[name]
        elif how == "renamed":
            tensors[f"{name}x"] = tensors.pop(name)
        elif how == "extra":
            tensors["x"] = torch.zeros(1)
        elif how == "shape":
            tensors[name] = tensor[..., :-1].contiguous() if tensor.numel() > 1 else torch.zeros(2)
        elif how == "empty tensor":
            tensors[name] = torch.zeros(0)
        else:
            tensors[name] = tensor.to({"dtype": torch.float64, "int": torch.int32, "fp8": torch.float8_e4m3fn}[how])
        save_file(tensors, path, metadata={"format": "pt"})
        rounds = how in ("int", "fp8") and path.parent.name == "base"  # a model may come in any type
        return f"{how} {name}", how not in ("dtype", "extra", "huge") and not rounds
    length = int.from_bytes(content[:8], "little")
    header = bytes(
        draw.randrange(256) if draw.random() < 0.02 else byte for byte in content[8 : 8 + min(length, 4096)]
    )
    damaged = {
        "cut": content[:at],
        "byte": content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :],
        "header": content[:8] + header + content[8 + len(header) :],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "longer": content + b"\0" * 16,
        "huge header": (2**62).to_bytes(8, "little") + content[8:],
    }[how]
    path.write_bytes(damaged)
    return how, how not in ("byte", "header")


def damaged_weights(case: Case) -> Verdict:
    """One file of weights or of state that a stage reads is damaged."""
    scheme = case.draw.choice(("sft", "reward", "ppo", "ppo", "evaluation", "resume", "resume"))
    if scheme == "resume":
        path = case.folder / "ppo" / "checkpoint-4" / case.draw.choice(STATE)
    else:
        path = case.folder / f"{case.draw.choice(WEIGHTS[scheme])}.safetensors"
    content = path.read_bytes()
    done, refused = damage_weights(case.draw, path)
    case.note(f"{scheme} {path.relative_to(case.folder)}: {done}")
    changed = path.read_bytes() != content
    refused = changed and (refused or scheme == "resume")
    tensor = done.partition(" ")[2]
    return run_on_damage(case, scheme, path, [tensor] if tensor else [], refused=refused)
