"""Say what each JSON file that is read must hold, in one place.

A stage checks a file before it does any work, and an error names the field, its value and what it must be. Fields that a
schema does not name are not used, and may hold anything: a file may come from a later version, or from somebody else.
`pipeline.backbone.adapter_config` says more about an adapter's config, where an unknown field can change the model.

The module is longer than most, because all schemas stand side by side.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.quoting import quoted


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value.

    Attributes:
        words: what the value must be, for messages.
        holds: tells whether a value is of this kind, apart from its parts.
        needed, known: kinds of the fields that an object must have, and of those that it may have.
        each: kind of every entry of a list, or of every value of an object.
        others: kinds of which one must fit instead, if this one does not.
    """

    words: str
    holds: Callable[[Any], bool]
    needed: Mapping[str, "Kind"] = field(default_factory=dict)
    known: Mapping[str, "Kind"] = field(default_factory=dict)
    each: "Kind | None" = None
    others: tuple["Kind", ...] = ()


def fault(value: Any, kind: Kind, where: str = "") -> str | None:
    """Return what is wrong with the first part of a value that is not of its kind, or None."""
    if any(fault(value, other, where) is None for other in kind.others):
        return None
    if not kind.holds(value):
        return f"{where or 'the file'} is {quoted(value)}, but must be {kind.words}"
    for name, of_field in kind.needed.items():
        if name not in value:
            return f"{_field(where, name)} is missing. It must be {of_field.words}"
    for name, of_field in (*kind.needed.items(), *kind.known.items()):
        if name in value and (problem := fault(value[name], of_field, _field(where, name))):
            return problem
    if kind.each is not None:
        entries = value if isinstance(value, dict) else dict(enumerate(value))
        for place, entry in entries.items():
            if problem := fault(entry, kind.each, _field(where, place)):
                return problem
    return None


def _field(where: str, name: str | int) -> str:
    return f"{where}[{quoted(name)}]" if where else quoted(name)


# ------------------------------------------------------------------------------------ kinds of values
LARGEST = 1e300  # whole numbers of JSON have no bound


def number(low: float = -LARGEST, high: float = LARGEST, words: str = "") -> Kind:
    """Return the kind of a finite number in low..high."""
    bounds = "" if low == -LARGEST else f" of at least {low:g}" if high == LARGEST else f" from {low:g} to {high:g}"
    return Kind(words or f"a number{bounds}", lambda value: _is_number(value) and low <= value <= high)


def whole(low: int = 0, high: int = 2**63 - 1) -> Kind:
    """Return the kind of a whole number in low..high."""
    bounds = f"of at least {low}" if high == 2**63 - 1 else f"from {low} to {high:,}"
    return Kind(f"a whole number {bounds}", lambda value: type(value) is int and low <= value <= high)


def one_of(*values: Any) -> Kind:
    """Return the kind of one of these values; 1 is not True."""
    words = " or ".join(json.dumps(value) for value in values)
    return Kind(words, lambda value: any(type(value) is type(one) and value == one for one in values))


def text(pattern: str = "", words: str = "a text") -> Kind:
    """Return the kind of a text, which must match the whole of `pattern` if one is given."""
    matches = re.compile(pattern).fullmatch if pattern else None
    return Kind(words, lambda value: isinstance(value, str) and (matches is None or matches(value) is not None))


def nullable(kind: Kind) -> Kind:
    """Return the kind of null or `kind`."""
    return either(kind, NULL)


def either(kind: Kind, *others: Kind) -> Kind:
    """Return the kind of values of one of these kinds."""
    words = " or ".join(one.words for one in (kind, *others))
    return replace(kind, words=words, others=(*kind.others, *others))


def list_of(kind: Kind, low: int = 0, high: int = 2**63 - 1) -> Kind:
    """Return the kind of a list of low to high entries of one kind."""
    words = (
        f"a list of {low} or more entries" if low else "a list" if high == 2**63 - 1 else f"a list of up to {high:,}"
    )
    return Kind(
        f"{words} ({kind.words})", lambda value: isinstance(value, list) and low <= len(value) <= high, each=kind
    )


def mapping(kind: Kind) -> Kind:
    """Return the kind of an object whose values are all of one kind."""
    return Kind(f"an object of values ({kind.words})", lambda value: isinstance(value, dict), each=kind)


def record(needed: Mapping[str, Kind] | None = None, known: Mapping[str, Kind] | None = None) -> Kind:
    """Return the kind of an object with fields of these kinds; other fields are not looked at."""
    words = f"an object with {', '.join(map(repr, needed))}" if needed else "an object"
    return Kind(words, lambda value: isinstance(value, dict), needed=needed or {}, known=known or {})


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]  # False for NaN


ANYTHING = Kind("any value", lambda value: True)
NULL, BOOLEAN, TEXT, NUMBER = one_of(None), one_of(True, False), text(), number()
# A figure that may not have been measured: null, or in older files a number that is not finite.
FIGURE = either(NUMBER, Kind("null", lambda value: value is None or (type(value) is float and not _is_number(value))))
OBJECT = mapping(ANYTHING)
SHARE = number(0, 1)

# ------------------------------------------------------------------------------------ beside an adapter
# backbone.json: `pipeline.backbone.identity.write_identity`. Older files lack the last three.
IDENTITY = record(
    {"fingerprint": TEXT},
    {"model_name_or_path": nullable(TEXT), "precision": TEXT, "pad_token_id": nullable(whole())},
)
# score_normalization.json: `reward_models.normalization.Normalization`.
NORMALIZATION = record(
    {"mean": NUMBER, "std": number(1e-30, words="a number above 0"), "completions": whole(1)},
)
# calibration.json: `reward_models.temperature.Calibration`.
CALIBRATION = record(
    {
        "temperature": number(1e-30, words="a number above 0"),
        **dict.fromkeys(("pairs", "measured"), whole(1)),
        **dict.fromkeys(("ece_before", "ece"), SHARE),
        **dict.fromkeys(("nll_before", "nll"), number(0)),
        "half_temperatures": list_of(number(1e-30, words="a number above 0"), 2, 2),
        "half_eces": list_of(SHARE, 2, 2),
        "source": TEXT,
    }
)
# The figures of a reward model: `reward_models.calibration.reward_model_report`.
BIN = {"low": NUMBER, "high": NUMBER}
REWARD_MODEL = {
    "accuracy": SHARE,
    "ece": SHARE,
    "pairs": whole(1),
    "human_ceiling": SHARE,
    "by_gap": list_of(record({**BIN, "pairs": whole(1), "accuracy": SHARE}, {"human": SHARE}), 1),
    "reliability": list_of(record({**BIN, "count": whole(1), "predicted": SHARE, "observed": SHARE}), 1),
}
# Those that a report shows.
MEASURED = record({key: REWARD_MODEL[key] for key in ("accuracy", "ece", "pairs", "reliability")}, REWARD_MODEL)
# What `pipeline.runs.outputs.rows_report` counts in each dataset.
ROWS = mapping(record({"source": TEXT, **dict.fromkeys(("rows", "kept", "cut", "dropped", "longest"), whole())}))
CHECKS = list_of(record({"name": TEXT, "measured": FIGURE, "bound": TEXT, "result": TEXT, "why": TEXT}))
# A line of a trainer's log. Figures that other trainers log are not used.
LOGGED = record(
    None, dict.fromkeys(("step", "score", "kl", "loss/value", "approxkl", "completions/mean_length"), FIGURE)
)
# Options that the figures of a completion's tokens depend on, of PPO's metrics.json and of a checkpoint's manifest.
OF_TOKENS = record(
    None,
    {
        **dict.fromkeys(("beta", "gamma", "lam", "temperature"), number(0)),
        "kl_estimator": one_of("k1", "k3"),
        "missing_eos_penalty": nullable(NUMBER),
        "reward_clip_range": nullable(list_of(NUMBER, 2, 2)),
        "reward_weights": nullable(list_of(NUMBER)),
        "max_completion_length": whole(1),
        **dict.fromkeys(("whiten_rewards", "normalize_scores"), BOOLEAN),
    },
)
# metrics.json. One from elsewhere may hold none of these.
METRICS = record(
    None,
    {
        **REWARD_MODEL,
        "rating_scale": record({"mean": NUMBER, "std": NUMBER}),
        "history": list_of(LOGGED),
        "rows": ROWS,
        "seconds": number(0),
        "completions": nullable(whole()),
        "preflight": CHECKS,
        "options": OF_TOKENS,
    },
)

# ------------------------------------------------------------------------------------ results
INTERVAL = record(dict.fromkeys(("mean", "low", "high"), NUMBER))
COMPLETIONS = record(
    dict.fromkeys(("score", "kl", "distinct_2"), NUMBER),
    {
        "judge": NUMBER,
        **dict.fromkeys(("distinct_1", "perplexity", "mean_length", "text_loss", "disagreement"), FIGURE),
    },
)
# report.json of pipeline.evaluation. Without a judge it has no figures of one.
JUDGED = {"judge_gain": INTERVAL, "win_rate": INTERVAL}
PAIRWISE = record({"judge": TEXT, "win_rate": INTERVAL, "consistent": SHARE, "undecided": whole()})
REPORT = record(
    {"sft": COMPLETIONS, "policy": COMPLETIONS},
    {
        **JUDGED,
        "judge": TEXT,
        "pairwise": PAIRWISE,
        "score_gain": INTERVAL,
        "score_win_rate": INTERVAL,
        "text_loss_change": INTERVAL,
        "policy_name": TEXT,
        "seed": whole(),
        "prompts": whole(1),
        "completions": nullable(whole()),
        "seconds": mapping(number(0)),
        "reward_model": MEASURED,
        "calibration": CALIBRATION,
        "preflight": CHECKS,
        "rows": ROWS,
    },
)
# What `pipeline.tables` reads besides.
_OF_JUDGE = record({**COMPLETIONS.needed, "judge": NUMBER}, COMPLETIONS.known)
JUDGED_REPORT = record({"sft": _OF_JUDGE, "policy": _OF_JUDGE, **JUDGED}, REPORT.known)
_OF_TEXTS = record({**_OF_JUDGE.needed, "text_loss": NUMBER}, COMPLETIONS.known)
SWEEP_REPORT = record(
    {**JUDGED_REPORT.needed, "sft": _OF_TEXTS, "policy": _OF_TEXTS, "text_loss_change": INTERVAL}, REPORT.known
)
SEED_REPORT = record({**JUDGED_REPORT.needed, "seed": whole(), "reward_model": MEASURED}, REPORT.known)
PPO_METRICS = record({"history": list_of(LOGGED, 1)})
REWARD_METRICS = record({key: REWARD_MODEL[key] for key in ("accuracy", "ece", "reliability")}, METRICS.known)
# best_of_n.json of pipeline.best_of_n.
BEST = record(
    {"n": whole(1), **dict.fromkeys(("score", "kl", "distinct_2"), NUMBER)},
    {**JUDGED, "judge": NUMBER, "mean_length": NUMBER},
)
BEST_OF_N = record({"rows": list_of(BEST)})

# report.json of pipeline.loop, with a judge: what `pipeline.tables` reads of it.
ROUND = record(
    {"labels": whole(), **JUDGED, "kl": NUMBER, "distinct_2": NUMBER}, {"earlier_reward_model": nullable(INTERVAL)}
)
LOOP_REPORT = record({"rounds": list_of(ROUND, 1)})

# ------------------------------------------------------------------------------------ checkpoints
# manifest.json. Older ones lack `kind`.
MANIFEST = record(
    {
        "sha256": TEXT,
        "files": mapping(record({"bytes": whole(), "sha256": TEXT})),
        "holds": list_of(TEXT),
        "world_size": whole(1),
        "order": OBJECT,
        "written": NUMBER,
    },
    {"kind": TEXT, "step": whole(), "run": whole(), "options": mapping(OBJECT), "contents": OBJECT},
)
# state_<process>.json of every trainer, as `load_state` returns it. PPO's checkpoints hold more.
STATE = record(
    {
        "counters": OBJECT,
        "metrics": mapping(mapping(list_of(ANYTHING))),
        "trained_for": NUMBER,
        "epoch_start": record({"torch": ANYTHING, "sampler": ANYTHING}),
        "now": record({"torch": ANYTHING, "sampler": ANYTHING}),
        "rows": nullable(whole()),
        "frozen": TEXT,
        "seconds": NUMBER,
    },
    {
        "loop": OBJECT,
        "logs": record(
            None,
            dict.fromkeys(("prompt", "completion", "advantages"), list_of(ANYTHING))
            | dict.fromkeys(("rewards", "extra"), mapping(list_of(ANYTHING))),
        ),
    },
)
# Older checkpoints have the state of the warnings as `watch`.
HEALTH = record(
    {"said": list_of(TEXT), "first_entropy": nullable(NUMBER), "flat_rollouts": whole()}, {"rollouts": whole()}
)
PPO = {"ppo": record({"beta": NUMBER})}
PPO_STATE = either(
    record(PPO | {"health": HEALTH}, {"rollout": OBJECT}), record(PPO | {"watch": HEALTH}, {"rollout": OBJECT})
)
# trainer_state.json, which Trainer reads.
TRAINER_STATE = record(
    {"global_step": whole(), "log_history": list_of(OBJECT)},
    {"epoch": nullable(NUMBER), "best_model_checkpoint": nullable(TEXT), "max_steps": whole(-1)}
    | {"stateful_callbacks": nullable(mapping(either(OBJECT, list_of(OBJECT))))},
)
# A line of samples.jsonl, of which a resumed run keeps those up to its step.
SAMPLE = record({"step": whole()})
# The same line for those who show it. A prompt is a text or a conversation.
SAMPLE_ROW = record(
    {"step": whole(), "prompt": either(TEXT, list_of(OBJECT)), "completion": TEXT},
    dict.fromkeys(("score", "kl", "judge", "disagreement"), FIGURE),
)
# A line of training_log.jsonl: `pipeline.runs.training_log`.
LOG_LINE = record(
    {"step": whole()},
    {
        "time": number(0, 1e11, "seconds since 1970"),
        "started": record({"stage": TEXT, "max_steps": whole(), "options": OBJECT}, {"preflight": CHECKS}),
        "warning": TEXT,
        "ended": TEXT,
    },
)

# ------------------------------------------------------------------------------------ models and data
# config.json of a model: transformers checks the rest as it loads the model.
MODEL_CONFIG = record(None, {"architectures": nullable(list_of(TEXT)), "model_type": TEXT})
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
FILE_NAME = Kind(
    "the name of a file in this folder",
    lambda value: isinstance(value, str) and value not in ("", ".", "..") and set(value).isdisjoint("/\\\0"),
)
DATASET_DICT = record({"splits": list_of(FILE_NAME)})
DATASET_STATE = record(
    {
        "_data_files": list_of(record({"filename": FILE_NAME})),
        "_fingerprint": TEXT,
        "_split": nullable(TEXT),
        "_format_type": nullable(TEXT),
        "_format_kwargs": OBJECT,
        "_format_columns": nullable(list_of(TEXT)),
        "_output_all_columns": BOOLEAN,
    }
)
DATASET_INFO = record(None, {"features": nullable(OBJECT), "splits": nullable(OBJECT)})
# ensemble.json: `pipeline.backbone.members.write_members`.
MEMBER = record({"folder": FILE_NAME, "seed": whole(), "sha256": TEXT})
ENSEMBLE = record({"members": list_of(MEMBER, 2)})

# A line of answers.jsonl: `pipeline.pages.label_answers`.
TURNS = list_of(record({"role": TEXT, "content": TEXT}), 1)
ANSWER = record(
    {
        **dict.fromkeys(("pair", "annotator", "first_from", "second_from"), TEXT),
        "label": one_of("1", "2", "tie", "skip", "undo"),
        **dict.fromkeys(("prompt", "first", "second"), either(TEXT, TURNS)),
        **dict.fromkeys(("swapped", "shared"), BOOLEAN),
        "number": whole(1),
        "disagreement": nullable(NUMBER),
    }
)
