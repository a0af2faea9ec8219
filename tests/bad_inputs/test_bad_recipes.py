"""Recipes and command lines: YAML, types, ranges, and options that contradict each other. No model is loaded."""

import json
import os
import sys
from dataclasses import fields
from importlib import import_module
from typing import get_type_hints

import pytest
from transformers import GPT2Config, MixtralConfig
from trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig

from pipeline import ppo
from pipeline.runs.arguments import DataArguments
from pipeline.runs.command_line import parse
from pipeline.runs.recipe import RANGES as RANGES_OF_OPTIONS
from pipeline.runs.trainer_options import check_router_loss


YAML = {
    "a bracket left open": ("run_name: [1, 2\n", r"recipe\.yaml line \d+: not a YAML recipe \(expected"),
    "a tab": ("\trun_name: x\n", r"recipe\.yaml line \d+: not a YAML recipe \(found character '\\t'"),
    "no space after the colon": ("lora_r:16\n", r"recipe\.yaml line \d+: not a YAML recipe"),
    "a key twice": ("seed: 1\n", r"recipe\.yaml line 8: not a YAML recipe \(the key 'seed' comes twice\)"),
    "a key twice below": ("lr_scheduler_kwargs: {a: 1, a: 2}\n", r"the key 'a' comes twice"),
    "a Python object": ("run_name: !!python/object/apply:os.getcwd []\n", r"could not determine a constructor"),
    "aliases that grow tenfold, nine times": (
        "run_name: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{key}: &{key} [*{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}]\n"
            for last, key in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        r"recipe\.yaml line \d+: not a YAML recipe \(more than 10,000 values\)",
    ),
    "an alias inside of itself": ("run_name: &a [*a]\n", r"an alias stands inside of what it names"),
    "merge keys that grow": (
        "optim_args: &a {x: 1}\n"
        + "".join(
            f"k{number}: &k{number} {{<<: [{', '.join([f'*k{number - 1}' if number else '*a'] * 9)}]}}\n"
            for number in range(9)
        ),
        r"more than 10,000 values",
    ),
    "brackets without end": ("run_name: " + "[" * 5000, r"its brackets are nested too deeply"),
    "two documents": ("---\nrun_name: x\n", r"a second document begins with ---"),
    "a number that is none": ("lora_r: !!int abc\n", r"invalid literal for int"),
    "a date that is none": ("run_name: !!timestamp abc\n", r"recipe\.yaml: not a YAML recipe"),
    "an unhashable key": ("{a: 1}: 2\n", r"found unhashable key"),
    "a zero byte": ('run_name: "a\\0b"\n', r"run_name='a\\x00b' holds a zero byte"),
    "a control character": ("run_name: a\x07b\n", r"not a YAML recipe \(special characters are not allowed\)"),
    "too large": ("# " + "x" * 100_000 + "\n", r"recipe\.yaml: larger than 100,000 bytes"),
    "a recipe in a recipe": ("config: other.yaml\n", r"recipe\.yaml: one run has one recipe"),
    "help": ("help: true\n", r"unknown key 'help'"),
    "a flag of the command line": ("no_use_cpu: true\n", r"unknown key 'no_use_cpu'\. Did you mean use_cpu\?"),
    "no environment": ("env: [a]\n", r"env=\['a'\] must be a mapping"),
    "no name of a variable": ("env: {A=B: 1}\n", r"env: 'A=B' is no name"),
    "an unknown key": (
        "learning_rat: 0.1\n",
        r"recipe\.yaml: unknown key 'learning_rat'\. Did you mean learning_rate\?",
    ),
    "a key of another stage": ("kl_target: 5\n", r"recipe\.yaml: unknown key 'kl_target'"),
}
TYPES = {
    "text for a number": ("learning_rate: high\n", r"recipe\.yaml: learning_rate='high' must be a number\."),
    "a list for a number": ("learning_rate: [0.1]\n", r"learning_rate=\[0\.1\] must be a number\."),
    "a mapping for a number": ("warmup_steps: {a: 1}\n", r"warmup_steps=\{'a': 1\} must be a number\."),
    "a number for yes or no": ("logging_first_step: 2\n", r"logging_first_step=2 must be true or false\."),
    "a fraction for a whole number": ("lora_r: 16.5\n", r"lora_r=16\.5 must be a whole number\."),
    "null for a number": ("learning_rate: null\n", r"learning_rate=None must be a number\."),
    "yes for a number": (
        "logging_steps: yes\n",
        r"logging_steps=True must be a number\. YAML reads yes, no, on and off",
    ),
    "off for a word": (
        "eval_strategy: off\n",
        r"eval_strategy=False must be text\. .*If you mean the word, put it in quotes",
    ),
    "a word for yes": ("packing: maybe\n", r"packing='maybe' must be true or false\."),
    "a number for text": ("run_name: 2024\n", r"run_name=2024 must be text or null\."),
    "a number for a list": (
        "lora_target_modules: 5\n",
        r"lora_target_modules=5 must be a list in brackets, each entry",
    ),
    "infinity for a whole number": ("lora_r: .inf\n", r"lora_r=inf must be a whole number\."),
    "no such dtype": ("dtype: float61\n", r"dtype='float61' is not one of auto, bfloat16, float16, float32\."),
    "no such schedule": ("lr_scheduler_type: linearr\n", r"lr_scheduler_type='linearr' is not one of linear, cosine"),
    "a pad token without quotes": ("pad_token: [PAD]\n", r"pad_token=\['PAD'\] must be text or null\."),
    "minutes": ("max_steps: 1:30\n", r"max_steps='1:30' must be a whole number\."),
    "hexadecimal": ("max_steps: 0x10\n", r"max_steps='0x10' must be a whole number\."),
    "a date for a number": ("learning_rate: 2024-01-01\n", r"learning_rate='2024-01-01' must be a number\."),
    "yes for a whole number": ("lora_r: yes\n", r"lora_r=True must be a whole number\. YAML reads yes"),
    "text in a list of numbers": (
        "lora_target_modules: [1]\n",
        r"lora_target_modules=\[1\] must be a list in brackets",
    ),
    "text in a mapping of switches": (
        "liger_kernel_config: {rope: maybe}\n",
        r"liger_kernel_config=\{'rope': 'maybe'\} must be a mapping or null",
    ),
    "text for a mapping": (
        "lr_scheduler_kwargs: power\n",
        r"lr_scheduler_kwargs='power' must be a mapping, or JSON text",
    ),
    "JSON that is no mapping": ("lr_scheduler_kwargs: '[1]'\n", r"lr_scheduler_kwargs='\[1\]' must be a mapping"),
    "no file of a mapping": (
        "deepspeed: nowhere.json\n",
        r"deepspeed='nowhere\.json' is neither a mapping nor a JSON file",
    ),
    "an empty text": ("run_name: ''\n", r"run_name='' is an empty text\. Give a value, or leave run_name out\."),
    "a name of blanks": ("dataset_name: ' '\n", r"dataset_name=' ' has a name of blanks alone\. Name a folder"),
    "an empty list": ("lora_target_modules: []\n", r"lora_target_modules=\[\] is an empty list"),
    "no such optimizer": ("optim: adam\n", r"optim='adam' is not one of adamw_torch"),
}
RANGES = [
    ("sft", "max_steps", 0, "1 or more, or -1 to train num_train_epochs"),
    ("sft", "learning_rate", -1.0, "0 or more"),
    ("sft", "learning_rate", "nan", "0 or more"),
    ("sft", "per_device_train_batch_size", 0, "1 or more"),
    ("sft", "gradient_accumulation_steps", 0, "1 or more"),
    ("sft", "max_length", 0, "1 or more"),
    ("sft", "num_train_epochs", 0.0, "above 0"),
    ("sft", "data_seed", -1, "from 0 to 4294967295"),
    ("sft", "dataloader_num_workers", -1, "0 or more"),
    ("sft", "ddp_timeout", 0, "1 or more"),
    ("sft", "learning_rate", "-1e-5", "0 or more"),
    ("sft", "learning_rate", "-inf", "0 or more"),
    ("sft", "seed", -1, "from 0 to 4294967295"),
    ("sft", "weight_decay", -0.1, "0 or more"),
    ("sft", "max_grad_norm", -1.0, "0 or more"),
    ("sft", "adam_beta1", 1.0, "0 or more and below 1"),
    ("sft", "logging_steps", 0.0, "above 0"),
    ("sft", "save_steps", 0.0, "above 0"),
    ("sft", "warmup_steps", -5.0, "0 or more"),
    ("sft", "lora_r", 0, "1 or more"),
    ("sft", "lora_dropout", 1.5, "from 0 to 1"),
    ("sft", "lora_top_layers", -1, "1 or more"),
    ("reward", "sft_completions", 0, "1 or more"),
    ("reward", "label_smoothing", 1.5, "from 0 to 1"),
    ("reward", "label_smoothing", -0.1, "from 0 to 1"),
    ("reward", "max_completion_length", 0, "1 or more"),
    ("ppo", "beta", -0.1, "0 or more"),
    ("ppo", "ptx_max_length", 1, "2 or more"),
    ("ppo", "temperature", 0.0, "above 0"),
    ("ppo", "top_p", 1.5, "above 0 and at most 1"),
    ("ppo", "num_iterations", 0, "1 or more"),
    ("ppo", "num_generations", 0, "1 or more"),
    ("ppo", "steps_per_generation", 0, "1 or more"),
    ("ppo", "max_completion_length", 0, "1 or more"),
    ("ppo", "epsilon", 0.0, "above 0"),
    ("ppo", "value_clip", 0.0, "above 0"),
    ("ppo", "vf_coef", -1.0, "0 or more"),
    ("ppo", "gamma", 1.5, "from 0 to 1"),
    ("ppo", "lam", -0.5, "from 0 to 1"),
    ("ppo", "kl_target", -1.0, "above 0"),
    ("ppo", "min_reward_accuracy", 55.0, "from 0 to 1"),
    ("ppo", "critic_warmup_updates", -1, "0 or more"),
    ("ppo", "sample_updates", -1, "0 or more"),
    ("rloo", "learning_rate", -1.0, "0 or more"),
    ("grpo", "temperature", -1.0, "above 0"),
    ("dpo", "beta", -1.0, "0 or more"),
    ("dpo", "max_pairs", 0, "1 or more"),
    ("evaluation", "temperature", 0.0, "above 0"),
    ("evaluation", "batch_size", 0, "1 or more"),
    ("evaluation", "max_prompts", 0, "1 or more"),
    ("best_of_n", "max_completion_length", 0, "1 or more"),
]
CONTRADICTIONS = {
    "an end of text of one stage": ("sft", {"eos_token": "!"}, r"^eos_token='!' would change only this stage"),
    "a chat template of one stage": ("sft", {"chat_template_path": "x"}, r"^chat_template_path='x' would change only"),
    "thinking that the reward would not see": (
        "rloo",
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        r"^chat_template_kwargs=\{'enable_thinking': False\} would not reach the reward model",
    ),
    "rankings torn apart": (
        "reward",
        {"train_sampling_strategy": "sequential"},
        r"^train_sampling_strategy='sequential' is not supported: pairs of a ranking are batched together",
    ),
    "a margin of ratings": (
        "reward",
        {"loss_type": "regression", "use_margin": True},
        r"^use_margin=True is for pairs, and loss_type='regression' has no labels of them\. Leave use_margin unset, or",
    ),
    "smoothed labels of rankings": (
        "reward",
        {"loss_type": "plackett_luce", "label_smoothing": 0.1},
        r"^label_smoothing=0\.1 is for pairs, and loss_type='plackett_luce' has no labels",
    ),
    "pairs to learn ratings from": (
        "reward",
        {"loss_type": "regression"},
        r"/pairs\.jsonl: no column 'rating', which loss_type='regression' learns\. Give rated texts",
    ),
    "ratings that say where 0 is": (
        "reward",
        {"loss_type": "regression", "center_rewards_coefficient": 0.1},
        r"^center_rewards_coefficient=0\.1 and loss_type='regression' contradict each other",
    ),
    "a loss that there is not": ("reward", {"loss_type": "hinge"}, r"loss_type.*'?hinge"),
    "one dataset and several": (
        "reward",
        {"datasets": '[{"path": "more.jsonl"}]'},
        r"^dataset_name='/.*pairs\.jsonl' and datasets both say what to train on\. Give one",
    ),
    "datasets that are no JSON": (
        "reward",
        {"datasets": "a.jsonl,b.jsonl", "dataset_name": "human_ratings"},
        r"^datasets='a\.jsonl,b\.jsonl' must be a list of entries in JSON",
    ),
    "datasets without held-out rows": (
        "reward",
        {
            "datasets": '[{"path": "a.jsonl"}, {"path": "b.jsonl"}]',
            "dataset_name": "human_ratings",
            "eval_on_start": True,
        },
        r"need held-out rows, and a\.jsonl, b\.jsonl has none\. Name a dataset in eval_dataset_name",
    ),
    "labels that say the opposite": (
        "reward",
        {"label_smoothing": 0.5},
        r"^label_smoothing=0\.5 must be below 0\.5: at 0\.5 labels say nothing",
    ),
    "the label smoothing of classifiers": (
        "reward",
        {"label_smoothing_factor": 0.1},
        r"^label_smoothing_factor=0\.1 has no effect on pairs\. Set label_smoothing\.$",
    ),
    "two words on how far apart scores are": (
        "reward",
        {"use_margin": True, "use_agreement": True},
        r"^use_margin=True and use_agreement=True contradict each other",
    ),
    "the start of no policy": (
        "reward",
        {"recipe": "start_from_sft: true\nsft_adapter: null\n"},
        r"^start_from_sft=True needs an adapter to start from\. Name it in sft_adapter\.$",
    ),
    "shares of raters that are not there": (
        "reward",
        {"use_agreement": True},
        r"pairs\.jsonl: no column 'agreement', which use_agreement=True reads\. Add it to the rows, or leave use_",
    ),
    "shares of raters that only the training rows have": (
        "reward",
        {
            "use_agreement": True,
            "dataset_name": lambda world: world.write(
                "shares.jsonl", [{"chosen": "A fine film.", "rejected": "A film.", "prompt": "", "agreement": 0.5}] * 8
            ),
            "eval_dataset_name": lambda world: str(world.folder / "pairs.jsonl"),
            "recipe": "eval_strategy: steps\neval_steps: 1\n",
        },
        r"/pairs\.jsonl: no column 'agreement', which use_agreement=True reads",
    ),
    "margins that are not there": (
        "reward",
        {"use_margin": True},
        r"pairs\.jsonl: no column 'margin', which use_margin=True reads",
    ),
    **{
        f"{key} among what is sampled by ({stage})": (
            stage,
            {"generation_kwargs": json.dumps({"typical_p": 0.9, key: value})},
            rf"^generation_kwargs: {key}={value!r} is not supported: {reason}",
        )
        for stage, key, value, reason in (
            ("ppo", "eos_token_id", 5, "completions end where the model's own generation config ends them"),
            ("ppo", "temperature", 0.5, "logprobs would be those of another temperature"),
            ("ppo", "num_return_sequences", 2, "a prompt has one completion at a time. Set num_generations"),
            ("rloo", "num_beams", 3, "completions are sampled one token after the other"),
            ("grpo", "return_dict_in_generate", True, "only tokens are returned"),
            ("grpo", "stop_strings", "the", "completions end at a token"),
        )
    },
    "a typo among what is sampled by": (
        "ppo",
        {"generation_kwargs": '{"typical": 0.9}'},
        r"^generation_kwargs: unknown key 'typical'\. Did you mean typical_p\?$",
    ),
    "an adapter without a name": (
        "evaluation",
        {"policy_adapter": ""},
        r"^command line: policy_adapter='' is an empty text\. Give a value, or leave policy_adapter out\.$",
    ),
    "two recipes": (
        "sft",
        {"config": "other.yaml"},
        r"^command line: one run has one recipe\. Name it with --config, once",
    ),
    **{
        f"{key}: 1e9 of {stage}": (
            stage,
            {key: 10**9},
            rf"^{key}=1000000000 is more than [\d,]+, the most that a run can use",
        )
        for stage, key in (
            ("sft", "per_device_train_batch_size"),
            ("sft", "gradient_accumulation_steps"),
            ("ppo", "steps_per_generation"),
            ("rloo", "num_generations"),
            ("evaluation", "batch_size"),
            ("best_of_n", "max_completion_length"),
        )
    },
    "a rollout too large": (
        "ppo",
        {"per_device_train_batch_size": 2**16, "steps_per_generation": 2**10},
        r"^generation_batch_size=67108864 is more than 1,048,576",
    ),
    "one prompt to evaluate": ("evaluation", {"max_prompts": 1}, r"prompts\.jsonl: 1 prompt \(max_prompts=1\), and"),
    "one prompt for best of n": ("best_of_n", {"max_prompts": 1}, r": 1 prompt .* intervals need 2 or more"),
    "minibatches": ("ppo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "does not divide"),
    "a held KL without a penalty": ("ppo", {"kl_target": 6.0, "beta": 0.0}, "beta=0.0 cannot be adapted to kl_target"),
    "a head with an adapter's start": (
        "ppo",
        {"critic": "head", "value_init": "reward"},
        "critic='head' has no value adapter",
    ),
    "bounds the wrong way round": (
        "ppo",
        {"recipe": "reward_clip_range: [5, -5]\n"},
        r"\[5\.0, -5\.0\] must be two numbers",
    ),
    "one bound": ("ppo", {"recipe": "reward_clip_range: [5]\n"}, r"reward_clip_range=\[5\.0\] must be two numbers"),
    **{
        f"a long {key}": (
            stage,
            {key: f"runs/{'é' * 128}"},
            rf"^{key}='runs/é+\.\.\. has a part of more than 255 bytes",
        )
        for stage, key in (
            ("sft", "model_name_or_path"),
            ("ppo", "sft_adapter"),
            ("dpo", "dataset_name"),
            ("grpo", "eval_dataset_name"),
        )
    },
    "a reference of its own, dpo": (
        "dpo",
        {"sync_ref_model": True},
        "^sync_ref_model=True needs a reference model of its own",
    ),
    "a reference of its own, grpo": (
        "grpo",
        {"sync_ref_model": True},
        "^sync_ref_model=True needs a reference model of its own",
    ),
    "a reference of its own, rloo": (
        "rloo",
        {"sync_ref_model": True},
        "^sync_ref_model=True needs a reference model of its own",
    ),
    "assistants of texts": (
        "sft",
        {"assistant_only_loss": True},
        r"^assistant_only_loss=True needs conversations, and .*texts",
    ),
    "a group of one": ("grpo", {"num_generations": 1}, "at least 2 generations"),
    "no completions": ("best_of_n", {"n": [0, 2]}, r"n=\[0, 2\] must be a list of numbers of completions"),
    "a report that is not there": ("best_of_n", {"report": "none.json"}, "report='none.json': no such file"),
    "an optimizer on the command line": (
        "sft",
        {"optim": "adam"},
        "command line: argument --optim: invalid choice: 'adam'",
    ),
    "no adapter to evaluate": (
        "evaluation",
        {"policy_adapter": []},
        "argument --policy_adapter.*: expected one argument",
    ),
}


# What transformers or TRL would refuse after the model is loaded, or in the middle of training.
BEST = "save_strategy: steps\neval_strategy: steps\nload_best_model_at_end: true\n"
LATE = {
    "an argument of no schedule": (
        "sft",
        "lr_scheduler_kwargs: {a: 1}\n",
        r"^lr_scheduler_type='linear' cannot be made",
    ),
    "a schedule that needs more": (
        "sft",
        "lr_scheduler_type: warmup_stable_decay\n",
        r"^lr_scheduler_type='warmup_stable",
    ),
    "a power that is none": (
        "sft",
        "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: x}\n",
        r"^lr_scheduler_type='polynomial' cannot be made with lr_scheduler_kwargs=\{'power': 'x'\}: unsupported operand",
    ),
    "an argument of no optimizer": (
        "sft",
        "optim_args: a\n",
        r"^optim='adamw_torch_fused' cannot be made with .*optim_args='a'",
    ),
    "a figure of no evaluation": (
        "reward",
        f"{BEST}metric_for_best_model: f1\n",
        r"^metric_for_best_model='f1' is no figure of this stage's evaluation\. Name one of loss, accuracy",
    ),
    "the best of no evaluation": ("sft", "save_strategy: best\n", r"^save_strategy: best needs an evaluation"),
    "an evaluation without rows": ("sft", "eval_strategy: steps\neval_steps: 1\n", r"texts\.jsonl has none"),
    "an evaluation that RLOO does not make": ("rloo", "eval_strategy: steps\n", r"this stage evaluates nothing"),
    "workers that stay, of none": ("dpo", "dataloader_persistent_workers: true\n", r"dataloader_num_workers is 0"),
    "an argument of no checkpointing": ("sft", "gradient_checkpointing_kwargs: {a: 1}\n", r"unknown key 'a'\. torch"),
    "options of a model that is loaded": (
        "sft",
        "model_init_kwargs: {a: 1}\n",
        r"^model_init_kwargs=.* has no effect here",
    ),
    "activations to the CPU, on a CPU": (
        "sft",
        "activation_offloading: true\n",
        r"^activation_offloading=True moves activations from a GPU to the CPU, and this run is on the CPU\. Leave it unset",
    ),
    "texts of another column": (
        "sft",
        "dataset_text_field: content\n",
        r"^dataset_text_field='content': texts are read from the column `text`\. Rename the column",
    ),
    "texts of any length, laid end to end": (
        "sft",
        "padding_free: true\n",
        r"^padding_free=True would not hold texts to max_length=\d+\. Set packing: true, or max_length: null",
    ),
    "half precision on a CPU": ("sft", "fp16: true\n", r"^fp16=True needs a GPU, and use_cpu is set"),
    "no such attention": ("sft", "attn_implementation: flash\n", r"^attn_implementation='flash' is not one of eager"),
    "no such compiler": ("sft", "torch_compile_backend: gcc\n", r"^torch_compile_backend='gcc' is not one of"),
    "a key of no accelerator": (
        "sft",
        "accelerator_config: {a: 1}\n",
        r"^SFTConfig cannot be made .*accelerator_config=\{'a': 1\}",
    ),
    "no such loss of DPO": (
        "dpo",
        "loss_type: [sigmoid, logistic]\n",
        r"^loss_type=\['sigmoid', 'logistic'\] is not one of",
    ),
    "no such divergence": ("dpo", "f_divergence_type: kl\n", r"^f_divergence_type='kl' is not one of reverse_kl"),
    "no such loss of GRPO": ("grpo", "loss_type: ppo\n", r"^loss_type='ppo' is not one of grpo"),
    "no such scale": ("grpo", "scale_rewards: all\n", r"^scale_rewards='all' is not one of group, batch, none"),
    "completions without an end": (
        "rloo",
        "max_completion_length: null\n",
        r"max_completion_length=None must be a whole number",
    ),
    "tokens that are none": (
        "ppo",
        "generation_kwargs: {suppress_tokens: the}\n",
        r"^generation_kwargs=.* cannot be sampled with",
    ),
    "a share above 1": (
        "ppo",
        "generation_kwargs: {typical_p: 2}\n",
        r"^generation_kwargs: typical_p=2 must be a number from 0",
    ),
    "no such cache": (
        "grpo",
        "cache_implementation: fast\n",
        r"^generation_kwargs=.*Invalid `cache_implementation` \(fast\)",
    ),
}


@pytest.mark.parametrize(("stage", "recipe", "message"), LATE.values(), ids=LATE)
def test_what_a_trainer_would_refuse_later(stage, recipe, message, refuses):
    refuses(stage, message, recipe=recipe)


@pytest.mark.parametrize(("recipe", "message"), YAML.values(), ids=YAML)
def test_yaml(recipe, message, refuses):
    refuses("sft", message, recipe=recipe)


@pytest.mark.parametrize(("recipe", "message"), TYPES.values(), ids=TYPES)
def test_types(recipe, message, refuses):
    refuses("sft", message, recipe=recipe)


@pytest.mark.parametrize(("stage", "key", "value", "range"), RANGES)
def test_ranges(stage, key, value, range, refuses):
    shown = float(value) if isinstance(value, str) else value
    refuses(stage, f"^{key}={shown} must be {range}\\.$", **{key: value})


@pytest.mark.parametrize(("stage", "options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(stage, options, message, refuses):
    refuses(stage, message, **options)


def test_every_range_is_that_of_an_option():
    mains = [
        import_module(f"pipeline.{stage}").main
        for stage in ("ppo", "reward", "dpo", "grpo", "evaluation", "best_of_n", "plan", "pretrain", "label")
        + ("loop", "pairs")
    ]
    kinds = [kind for main in mains for name, kind in get_type_hints(main).items() if name != "return"]
    options = {option.name for kind in kinds for option in fields(kind)}
    options.add("warmup_ratio")  # only the oldest transformers that is allowed has it
    assert {name for names, _, _ in RANGES_OF_OPTIONS for name in names} <= options


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, RLOOConfig, GRPOConfig])
def test_only_mixtures_of_experts_have_a_router_loss(kind, tmp_path):
    args = kind(str(tmp_path), report_to="none", use_cpu=True, bf16=False, router_aux_loss_coef=0.1)
    check_router_loss(args, MixtralConfig())
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef=0\.1 weighs .*this model has no experts"):
        check_router_loss(args, GPT2Config())
    args.router_aux_loss_coef = None
    check_router_loss(args, GPT2Config())


def test_a_word_too_many():
    with pytest.raises(ValueError, match=r"^command line: \[''\] belong to no option"):
        parse(DataArguments, args=["--dataset_name", "x", ""])


def test_a_whole_number_is_a_float_as_on_the_command_line(world):
    """transformers refuses a temperature of 1, and takes 1.0."""
    path = world.write("recipe.yaml", "dataset_name: x\nmin_kept: 1\n")
    (found,) = parse(DataArguments, args=["--config", str(path)])
    assert type(found.min_kept) is float


@pytest.mark.parametrize("name", ["nowhere.yaml", ".", "prompts.jsonl/ppo.yaml"])
def test_a_recipe_that_is_not_there(name, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    with pytest.raises(FileNotFoundError, match=rf"^--config {name}: no such file\. Name a recipe"):
        parse(DataArguments, args=["--config", name])
    with pytest.raises(FileNotFoundError, match=rf"^--config {name}: no such file\. Name a recipe"):
        parse(DataArguments, args=[f"--config={name}"])


def test_a_recipe_that_is_no_text(world):
    path = world.write("recipe.yaml", b"run_name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a YAML recipe \('utf-8' codec can't decode"):
        parse(DataArguments, args=["--config", path])


def test_numbers_that_yaml_reads_as_text_are_numbers(world):
    """`1e-5` has no point, and so is text in YAML 1.1."""
    path = world.write("recipe.yaml", "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\nmax_steps: 1e1\n")
    with pytest.raises(ValueError, match=r"max_steps='1e1' must be a whole number"):
        parse(SFTConfig, args=["--config", path])
    world.write("recipe.yaml", "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-5\n")
    assert parse(SFTConfig, args=["--config", path])[0].learning_rate == 1e-5


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("reward_weights: [1e-1, 2, '3']", [0.1, 2.0, 3.0]),
        ("reward_clip_range: [-1e1, 1_0]", [-10.0, 10.0]),
        ("lr_scheduler_kwargs: {num_cycles: 5e-1}\nlr_scheduler_type: cosine", {"num_cycles": 0.5}),
        ("lora_target_modules: [010, 1e5, 'off']", ["010", "1e5", "off"]),
        ("lora_target_modules: c_attn", "c_attn"),  # ModelConfig unwraps a list of one
        ("max_steps: 010", 10),  # as on the command line; YAML 1.1 reads 8
        ("max_steps: 1_000", 1000),
        ("max_steps: 10.0", 10),
        ("run_name: 1:30", "1:30"),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 0x10", "0x10"),
        ("seed: &seed 5\ndata_seed: *seed", 5),
        ("normalize_scores: off", False),
        ("report_to: [none]", []),
        ("eval_dataset_name: ''", ""),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "BOM"])
def test_what_a_value_means(line, value, start, world):
    path = world.write(
        "recipe.yaml", f"{start}use_cpu: true\nbf16: false\noutput_dir: out\nreward_funcs: a.b\n{line}\n"
    )
    parts = parse(*ppo.OPTIONS, args=["--config", path])
    (found,) = {repr(getattr(part, key)) for part in parts if hasattr(part, key := line.split(":")[0])}
    assert found == repr(value)


def test_negative_numbers_on_the_command_line():
    words = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--reward_funcs", "a.b"]
    *_, args = parse(
        *ppo.OPTIONS, args=[*words, "--reward_weights", "1", "-1e-1", "--reward_clip_range", "-.5", "5e0"]
    )
    assert args.reward_weights == [1.0, -0.1] and args.reward_clip_range == [-0.5, 5.0]


def test_the_environment_of_a_recipe(world, monkeypatch):
    monkeypatch.setenv("SPINE_TEST", "before")
    path = world.write("recipe.yaml", "env: {SPINE_TEST: 010}\nrun_nam: x\n")
    with pytest.raises(ValueError, match="unknown key 'run_nam'"):
        parse(DataArguments, args=["--config", path])
    assert os.environ["SPINE_TEST"] == "before"
    world.write("recipe.yaml", "env: {SPINE_TEST: 010}\n")
    parse(DataArguments, args=["--config", path])
    assert os.environ["SPINE_TEST"] == "010"


@pytest.mark.parametrize("kind", ["a pipe", "a name of 300 characters"])
def test_a_recipe_that_is_no_file(kind, tmp_path):
    """Each process reads the recipe, and a pipe has it once."""
    path = tmp_path / ("pipe" if kind == "a pipe" else "x" * 300)
    if kind == "a pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file" if kind == "a pipe" else "no such file"):
        parse(DataArguments, args=["--config", str(path)])


def test_a_token_of_the_hub_is_in_no_message():
    words = ["--output_dir", "out", "--hub_token", "hf_secret", "--accelerator_config", '{"a": 1}', "--use_cpu"]
    with pytest.raises(ValueError, match="accelerator_config") as caught:
        parse(SFTConfig, args=words)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clearml", "ClearMLCallback requires 'clearml' to be installed"),
        ("notebook", "notebook is not supported, only azure_ml"),
    ],
)
def test_a_tracker_that_is_not_there(name, problem, monkeypatch):
    """Trainer says so too, after the model was loaded. A recipe that is only read may name what another machine has."""
    args = ["--output_dir", "out", "--use_cpu", "--bf16", "false", "--report_to", name]
    monkeypatch.setattr(sys, "argv", ["stage", *args])
    with pytest.raises(ValueError, match=rf"^report_to=\['{name}'\]: .*({problem})"):
        parse(SFTConfig)
    assert parse(SFTConfig, args=args)[0].report_to == [name]
