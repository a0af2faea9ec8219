"""Refuse options that transformers or TRL would refuse only after the model is loaded, or in the middle of training.

Where their code can be asked (optimizer, schedule, sampling), it is called on something tiny.
"""

import inspect
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.utils.checkpoint
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import (
    AttentionInterface,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from trl import DPOConfig, GRPOConfig, RewardConfig, RLOOConfig, SFTConfig

from data.cells import shorten


# Words that an option knows, where its dataclass does not name them.
DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "luspo", "sapo", "vespo")
WORDS: dict[type[TrainingArguments], dict[str, tuple[str, ...]]] = {
    TrainingArguments: {
        "torch_compile_backend": tuple(backend.value.lower() for backend in DynamoBackend),
        "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    },
    DPOConfig: {
        "loss_type": DPO_LOSSES,
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    },
    GRPOConfig: {
        "loss_type": GRPO_LOSSES,
        "importance_sampling_level": ("token", "sequence"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "scale_rewards": ("group", "batch", "none"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        "vllm_mode": ("server", "colocate"),
    },
    RLOOConfig: {"vllm_mode": ("server", "colocate")},
}
# Entries of generation_kwargs that transformers ignores outside of this range.
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Figures of an evaluation. PPO's are not known before: a reward function may log some of its own.
EVALUATED: dict[type[TrainingArguments], tuple[str, ...]] = {
    TrainingArguments: ("loss",),
    SFTConfig: ("loss", "entropy", "mean_token_accuracy", "num_tokens"),
    RewardConfig: ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"),
}


def check_trainer_options(args: TrainingArguments, *, installed: bool) -> None:
    """Refuse what a trainer of these arguments would refuse later.

    Args:
        installed: whether to look for the packages that options need; a recipe that is only read may be for another machine.

    Raises:
        ValueError: an option has a value that no trainer can use, or that contradicts another option.
        ImportError: an option needs a package that is not installed.
    """
    for kind, options in WORDS.items():
        for name, words in options.items() if isinstance(args, kind) else ():
            value = getattr(args, name)
            for word in value if isinstance(value, list) else [value]:
                if word is not None and word not in words:
                    raise ValueError(f"{name}={shorten(value)} is not one of {', '.join(words)}.")
    if getattr(args, "model_init_kwargs", None):
        raise ValueError(
            f"model_init_kwargs={shorten(args.model_init_kwargs)} has no effect here. Set dtype, attn_implementation, "
            f"model_revision and the like, which are options of their own."
        )
    _check_workers(args)
    _check_evaluation(args)
    _check_optimizer(args, installed=installed)
    _check_schedule(args)
    named = {*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "preserve_rng_state"} - {
        "function",
        "args",
        "kwargs",
    }
    for name in args.gradient_checkpointing_kwargs or {}:
        if name not in named:
            raise ValueError(
                f"gradient_checkpointing_kwargs, also called activation_checkpointing_kwargs: unknown key {shorten(name)}. "
                f"torch.utils.checkpoint knows "
                f"{', '.join(sorted(named))}."
            )
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16=True needs a GPU, and use_cpu is set. Set bf16: true, or neither.")
    on_cpu = args.use_cpu or (installed and not torch.accelerator.is_available())
    if on_cpu and getattr(args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading=True moves activations from a GPU to the CPU, and this run is on the CPU. Leave it unset."
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True needs a reference model of its own, and here the reference is an adapter on the shared "
            "backbone. Leave it unset."
        )
    if isinstance(args, SFTConfig) and args.dataset_text_field != "text":
        raise ValueError(
            f"dataset_text_field={shorten(args.dataset_text_field)}: texts are read from the column `text`. Rename the "
            f"column, and leave dataset_text_field unset."
        )
    if isinstance(args, SFTConfig) and args.padding_free and not args.packing and args.max_length is not None:
        raise ValueError(
            f"padding_free=True would not hold texts to max_length={args.max_length}. Set packing: true, or max_length: null, "
            f"which cuts no text."
        )
    if isinstance(args, DPOConfig):
        _check_dpo(args)
    if isinstance(args, (RLOOConfig, GRPOConfig)):
        _check_sampling(args)
    if installed:
        if args.fsdp and args.world_size == 1:
            raise ValueError(
                f"fsdp={args.fsdp!r} needs several processes. Leave it unset, and launch with accelerate_configs/fsdp2.yaml."
            )
        for option, package in (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")):
            if getattr(args, option, False) and not find_spec(package):
                raise ImportError(f"{option}=True needs the package {package}. Install it, or leave {option} unset.")


def check_router_loss(args: SFTConfig | DPOConfig | RLOOConfig | GRPOConfig, config: PreTrainedConfig) -> None:
    """Refuse the weight of a loss that the model does not have, as TRL's trainers do.

    Raises:
        ValueError: `router_aux_loss_coef` is set, and the model is no mixture of experts.
    """
    if args.router_aux_loss_coef and not hasattr(config.get_text_config(), "output_router_logits"):
        raise ValueError(
            f"router_aux_loss_coef={args.router_aux_loss_coef:g} weighs a loss of mixtures of experts, and this model has no "
            f"experts. Leave it unset."
        )


def check_attention(name: str | None, *, installed: bool) -> None:
    """Refuse an attention implementation that transformers does not know, or that is not installed.

    Raises:
        ValueError: there is no such implementation.
        ImportError: its package is not installed.
    """
    known = ["eager", *AttentionInterface().valid_keys()]
    if name is None or "/" in name:  # a kernel of the hub
        return
    if name not in known:
        raise ValueError(f"attn_implementation={shorten(name)} is not one of {', '.join(known)}.")
    if installed and name == "flash_attention_2" and not (find_spec("flash_attn") or find_spec("kernels")):
        raise ImportError(
            f"attn_implementation={name!r} needs the package flash-attn and a GPU. Install it, or set sdpa."
        )


def _check_workers(args: TrainingArguments) -> None:
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        # The oldest transformers that is allowed has not all of these.
        if getattr(args, name, None) and not args.dataloader_num_workers:
            raise ValueError(
                f"{name}={getattr(args, name)!r} is about worker processes, and dataloader_num_workers is 0. Set it, or leave "
                f"{name} unset."
            )


def _check_evaluation(args: TrainingArguments) -> None:
    """Refuse an evaluation that cannot be made, and a figure that it does not have."""
    evaluates = args.eval_strategy != "no"
    if type(args) in (DPOConfig, RLOOConfig, GRPOConfig) and (evaluates or args.eval_on_start):
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r}, eval_on_start={args.eval_on_start}: this stage evaluates nothing "
            f"while it trains. Leave them unset, and evaluate the policy with pipeline.evaluation."
        )
    best = args.load_best_model_at_end or args.save_strategy == "best"
    if best and not evaluates:
        option = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy: best"
        raise ValueError(f"{option} needs an evaluation to find the best checkpoint. Set eval_strategy.")
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise ValueError(
            "save_strategy: best needs metric_for_best_model. Name a figure of the evaluation, such as loss."
        )
    known, metric = EVALUATED.get(type(args)), args.metric_for_best_model
    uses = best or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if uses and known and metric and metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={shorten(metric)} is no figure of this stage's evaluation. Name one of {', '.join(known)}."
        )


def _check_optimizer(args: TrainingArguments, *, installed: bool) -> None:
    """Make the optimizer for a model of four weights; one that projects named modules needs the real model."""
    if args.optim_target_modules:
        return
    model = nn.Linear(2, 2, bias=False)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not {"params", "model", "optimizer_dict"} & set(options):
            kind(model.parameters(), **options)
    except Exception as error:
        if "install" in str(error) and not installed:
            return
        raise ValueError(
            f"optim={args.optim.value!r} cannot be made with learning_rate={args.learning_rate:g}, adam_beta1="
            f"{args.adam_beta1:g}, adam_beta2={args.adam_beta2:g}, adam_epsilon={args.adam_epsilon:g}, optim_args="
            f"{shorten(args.optim_args)}: {error}"
        ) from error


def _check_schedule(args: TrainingArguments) -> None:
    """Make the schedule for one weight and a long run, and take its first steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        with warnings.catch_warnings(action="ignore"):  # that the optimizer takes no step
            schedule = get_scheduler(
                args.lr_scheduler_type, optimizer, 0, 1_000_000, scheduler_specific_kwargs=args.lr_scheduler_kwargs
            )
            for _ in range(3 if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) else 0):
                schedule.step()
    except Exception as error:
        raise ValueError(
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} cannot be made with lr_scheduler_kwargs="
            f"{shorten(args.lr_scheduler_kwargs)}: {error}"
        ) from error


def _check_dpo(args: DPOConfig) -> None:
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise ValueError("loss_type: exo_pair needs label_smoothing above 0, such as 1e-3.")
    if args.use_weighting and {"aot", "aot_unpaired"} & set(args.loss_type):
        raise ValueError("use_weighting=True does not go with loss_type aot and aot_unpaired, which sort the pairs.")


def _check_sampling(args: RLOOConfig | GRPOConfig) -> None:
    """Sample with `generation_kwargs` from a model of one layer and many tokens; with vLLM they are vLLM's options."""
    given: dict[str, Any] = dict(args.generation_kwargs or {})
    if args.cache_implementation:
        given["cache_implementation"] = args.cache_implementation
    if not given or args.use_vllm:
        return
    for name in SHARES:
        value = given.get(name, 1.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"generation_kwargs: {name}={shorten(value)} must be a number from 0 to 1.")
    most = given.pop("max_new_tokens", 1)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"generation_kwargs: max_new_tokens={shorten(most)} must be a whole number, 1 or more.")
    try:
        with torch.random.fork_rng(devices=[]):
            model = GPT2LMHeadModel(GPT2Config(vocab_size=2**18, n_positions=8, n_embd=2, n_layer=1, n_head=1))
            config = GenerationConfig(do_sample=True, pad_token_id=0, disable_compile=True, max_new_tokens=2, **given)
            ids = torch.ones(1, 2, dtype=torch.long)
            model.eval().generate(ids, attention_mask=ids, generation_config=config)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"generation_kwargs={shorten(given)} cannot be sampled with: {said[0]}") from error
