r"""Label: a page on which people compare two completions of a prompt, and which writes preferences for the reward stage.

    python -m pipeline.label --policy_adapter runs/demo/sft runs/demo/ppo --output_dir runs/labels
    python -m pipeline.label --pairs pairs.jsonl --output_dir runs/labels

The pairs are sampled from one or two policies while people answer, or are read from a file. Every answer is on the disk, in
`answers.jsonl`, before the next pair is shown. `preferences.jsonl` is made of the answers, in TRL's format, for
`pipeline.reward`. The page needs gradio: pip install 'spine-rlhf[pages]'.
"""

import os
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from trl import ModelConfig

from data.cells import check_chat_template
from data.pairing import letters_of
from data.prompts import check_prompt_lengths, load_prompts
from data.reading import dataset_of
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import context_length
from pipeline.backbone.members import members_of
from pipeline.backbone.plain import base_of
from pipeline.backbone.roles import load_backbone
from pipeline.pages.label_answers import ANSWERS, PREFERENCES, AnswerFile, current, read_answers
from pipeline.pages.label_desk import Desk
from pipeline.pages.label_pairs import Pair, Pool, read_pairs
from pipeline.pages.label_policies import disputed, disputes_of, sampled_pairs
from pipeline.runs.arguments import PAD_TOKEN
from pipeline.runs.command_line import parse
from pipeline.runs.errors import report
from pipeline.runs.folders import check_folders
from pipeline.runs.launch import check_launch
from pipeline.runs.output_lock import lock_output, release_all


LOOPBACK = ("127.0.0.1", "localhost", "::1")
PASSWORD = "SPINE_LABEL_PASSWORD"  # the environment variable
GUIDELINES = """
Read the prompt and both completions. Choose the one that you would rather have as the answer.

- Choose by what is written, not by its length.
- Say **tie** if you would not mind which of the two you got, and **skip** if you cannot judge them.
- The place of a completion means nothing: it is drawn at random.
"""


@dataclass
class LabelArguments:
    """The pairs that are shown, how they are chosen, and who may see the page."""

    output_dir: str = field(metadata={"help": "Folder for the answers; those that are there are gone on with."})
    pairs: str | None = field(
        default=None,
        metadata={"help": "Pairs to show: hub id, folder or file. Unset: they are sampled from the policies."},
    )
    policy_adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "One policy adapter, or two to compare. Unset: the bare backbone."},
    )
    dataset_name: str = field(
        default="human_ratings", metadata={"help": "Prompts to sample from: hub id, folder or file."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the prompts or pairs."})
    max_pairs: int = field(default=200, metadata={"help": "Number of pairs to label."})
    overlap: int = field(default=0, metadata={"help": "Show each pair of this number to all annotators; 0: none."})
    choose: Literal["random", "disagreement"] = field(
        default="random",
        metadata={"help": "disagreement: show the pair about which the reward adapters disagree most."},
    )
    reward_adapter: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward adapters, or the folder of an ensemble, for choose: disagreement."},
    )
    candidates: int = field(
        default=64, metadata={"help": "Sampled pairs that wait, of which the most disputed is shown next."}
    )
    ties: Literal["drop", "keep"] = field(
        default="drop", metadata={"help": "Leave ties out of the preferences, or keep them with agreement 0.5."}
    )
    guidelines: str | None = field(
        default=None, metadata={"help": "File in Markdown that tells annotators how to choose. Unset: a general text."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all of this machine."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    password_file: str | None = field(
        default=None,
        metadata={"help": f"File with the password of the page. Unset: the variable {PASSWORD}, or none."},
    )
    max_completion_length: int = field(default=24, metadata={"help": "Most tokens sampled for a prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, as in PPO."})
    batch_size: int = field(default=16, metadata={"help": "Number of prompts sampled at once."})
    seed: int = 0
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())
        if len(self.policy_adapter) > 2:
            raise ValueError(
                f"policy_adapter names {len(self.policy_adapter)} policies, and a pair has 2 sides. Name 1 or 2."
            )
        if self.pairs and self.policy_adapter:
            raise ValueError("pairs are read and policy_adapter would sample them. Name one of the two.")
        if self.reward_adapter and self.choose == "random":
            raise ValueError("reward_adapter is for choose: disagreement. Set that, or leave reward_adapter unset.")
        if self.choose == "disagreement" and not self.reward_adapter:
            raise ValueError(
                "choose='disagreement' needs the reward models that may disagree. Name them in reward_adapter."
            )

    @property
    def needs_model(self) -> bool:
        return self.pairs is None or bool(self.reward_adapter)

    def password(self) -> str | None:
        """Return the password of the page, or None if it has none.

        Raises:
            OSError: the file cannot be read.
            ValueError: the password is empty.
        """
        if self.password_file is None:
            found, source = os.environ.get(PASSWORD), PASSWORD
        else:
            found, source = self._text("password_file"), f"password_file={self.password_file!r}"
        if found is not None and not found.strip():
            raise ValueError(f"{source}: the password is empty. Write one there, or leave it out.")
        return found and found.strip()

    def guideline_text(self) -> str:
        """Return the guidelines in Markdown. Raises an OSError if the file cannot be read, a ValueError if it is not UTF-8."""
        return GUIDELINES if self.guidelines is None else self._text("guidelines")

    def _text(self, option: str) -> str:
        name = getattr(self, option)
        try:
            return Path(name).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"{option}={name!r}: cannot be read ({error.strerror}). Correct the path.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{option}={name!r}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


OPTIONS = (LabelArguments, ModelConfig)


def check(args: LabelArguments, model: ModelConfig) -> None:
    """Check the options and folders before anything is loaded.

    The model is set to the one that the first adapter names, unless the user names one.

    Raises:
        ImportError: gradio is not installed.
        ValueError, OSError: an option, a file or a folder cannot be used.
    """
    if find_spec("gradio") is None:
        raise ImportError("The page needs gradio. Install it: pip install 'spine-rlhf[pages]'.")
    if check_launch().num_processes > 1:
        raise ValueError(
            "The page runs in one process. Start it with python -m pipeline.label, without accelerate launch."
        )
    check_port(args.host, args.port)
    args.password()
    args.guideline_text()
    members = [member for name in args.reward_adapter for member in members_of(name)]
    if members and len(members) < 2:
        raise ValueError(
            f"choose='disagreement' compares two or more reward models, and reward_adapter names {members[0]} alone. Name the "
            f"folder of an ensemble (num_members of pipeline.reward), or several adapters."
        )
    adapters = (*args.policy_adapter, *members)
    if args.needs_model and model.model_name_or_path is None and adapters:
        model.model_name_or_path = base_of(adapters[0])
    check_folders(
        args.output_dir,
        model.model_name_or_path if args.needs_model else None,
        policies=tuple(args.policy_adapter),
        rewards=args.reward_adapter,
        data=(args.pairs or args.dataset_name,),
        writes=(PREFERENCES,),
        needs_model=args.needs_model,
    )


def check_port(host: str, port: int) -> None:
    """Check that the page can listen on an address.

    Raises:
        OSError: it cannot.
    """
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"host={host!r}, port={port}: the page cannot listen there ({reason}). Name another port or host."
        ) from error


def filled_pool(
    args: LabelArguments, model: ModelConfig, shown: list[dict[str, Any]]
) -> tuple[Pool, list[Pair] | None, Any]:
    """Return the pool of pairs; the pairs of a file, or None if a thread samples them; and the prompt of one pair.

    Args:
        shown: the lines of the answers that are there.

    Raises the errors of the readers of data, `load_backbone`, `read_adapter`, `disputes_of` and `check_prompt_lengths`.
    """
    split, by_dispute = args.dataset_train_split, args.choose == "disagreement"
    pairs = read_pairs(args.pairs, split) if args.pairs else None
    if pairs:
        random.Random(args.seed).shuffle(pairs)
    rows = None if args.pairs else load_prompts(args.dataset_name, split)
    if pairs is not None and not args.needs_model:
        return Pool(pairs), pairs, pairs[0].prompt
    policies = args.policy_adapter
    backbone, tokenizer = load_backbone(
        model,
        policies[0] if policies else None,
        trust_remote_code=args.trust_remote_code,
        pad_token=args.pad_token,
    )
    if len(policies) == 2:
        base = backbone.get_base_model()
        backbone.add_role("other", read_adapter(policies[1], needs_head=False, base=base, tokenizer=tokenizer))
    disputes = disputes_of(args.reward_adapter, backbone, tokenizer) if by_dispute else None
    backbone.to(PartialState().device).eval()
    if pairs is not None and args.pairs and disputes:
        check_chat_template(dataset_of({"prompt": [pairs[0].prompt]}, args.pairs), tokenizer, args.pairs)
        pairs = disputed(pairs, disputes, tokenizer)
        return Pool(pairs, disputed=True), pairs, pairs[0].prompt
    context = context_length(backbone)
    rows, _ = check_prompt_lengths(rows, tokenizer, context, args.max_completion_length, args.dataset_name)
    ahead = args.candidates if by_dispute else args.batch_size
    pool = Pool(disputed=by_dispute, least=ahead if by_dispute else 1)
    names = (policies[0], policies[-1]) if policies else (model.model_name_or_path,) * 2
    batches = sampled_pairs(
        backbone,
        ("policy", "other" if len(policies) == 2 else "policy"),
        names,
        tokenizer,
        rows["prompt"][:],
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        asked=Counter({line["pair"]: letters_of(line["prompt"]) for line in shown}.values()),
        disputes=disputes,
        tell=pool.check_open,
    )
    pool.start(batches, ahead, lambda error: report(type(error), error, error.__traceback__))
    return pool, None, rows["prompt"][0]


@contextmanager
def open_desk(args: LabelArguments, model: ModelConfig) -> Iterator[Desk]:
    """Open the desk of a folder, and close it at the end: no more pairs are sampled, and the preferences are written.

    Raises the errors of `AnswerFile` and `filled_pool`, and:
        ValueError: the answers are about texts and the pairs are conversations, or the other way round.
    """
    folder = Path(args.output_dir)
    lines = read_answers(folder / ANSWERS)
    pool, pairs, prompt = filled_pool(args, model, lines)
    try:
        if lines and _kind(prompt) != _kind(lines[0]["prompt"]):
            raise ValueError(
                f"{folder / ANSWERS} is about {_kind(lines[0]['prompt'])}, and {args.pairs or args.dataset_name} has "
                f"{_kind(prompt)}. One file of preferences cannot hold both. Name another folder in output_dir."
            )
        known = {line["pair"] for line in lines}
        total = args.max_pairs if pairs is None else min(args.max_pairs, len(known | {pair.id for pair in pairs}))
        file = AnswerFile(folder / ANSWERS)
        desk = Desk(file, pool, seed=args.seed, overlap=args.overlap, total=total)
        try:
            desk.write_preferences(ties=args.ties == "keep")
            yield desk
        finally:
            desk.write_preferences(ties=args.ties == "keep")
            file.close()
    finally:
        pool.stop()


def _kind(prompt: Any) -> str:
    return "texts" if isinstance(prompt, str) else "conversations"


def wait_for_signal() -> None:
    """Wait until the process is asked to end, by Ctrl-C or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()


def main(args: LabelArguments, model: ModelConfig) -> None:
    check(args, model)
    lock_output(args.output_dir, writes=True)
    with open_desk(args, model) as desk:
        from pipeline.pages.label_page import serving  # gradio is an optional package

        text, password = args.guideline_text(), args.password()
        ties = args.ties == "keep"
        with serving(desk, text, host=args.host, port=args.port, password=password, ties=ties) as url:
            print(f"{url}: the page is open. Ctrl-C ends it; every answer is saved as it is given.", flush=True)
            if password is None and args.host not in LOOPBACK:
                print("Everybody who reaches this address can answer: set a password (password_file).", flush=True)
            wait_for_signal()
    folder = Path(args.output_dir)
    made = f" {folder / PREFERENCES}: {desk.written} pairs." if desk.written else ""
    print(f"{folder / ANSWERS}: {len(current(desk.lines))} answers.{made}")
    release_all()


if __name__ == "__main__":
    main(*parse(*OPTIONS))
