"""What Spine relies on inside the packages that it builds on, beyond what they document.

One line of `RELIED_ON` for each thing: what it is, where we use it, why, and the way out if it goes. A line asserts that the
thing is there, takes the arguments that we give it, and says in its source what we rely on; it fails with a message that
names what moved. The packages that are installed are looked at, whichever of the versions that pyproject.toml allows.

`test_nothing_private_is_missing` reads our own code: a private name or an import from deep inside a package that has no line
here is refused.
"""

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import pytest
import torch
from datasets import Dataset
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from pipeline.runs.epochs import LOOP
from pipeline.runs.optimizer_shards import ZERO


ROOT = Path(__file__).parents[1]
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "huggingface_hub",
    "peft",
    "torch",
    "transformers",
    "trl",
)
OPTIONAL = ("bitsandbytes", "deepspeed")
MISSING = object()


class Relied(NamedTuple):
    """A thing in another package that we rely on, and that may go without notice."""

    what: str  # its dotted path; an attribute that a class gives its objects is written as one of the class
    used_in: str
    why: str
    way_out: str
    arguments: tuple[str, ...] | None = None  # the names of its parameters, where we override or call it with them
    says: tuple[str, ...] = ()  # pieces of its source, in this order
    holds: Callable[[Any], bool] | None = None  # what else is true of it


def find(path: str) -> Any:
    """Return what a dotted path names; None for an attribute that a class gives its objects; `MISSING` where it is not."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            owner, found = found, getattr(found, name, MISSING)
            if found is MISSING:
                given = inspect.isclass(owner) and re.search(rf"self\.{name}\b[^=\n]* = ", sources(owner))
                return None if given else MISSING
        return found
    return MISSING


@cache
def sources(kind: type) -> str:
    """Return the source of a class, and of those it inherits from, as far as they are of `PACKAGES`."""
    return "\n".join(inspect.getsource(each) for each in kind.__mro__ if each.__module__.split(".")[0] in PACKAGES)


def source(thing: Any) -> str:
    return sources(thing) if inspect.isclass(thing) else inspect.getsource(thing)


def fault(line: Relied) -> str | None:
    """Return what of a line no longer holds, or None."""
    thing = find(line.what)
    if thing is MISSING:
        return "it is gone"
    if line.arguments is not None:
        found = tuple(inspect.signature(thing).parameters)
        if found != line.arguments:
            return f"it takes {found}, and we rely on {line.arguments}"
    if line.says:  # of an attribute, the source of the class that gives it
        has_source = inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)
        text, at = source(thing if has_source else find(line.what.rpartition(".")[0])), 0
        for piece in line.says:
            at = text.find(piece, at)
            if at < 0:
                return f"its source does not say {piece!r}, or not in the place that we rely on"
            at += len(piece)
    if line.holds is not None and not line.holds(thing):
        return f"it is another thing now: {inspect.getsource(line.holds).strip()}"
    return None


def message(line: Relied, problem: str) -> str:
    package = line.what.split(".")[0]
    return (
        f"{line.what} moved ({package} {import_module(package).__version__}): {problem}. Used in {line.used_in}: {line.why} "
        f"Way out: {line.way_out}"
    )


# transformers renames it; the old name warns, and the oldest release that we allow has no other.
RENAMED = hasattr(find("transformers.PreTrainedModel"), "activation_checkpointing_enable")
CHECKPOINTING = "activation" if RENAMED else "gradient"

TRAINER, SAVING, RECORDING = "pipeline/rl/trainer.py", "pipeline/rl/saving.py", "pipeline/rl/recording.py"
CHECKPOINTS, EPOCHS, SHARDS = (
    "pipeline/runs/checkpoints.py",
    "pipeline/runs/epochs.py",
    "pipeline/runs/optimizer_shards.py",
)
SAMPLER, ONLINE, DIVERGENCE = "pipeline/rl/policy_sampler.py", "pipeline/rl/online.py", "pipeline/runs/divergence.py"
ROLES, LOADING, SHARDING = (
    "pipeline/backbone/roles.py",
    "pipeline/backbone/loading.py",
    "pipeline/backbone/sharding.py",
)
RESUMED, FILES = "pipeline/runs/resumed_options.py", "pipeline/backbone/model_files.py"
PLAN, MERGING, LAUNCH = "pipeline/plan.py", "pipeline/backbone/merging.py", "pipeline/runs/launch.py"
ENSEMBLES = "pipeline/runs/ensembles.py"

COPY_RLOO = "copy the method from the last RLOOTrainer that had it into PPOTrainer: it is ours to keep."
RENAME = "take the new name; the pin on the package's minor version holds until then."
COPY = "copy the function: it is short, and has no state."
OWN_LOOP = "keep the pin on transformers, and carry the hook to where the loop now does this."
OWN_STATE = "save the new name in `training_state`; a resumed run differs from one that was not killed until then."

TRL = [
    Relied("trl.RLOOTrainer._prepare_inputs", TRAINER, "each pass gets a minibatch of our rollout.", COPY_RLOO,
           arguments=("self", "generation_batch")),
    Relied("trl.RLOOTrainer._generate_and_score_completions", TRAINER, "steps 1 to 5 of an update stand here.", COPY_RLOO,
           arguments=("self", "inputs")),
    Relied("trl.RLOOTrainer._generate", SAMPLER, "TRL tokenizes, samples, decodes and logs lengths.", COPY_RLOO,
           arguments=("self", "prompts"),
           says=("self._tokenize_prompts(prompts)", "self._generate_single_turn(prompt_ids, images, multimodal_fields)",
                 "completions/mean_length")),
    Relied("trl.RLOOTrainer._generate_single_turn", SAMPLER, "all of Spine samples with one function.", COPY_RLOO,
           arguments=("self", "prompt_ids", "images", "multimodal_fields")),
    Relied("trl.RLOOTrainer._tokenize_prompts", ONLINE, "a prompt that ends in an assistant's turn is continued.", COPY_RLOO,
           arguments=("self", "prompts")),
    Relied("trl.RLOOTrainer._calculate_rewards", ONLINE, "TRL calls the functions, sync and async; we check them.", COPY_RLOO,
           arguments=("self", "inputs", "prompts", "completions", "completion_ids_list"),
           says=("trainer_state", "log_extra", "log_metric")),
    Relied("trl.RLOOTrainer._compute_loss", TRAINER, "the clipped losses stand in its place.", COPY_RLOO,
           arguments=("self", "model", "inputs")),
    Relied("trl.RLOOTrainer.training_step", TRAINER, "it counts passes, which tell the position in an update.", COPY_RLOO,
           arguments=("self", "model", "inputs", "num_items_in_batch"), says=("super().training_step(", "self._step += 1")),
    Relied("trl.RLOOTrainer._save_checkpoint", CHECKPOINTS, "TRL writes a model card with each checkpoint.", RENAME,
           arguments=("self", "model", "trial")),
    Relied("trl.RLOOTrainer._get_grad_norm", DIVERGENCE, "the last place before the optimizer steps.", OWN_LOOP,
           arguments=("self", "model", "grad_norm")),
    Relied("trl.RLOOTrainer._load_best_model", CHECKPOINTS, "the best adapters are loaded by us.", OWN_LOOP,
           arguments=("self",)),
    Relied("trl.RLOOTrainer._step", TRAINER, "it counts the passes of this process, also in `between_updates`.",
           "count the passes ourselves, in `training_step`.", says=("self._step = 0",)),
    Relied("trl.RLOOTrainer._buffered_inputs", TRAINER, "the minibatches of the epoch, which no checkpoint may hold twice.",
           "keep them under a name of ours, and leave the `del` in `training_state` out.",
           says=("self._buffered_inputs = None",)),
    Relied("trl.RLOOTrainer._metrics", RECORDING, "figures that TRL averages into the next line of the log.",
           "average them in `log`.", says=('self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}',)),
    Relied("trl.RLOOTrainer.log", RECORDING, "it writes `_metrics` and the table of `_logs`, and empties the first.",
           "write both in `Checkpointed.log`.", says=("self._metrics[mode].items()", "self._metrics[mode].clear()")),
    Relied("trl.RLOOTrainer._logs", RECORDING, "the table of completions, which a checkpoint holds too.",
           "keep a table of ours.",
           says=('"prompt"', '"completion"', '"rewards"', '"advantages"', '"extra"')),
    Relied("trl.RLOOTrainer._pending_extra_logs", RECORDING, "what reward functions gave to `log_extra`.",
           "pass reward functions a `log_extra` of ours.", says=("self._pending_extra_logs[column].extend(values)",)),
    Relied("trl.RLOOTrainer._pending_metrics", RECORDING, "what reward functions gave to `log_metric`.",
           "pass reward functions a `log_metric` of ours.", says=("self._pending_metrics[name].append(value)",)),
    Relied("trl.RLOOTrainer._tokenizer", TRAINER, "the tokenizer, also where TRL is given a processor.",
           "`processing_class`, which PPO only takes as a tokenizer."),
    Relied("trl.RLOOTrainer._dist", TRAINER, "it tells FSDP and ZeRO-3 apart, and gathers parameters.",
           "`pipeline.backbone.sharding.kind_of`, and deepspeed's GatheredParameters.",
           says=("self._dist = DistributedBackend(self.accelerator)",)),
    Relied("trl.distributed.DistributedBackend.is_fsdp", TRAINER, "whether FSDP shards the model.", "`kind_of`."),
    Relied("trl.distributed.DistributedBackend.is_zero3", SAVING, "whether ZeRO-3 shards the model.", "`kind_of`."),
    Relied("trl.distributed.DistributedBackend.gather_params", SAVING, "a frozen value is gathered before it is saved.",
           "deepspeed's GatheredParameters.", arguments=("self", "params"),
           says=("deepspeed.zero.GatheredParameters(params)",)),
    Relied("trl.RLOOTrainer.reward_func_names", RECORDING, "rewards are logged by these names.", "`Composite.names`."),
    Relied("trl.RLOOTrainer.eos_token_ids", TRAINER, "the tokens that end a completion.", "`sampling.end_tokens`.",
           says=("self.eos_token_ids = eos_token_ids",)),
    Relied("trl.RLOOTrainer.temperature", TRAINER, "logits are divided by it.", "`args.temperature`."),
    Relied("trl.RLOOTrainer.pad_to_multiple_of", TRAINER, "rollouts are padded so.", "`args.pad_to_multiple_of`."),
    Relied("trl.RLOOTrainer.async_loop", "pipeline/rl/sample_table.py", "clients of async rewards are bound to it.",
           "run a loop of ours for the table.", says=("self.async_loop)",)),
    Relied("trl.RLOOTrainer.__init__", TRAINER, "TRL clones the policy's adapter as the reference.",
           "`Backbone.add_role('reference', ...)`.",
           says=('model.add_adapter("ref", default_config)', "ref_param.data.copy_")),
    Relied("trl.RLOOTrainer._last_loaded_step", SAVING, "vLLM is sent the weights of a step once.",
           "keep a step of ours in `policy_sampler`.",
           says=("self._last_loaded_step = -1", "if self.state.global_step != self._last_loaded_step")),
    Relied("trl.RLOOTrainer.vllm_generation", SAMPLER, "vLLM is TRL's to start and to call.", RENAME,
           says=("self.vllm_generation = VLLMGeneration(", "self.vllm_generation.sync_weights()")),
    Relied("trl.RLOOTrainer._current_train_step_time", CHECKPOINTS, "a log after resuming names the time of the whole step.",
           OWN_STATE),
    Relied("trl.RLOOTrainer._total_train_tokens", CHECKPOINTS, "TRL's `num_tokens` goes on after resuming.", OWN_STATE),
    Relied("trl.SFTTrainer._total_train_tokens", CHECKPOINTS, "TRL's `num_tokens` goes on after resuming.", OWN_STATE),
    Relied("trl.SFTTrainer._metrics", CHECKPOINTS, "what was measured since the last log is in a checkpoint.", OWN_STATE),
    Relied("trl.RewardTrainer._metrics", CHECKPOINTS, "what was measured since the last log is in a checkpoint.", OWN_STATE),
    Relied("trl.DPOTrainer._metrics", CHECKPOINTS, "what was measured since the last log is in a checkpoint.", OWN_STATE),
    Relied("trl.GRPOTrainer._generate_single_turn", ONLINE, "GRPO samples as all of Spine does.", COPY_RLOO,
           arguments=("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images")),
    Relied("trl.GRPOTrainer._tokenize_prompts", ONLINE, "a prompt that ends in an assistant's turn is continued.", COPY_RLOO,
           arguments=("self", "prompts")),
    Relied("trl.GRPOTrainer._calculate_rewards", ONLINE, "TRL calls the functions, sync and async; we check them.", COPY_RLOO,
           arguments=("self", "inputs", "prompts", "completions", "completion_ids_list")),
    Relied("trl.GRPOTrainer._buffered_inputs", CHECKPOINTS, "the completions of the update under way.", OWN_STATE),
    Relied("trl.RewardTrainer._prepare_dataset", "reward_models/ranking.py", "each text of a ranking is tokenized once.",
           "tokenize before the trainer is made.",
           arguments=("self", "dataset", "processing_class", "args", "dataset_name")),
    Relied("trl.RewardTrainer._set_signature_columns_if_needed", "reward_models/ranking.py",
           "the shares of raters reach the loss.", "keep all columns, and have the collator choose.", arguments=("self",),
           says=("self._signature_columns = [",)),
    Relied("trl.RewardTrainer._signature_columns", "reward_models/ranking.py", "the columns that the collator gets.",
           "keep all columns, and have the collator choose."),
    Relied("trl.RewardTrainer.compute_loss", "reward_models/ranking.py",
           "its figures are kept, and its loss where labels are 1.", "compute both ourselves.",
           arguments=("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
           says=("torch.chunk(outputs.logits.squeeze(-1), chunks=2)", 'if "margin" in inputs:')),
    Relied("trl.RewardTrainer._total_train_tokens", "reward_models/ranking.py", "tokens of rankings are counted as TRL's.",
           "count them ourselves.", says=('self._metrics[mode]["num_tokens"] = [self._total_train_tokens]',)),
    Relied("trl.trainer.reward_trainer.DataCollatorForPreference", "reward_models/listwise.py",
           "batches of rankings are padded as those of pairs.", "pad with `args.pad_to_multiple_of` and the tokenizer.",
           says=("pad_token_id: int", "pad_to_multiple_of: int")),
    Relied("trl.RLOOTrainer._name", TRAINER, "the model card names the algorithm.", "write the card ourselves.",
           says=("trainer_name=self._name", 'self._paper.get("title")')),
    *[Relied(f"trl.{kind}._name", "pipeline/runs/training_log.py", "the log names the stage.", "name it in our classes.",
             holds=lambda x, name=name: x == name)
      for kind, name in (("SFTTrainer", "SFT"), ("RewardTrainer", "Reward"), ("GRPOTrainer", "GRPO"), ("DPOTrainer", "DPO"))],
    Relied("trl.RLOOTrainer._paper", TRAINER, "the model card cites the paper.", "write the card ourselves."),
    Relied("trl.RLOOTrainer._tag_names", TRAINER, "tags of the model card.", "write the card ourselves."),
    Relied("trl.RLOOTrainer.create_model_card", "pipeline/runs/outputs.py", "of a base in a folder TRL writes None.",
           "write the card ourselves.", arguments=("self", "model_name", "dataset_name", "tags"),
           says=("os.path.isdir(model_name_or_path)", "base_model = None", 'os.path.join(self.args.output_dir, "README.md")')),
    Relied("trl.SFTTrainer.__init__", ROLES, "it rounds what trains on a quantised base, unless `is_loaded_in_4bit` is False.",
           "`loading.train_in_float32` after it, as in SFT.", says=('getattr(model, "is_loaded_in_4bit", False)',)),
    Relied("trl.RLOOTrainer._get_train_sampler", EPOCHS, "the order of prompts is drawn from its generator.", OWN_LOOP,
           says=("RepeatSampler(",)),
    Relied("trl.RLOOConfig.__post_init__", "pipeline/rl/config.py", "its last check wants two completions a prompt, not PPO.",
           "set num_generations to 2 around the call.", says=("at least 2 generations",)),
    Relied("trl.RLOOConfig.ds3_gather_for_generation", TRAINER, "we gather for all of a rollout, and TRL is not to.",
           "leave the line out."),
    Relied("trl.TrlParser.set_defaults_with_config", "pipeline/runs/command_line.py", "ranges are checked before options.",
           "parse the recipe with argparse.", arguments=("self", "kwargs")),
    Relied("trl.TrlParser.parse_args_and_config", "pipeline/runs/command_line.py",
           "recipe and command line become dataclasses.",
           "`set_defaults` and HfArgumentParser."),
    Relied("trl.trainer.utils.selective_log_softmax_and_entropy", "pipeline/backbone/logprobs.py",
           "logprobs and entropy where the head trains or the entropy has a gradient.", COPY,
           arguments=("logits", "index", "entropy_requires_grad", "temperature", "row_mask")),
    Relied("trl.trainer.utils.pad", TRAINER, "token rows are padded on either side.", COPY,
           arguments=("tensors", "padding_value", "padding_side", "pad_to_multiple_of")),
    Relied("trl.trainer.utils.get_callable_name", "reward_models/composite.py", "rewards are named as TRL names them.", COPY,
           arguments=("func",)),
    Relied("trl.trainer.utils.is_async_callable", "reward_models/composite.py",
           "async rewards are told as TRL tells them.", COPY,
           arguments=("func",)),
    Relied("trl.trainer.reward_trainer.suppress_seqcls_warning", FILES, "that a score head is fresh is what we want.",
           "leave it out: transformers then reports the fresh head.", arguments=()),
    Relied("trl.models.unwrap_model_for_generation", SHARDING, "it unwraps, and gathers under ZeRO-3.",
           "`accelerator.unwrap_model` and deepspeed's GatheredParameters.",
           arguments=("model", "accelerator", "gather_deepspeed3_params", "generation_kwargs",
           "gradient_checkpointing_kwargs")),
    Relied("trl.get_quantization_config", LOADING, "ModelConfig's 4-bit options as a BitsAndBytesConfig.", COPY,
           arguments=("model_args",)),
]  # fmt: skip

VLLM = "trl.generation.vllm_generation.VLLMGeneration"
TRL_VLLM = [
    Relied(f"{VLLM}._iter_named_params", SAMPLER, "vLLM is sent the policy, merged layer by layer.",
           "override `sync_weights`.", arguments=("self",)),
    Relied(f"{VLLM}.sync_weights", SAMPLER, "all that it sends comes from there, in each of its modes.",
           "send the weights ourselves.", arguments=("self",),
           holds=lambda x: source(x).count("self._iter_named_params()") == 4 and "merge" not in source(x)),
    Relied(f"{VLLM}.generate", SAMPLER, "prompts in, tokens and their logprobs out.", RENAME,
           says=("return prompt_ids, completion_ids, logprobs, logprob_token_ids",),
           holds=lambda x: list(inspect.signature(x).parameters)[:4] == ["self", "prompts", "images", "num_generations"]),
    Relied(f"{VLLM}.generation_kwargs", SAMPLER, "our stop tokens are in every request.",
           "give TRL's config the stop tokens."),
    Relied(f"{VLLM}.logprobs", SAMPLER, "the sampled tokens' logprobs come back.", "keep RLOO's, and score them again.",
           holds=lambda x: source(find(f"{VLLM}.generate")).count('"logprobs": self.logprobs') == 2
           and source(find(f"{VLLM}.generate")).count("self.generation_kwargs") == 2),
]  # fmt: skip

EPOCH_ARGUMENTS = (
    "self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
    "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch",
)  # fmt: skip
T = "transformers.Trainer"
TRANSFORMERS = [
    Relied(f"{T}._inner_training_loop", EPOCHS, "it sets what a checkpoint brings back before the first epoch.", OWN_LOOP,
           says=("self._prepare_for_training(", "on_train_begin", "self._run_epoch(", "self._finalize_training("),
           holds=lambda x: all(f"self.{name} = " in source(x).partition("on_train_begin")[0] for name in LOOP)),
    Relied(f"{T}._run_epoch", CHECKPOINTS, "the loop passes all by keyword, and the order of its steps is as we resume.",
           OWN_LOOP, arguments=EPOCH_ARGUMENTS,
           says=("_load_rng_state(", "iter(train_dataloader)", "_load_rng_state(", "training_step(", "_clip_grad_norm(",
                 "_get_grad_norm(", "optimizer.step(", "on_step_end(", "_maybe_log_save_evaluate(")),
    Relied(f"{T}._maybe_log_save_evaluate", CHECKPOINTS, "after each step: log, evaluate, save, in this order.", OWN_LOOP,
           says=("self.log(", "self._evaluate(", "self._save_checkpoint(")),
    Relied(f"{T}._finalize_training", CHECKPOINTS, "an error ends a diverged run before anything is saved.", OWN_LOOP,
           arguments=("self", "trial", "num_train_samples", "start_time"),
           says=("self._load_best_model()", "on_train_end")),
    Relied(f"{T}._prepare_for_training", SHARDS, "accelerate and DeepSpeed are not to unpickle a checkpoint.", OWN_LOOP,
           arguments=("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
           says=("self._load_optimizer_and_scheduler(",)),
    Relied(f"{T}._save_checkpoint", CHECKPOINTS, "it writes all that Trainer knows into the staging folder.", OWN_LOOP,
           arguments=("self", "model", "trial"),
           says=("self._get_output_dir(", "self.save_model(output_dir, _internal_call=True)",
                 "self._save_optimizer_and_scheduler(", "self._save_rng_state(", "self._push_from_checkpoint(")),
    Relied(f"{T}._get_output_dir", CHECKPOINTS, "checkpoints are staged beneath it.", OWN_LOOP, arguments=("self", "trial")),
    Relied(f"{T}._push_from_checkpoint", CHECKPOINTS, "a checkpoint is pushed once it has its name.", OWN_LOOP,
           arguments=("self", "checkpoint_folder")),
    Relied(f"{T}._load_from_checkpoint", CHECKPOINTS, "adapters are read by us, from safetensors.", OWN_LOOP,
           arguments=("self", "resume_from_checkpoint", "model")),
    Relied(f"{T}._load_best_model", CHECKPOINTS, "the best adapters are read by us.", OWN_LOOP, arguments=("self",)),
    Relied("transformers.TrainerState.compute_steps", RESUMED, "a checkpoint's state would keep its own save_steps.",
           "set `save_steps` and the like on the state.", arguments=("self", "args", "max_steps"),
           says=('setattr(self, f"{step_kind}_steps", num_steps)',)),
    Relied(f"{T}._load_optimizer_and_scheduler", CHECKPOINTS, "nothing is unpickled as a run resumes.", OWN_LOOP,
           arguments=("self", "checkpoint")),
    Relied(f"{T}._save_optimizer_and_scheduler", SHARDS, "each process writes its part as safetensors.", OWN_LOOP,
           arguments=("self", "output_dir")),
    Relied(f"{T}._load_scaler", SHARDS, "float16's scaler under FSDP is read with the optimizer.", OWN_LOOP,
           arguments=("self", "checkpoint"), says=("weights_only=True",)),
    Relied(f"{T}._load_rng_state", EPOCHS, "random states are put back where an epoch begins.", OWN_LOOP,
           arguments=("self", "checkpoint"), says=("weights_only=True",)),
    Relied(f"{T}._get_train_sampler", EPOCHS, "the order of rows is drawn there.", OWN_LOOP,
           arguments=("self", "train_dataset")),
    Relied(f"{T}._save", CHECKPOINTS, "it writes weights, tokenizer and a pickle, which we remove.", OWN_LOOP,
           arguments=("self", "output_dir", "state_dict"), says=("TRAINING_ARGS_NAME",)),
    Relied(f"{T}._get_grad_norm", DIVERGENCE, "the last place before the optimizer steps.", OWN_LOOP,
           arguments=("self", "model", "grad_norm")),
    Relied(f"{T}._finish_current_push", CHECKPOINTS, "a push under way ends before the run does.", OWN_LOOP,
           arguments=("self",)),
    Relied(f"{T}.compute_loss_context_manager", DIVERGENCE, "the last look at outputs runs as the loss does.",
           "`accelerator.autocast`.", arguments=("self",)),
    Relied(f"{T}.save_model", "pipeline/runs/outputs.py", "`_internal_call` keeps it from pushing too early.", OWN_LOOP,
           arguments=("self", "output_dir", "_internal_call")),
    *(Relied(f"{T}.{name}", EPOCHS, "a resumed run logs the loss that the run would have.", OWN_STATE) for name in LOOP),
    Relied(f"{T}._tr_loss", DIVERGENCE, "a loss that is not finite stays out of the checkpoint.", OWN_STATE,
           says=("self._tr_loss = torch.tensor(0.0",)),
    Relied("transformers.trainer.TRAINING_ARGS_NAME", CHECKPOINTS, "the pickle to remove.", "write the name down.",
           holds=lambda x: x == "training_args.bin"),
    Relied("transformers.trainer.OPTIMIZER_NAME", CHECKPOINTS, "the optimizer's file.", "write the name down.",
           holds=lambda x: x == "optimizer.pt"),
    Relied("transformers.trainer.SCHEDULER_NAME", CHECKPOINTS, "the scheduler's file.", "write the name down.",
           holds=lambda x: x == "scheduler.pt"),
    Relied("transformers.trainer.TRAINER_STATE_NAME", CHECKPOINTS, "the trainer's state.", "write the name down.",
           holds=lambda x: x == "trainer_state.json"),
    Relied("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", CHECKPOINTS, "the name of a checkpoint.", "write it down.",
           holds=lambda x: x == "checkpoint"),
    Relied("transformers.trainer_pt_utils.get_length_grouped_indices", "reward_models/ranking.py",
           "rankings of like length share a batch.", COPY,
           holds=lambda x: {"lengths", "batch_size", "generator"} <= set(inspect.signature(x).parameters)),
    Relied("transformers.integrations.get_reporting_integration_callbacks", "pipeline/runs/command_line.py",
           "a tracker that is not installed is refused before the model is loaded.", "leave the check to Trainer.",
           arguments=("report_to",)),
    Relied("transformers.integrations.TensorBoardCallback", "pipeline/rl/sample_table.py",
           "its writer gets the samples as text.",
           "leave tensorboard out of the table.", says=("self.tb_writer",)),
    Relied("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", "reward_models/pretrained.py",
           "with it set, a model is sharded as it loads, and no fingerprint can be taken.",
           "load under `deepspeed.zero.Init(enabled=False)`.",
           holds=lambda x: "_hf_deepspeed_config_weak_ref()" in source(
               find("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled"))),
    Relied("transformers.integrations.deepspeed.unset_hf_deepspeed_config",
           "reward_models/pretrained.py", "a model is loaded whole under ZeRO-3 too.",
           "load under `deepspeed.zero.Init(enabled=False)`.", arguments=(),
           says=("_hf_deepspeed_config_weak_ref = None",)),
    Relied("transformers.utils.SAFE_WEIGHTS_NAME", "pipeline/runs/whole_models.py", "the file of a checkpoint's weights.",
           "write the name.", holds=lambda x: x == "model.safetensors"),
    Relied("transformers.utils.is_bitsandbytes_available", LOADING, "load_in_4bit is refused without it.",
           "importlib.util.find_spec.", holds=lambda x: isinstance(x(), bool)),
    Relied("transformers.utils.logging.tqdm", "pipeline/runs/terminal.py",
           "our bars are drawn where transformers' are.", "tqdm.auto's, and an option of ours to leave them out.",
           holds=lambda x: hasattr(find("transformers.utils.logging"), "disable_progress_bar")),
    Relied("transformers.ProgressCallback.on_log", "pipeline/runs/terminal.py", "a line takes the place of a dictionary.",
           "a callback of ours without Trainer's.", arguments=("self", "args", "state", "control", "logs", "kwargs")),
    Relied("transformers.ProgressCallback.training_bar", "pipeline/runs/terminal.py",
           "the bar counts from the step that a run resumes from.", "a callback of ours without Trainer's.",
           says=("self.training_bar.update(state.global_step - self.current_step)",)),
    Relied("transformers.activations.NewGELUActivation", LOADING, "GPT-2's activation, in eight kernels.",
           "leave `fuse_gelu` out: the demo's bytes change.", says=("torch.tanh",)),
    Relied("transformers.activations.ACT2FN", LOADING, "the same function in one kernel.",
           "`nn.GELU(approximate='tanh')`.", holds=lambda x: "gelu_pytorch_tanh" in x),
    Relied("transformers.pytorch_utils.Conv1D", "pipeline/backbone/lora.py", "GPT-2's linear layers are of this class.",
           "take the class from the model itself.", says=("self.weight",)),
    Relied("transformers.PreTrainedModel.get_expanded_tied_weights_keys", LOADING,
           "weights that config.json ties and the files do not are refused.", "compare the two tensors.",
           arguments=("self", "all_submodels")),
    Relied("transformers.PreTrainedModel.all_tied_weights_keys", LOADING, "those that loading left tied.",
           "compare the two tensors.", says=("self.all_tied_weights_keys.pop(",)),
    Relied("transformers.PreTrainedModel.from_pretrained", LOADING, "what loading found is checked to the tensor.",
           "compare the file's header with the model's state.",
           says=("output_loading_info",), holds=lambda x: all(
               name in inspect.getsource(inspect.getmodule(x)) for name in ("missing_keys", "unexpected_keys",
               "mismatched_keys"))),
    Relied("transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained", FILES,
           "a family without such a model is refused in our words.", "ask the mapping before.",
           says=("Unrecognized configuration class",)),
    Relied("transformers.PreTrainedConfig._name_or_path", "pipeline/backbone/identity.py", "where a base was loaded from.",
           "keep the name beside the model.", says=("self._name_or_path",)),
    Relied("transformers.PreTrainedModel.save_pretrained", "pipeline/backbone/gguf.py",
           "a dequantised GGUF without quantizer is saved as plain weights.",
           "copy the weights into a model made from the config.", says=('getattr(self, "hf_quantizer", None)',)),
    Relied("transformers.GenerationMixin._prepare_generation_config", "pipeline/backbone/sampling.py",
           "`generate` fills what ours leaves unset from the model's `generation_config`, which we hide.",
           "pass every field.", says=("self.generation_config.to_dict(), defaults_only=True",)),
    Relied("transformers.GenerationMixin.generate", "pipeline/backbone/sampling.py",
           "each process samples as long as it needs.",
           RENAME, holds=lambda x: {"generation_config", "logits_processor",
           "synced_gpus"} <= set(inspect.signature(x).parameters)),
    Relied(f"transformers.PreTrainedModel.{CHECKPOINTING}_checkpointing_enable", ROLES,
           "a layer is computed again as the role that it ran as: torch's `context_fn` is passed on.",
           "wrap the decoder layers with torch.utils.checkpoint.",
           holds=lambda x: f"{CHECKPOINTING}_checkpointing_kwargs" in inspect.signature(x).parameters),
    Relied("transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "tests/families.py",
           "every family that transformers knows has a row in docs/families.md.", "list them by hand.",
           holds=lambda x: "gpt2" in x and "llama" in x),
]  # fmt: skip

P = "peft.tuners.tuners_utils.BaseTunerLayer"
PEFT_WAY_OUT = "`adapter_names=` per row where peft has it in training, or a switch of ours in each layer's forward."
PEFT = [
    Relied(f"{P}._active_adapter", ROLES, "a role is chosen by naming its adapter on each layer.", PEFT_WAY_OUT,
           holds=lambda x: x == "default" and "return self._active_adapter" in source(find(P))),
    Relied(f"{P}._disable_adapters", ROLES, "the bare backbone is the model with all adapters off.", PEFT_WAY_OUT,
           holds=lambda x: x is False and "return self._disable_adapters" in source(find(P))),
    Relied("peft.tuners.lora.LoraLayer.cast_input_dtype_enabled", ROLES, "under autocast peft's cast is undone at once.",
           "leave the switch out: a pass is slower, and the same.",
           says=('getattr(self, "cast_input_dtype_enabled", True)',)),
    Relied("peft.tuners.lora.LoraLayer.lora_variant", ROLES, "DoRA and its like need the cast.",
           "leave the switch out: a pass is slower, and the same.", says=("self.lora_variant: dict",)),
    Relied(f"{P}.merged_adapters", MERGING, "a layer merged in a copy is told that it is not.",
           "merge with `get_delta_weight`.",
           holds=lambda x: x == []),
    Relied(f"{P}.merged", MERGING, "whether an adapter changed a layer's weights.", "compare the weights.",
           says=("return bool(self.merged_adapters)",)),
    Relied("peft.tuners.lora.layer.Linear.merge", MERGING, "one layer, one adapter.", "merge with `get_delta_weight`.",
           arguments=("self", "safe_merge", "adapter_names"), says=("self.merged_adapters.append(active_adapter)",)),
    Relied(f"{P}.get_base_layer", MERGING, "the frozen layer beneath an adapter.", "its attribute `base_layer`.",
           arguments=("self",)),
    Relied("peft.tuners.lora.LoraLayer.lora_A", "pipeline/backbone/trunk.py", "which adapters a layer has.",
           "`peft_config` and the names of parameters."),
    Relied("peft.tuners.lora.LoraLayer.lora_embedding_A", "pipeline/backbone/trunk.py", "which adapters the embeddings have.",
           "`peft_config` and the names of parameters."),
    Relied("peft.tuners.lora.layer.dispatch_default", "pipeline/backbone/lora.py",
           "of GPT-2's Conv1D peft wants fan_in_fan_out.",
           "leave it to peft, which warns.", says=("isinstance(target_base_layer, Conv1D)", "config.fan_in_fan_out = True")),
    Relied("peft.PeftModelForCausalLM.add_adapter", ROLES, "a role is an adapter.", RENAME,
           holds=lambda x: list(inspect.signature(x).parameters)[:3] == ["self", "adapter_name", "peft_config"]),
    Relied("peft.PeftModelForCausalLM.delete_adapter", TRAINER, "a reference that is the bare backbone has none.",
           "keep the adapter of zeros.", holds=lambda x: "adapter_name" in inspect.signature(x).parameters),
    Relied("peft.PeftModelForCausalLM.save_pretrained", ROLES, "the policy alone is saved.", "`save_role`.",
           holds=lambda x: {"save_directory", "selected_adapters"} <= set(inspect.signature(x).parameters)),
    Relied("peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "pipeline/backbone/classifier_adapters.py",
           "peft's choice of layers for a family.", "ask for lora_target_modules.", holds=lambda x: "bert" in x),
    Relied("peft.tuners.tuners_utils.check_target_module_exists", "pipeline/backbone/adapter_tensors.py",
           "which layers peft adapts is known before it makes tensors for them.", "compare the tensors' names alone.",
           arguments=("config", "key"), says=("config.exclude_modules", "config.target_modules", "key.endswith(")),
    Relied("peft.get_peft_model_state_dict", ROLES, "the tensors of one adapter.", "pick them by name.",
           holds=lambda x: {"model", "state_dict", "adapter_name", "save_embedding_layers"}
           <= set(inspect.signature(x).parameters)),
    Relied("peft.set_peft_model_state_dict", ROLES, "an adapter is given the tensors of a file.", "copy them by name.",
           holds=lambda x: {"model", "peft_model_state_dict", "adapter_name"} <= set(inspect.signature(x).parameters)),
]  # fmt: skip

ACCELERATE = [
    Relied("accelerate.commands.launch.launch_command_parser",
           LAUNCH, "only the launcher's command line tells what was asked for.",
           "check the number of processes alone, from the environment.",
           holds=lambda x: {"config_file", "cpu", "num_processes", "quiet", "module", "training_script"}
           <= {action.dest for action in x()._actions}),
    Relied("accelerate.commands.launch._validate_launch_command",
           "pipeline/runs/launcher.py", "an option of the launcher goes before one of its config.",
           "write the accelerate config anew, with the path.", says=("key not in args.nondefault",)),
    Relied("accelerate.commands.config.default_config_file", LAUNCH, "the config of a launch that names none.",
           "`~/.cache/huggingface/accelerate/default_config.yaml`."),
    Relied("accelerate.commands.config.load_config_from_file", LAUNCH, "what that config asks for.", "yaml.safe_load.",
           arguments=("config_file",)),
    Relied("accelerate.utils.launch.prepare_multi_gpu_env", SHARDING, "the launcher hands on FSDP by environment.",
           "`AcceleratorState().fsdp_plugin`.", says=('"ACCELERATE_USE_FSDP"', '"FSDP_VERSION"')),
    Relied("accelerate.utils.launch.prepare_deepspeed_cmd_env", SHARDING, "the launcher hands on DeepSpeed by environment.",
           "`AcceleratorState().deepspeed_plugin`.", says=('"ACCELERATE_USE_DEEPSPEED"',)),
    Relied("accelerate.utils.launch.prepare_simple_launcher_cmd_env", LAUNCH, "the launcher hands on the CPU by environment.",
           "TrainingArguments' use_cpu.", says=('"ACCELERATE_USE_CPU"',)),
    Relied("accelerate.utils.FullyShardedDataParallelPlugin.mixed_precision_policy", TRAINER,
           "accelerate's would round what leaves the model to bfloat16.", "wrap the model with torch's fully_shard.",
           holds=lambda x: "fsdp2_plugin.mixed_precision_policy or MixedPrecisionPolicy()" in source(
               find("accelerate.utils.fsdp_utils"))),
    Relied("accelerate.utils.FullyShardedDataParallelPlugin.reshard_after_forward", TRAINER,
           "layers are sharded again as the launch asks.", "shard them again always.",
           holds=lambda x: "fsdp2_plugin.reshard_after_forward" in source(find("accelerate.utils.fsdp_utils"))),
    Relied("accelerate.Accelerator.optimizer_step_was_skipped", DIVERGENCE, "whether DeepSpeed took a step.",
           "leave that half sentence out of the message."),
    Relied("accelerate.Accelerator.scaler", DIVERGENCE, "with float16 a gradient may be infinite for a while.",
           "refuse fp16, as PPO does."),
    Relied("accelerate.state.AcceleratorState._reset_state", ENSEMBLES,
           "each member of an ensemble has a trainer, and a second accelerator with plugins is refused.",
           "train each member in a process of its own."),
    Relied("accelerate.state.GradientState._reset_state", ENSEMBLES, "it is of the member before.",
           "train each member in a process of its own."),
    Relied("accelerate.Accelerator.end_training", CHECKPOINTS, "trackers are finished and the process group left.",
           "torch.distributed.destroy_process_group.", arguments=("self",)),
]  # fmt: skip

TORCH = [
    Relied("torch.distributed.fsdp.FSDPModule.set_reshard_after_forward", SHARDING, "embeddings and head run once a role.",
           "run all roles in one call of the sharded group.", arguments=("self", "reshard_after_forward", "recurse")),
    Relied("torch.distributed.fsdp.FSDPModule.set_reshard_after_backward",
           SHARDING, "what runs once a role stays gathered for all backward passes.",
           "run all roles in one call of the sharded group.",
           holds=lambda x: list(inspect.signature(x).parameters)[:2] == ["self", "reshard_after_backward"]
           and "recurse" in inspect.signature(x).parameters),
    Relied("torch.distributed.fsdp.FSDPModule.unshard", SHARDING, "all weights are there for a rollout.",
           "`full_tensor` of each parameter.", arguments=("self", "async_op")),
    Relied("torch.distributed.fsdp.FSDPModule.reshard", SHARDING, "after a rollout each process has its part alone.",
           "drop the gathered copies.", arguments=("self",)),
    Relied("torch.distributed.fsdp.MixedPrecisionPolicy", TRAINER, "an empty policy casts nothing.",
           "pass one of float32.", holds=lambda x: x() == x(None, None, None, True)),
    *(Relied(f"torch.optim.lr_scheduler.{kind}.{name}", "pipeline/runs/resharding.py",
             "a scheduler has a value for each parameter group, and DeepSpeed drops empty groups.", "take the new name.")
      for kind, name in (("LRScheduler", "base_lrs"), ("LRScheduler", "_last_lr"), ("LambdaLR", "lr_lambdas"),
                         ("ReduceLROnPlateau", "min_lrs"))),
    Relied("torch.distributed.tensor.DTensor.from_local", SHARDS, "a moment is sharded as its parameter is.",
           "torch.distributed.checkpoint.",
           holds=lambda x: {"local_tensor", "device_mesh", "placements", "run_check", "shape", "stride"}
           <= set(inspect.signature(x).parameters)),
    Relied("torch._subclasses.fake_tensor.FakeTensor", "pipeline/backbone/trunk.py", "a plan has shapes and no values.",
           "tensors on the meta device: attention's kernel is then another.", holds=lambda x: issubclass(x, torch.Tensor)),
    Relied("torch._subclasses.fake_tensor.FakeTensorMode", PLAN, "a plan runs the model on shapes alone.",
           "tensors on the meta device: attention's kernel is then another.",
           holds=lambda x: hasattr(x, "__enter__")),
    Relied("torch.utils._pytree.tree_leaves", PLAN, "the tensors of a cache, whatever holds them.", "walk lists and dicts.",
           holds=lambda x: x([1, {"a": (2, 3)}]) == [1, 2, 3]),
    Relied("torch.Tensor._base", PLAN, "a view of a weight is no activation.", "compare storages."),
    Relied("torch.UntypedStorage._cdata", PLAN, "tells storages apart, also those without data.", "id of the storage."),
    Relied("torch.nn.Module._parameters", PLAN, "weights are replaced in place by fake ones.", "setattr."),
    Relied("torch.nn.Module._buffers", PLAN, "buffers are replaced in place by fake ones.", "setattr."),
    Relied("torch.optim.lr_scheduler.LambdaLR", RESUMED, "a changed learning rate takes effect at the checkpoint's step.",
           "make the scheduler anew with its `last_epoch`.",
           says=('state_dict["lr_lambdas"]', "base_lr * lmbda(self.last_epoch)", "zip(self.lr_lambdas, self.base_lrs")),
    Relied("torch.optim.lr_scheduler.LambdaLR._last_lr", RESUMED, "the log names the rate of the first resumed step.",
           "leave it: the log then names the old rate once."),
    Relied("torch.distributed.elastic.multiprocessing.errors", "pipeline/runs/errors.py",
           "torch's launcher shows the error that a process wrote into this file.", "leave its table without a message.",
           says=("TORCHELASTIC_ERROR_FILE", '"extraInfo"')),
]  # fmt: skip

DATASETS = [
    Relied("datasets.Dataset.__init__", "data/rows.py", "rows of ours are made of the same table.", "keep the dataset inside.",
           arguments=("self", "arrow_table", "info", "split", "indices_table", "fingerprint")),
    Relied("datasets.Dataset._indices", "data/rows.py", "which rows of its table a dataset has.", "`flatten_indices` before."),
    Relied("datasets.Dataset._fingerprint", "data/rows.py", "the cache is told the same rows.", "leave it to be drawn anew."),
    *(Relied(f"datasets.Dataset.{name}", "data/rows.py", "it takes rows by `select`, which keeps their origin.",
             f"override `{name}` too.", says=("self.select(",)) for name in ("shuffle", "sort", "train_test_split")),
    Relied("datasets.Dataset.load_from_disk", "data/schemas.py", "these fields of state.json are checked first.",
           "leave a field that it no longer reads out of the schema.",
           says=('posixpath.join(dest_dataset_path, data_file["filename"])', 'state["_data_files"]', 'state["_split"]',
                 'state["_fingerprint"]', 'state["_format_type"]', 'state["_format_kwargs"]', 'state["_format_columns"]',
                 'state["_output_all_columns"]')),
    *(Relied(f"datasets.Dataset.{name}", "data/schemas.py", "a field of state.json is called so.",
             "leave it out of the schema.")
      for name in ("_split", "_format_type", "_format_kwargs", "_format_columns", "_output_all_columns")),
]  # fmt: skip

Z = "deepspeed.runtime.zero"
ZERO_2, ZERO_3 = f"{Z}.stage_1_and_2.DeepSpeedZeroOptimizer", f"{Z}.stage3.DeepSpeedZeroOptimizer_Stage3"
ZERO_WAY_OUT = "DeepSpeed's own `save_checkpoint`, whose pickles would then have to be trusted."
DEEPSPEED = [
    *(Relied(f"deepspeed.checkpoint.constants.{name}", SHARDS, "what its optimizers call the parts of their state.",
           ZERO_WAY_OUT,
             holds=lambda x: x in (*ZERO[0], *ZERO[1]))
      for name in ("BASE_OPTIMIZER_STATE", "SINGLE_PARTITION_OF_FP32_GROUPS", "OPTIMIZER_STATE_DICT", "FP32_FLAT_GROUPS")),
    Relied(f"{ZERO_2}.state_dict", SHARDS, "the parts are in it.", ZERO_WAY_OUT,
           says=("state_dict[BASE_OPTIMIZER_STATE] = self.optimizer.state_dict()",
           "state_dict[SINGLE_PARTITION_OF_FP32_GROUPS]")),
    Relied(f"{ZERO_3}._rigid_state_dict", SHARDS, "the parts are in it.", ZERO_WAY_OUT,
           says=("state_dict[OPTIMIZER_STATE_DICT] = self.optimizer.state_dict()", "state_dict[FP32_FLAT_GROUPS]")),
    Relied(f"{ZERO_2}.single_partition_of_fp32_groups", SHARDS, "its weights in float32 are flat, in memory.", ZERO_WAY_OUT),
    Relied(f"{ZERO_3}.fp32_partitioned_groups_flat", SHARDS, "its weights in float32 are flat, in memory.", ZERO_WAY_OUT),
    Relied(f"{ZERO_2}.bit16_groups", SHARDS, "the weights in each flat tensor, which a checkpoint names.", ZERO_WAY_OUT),
    Relied(f"{ZERO_2}.bit16_groups_flat", SHARDS, "the weights are views of it, and so it tells where each begins.",
           ZERO_WAY_OUT),
    Relied(f"{ZERO_2}.get_data_parallel_partitions", SHARDS, "each process has an equal part of the flat tensor.",
           ZERO_WAY_OUT, says=("total_num_elements // dp",)),
    Relied(f"{ZERO_3}.fp16_groups", SHARDS, "the weights in each flat tensor, which a checkpoint names.", ZERO_WAY_OUT),
    Relied(f"{Z}.partition_parameters.Init._padding_size", SHARDS, "each process has an equal piece of each weight.",
           ZERO_WAY_OUT, holds=lambda x: re.search(  # the first is DeepSpeed 0.19.0's name for it
               r"remainder = param\.ds_numel % (self\.num_partitions|partition_world_size)\n", inspect.getsource(x))),
    Relied(f"{ZERO_3}.swap_optimizer", SHARDS, "an optimizer on disk is refused.", ZERO_WAY_OUT),
    Relied(f"{ZERO_3}.params_in_nvme_and_cpu", SHARDS, "an optimizer on disk is refused.", ZERO_WAY_OUT),
    *(Relied(f"{each}.{name}", SHARDS, why, ZERO_WAY_OUT) for each in (ZERO_2, ZERO_3) for name, why in (
        ("elastic_checkpoint", "one that saves otherwise is refused."), ("loss_scaler",
        "float16's scale is in a checkpoint."))),
    *(Relied(f"{each}.load_state_dict", SHARDS, "the parts are put back.", ZERO_WAY_OUT,
             holds=lambda x: {"state_dict_list", "load_from_fp32_weights"} <= set(inspect.signature(x).parameters))
      for each in (ZERO_2, ZERO_3)),
    Relied(f"{ZERO_3}.checkpoint_event_prologue", SHARDS, "stage 3 shards its weights before it loads.", ZERO_WAY_OUT),
    Relied(f"{ZERO_3}.checkpoint_event_epilogue", SHARDS, "and gathers the small ones again after.", ZERO_WAY_OUT),
    Relied(f"{ZERO_2}.update_lp_params", SHARDS, "stage 1 and 2 bring the loaded weights to the model.", ZERO_WAY_OUT),
    Relied("deepspeed.runtime.engine.DeepSpeedEngine.zero_optimization_stage", LAUNCH, "which stage wraps the model.",
           "the DeepSpeed config.", arguments=("self",)),
]  # fmt: skip

BITSANDBYTES = [
    Relied("bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu", LOADING,
           "it would repack the weights for CPUs, rounded, and lose the gradients.", "refuse load_in_4bit on such CPUs."),
]  # fmt: skip

TQDM = [
    Relied("tqdm.tqdm._instances", "pipeline/runs/errors.py", "a bar that an error cuts short is closed before its message.",
           "leave the bar open: the message then follows it in the same line.", holds=lambda x: isinstance(x, WeakSet)),
]  # fmt: skip

RELIED_ON = [*TRL, *TRL_VLLM, *TRANSFORMERS, *PEFT, *ACCELERATE, *TORCH, *DATASETS, *DEEPSPEED, *BITSANDBYTES, *TQDM]


@pytest.mark.parametrize("line", RELIED_ON, ids=lambda line: f"{line.what} in {line.used_in}")
def test_it_is_as_we_rely_on(line):
    package = line.what.split(".")[0]
    if package in OPTIONAL and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    problem = fault(line)
    assert problem is None, message(line, problem)


@pytest.mark.parametrize("line", RELIED_ON, ids=lambda line: line.what)
def test_a_line_names_a_file_of_ours_that_uses_it(line):
    assert (ROOT / line.used_in).is_file()
    assert line.why.endswith(".") and line.way_out.endswith(".")


# ------------------------------------------------------------------------------------------ the table is whole
# Documented by their packages, though deep inside.
DOCUMENTED = re.compile(
    r"accelerate\.(logging|utils)|datasets\.exceptions|huggingface_hub\.errors|"
    r"torch\.(autograd|distributed|nn|utils\.data)\b.*"
)
# Names that are Python's, not a package's (of named tuples, of argparse), and ends of keys in reports, logs and other
# projects' configs.
NO_PACKAGES = {"_replace", "_actions", "_negative_number_matcher", "_score", "_judge", "_far", "_skip", "_terminated_length",
               "_low", "_high", "_threshold", "_target_"}  # fmt: skip
# Names that the installed release does not have yet. Our code asks for its version, and leaves them out.
NOT_YET = {"_initial_global_step"} - set(LOOP)


@cache
def private_uses() -> dict[str, set[str]]:
    """Return the private names that our code reads or defines and another package has too, and imports from deep inside
    packages: name, and the files."""
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in ("pipeline", "reward_models", "data")
        for path in (ROOT / package).rglob("*.py")
    }
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    named, ours, deep = {}, set(), {}
    for file, node in nodes:
        name = None
        if isinstance(node, ast.Attribute):
            name = node.attr
            if isinstance(node.ctx, ast.Store):
                ours.add(name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name
            ours.add(name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
            ours.add(name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        if name and re.fullmatch(r"_[a-z]\w*", name):
            named.setdefault(name, set()).add(file)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            within = node.module.count(".") and not DOCUMENTED.fullmatch(node.module)
            for each in node.names if within else ():
                deep.setdefault(f"{node.module}.{each.name}", set()).add(file)
    bases = (RLOOTrainer, GRPOTrainer, SFTTrainer, DPOTrainer, RewardTrainer, PeftModelForCausalLM, LoraLayer, Dataset)
    theirs = set(re.findall(r"(?:self\.|def )(_[a-z]\w*)", "\n".join(map(sources, bases))))
    found = {name: files for name, files in named.items() if name not in ours or name in theirs}
    return deep | {name: files for name, files in found.items() if name not in NO_PACKAGES}


@pytest.mark.slow
def test_nothing_private_is_missing():
    """A private name of ours that TRL's trainers, peft's model or datasets' Dataset have too counts as theirs: to override it
    is meant and has a line, or it takes the place of something."""
    paths = [line.what.split(".") for line in RELIED_ON]
    listed = {part for path in paths for part in path} | {
        ".".join(path[:end]) for path in paths for end in range(2, len(path) + 1)
    }
    missing = {name: sorted(files) for name, files in private_uses().items() if name not in listed | NOT_YET}
    assert not missing, (
        f"no line of tests/test_upstream.py says why these are used, and what to do if they go: {missing}"
    )


@pytest.mark.slow
def test_the_table_knows_what_our_code_uses():
    uses = private_uses()
    for name in ("_dist", "_tr_loss", "_active_adapter", "_run_epoch", "trl.trainer.utils.pad"):
        assert name in uses, name


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("trl.RLOOTrainer._compute_loss", None, "it is gone"),
        ("trl.RLOOTrainer._compute_loss", lambda self, model, batch: None, r"it takes \('self', 'model', 'batch'\)"),
        ("transformers.Trainer._maybe_log_save_evaluate", lambda self: None, r"its source does not say 'self.log\('"),
        ("peft.tuners.tuners_utils.BaseTunerLayer._active_adapter", "policy", "it is another thing now"),
    ],
)
def test_a_line_fails_when_its_thing_moves(path, change, problem, monkeypatch):
    line = next(line for line in RELIED_ON if line.what == path)
    assert fault(line) is None
    owner, name = find(path.rpartition(".")[0]), path.rpartition(".")[2]
    if change is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, change)
    with pytest.raises(
        AssertionError, match=rf"^{re.escape(path)} moved \(\w+ [\d.]+\): {problem}.*Used in .*Way out: "
    ):
        test_it_is_as_we_rely_on(line)


def test_an_attribute_of_objects_that_is_gone_is_missed(monkeypatch):
    line = next(line for line in RELIED_ON if line.what == "trl.RLOOTrainer._pending_metrics")
    moved = sources(RLOOTrainer).replace("_pending_metrics", "_metrics_to_come")
    monkeypatch.setitem(globals(), "sources", lambda kind: moved)
    assert fault(line) == "it is gone"
