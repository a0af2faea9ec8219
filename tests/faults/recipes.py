"""Recipes and command lines: options of every stage with odd and hostile values, and what YAML makes of odd files."""

import math
import re
from dataclasses import MISSING, fields
from typing import get_type_hints

from tests.faults.verdicts import UNCLEAR, Verdict, judge
from tests.faults.world import Case, Raw, as_recipe, good_options, kinds_of, unsound


STAGES = ("sft", "reward", "ppo", "ppo", "evaluation", "best_of_n", "rloo", "grpo", "dpo")
NUMBERS = (
    "-1", "0", "1", "2", "3", "7", "1000000000", "1.0e+30", "-1.0e-5", "0.5", ".nan", ".inf", "-.inf", "1.0e-320", "010",
    "1:30", "0x10", "1_000", "'1e-1'", "+3", "99999999999999999999999", "1e5", "'  4'", "3.0",
)  # fmt: skip
WORDS = (
    "''", "' '", "~", "'null'", "true", "yes", "'off'", "abc", "'no'", '"\\u2028é"', '"\\e[31mred"', "2020-01-01", "a" * 400,
    "'../..'", "/dev/null", "/", "'{}'", "'[1'", '"a\\0b"', "!!binary aGk=", "'--seed'", "steps", "epoch", "auto", "last",
)  # fmt: skip
LIKELY = ("1", "2", "3", "4", "6", "0.1", "0.5", "1.0e-3", "2.0", "16")
CHOICES = (
    "cosine", "constant", "linear", "polynomial", "sgd", "rmsprop", "adafactor", "adamw_torch", "lion_32bit", "head", "policy",
    "k3", "sequence", "token", "eager", "float32", "bfloat16", "steps", "epoch", "group_by_length", "random", "keep_end",
    "c_attn", "all-linear", "gaussian", "'<|end|>'", "prompts.jsonl", "pairs.jsonl", "texts.jsonl", "sft",
    "ppo", "loss", "eval_loss",
)  # fmt: skip
NESTED = ("[]", "[1]", "[1e-1]", "['a']", "[~]", "[[1]]", "[1, two]", "{}", "{a: 1}", "{a: {b: [1]}}", "[true, false]")
# Options that reach for the network or start services, those of other hardware, and where a large number is honest work.
LEFT_OUT = re.compile(
    "push_to_hub.*|hub_.*|deepspeed|fsdp.*|torch_compile.*|use_vllm|vllm_.*|dataloader_.*|dataset_num_proc|tpu_.*|local_rank|"
    "ddp_.*|trackio.*|accelerator_config|parallelism_config|load_in_.*|use_cpu|report_to|model_revision|run_name|"
    "trust_remote_code|attn_implementation|dataset_kwargs|model_init_kwargs|use_liger.*|liger.*|distributed.*|project"
)
HONEST = re.compile(
    "max_steps|num_train_epochs|num_iterations|n|gradient_accumulation_steps|.*_delay|.*_batches|save_.*"
)
NUMBER = re.compile(r"\bint\b|\bfloat\b")


def options_of(stage: str) -> dict[str, str]:
    """Return the names of a stage's options that are drawn from, each with its type as text."""
    found = {}
    for kind in kinds_of(stage):
        hints = get_type_hints(kind)
        found |= {option.name: str(hints[option.name]) for option in fields(kind) if option.init}
    return {name: hint for name, hint in found.items() if not LEFT_OUT.fullmatch(name)}


def default_of(stage: str, name: str) -> object:
    """Return the default of an option, None if it has none."""
    for kind in kinds_of(stage):
        for option in fields(kind):
            if option.name == name and option.default is not MISSING:
                return option.default
    return None


def draw_value(case: Case, name: str, hint: str) -> str:
    """Return a value as YAML, mostly of the option's own type."""
    number, fits = NUMBER.search(hint), case.draw.random() < 0.6
    pool: tuple[str, ...] = case.draw.choice((NUMBERS, WORDS, NESTED))
    if number and fits:
        pool = case.draw.choice((NUMBERS, LIKELY))
    elif fits and "bool" in hint:
        pool = ("true", "false", "'True'")
    elif fits and "list" not in hint:
        pool = CHOICES
    value = case.draw.choice(pool)
    while HONEST.fullmatch(name) and value in (
        "1000000000",
        "1.0e+30",
        "1_000",
        "1e5",
        "99999999999999999999999",
        ".inf",
    ):
        value = case.draw.choice(pool)
    return value


def draw_options(case: Case) -> tuple[str, dict[str, Raw]]:
    stage = case.draw.choice(STAGES)
    options = options_of(stage)
    chosen = case.draw.sample(sorted(options), case.draw.choice((1, 1, 1, 2, 3)))
    drawn = {name: Raw(draw_value(case, name, options[name])) for name in chosen}
    case.note(f"{stage} " + ", ".join(f"{name}: {value[:60]}" for name, value in drawn.items()))
    return stage, drawn


def misread(stage: str, drawn: dict[str, str]) -> str | None:
    """Say which value of a number no run can have taken as it was meant."""
    options = options_of(stage)
    for name, value in drawn.items():
        if NUMBER.search(options[name]) and "str" not in options[name] and value in (".nan", "1:30"):
            return f"{name}: {value} was taken"
    return None


def out_of(case: Case, drawn: dict[str, str]) -> str:
    """Return the output folder of a run that may have changed it."""
    given = drawn.get("output_dir", "out")
    return given.strip("'\"") if given != "''" else "."


def recipe(case: Case) -> Verdict:
    """A few options of a recipe have odd values, over an earlier run's folder half of the time."""
    stage, drawn = draw_options(case)
    earlier = stage if (case.folder / stage).is_dir() and stage != "ppo" and case.draw.random() < 0.3 else "out"
    given = {"output_dir": earlier} | ({"sft_adapter": "ppo"} if earlier == "sft" and stage != "sft" else {}) | drawn
    before = case.files()
    ended = case.run(stage, **given)
    return verdict_of(case, ended, stage, drawn, before, given)


def verdict_of(case, ended, stage, drawn, before, given) -> Verdict:
    out = out_of(case, given)
    # What is in output_dir may change when a run ends well; all else may not, whatever happens.
    lost = case.changed(before, but=() if ended.code else (out,))
    names = [*drawn, *(value.strip("'\"") for value in drawn.values() if len(value.strip("'\"")) > 1)]
    names += ["generation_batch_size"] * ("per_device_train_batch_size" in drawn or "num_generations" in drawn)

    def wrong() -> str | None:
        if problem := misread(stage, drawn):
            return problem
        folder = case.folder / out
        return unsound(stage, folder) if "output_dir" not in drawn or folder.is_dir() else None

    return judge(ended, names=names, lost=lost, wrong=wrong)


# ------------------------------------------------------------------------------------ the command line
def command_line(case: Case) -> Verdict:
    """Words of the command line are odd: values, missing values, abbreviations, repetitions."""
    stage, drawn = draw_options(case)
    words: list[str] = []
    for name, value in drawn.items():
        value = value.strip("'\"")
        key = case.draw.choice((name, name, name, name.replace("_", "-"), name[:-1], f"no_{name}", name.upper()))
        words += case.draw.choice(
            ([f"--{key}", value], [f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [f"--{key}", value, "extra"],
             [f"-{key}", value], [f"--{key}", value, f"--{key}", value], [key, value], [f"--{key}", *value.split()])
        )  # fmt: skip
    if case.draw.random() < 0.15:
        words.insert(
            case.draw.randrange(len(words) + 1), case.draw.choice(("--", "--config", "", "-h", "--config=", "é", "@x"))
        )
    case.note(" ".join(map(repr, words)))
    before = case.files()
    ended = case.run(stage, *words)
    helped = any(word in ("-h", "--help") for word in words)
    lost = case.changed(before, but=() if ended.code else ("out", *drawn.get("output_dir", "").strip("'\"").split()))
    keys = [word.lstrip("-").split("=")[0].replace("-", "_") for word in words]
    names = (
        [*keys, *map(repr, keys)]  # a key of one letter is known by its quotes
        + [word.partition("=")[2] for word in words]
        + [*words, "--config", "generation_batch_size", *map(repr, words)]
    )

    def wrong() -> str | None:
        return None if helped or "output_dir" in drawn else unsound(stage, case.folder / "out")

    return judge(ended, names=[name for name in names if len(name) > 1 or not name.isascii()], lost=lost, wrong=wrong)


# ------------------------------------------------------------------------------------ YAML
def yaml_of(case: Case, stage: str) -> tuple[str, str | bytes, bool, str]:
    """Return an odd recipe: its kind, the file, whether it must be refused, and what an error may name besides the file."""
    good = as_recipe(good_options(stage))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    key = case.draw.choice([line.split(":")[0] for line in good.splitlines()])
    typo = case.draw.choice(
        (key[:-1], key + "s", key.replace("_", "-") if "_" in key else key + "-", key.title(), f" {key}")
    )
    odd = {
        "empty": ("", True, ""),
        "comments only": ("# nothing\n", True, ""),
        "a list": ("- a\n- b\n", True, ""),
        "a scalar": ("model", True, ""),
        "two documents": (good + "---\n" + good, True, ""),
        "a key twice": (good + f"{key}: 1\n", True, key),
        "a typo": (re.sub(rf"^{key}:", f"{typo}:", good, flags=re.M), True, typo.strip()),
        "a tab": (good + "\tseed: 1\n", True, ""),
        "a BOM": ("\ufeff" + good, False, ""),
        "UTF-16": (good.encode("utf-16"), True, ""),
        "latin-1": (good.encode() + b"run_name: caf\xe9\n", True, ""),
        "CRLF": (good.replace("\n", "\r\n"), False, ""),
        "NUL": (good + "run_name: a\0b\n", True, ""),
        "deep": (good + "model_init_kwargs: " + "[" * 4000 + "]" * 4000 + "\n", True, "model_init_kwargs"),
        "an alias bomb": (bomb + good, True, "a0"),
        "an alias bomb as a value": (re.sub(r"(?m)^seed:.*\n", "", good) + bomb.replace("a8: ", "seed: "), True, "a0"),
        "an alias": ("seed: &s 0\n" + re.sub(r"(?m)^seed:.*\n", "", good), False, ""),
        "a merge key": ("<<: {seed: 0}\n" + re.sub(r"(?m)^seed:.*\n", "", good), None, "<<"),
        "a Python tag": (good + "run_name: !!python/object/apply:os.system ['touch owned']\n", True, ""),
        "a key that is no text": (good + "1: 2\n", True, "1"),
        "a key that is null": (good + "~: 2\n", True, ""),
        "a key that is a list": (good + "? [a]\n: 2\n", True, ""),
        "a key that recurs": (good + "run_name: &r [*r]\n", True, "run_name"),
        "a huge number": (good + "warmup_steps: " + "9" * 5000 + "\n", True, "warmup_steps"),
        "flow style": ("{" + good.strip().replace("\n", ", ") + "}", False, ""),
        "env": (good + "env: {SPINE_X: 1}\n", None, "env"),
        "env of a list": (good + "env: [a]\n", True, "env"),
        "a config in it": (good + "config: other.yaml\n", None, "config"),
    }
    kind = case.draw.choice(sorted(odd))
    text, refused, names = odd[kind]
    return kind, text, refused, names


def yaml(case: Case) -> Verdict:
    """The recipe is an odd YAML file."""
    stage = case.draw.choice(STAGES)
    kind, text, refused, name = yaml_of(case, stage)
    case.note(f"{stage}, {kind}")
    before = case.files()
    ended = case.run(stage, recipe=text)
    lost = case.changed(before, but=("out",)) + (["a recipe ran code"] if (case.folder / "owned").exists() else [])

    def wrong() -> str | None:
        return f"a recipe with {kind} was taken" if refused else unsound(stage, case.folder / "out")

    verdict = judge(ended, names=["recipe-0", name], lost=lost, wrong=wrong)
    if refused is False and ended.code and not math.isnan(ended.code) and verdict.name == "clear error":
        return Verdict(UNCLEAR, f"a good recipe is refused: {ended.message}")
    return verdict
