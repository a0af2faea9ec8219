"""Find the policies, rewards and values in the folders of runs, and the options of PPO that made their figures.

No model is loaded and no tensor is read here. So a wrong folder is an error within a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from data.boundaries import real_path
from data.json_files import check_object, read_json
from data.quoting import escaped
from data.schemas import IDENTITY, OF_TOKENS, TRAINER_STATE
from pipeline.backbone.adapter_config import ADAPTER_CONFIG
from pipeline.backbone.adapter_tensors import HEAD, WEIGHTS, read_header
from pipeline.backbone.adapters import check_adapter, is_of_classifier, read_metrics
from pipeline.backbone.identity import IDENTITY as IDENTITY_FILE
from pipeline.backbone.members import MANIFEST as ENSEMBLE
from pipeline.backbone.members import members_of
from pipeline.reports.model_card import method_of
from pipeline.rl.config import OF_TOKENS as OPTIONS
from pipeline.rl.config import PPOConfig
from pipeline.runs.manifest import NAME as CHECKPOINT
from pipeline.runs.manifest import read_manifest
from reward_models.normalization import FILE as SCALE


DEEPEST = 3  # levels beneath the folder of a run
DEFAULTS = {field.name: field.default for field in fields(PPOConfig) if field.name in OPTIONS}


@dataclass(frozen=True)
class Options:
    """Options of PPO that the figures of a completion depend on.

    Attributes:
        values: the options of `pipeline.rl.config.OF_TOKENS`.
        source: the file that they come from, or None for PPO's defaults.
        last_beta: KL coefficient of the last update that a log states. With `kl_target` it differs from the option `beta`.
    """

    values: Mapping[str, Any]
    source: str | None = None
    last_beta: float | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def beta(self) -> float:
        """Return the KL coefficient of the rewards."""
        return self.values["beta"] if self.last_beta is None else self.last_beta


@dataclass(frozen=True)
class Policy:
    """A policy adapter of a run, with the adapters of the roles that PPO measures its completions by.

    Attributes:
        name: name on the page.
        folder: None is the bare backbone.
        run: number of its run.
        method: TRL's tag of the method that trained it (`sft`, `ppo`, `dpo`, ...), or None.
        reference: adapter that the KL is measured to; None is the bare backbone.
        value: value adapter, or None. It may belong to another policy of the run.
    """

    name: str
    folder: str | None
    run: int
    method: str | None = None
    reference: str | None = None
    value: str | None = None
    options: Options | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Tell whether a run saved it on its way."""
        return self.folder is not None and CHECKPOINT.fullmatch(Path(self.folder).name) is not None


@dataclass(frozen=True)
class Run:
    """Adapters in one folder that was named: its policies, and its rewards (folders of adapters or of ensembles)."""

    name: str
    policies: list[Policy]
    rewards: list[str]


def find_run(name: str, number: int = 0, *, prefix: str = "") -> Run:
    """Find the adapters in a folder of a run: `sft`, `reward`, `ppo`, `ppo/value`, checkpoints, and any others.

    The folder may itself be that of an adapter. Adapters with a score head are rewards, or values where they are the `value`
    beside a policy. Rewards in checkpoints are left out.

    Args:
        prefix: goes before the names of the policies, such as `demo/`.

    Raises the errors of `check_adapter`, `members_of` and `read_options`, and:
        FileNotFoundError: there is no such folder, or no adapter in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder. Name the folder of a run, such as runs/demo.")
    policies, rewards = [], []
    for path in _adapters_in(folder):
        inner = path.relative_to(folder).as_posix()
        if (path / ENSEMBLE).is_file():
            members_of(str(path))
            rewards.append(str(path))
            continue
        tensors = read_header(path / WEIGHTS) if (path / WEIGHTS).is_file() else {}
        if is_of_classifier(path, tensors):
            continue  # an encoder of its own: a reward function (`pipeline.backbone.rewards.get_reward_adapter`)
        check_adapter(str(path), needs_head=None)
        if HEAD not in tensors:
            own = path / "value"
            value = str(own) if (own / WEIGHTS).is_file() else None
            shown = prefix + inner if inner != "." else prefix.rstrip("/") or folder.absolute().name
            policies.append(Policy(shown, str(path), number, _method(path), value=value, options=read_options(path)))
        elif path.name != "value" and (inner == "." or not any(map(CHECKPOINT.fullmatch, path.parts))):
            rewards.append(str(path))
    if not policies and not rewards:
        raise FileNotFoundError(
            f"{name}: no adapter in this folder ({ADAPTER_CONFIG}). Name the folder of a run, such as runs/demo, or of an "
            f"adapter."
        )
    return Run(folder.absolute().name, policies, rewards)


def find_runs(names: list[str], *, sft_adapter: str | None = None, options: Options | None = None) -> list[Run]:
    """Find the adapters of several runs, and complete each policy with reference, value and options.

    The reference is `sft_adapter` if it is given, else the SFT policy of the same run, else that of the first run that has
    one, else the bare backbone. A policy without a value or options of its own gets those of PPO in the same run, else of the
    first run that has them. `options` replace all but the last beta that a log states.

    Raises the errors of `find_run`, and:
        ValueError: a folder is named twice; there is no policy; or two adapters were trained on different base models.
    """
    paths = [real_path(Path(name).expanduser()) for name in names]
    if twice := next((name for name, path in zip(names, paths, strict=True) if paths.count(path) > 1), None):
        raise ValueError(f"{twice} is named twice. Name each run once.")
    several = len(names) > 1
    short = [path.name for path in paths]
    shown = [base if short.count(base) == 1 else name for base, name in zip(short, names, strict=True)]
    runs = [find_run(name, i, prefix=f"{shown[i]}/" if several else "") for i, name in enumerate(names)]
    found = [policy for run in runs for policy in run.policies]
    if not found:
        raise ValueError(f"{', '.join(names)}: only rewards, and no policy. Name the folder of a run with a policy.")
    check_same_base([policy.folder for policy in found if policy.folder], [r for run in runs for r in run.rewards])
    if sft_adapter:
        check_adapter(sft_adapter, needs_head=False)
    finished = sorted(found, key=lambda policy: policy.is_checkpoint)

    def donor(policy: Policy, has: str) -> Any:
        """Return a field of the first policy that has it, of the same run if there is one; finished ones come first."""
        own = [other for other in finished if other.run == policy.run]
        return next((value for other in (*own, *finished) if (value := getattr(other, has)) is not None), None)

    starts = [policy for policy in finished if policy.method == "sft" or Path(policy.folder or "").name == "sft"]

    def completed(policy: Policy) -> Policy:
        own = [start for start in starts if start.run == policy.run] or starts
        reference = sft_adapter or (own[0].folder if own else None)
        seen = policy.options or donor(policy, "options") or Options(DEFAULTS)
        if options is not None:
            seen = replace(options, last_beta=seen.last_beta)
        return replace(policy, reference=reference, value=policy.value or donor(policy, "value"), options=seen)

    return [
        replace(run, name=shown[i], policies=[completed(policy) for policy in run.policies])
        for i, run in enumerate(runs)
    ]


def bare(runs: list[Run]) -> Policy:
    """Return the bare backbone as a policy, with the reference and the options of the first policy."""
    first = next(policy for run in runs for policy in run.policies)
    return replace(first, name="bare backbone", folder=None, method=None)


def read_options(folder: Path) -> Options | None:
    """Read the options that PPO left beside a policy, in metrics.json or in a checkpoint's manifest; None if there are none.

    An earlier release left none in metrics.json, but the beta of each update in its history. The others are then PPO's
    defaults.

    Raises:
        ValueError: a file is damaged.
    """
    manifest = read_manifest(folder) if CHECKPOINT.fullmatch(folder.name) else None
    if manifest is not None:
        of_run = manifest.get("options") or {}
        if "PPOConfig" not in of_run:
            return None
        given = {**of_run["PPOConfig"], **of_run.get("RewardArguments", {})}
        path = folder / TRAINER_STATE_NAME
        history = read_json(path, TRAINER_STATE)["log_history"] if path.is_file() else []
        source = str(folder)
    else:
        metrics = read_metrics(folder)
        given, history = metrics.get("options") or {}, metrics.get("history", [])
        source = str(folder / "metrics.json")
    given = {name: given[name] for name in (*OPTIONS, "normalize_scores") if name in given}
    check_object(given, source, OF_TOKENS, remedy="Restore the file.")
    betas = [row["beta"] for row in history if isinstance(row.get("beta"), (int, float))]
    if not given and not betas:
        return None
    return Options({**DEFAULTS, **given}, source if given else None, betas[-1] if betas else None)


def normalizes(runs: list[Run]) -> bool:
    """Tell whether the rewards' scores are normalised: as the first run's options say, else if all their scales are there."""
    seen = [policy.options.values for run in runs for policy in run.policies if policy.options is not None]
    told = next((values["normalize_scores"] for values in seen if "normalize_scores" in values), None)
    if told is not None:
        return told
    folders = [member for run in runs for reward in run.rewards for member in members_of(reward)]
    return bool(folders) and all((Path(folder) / SCALE).is_file() for folder in folders)


def check_same_base(policies: list[str], rewards: list[str]) -> None:
    """Check, from the files beside the adapters, that all were trained on one base model.

    Raises:
        ValueError: two were not.
    """
    first: tuple[str, dict] | None = None
    for name in (*policies, *(member for reward in rewards for member in members_of(reward))):
        path = Path(name) / IDENTITY_FILE
        if not path.is_file():
            continue
        made_for = read_json(path, IDENTITY)
        first = first or (name, made_for)
        ours, theirs = (entry["fingerprint"].split("+")[0] for entry in (first[1], made_for))
        if ours != theirs:
            bases = [escaped(entry.get("model_name_or_path")) for entry in (first[1], made_for)]
            raise ValueError(
                f"{first[0]} and {name} were trained on different base models ({bases[0]}, {bases[1]}), and the page has one "
                f"backbone. Compare runs on the same base."
            )


def _adapters_in(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Yield the folders of adapters and ensembles, parents before what is in them, checkpoints in their order."""
    if (folder / ENSEMBLE).is_file():
        yield folder
        return
    if (folder / ADAPTER_CONFIG).is_file():
        yield folder
    if depth < DEEPEST:
        inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        for path in sorted((path for path in inner if ".kept-" not in path.name), key=_order):
            yield from _adapters_in(path, depth + 1)


def _order(path: Path) -> tuple:
    """Return the key that sorts the folders of a run: SFT first, checkpoints by their step."""
    number = path.name.rpartition("-")[2]
    return path.name != "sft", path.name.rpartition("-")[0], int(number) if number.isdigit() else 0, path.name


def _method(folder: Path) -> str | None:
    card = folder / "README.md"
    return method_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
