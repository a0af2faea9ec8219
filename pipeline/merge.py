"""Merge an adapter into its base, and save the plain model that transformers, vLLM and llama.cpp's converter load.

    python -m pipeline.merge runs/demo/ppo runs/merged
    python -m pipeline.merge runs/demo/reward runs/merged-reward --dtype float32

A policy becomes a language model. A reward adapter becomes a sequence classifier with its head. Both are saved with the
tokenizer and its chat template, the generation config, and a model card with data, figures and licence. The saved model is
loaded again and compared with the adapter on its base before the folder gets it.
"""

import argparse
import re
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from huggingface_hub import ModelCard, create_repo, is_offline_mode, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedModel

from data.listing import file_digest, read_listing
from data.saving import complete, save
from pipeline.backbone.adapter_config import ADAPTER_CONFIG
from pipeline.backbone.adapter_tensors import WEIGHTS
from pipeline.backbone.adapters import Adapter, adapter_folder, read_metrics
from pipeline.backbone.gguf import SMOLLM2, SMOLLM2_FOLDER
from pipeline.backbone.plain import base_of, load_with_adapter, save_plain
from pipeline.reports.model_card import Merged, method_of, model_card
from pipeline.reports.report import read_report
from pipeline.runs.errors import report_errors
from pipeline.runs.folders import check_output_dir, check_path
from pipeline.runs.output_lock import LOCK, lock_output, release_all
from reward_models.normalization import FILE as SCALE
from reward_models.normalization import read_normalization


DTYPES = ("auto", "float32", "bfloat16", "float16")


def arguments(args: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with a message if an option is invalid."""
    parser = argparse.ArgumentParser("python -m pipeline.merge", allow_abbrev=False)
    parser.add_argument("adapter", help="Folder or hub id of the adapter: a policy, a reward or a value.")
    parser.add_argument("output_dir", help="Folder of the merged model: a new one, or that of an earlier merge.")
    parser.add_argument("--model_name_or_path", help="The base model; unset: the one that the adapter names.")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="Precision to save; auto: that of the base.")
    parser.add_argument("--report", help="report.json of the evaluation; unset: the one beside the adapter's folder.")
    parser.add_argument("--license", help="Licence for the model card; unset: that of the base's own card.")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="Upload the merged model to this repository.")
    parser.add_argument("--private", action="store_true", help="Make the repository private.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the model's repository.")
    return parser.parse_args(args)


def check_output(output_dir: str, reads: tuple[Path | None, ...]) -> None:
    """Check that a merged model can be written to a folder: a new one, an empty one, or that of an earlier merge.

    Args:
        reads: folders of the adapter and the base, as far as they are folders.

    Raises the errors of `check_path`, `check_output_dir` and `read_listing`, and:
        ValueError: the folder holds something else.
    """
    check_path(output_dir)
    check_output_dir(output_dir)
    folder = Path(output_dir).expanduser()
    if any(path and path.resolve() == folder.resolve() for path in reads):
        raise ValueError(f"output_dir={output_dir!r}: the merge reads this folder. Name another one.")
    if not folder.is_dir():
        return
    complete(folder)
    kinds = {entry["kind"] for entry in (read_listing(folder) or {}).values()}
    there = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if there and kinds != {"model"}:
        raise ValueError(
            f"output_dir={output_dir!r} holds {', '.join(there[:5])}{' and more' if len(there) > 5 else ''}, and no merged "
            f"model of Spine. A merged model gets a folder of its own: name a new one."
        )


def licence_of(base: str) -> str | None:
    """Return the licence that the card of a base model states, or None if it has no card, or cannot be reached."""
    path = Path(base).expanduser()
    if base == SMOLLM2 or path.name == SMOLLM2_FOLDER:
        return "apache-2.0"
    card = path / "README.md"
    if path.is_dir() and not card.is_file() or (not path.is_dir() and is_offline_mode()):
        return None
    with suppress(OSError, ValueError, HfHubHTTPError, yaml.YAMLError):
        found = ModelCard.load(card if path.is_dir() else base).data.license
        return found if isinstance(found, str) else None
    return None


def report_of(adapter: Path, metrics: dict, named: str | None) -> dict | None:
    """Return the report of this policy's evaluation: the one that is named, or the one beside its folder if it is of this run.

    A report is of this run if it states the seconds that the adapter's metrics.json states.

    Raises the errors of `read_report`, and:
        ValueError: the report that is named is of another run.
    """
    path = Path(named).expanduser() if named else adapter.absolute().parent / "report.json"
    if not named and not path.is_file():
        return None
    report = read_report(path)
    if metrics.get("seconds") is not None and report.get("seconds", {}).get("policy") == metrics["seconds"]:
        return report
    if named:
        raise ValueError(
            f"--report {named}: it reports another run than {adapter} (its policy trained for "
            f"{report.get('seconds', {}).get('policy')} s, this one for {metrics.get('seconds')} s). Name the report of this "
            f"policy, or leave --report out."
        )
    return None


def make_repository(name: str | None, *, private: bool) -> None:
    """Make a repository on the hub, if it is not there yet, before any long work.

    Raises:
        ValueError: the name is no repository's, or this user may not make it.
    """
    if name is None:
        return
    try:
        create_repo(name, private=private, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        raise ValueError(
            f"--push_to_hub {name}: there is no such repository, and it cannot be made ({reason}). Correct the name, log in "
            f"with `hf auth login`, or leave the option out."
        ) from error


def parts_of(adapter: Adapter, folder: Path, base: PreTrainedModel, dtype: torch.dtype) -> dict[str, str]:
    """Return what the merged model was made from, for its card."""
    config = adapter.config
    own = sum(parameter.numel() for name, parameter in base.named_parameters() if "lora_" not in name)
    return {
        "adapter": f"rank {config.r}, alpha {config.lora_alpha:g}, SHA-256 {file_digest(folder / WEIGHTS)}",
        "base model": f"{type(base).__name__}, {own:,} parameters",
        "precision": f"{str(dtype).removeprefix('torch.')}; merged in float32 and rounded once",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "trl", "torch")),
    }


def main(args: list[str]) -> None:
    given = arguments(args)
    PartialState(cpu=True)
    folder = adapter_folder(given.adapter)
    if not (folder / ADAPTER_CONFIG).is_file() and (beneath := sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))):
        raise ValueError(
            f"{given.adapter}: no adapter. Name one of {', '.join(str(path.parent) for path in beneath)}."
        )
    base_name = given.model_name_or_path or base_of(given.adapter)
    if base_name is None:
        raise ValueError(f"{given.adapter}: the adapter names no base model. Name it with --model_name_or_path.")
    check_output(given.output_dir, (folder, Path(base_name).expanduser()))
    metrics = read_metrics(folder)
    report = report_of(folder, metrics, given.report)
    make_repository(given.push_to_hub, private=given.private)
    lock_output(given.output_dir, writes=True)

    base, adapter, tokenizer = load_with_adapter(given.adapter, base_name, trust_remote_code=given.trust_remote_code)
    dtype = base.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    card, scale = folder / "README.md", None
    if (folder / SCALE).is_file():
        measured = read_normalization(folder)
        scale = measured.mean, measured.std
    merged = Merged(
        name=given.push_to_hub or Path(given.output_dir).absolute().name,
        base=_public(base_name),
        licence=given.license or licence_of(base_name),
        tag=method_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None,
        scores=adapter.head is not None,
        chat=tokenizer.chat_template is not None,
        scale=scale,
        parts=parts_of(adapter, folder, base, dtype),
    )
    found, unit = [], "in a score" if merged.scores else "nats a token (KL)"

    def write(staged: Path) -> None:
        difference = save_plain(base, adapter, tokenizer, staged, dtype)
        found.append(difference)
        merged.parts["difference to the adapter on its base"] = f"{difference:.2g} {unit}"
        (staged / "README.md").write_text(model_card(merged, metrics, report), encoding="utf-8")

    save(given.output_dir, "model", write, retry=False)
    weights = sum(path.stat().st_size for path in Path(given.output_dir).glob("*.safetensors"))
    print(
        f"{given.output_dir}: {type(base).__name__}, {str(dtype).removeprefix('torch.')}, {weights / 1e6:,.1f} MB, "
        f"{found[-1]:.2g} {unit} from the adapter on its base."
    )
    if merged.licence is None:
        print(f"The card states no licence, since {merged.base} states none here. Name it with --license.")
    if given.push_to_hub:
        url = upload_folder(
            repo_id=given.push_to_hub,
            folder_path=given.output_dir,
            commit_message="Merged model",
            ignore_patterns=["_*", ".sav*", "saved_files.json", "*.kept-*"],
        )
        print(f"Uploaded: {url}")
    release_all()


def _public(base: str) -> str:
    """Return the name of a base for others: of a folder, only the last part of the path."""
    return Path(base).name if Path(base).expanduser().is_dir() or re.match(r"[./~]", base) else base


if __name__ == "__main__":
    report_errors()
    main(sys.argv[1:])
