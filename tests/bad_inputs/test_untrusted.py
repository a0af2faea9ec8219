"""Files that a stranger may have written: nothing in them is run, and nothing is written outside of where it belongs.

Every payload leaves a marker when it is run, and a test shows that it does when it is loaded as it should not be.
"""

import io
import json
import pickle
import shutil
import socket
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from trl import ModelConfig

from data import human_ratings
from data.files import load_rows
from pipeline.backbone import adapters
from pipeline.backbone.adapters import WEIGHTS, read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import load_backbone


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


def plant(path: Path, marker: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".bin", ".pt", ".pth"):
        torch.save(Payload(marker), path)
    elif path.suffix == ".py":
        path.write_text(f"open({str(marker)!r}, 'w')\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}))
    else:
        path.write_bytes(pickle.dumps(Payload(marker)))


def test_a_payload_works(tmp_path, marker):
    plant(tmp_path / "a.bin", marker)
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert marker.exists()
    marker.unlink()
    plant(tmp_path / "a.pkl", marker)
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert marker.exists()


PLANTED = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pkl",
    "adapter_model.bin",
    "adapter_model.pt",
    "value/adapter_model.bin",
    "score.bin",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "custom_checkpoint_0.pkl",
    "pytorch_model/mp_rank_00_model_states.pt",
    "tokenizer.pkl",
    "setup.py",
    "modeling_gpt2.py",
    "tokenization_gpt2.py",
    "custom_generate/generate.py",
    "__init__.py",
]


@pytest.mark.parametrize("stage", ["ppo", "evaluation"])
def test_what_lies_beside_the_weights_is_not_run(stage, world, marker, monkeypatch):
    """In the folders of the model, the policy, the reference and the reward model, up to the first sample."""
    given = {
        "model_name_or_path": world.copy(world.tiny),
        "sft_adapter": world.copy(world.sft),
        "reward_adapter": world.copy(world.reward),
    }
    for folder in given.values():
        for name in PLANTED:
            plant(Path(folder) / name, marker)
    if stage == "evaluation":
        given["policy_adapter"] = given["sft_adapter"]

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr("transformers.Trainer.train", reached)
    monkeypatch.setattr("pipeline.evaluation.sample", reached)
    with pytest.raises(Reached):
        world.run(stage, **given)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "pytorch_model.bin.index.json"])
def test_a_model_that_is_only_pickled_is_refused(name, world, marker, refuses):
    folder = Path(world.copy(world.tiny))
    (folder / "model.safetensors").unlink()
    for each in {name, "pytorch_model.bin"}:
        plant(folder / each, marker)
    refuses(
        "sft",
        r"has no model\.safetensors \(only pytorch_model\.bin, which is a pickle and is not read",
        model_name_or_path=str(folder),
    )
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_pretrained(ModelConfig(str(folder)))
    assert not marker.exists()


@pytest.mark.parametrize("key", ["sft_adapter", "reward_adapter"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_that_is_only_pickled_is_refused(name, key, world, marker, refuses):
    folder = Path(world.copy(world.sft if key == "sft_adapter" else world.reward))
    (folder / WEIGHTS).unlink()
    plant(folder / name, marker)
    refuses("ppo", r"adapter_model\.safetensors: no such file", **{key: str(folder)})
    assert not marker.exists()


@pytest.mark.parametrize("source", ["tiny", "sft"])
def test_a_pickle_called_safetensors_is_not_run(source, world, marker, refuses):
    folder = Path(world.copy(getattr(world, source)))
    name = WEIGHTS if source == "sft" else "model.safetensors"
    torch.save(Payload(marker), folder / name)
    key = "sft_adapter" if source == "sft" else "model_name_or_path"
    refuses("ppo", "damaged", loads=source == "tiny", **{key: str(folder)})
    assert not marker.exists()


@pytest.mark.parametrize(
    "option",
    [
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "planted"},
        {"auto_mapping": {"base_model_class": "Model", "parent_library": "planted"}},
    ],
    ids=["megatron", "auto_mapping"],
)
def test_an_adapters_config_imports_nothing(option, world, marker, monkeypatch):
    plant(world.folder / "planted.py", marker)
    monkeypatch.syspath_prepend(str(world.folder))
    folder = Path(world.copy(world.sft))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **option}))
    with suppress(ValueError, ImportError):  # peft's own refusal
        load_backbone(ModelConfig(world.tiny), str(folder))
    assert "planted" not in sys.modules
    assert not marker.exists()


# ------------------------------------------------------------------------------------ code in repositories
def custom_model(world, marker: Path, kind: str) -> str:
    """A model folder that brings its own code for a config and model, or for a tokenizer."""
    folder = Path(world.copy(world.tiny))
    file = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    config = json.loads((folder / file).read_text())
    code = f"open({str(marker)!r}, 'w')\n"
    if kind == "tokenizer":
        config |= {"auto_map": {"AutoTokenizer": [None, "planted.Own"]}, "tokenizer_class": "Own"}
        code += "from transformers import GPT2TokenizerFast\nclass Own(GPT2TokenizerFast): pass\n"
    else:
        config |= {"auto_map": {"AutoConfig": "planted.OwnConfig", "AutoModelForCausalLM": "planted.Own"}}
        config["model_type"] = "own" if kind == "own model" else "gpt2"
        code += "from transformers import GPT2Config, GPT2LMHeadModel\n"
        code += f"class OwnConfig(GPT2Config): model_type = {config['model_type']!r}\n"
        code += "class Own(GPT2LMHeadModel): config_class = OwnConfig\n"
    (folder / file).write_text(json.dumps(config))
    (folder / "planted.py").write_text(code)
    return str(folder)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Where transformers copies such code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])


@pytest.mark.parametrize("kind", ["own model", "known model", "tokenizer"])
@pytest.mark.parametrize("head", [False, True])
def test_code_in_a_models_folder_is_not_run(head, kind, world, marker, own_modules, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("the user was asked"))
    name = custom_model(world, marker, kind)
    try:
        load_pretrained(ModelConfig(name), head=head)
        assert kind != "own model"
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["own model", "tokenizer"])
def test_code_in_a_models_folder_is_run_when_asked(kind, world, marker, own_modules, monkeypatch):
    """The flag of TRL's configs, which evaluation and best-of-n have too."""
    name = custom_model(world, marker, kind)
    for stage, given in (("sft", {}), ("best_of_n", {"sft_adapter": "", "lora_target_modules": ["c_attn"]})):
        monkeypatch.setattr("pipeline.sft.check_max_length", lambda *args: 1 / 0)
        monkeypatch.setattr("pipeline.runs.arguments.check_prompt_lengths", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.run(stage, model_name_or_path=name, trust_remote_code=True, **given)
        assert marker.exists()
        marker.unlink()
        for module in [module for module in sys.modules if "planted" in module]:
            del sys.modules[module]


# ------------------------------------------------------------------------------------ datasets
@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.py", "rows.bin"])
def test_a_dataset_file_is_not_unpickled(name, tmp_path, marker):
    plant(tmp_path / name, marker)
    with pytest.raises(ValueError, match=r"a file must end in one of \.jsonl, \.json, \.csv, \.tsv, \.parquet"):
        load_rows(str(tmp_path / name), "train")
    assert not marker.exists()


@pytest.mark.parametrize("beside", [True, False], ids=["beside rows", "alone"])
@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.py", "rows/rows.py", "dataset_infos.py", "train.tar"])
def test_a_dataset_folder_runs_nothing(name, beside, world, marker):
    """The script that `datasets` once ran is called as the folder is."""
    folder = world.folder / "rows"
    folder.mkdir()
    plant(folder / "rows.py", marker)
    if name.endswith(".tar"):
        with tarfile.open(folder / name, "w") as archive:
            content = pickle.dumps(Payload(marker))
            for member in ("0.pkl", "0.pyd", "0.pickle", "../0.pth"):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        plant(folder / name, marker)
    if beside:
        (folder / "train.jsonl").write_text('{"text": "a"}\n')
    try:
        assert list(load_rows(str(folder), "train"))
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith(str(folder))
    assert not marker.exists()


def test_a_saved_dataset_runs_nothing(tmp_path, marker):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "rows")
    for name in ("state.pkl", "dataset.py", "rows.py", "data.pt"):
        plant(tmp_path / "rows" / name, marker)
    assert list(load_rows(str(tmp_path / "rows"), "train")) == [{"text": "a"}]
    assert not marker.exists()


# ------------------------------------------------------------------------------------ archives
def archive_of(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                content.name = name
                archive.addfile(content)
    return buffer.getvalue()


def link_to(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, target
    return info


INNER = human_ratings.INNER
HOSTILE = {
    "a path upwards": {"../../escaped": b"x", INNER: b"x"},
    "an absolute path": {"/tmp/spine-escaped": b"x"},
    "a link out": {INNER: link_to("/etc/passwd")},
    "a hard link out": {INNER: link_to("/etc/passwd", tarfile.LNKTYPE)},
    "a folder in its place": {INNER: link_to("", tarfile.DIRTYPE)},
    "a device in its place": {INNER: link_to("", tarfile.CHRTYPE)},
    "no archive inside": {INNER: b"not an archive"},
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_archives_are_read_in_memory(members, tmp_path, monkeypatch):
    """Even one of the right hash."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "down")
    fetched = SimpleNamespace(read_bytes=lambda: archive_of(members))
    monkeypatch.setattr(human_ratings, "fetch", lambda release: fetched)
    with pytest.raises(ValueError, match=r"vaderSentiment-3\.3\.2\.tar\.gz: .*is not the published one"):
        human_ratings.load_snippets()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not Path("/tmp/spine-escaped").exists()


# ------------------------------------------------------------------------------------ the hub
def publish(cache: Path, name: str, revisions: dict[str, str]) -> None:
    """A repository in the hub's cache: revisions and the folder of each."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_adapter_on_the_hub_can_be_pinned(hub, world):
    newer = Path(world.copy(world.sft))
    # Copies: older safetensors writes into the file that the tensors are mapped from.
    tensors = {name: tensor.clone() for name, tensor in load_file(newer / WEIGHTS).items()}
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, newer / WEIGHTS)
    publish(hub, "owner/sft", {"main": str(newer), "v1": world.sft})
    name = next(iter(tensors))
    for source, factor in (("owner/sft", 2), ("owner/sft@v1", 1), (f"owner/sft@{1:040x}", 1)):
        adapter = read_adapter(source)
        assert adapter.source == source
        assert torch.equal(adapter.weights[name], factor * tensors[name])
    with pytest.raises(
        FileNotFoundError, match=r"^owner/sft@v2: no such folder .*and no such adapter on the hub \(HF_HUB_OFFLINE is"
    ):
        read_adapter("owner/sft@v2")


def test_an_adapter_on_the_hub_is_checked_as_a_folder_is(hub, world, refuses):
    """Its identity, scale and metrics are read too."""
    folder = Path(world.copy(world.reward))
    (folder / "backbone.json").write_text(json.dumps({"model_name_or_path": "gpt2", "fingerprint": "0" * 64}))
    publish(hub, "owner/reward", {"main": str(folder), "v1": world.reward})
    refuses("ppo", r"owner/reward: .*another base, gpt2", loads=True, reward_adapter="owner/reward")
    publish(hub, "owner/scaleless", {"main": world.sft})
    refuses("ppo", r"owner/scaleless: .*holds no score head", reward_adapter="owner/scaleless")


def test_only_json_and_safetensors_are_fetched(monkeypatch, world):
    asked = {}
    monkeypatch.setattr(
        adapters, "snapshot_download", lambda name, **given: asked.update(given, name=name) or world.sft
    )
    read_adapter("owner/sft@v1")
    offline = asked.pop("local_files_only")
    assert offline is True  # HF_HUB_OFFLINE is set
    assert asked == {"name": "owner/sft", "revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}


def test_a_model_on_the_hub_can_be_pinned(hub, world):
    newer, _ = load_pretrained(ModelConfig(world.tiny))
    newer.transformer.wte.weight.data.mul_(2)
    folder = Path(world.copy(world.tiny))
    newer.save_pretrained(folder)
    publish(hub, "owner/model", {"main": str(folder), "v1": world.tiny})
    pinned, latest = (load_pretrained(ModelConfig("owner/model", model_revision=r))[0] for r in ("v1", "main"))
    assert torch.equal(2 * pinned.transformer.wte.weight, latest.transformer.wte.weight)


def test_a_dataset_on_the_hub_can_be_pinned(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or Dataset.from_dict({"a": [1]}))
    load_rows("owner/name@v1", "train")
    assert asked == [(("owner/name",), {"split": "train", "revision": "v1"})]


# ------------------------------------------------------------------------------------ the network
@pytest.mark.slow
def test_a_run_on_local_files_talks_to_nobody(world, monkeypatch):
    """With the two variables that CONTRIBUTING names, and the hub not set offline."""
    assert constants.HF_HUB_DISABLE_TELEMETRY  # gradio sets the variable anew, to "True"
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, False)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: asked.append(host) or 1 / 0)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address) or 1 / 0)
    world.run("sft")
    assert not asked
