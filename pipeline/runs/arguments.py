"""The stages' arguments: TRL's own config classes, what PPO adds to them, and a parser that takes no typo silently."""

import difflib
import os
import sys
import warnings
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import get_reporting_integration_callbacks
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, RLOOConfig, TrlParser

from data.files import has_splits
from data.prompts import load_prompts
from pipeline.rl.importance import MODES
from pipeline.runs.recipe import check_ranges, check_types, read_recipe
from pipeline.backbone.trunk import decoder_layers


@dataclass
class DataArguments:
    """Where a stage reads its rows."""

    dataset_name: str = field(
        default="human_ratings",
        metadata={
            "help": "Hub id, folder or .jsonl/.json/.csv/.tsv/.parquet file (or .gz); human_ratings is the embedded default."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on (a single file has none)."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to evaluate on; unset: the evaluation split of dataset_name; '': none."},
    )
    dataset_eval_split: str = field(
        default="test", metadata={"help": "Split to evaluate on (a single file has none)."}
    )
    drop_bad_rows: bool = field(
        default=False, metadata={"help": "Leave rows that cannot be used out, and say so, instead of refusing them."}
    )
    min_kept: float = field(
        default=0.5,
        metadata={"help": "Refuse to train if max_length leaves fewer than this share of the rows whole (0 to 1)."},
    )

    @property
    def eval_source(self) -> str | None:
        """Where evaluation rows come from: None where no other dataset is named and dataset_name has no splits, so that
        they would be those that are trained on."""
        if self.eval_dataset_name is not None:
            return self.eval_dataset_name or None
        return self.dataset_name if has_splits(self.dataset_name) else None


# SFTConfig, RewardConfig and DPOConfig of TRL have an option `pad_token`; the other stages get one of that name.
PAD_TOKEN = {
    "help": "Token used for padding, the same in all stages; unset: the tokenizer's own, unless it ends texts."
}


@dataclass
class PolicyArguments:
    """Where a policy starts."""

    sft_adapter: str | None = field(
        default=None, metadata={"help": "Adapter the policy starts from and is held to; unset: the bare backbone."}
    )


@dataclass
class OnlineArguments(PolicyArguments):
    """Add to TRL's configs what RLOO and GRPO need here."""

    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)


@dataclass
class CompletionArguments:
    """Held-out prompts, and how they are completed."""

    output_dir: str = field(metadata={"help": "Where the figures go."})
    dataset_name: str = field(default="human_ratings", metadata={"help": "Prompts: hub id, folder or file."})
    dataset_eval_split: str = field(default="test", metadata={"help": "Split to take prompts from."})
    drop_bad_rows: bool = field(default=False, metadata={"help": "Leave prompts that cannot be used out, and say so."})
    max_prompts: int = field(default=512, metadata={"help": "The first so many prompts."})
    max_completion_length: int = field(default=24, metadata={"help": "Tokens sampled at most."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, as in PPO."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled at once."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "As in PPO; unset: 1 each."})
    seed: int = 0
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    def __post_init__(self):
        self.output_dir = str(Path(self.output_dir).expanduser())  # as Trainer's arguments do

    def prompts(self) -> Dataset:
        """Raises what `load_prompts` raises, and a ValueError if there are fewer than two: no interval can be given."""
        prompts = load_prompts(self.dataset_name, self.dataset_eval_split, drop=self.drop_bad_rows)
        prompts = prompts.select(range(min(self.max_prompts, len(prompts))))
        if len(prompts) < 2:
            raise ValueError(
                f"{self.dataset_name}: 1 prompt (max_prompts={self.max_prompts}), and intervals need 2 or more. Name more."
            )
        return prompts


@dataclass
class LoraArguments:
    """Where an adapter reaches, beside `lora_target_modules`."""

    lora_top_layers: int | None = field(
        default=None,
        metadata={
            "help": "Adapt the top so many decoder layers; PPO computes those below once a rollout. Unset: all."
        },
    )
    lora_embeddings: bool = field(
        default=False,
        metadata={"help": "LoRA on the input embeddings as well: a small backbone's words are taught their worth."},
    )


@dataclass
class RewardModelArguments:
    """What the reward stage adds to TRL's RewardConfig."""

    use_margin: bool = field(
        default=False,
        metadata={"help": "Subtract the `margin` column in the loss (Llama 2). It costs calibration: scores stretch."},
    )
    sft_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Policy whose completions PPO will start from: measure the mean and deviation of their scores."
        },
    )
    sft_completions: int = field(default=256, metadata={"help": "How many of its completions."})
    max_completion_length: int = field(default=64, metadata={"help": "Tokens sampled at most for each."})


# Options of RLOOConfig and Trainer that PPO would have to ignore.
UNSUPPORTED = (
    "fp16",  # its loss scaler expects gradients in every step, and infinite ones in some
    "vllm_structured_outputs_regex",  # completions would not be drawn from the policy that is scored
    "use_transformers_continuous_batching",  # with bf16 TRL rounds the adapters to bfloat16 for good
    "mask_truncated_completions",
    "sync_ref_model",
    "epsilon_high",
    "router_aux_loss_coef",
    "chat_template_kwargs",
)


@dataclass
class PPOConfig(RLOOConfig):
    """PPO's arguments: TRL's RLOOConfig, whose names keep their meaning, and what a value function adds.

    Inherited and central: `beta` (KL coefficient), `epsilon` (policy clip range), `num_iterations` (PPO epochs an
    update), `steps_per_generation` (minibatches an epoch times gradient accumulation), `temperature`,
    `max_completion_length`, `reward_weights`, `reward_clip_range` (bounds of the score).
    """

    # what TRL's class has, with PPO's defaults
    num_generations: int = field(default=1, metadata={"help": "Completions a prompt. PPO's baseline is the value."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    normalize_advantages: bool = field(default=True, metadata={"help": "Whiten advantages over each rollout."})
    reward_clip_range: list[float] | None = field(  # TRL's tuple cannot be given on a command line
        default=None, metadata={"help": "Lowest and highest score; scores beyond are clipped."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn dropout off, so that ratios start at 1."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam, as in OpenAI's PPO."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Keep each layer's input alone, and compute the rest again."}
    )
    pad_token: str | None = field(default=None, metadata=PAD_TOKEN)

    # vLLM, which samples in an arithmetic of its own: names, meaning and defaults of TRL's GRPOConfig
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "With use_vllm, weigh the policy loss by trained over sampled probability."}
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={"help": f"What has a ratio, and what becomes of one beyond the bounds: {', '.join(MODES)}."},
    )
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Upper bound of a ratio."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Lower bound of a ratio."})

    # the reward of a token
    kl_estimator: str = field(default="k1", metadata={"help": "KL of a token: k1 (unbiased) or k3 (never negative)."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats a sequence that beta is adapted to hold; unset: beta stays as it is."}
    )
    kl_horizon: float = field(
        default=10_000, metadata={"help": "Sequences over which an adaptive beta may change by a factor of e^0.2."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the score of a completion that did not end by itself."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to unit variance; the mean stays."})

    # the advantage and the value
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    critic: str = field(
        default="adapter",
        metadata={"help": "adapter: a value adapter and head of its own. head: only a head, on the policy's trunk."},
    )
    value_init: str = field(
        default="auto",
        metadata={"help": "Start of the value adapter: reward, policy (with a zero head), or auto: reward if any."},
    )
    critic_warmup_updates: int = field(default=0, metadata={"help": "First updates in which the value alone trains."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_clip: float = field(default=0.2, metadata={"help": "Clip range of the value loss."})

    # the update
    max_approx_kl: float | None = field(
        default=None, metadata={"help": "Skip the rest of an update once a minibatch's approxkl (nats) exceeds this."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on texts of ptx_dataset_name."}
    )

    # before and during training
    min_reward_accuracy: float = field(
        default=0.55, metadata={"help": "Refuse a reward model that orders fewer held-out pairs rightly."}
    )
    sample_updates: int = field(
        default=0, metadata={"help": "Write completions of fixed prompts to samples.jsonl every so many updates."}
    )
    sample_prompts: int = field(default=8, metadata={"help": "How many fixed prompts."})
    eval_prompts: int = field(default=256, metadata={"help": "The first so many held-out prompts (eval_strategy)."})

    def __post_init__(self):
        check_ranges(vars(self))
        try:
            super().__post_init__()
        except ValueError as error:
            # RLOO's last check wants two completions a prompt for its leave-one-out baseline. PPO's is the value.
            if "at least 2 generations" not in str(error):
                raise
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by PPO; leave it unset.")
        for name, known in (
            ("vllm_mode", ("server", "colocate")),
            ("vllm_importance_sampling_mode", MODES),
            ("kl_estimator", ("k1", "k3")),
            ("critic", ("adapter", "head")),
            ("value_init", ("auto", "reward", "policy")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.critic == "head" and self.value_init != "auto":
            raise ValueError(
                f"value_init={self.value_init!r} starts a value adapter, which critic='head' has not; leave it unset."
            )
        bounds = [self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max]
        if None not in bounds and not _ascends(bounds):
            raise ValueError(
                f"vllm_importance_sampling_clip_min={bounds[0]} must be below vllm_importance_sampling_clip_max={bounds[1]}."
            )
        if self.reward_clip_range is not None and not _ascends(self.reward_clip_range):
            raise ValueError(
                f"reward_clip_range={self.reward_clip_range} must be two numbers, the lower first: [-5, 5]."
            )
        if self.kl_target and self.beta <= 0:
            raise ValueError(f"beta={self.beta} cannot be adapted to kl_target={self.kl_target}; start above 0.")
        if self.kl_target and self.kl_horizon < self.generation_batch_size:
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g} is shorter than one rollout of {self.generation_batch_size} sequences over "
                f"all processes, in which beta may change by a fifth at most; raise it to several rollouts."
            )
        minibatches = self.steps_per_generation / self.gradient_accumulation_steps
        if minibatches != int(minibatches):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"steps_per_generation={self.steps_per_generation}; their ratio is the number of minibatches an epoch."
            )


def _ascends(bounds: list[float]) -> bool:
    return len(bounds) == 2 and bounds[0] < bounds[1]


def check_max_length(max_length: int | None, context: int) -> None:
    """Rows longer than `max_length` tokens are TRL's to cut (SFT) or drop (reward); none may outgrow the model.

    Raises:
        ValueError: rows longer than the model's context could reach it.
    """
    if max_length is None or max_length > context:
        raise ValueError(f"max_length={max_length} exceeds the model's context of {context} tokens; lower it.")


def lora_config(
    model: ModelConfig, *, task_type: str, reach: LoraArguments | None = None, base: PreTrainedModel | None = None
) -> LoraConfig:
    """LoRA as `lora_*` in ModelConfig says, as far as `reach` takes it on `base`.

    A reward adapter (SEQ_CLS) trains and saves its head too.

    Raises:
        ValueError: the model has fewer layers than are to be adapted; or an option of ModelConfig has no effect here.
    """
    for option in ("use_dora", "lora_modules_to_save", "lora_target_parameters"):
        if getattr(model, option):
            raise ValueError(f"{option}={getattr(model, option)!r} is not supported; leave it unset.")
    modules, layers = model.lora_target_modules, {}
    if isinstance(modules, str) and modules != "all-linear":
        modules = [modules]  # ModelConfig unwraps a list of one, and peft would take the bare name for a pattern
    if reach and (reach.lora_embeddings or reach.lora_top_layers):
        named = dict(base.named_modules())
        if modules in (None, "all-linear"):  # peft takes that word alone: not in a list, not for some layers
            linear = {name.split(".")[-1] for name, layer in named.items() if isinstance(layer, (nn.Linear, Conv1D))}
            heads = (base.get_output_embeddings(), getattr(base, "score", None))
            modules = sorted(linear - {name.split(".")[-1] for name, layer in named.items() if layer in heads})
        if reach.lora_embeddings:
            # By its full name: peft would store the frozen embeddings with an adapter of a bare `embed_tokens`.
            modules = [*modules, next(n for n, layer in named.items() if layer is base.get_input_embeddings())]
        if reach.lora_top_layers:
            _, pattern, decoder = decoder_layers(base)
            if not 0 < reach.lora_top_layers <= len(decoder):
                raise ValueError(f"lora_top_layers={reach.lora_top_layers}: the model has {len(decoder)} layers.")
            top = list(range(len(decoder)))[-reach.lora_top_layers :]
            layers = {"layers_to_transform": top, "layers_pattern": pattern}
    return LoraConfig(
        task_type=task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=modules,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        use_rslora=model.use_rslora,
        **layers,
    )


def check_lora(
    found: LoraConfig, model: ModelConfig, reach: LoraArguments, base: PreTrainedModel, source: str
) -> None:
    """Raise a ValueError for a `lora_*` option that was set, and says otherwise than `found`, the config of the adapter
    `source` that training goes on from: it would have no effect."""
    wanted = lora_config(model, task_type=found.task_type, reach=reach, base=base)
    fields = {
        "lora_r": "r",
        "lora_alpha": "lora_alpha",
        "use_rslora": "use_rslora",
        "lora_top_layers": "layers_to_transform",
        "lora_target_modules": "target_modules",
        "lora_embeddings": "target_modules",
    }
    default, given = vars(ModelConfig()) | vars(LoraArguments()), vars(model) | vars(reach)
    for option, field_name in fields.items():
        values = (getattr(config, field_name) for config in (wanted, found))
        ours, theirs = (sorted(value) if isinstance(value, (list, set)) else value for value in values)
        # "all-linear" peft stores as the layers that it took it for.
        if given[option] != default[option] and ours not in (theirs, "all-linear"):
            raise ValueError(
                f"{option}={given[option]!r} describes a fresh adapter, and {source} is one with {field_name}={theirs}. "
                f"Leave {option} unset, or train {source} anew with it."
            )


def parse(*dataclass_types, args: list[str] | None = None) -> tuple:
    """Dataclasses from `--config recipe.yaml` and the command line, which overrides it.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe is not YAML; a key that no dataclass has, and the message names the nearest one; a value
            that is not of the key's type, or outside of its range.
    """
    runs = args is None
    if runs:
        args = sys.argv[1:]
        _report_errors_once()
        for stream in (sys.stdout, sys.stderr):  # in an ASCII locale a token or a path may hold what cannot be printed
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    args = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser = TrlParser(dataclass_types)
    parser.error = _refuse  # argparse would print all options of the stage before what is wrong
    options = [word.lstrip("-").replace("-", "_") for action in parser._actions for word in action.option_strings]
    known = {"config", "env", *options}
    given = [(word[2:].split("=")[0].replace("-", "_"), "command line") for word in args if word.startswith("--")]
    recipe, path, rest = {}, None, list(args)
    if "--config" in args:
        if args[-1] == "--config":
            raise ValueError("command line: --config needs the path of a recipe after it.")
        at = rest.index("--config")
        path = rest[at + 1]
        del rest[at : at + 2]
        recipe = read_recipe(path)
        given += [(str(key), path) for key in recipe]
    for key, source in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{source}: unknown key {key!r}.{hint}")
    check_types(recipe, dataclass_types, path)
    parser.set_defaults_with_config(**recipe)
    check_ranges(vars(parser.parse_known_args(rest)[0]))
    with warnings.catch_warnings():  # TRL would have the tokenizer's set instead, which `load_pretrained` does
        warnings.filterwarnings("ignore", message="`pad_token` is deprecated")
        parts = parser.parse_args_and_config(args)
    for part in parts:
        for name in ("eos_token", "chat_template_path"):
            if value := getattr(part, name, None):
                raise ValueError(
                    f"{name}={value!r} would hold for this stage alone, and all stages read the model's tokenizer. Set it "
                    f"there: in the tokenizer of a local copy of the model, which model_name_or_path names."
                )
    if runs:
        for part in parts:
            _check_trackers(getattr(part, "report_to", None))
    return parts


def _check_trackers(report_to: list[str] | None) -> None:
    """Raise a ValueError for a tracker that is not installed: Trainer does so after the model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"report_to={report_to}: {error}") from error


def _refuse(message: str) -> None:
    raise ValueError(f"command line: {message}")


def _report_errors_once() -> None:
    """Where several processes run a stage, all but the first tell their errors in a line each: most have the same, and
    as many tracebacks printed at once can be read by no one."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        sys.excepthook = lambda kind, error, trace: sys.stderr.write(f"[rank {rank}] {kind.__name__}: {error}\n")
