"""Models, adapters and outputs: the wrong folder in the wrong place, and files that are damaged or missing."""

import errno
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trl import ModelConfig

from pipeline.backbone.adapters import HEAD, WEIGHTS
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import load_backbone


def remove(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def put(name, content):
    return lambda folder: (folder / name).write_text(content)


def change(name, **values):
    def spoil(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **values}))

    return spoil


def tensors(how):
    """Spoils the adapter's tensors by a function that takes them and gives those to save."""
    return lambda folder: save_file(how(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def add_a_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "data" / "backbone")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def with_nan(found: dict) -> dict:
    found[next(iter(found))][0, 0] = float("nan")
    return found


def spoiled(spoil, source: str):
    """The value of a case: a copy of the world's model (tiny), or of its SFT or reward adapter, spoiled."""
    return lambda world: world.copy(getattr(world, source), spoil)


MODELS = {
    "nothing named": (None, r"model_name_or_path is not set"),
    "no such model": (
        "sent2vec",
        r"model_name_or_path='sent2vec': there is no such folder, and the hub did not give such a model \(.*Correct the name",
    ),
    "no such folder": ("./nowhere", r"model_name_or_path='\./nowhere': there is no such folder"),
    "a file": (lambda world: f"{world.tiny}/config.json", r"config\.json': there is no such folder"),
    "an adapter": (
        lambda world: world.sft,
        r"is the folder of an adapter, not of a model\. Name its base there \(\S*tiny0\)",
    ),
    "no tokenizer": (
        spoiled(remove("tokenizer*"), "tiny"),
        r"the model folder has no tokenizer \(tokenizer\.json\)\. Save it there with",
    ),
    "no weights": (
        spoiled(remove("*.safetensors"), "tiny"),
        r"the model folder has no model\.safetensors \(no weights\)",
    ),
}
MODELS_SEEN_IN_LOADING = {
    "cut weights": (cut("model.safetensors", 5000), r"damaged, perhaps by a copy or download that was cut short"),
    "a cut config": (cut("config.json", 20), r"config\.json: not valid JSON .*Restore the file"),
    "no config": (remove("config.json"), r"Unrecognized model in \S+\. Should have a `model_type` key in its config"),
    "a text for a number": (
        change("config.json", n_head="two"),
        r"makes no model of config\.json .*'n_head'.*Correct them",
    ),
    "no heads": (
        change("config.json", n_head=0),
        r"makes no model of config\.json .*ZeroDivisionError.*or name another",
    ),
    **{
        f"a huge {name}": (change("config.json", **{name: size}), rf"config\.json {says}.*Correct the sizes there")
        for name, size, says in (
            (
                "n_layer",
                10**9,
                r"names 1,000,000,000 layers \(num_hidden_layers\), but the model's files have \d+ tensors\.",
            ),
            ("vocab_size", 10**9, r"describes a model of [\d,]{13,} numbers, but the model's files hold [\d,]+\."),
            ("n_embd", 10**7, "describes a model of"),
            ("n_positions", 10**10, "describes a model of"),
            ("n_inner", 10**9, "describes a model of"),
        )
    },
    "an end that is no token": (
        change("generation_config.json", eos_token_id=[None]),
        r"eos_token_id names None, which is no token's id\. Correct generation_config\.json",
    ),
    "a length that is no number": (
        change("tokenizer_config.json", model_max_length=[]),
        r"tokenizer_config\.json has model_max_length=\[\]\. Write a whole number",
    ),
    "an unknown family": (
        change("config.json", model_type="own\x1b[2J"),
        r"no model of config\.json .*type `own\\x1b\[2J`",
    ),
    "a text for the architectures": (
        change("config.json", architectures="GPT2LMHeadModel"),
        r"config\.json: 'architectures' is 'GPT2LMHeadModel', but must be a list \(a text\) or null\. Restore the file",
    ),
    "a cut tokenizer": (
        cut("tokenizer.json", 20),
        r"the tokenizer's files are damaged .*Save the tokenizer there anew",
    ),
    "more tokens than embeddings": (
        add_a_token,
        r"the tokenizer has 8193 tokens, but the model embeds 8192\. Use the",
    ),
    "no end of text": (
        change("tokenizer_config.json", eos_token=None),
        r"the tokenizer has no end-of-text token\. Set eos",
    ),
}
ADAPTERS = {
    "reward for SFT": (
        "ppo",
        "sft_adapter",
        lambda world: world.reward,
        r"holds a score head .*and this one as reward_ad",
    ),
    "reward for SFT in DPO": ("dpo", "sft_adapter", lambda world: world.reward, r"holds a score head"),
    "reward to evaluate": (
        "evaluation",
        "policy_adapter",
        lambda world: world.reward,
        r"A policy cannot start from it",
    ),
    "SFT for reward": ("ppo", "reward_adapter", lambda world: world.sft, r"holds no score head .*so it cannot score"),
    "a model for SFT": (
        "ppo",
        "sft_adapter",
        lambda world: world.tiny,
        r"a whole model\. Name a merged model in model_name",
    ),
    "a model for reward": ("grpo", "reward_adapter", lambda world: world.tiny, r"This is a whole model"),
    "no such folder": (
        "reward",
        "sft_adapter",
        "runs/demo/nowhere",
        r"runs/demo/nowhere/adapter_config\.json: no such file",
    ),
    "no such name": (
        "rloo",
        "sft_adapter",
        "runs/nowhere",
        r"runs/nowhere: no such folder .*and no such adapter on the hub",
    ),
    "no such revision": ("ppo", "reward_adapter", "runs/nowhere@v1", r"runs/nowhere@v1: no such folder .*on the hub"),
    "the file, not the folder": (
        "ppo",
        "sft_adapter",
        lambda world: f"{world.sft}/{WEIGHTS}",
        r"adapter_config\.json: no such file\. Name the folder that `trainer\.save_model` wrote",
    ),
}
# Each is done to a copy of the SFT adapter, or of the reward adapter.
DAMAGED = {
    "no weights": ("sft", remove(WEIGHTS), r"adapter_model\.safetensors: no such file"),
    "no config": ("sft", remove("adapter_config.json"), r"adapter_config\.json: no such file"),
    "empty weights": (
        "sft",
        cut(WEIGHTS, 0),
        r"adapter_model\.safetensors: the file is damaged.*(header too small|HeaderTooSmall)",
    ),
    "cut in the header": (
        "sft",
        cut(WEIGHTS, 500),
        r"adapter_model\.safetensors: the file is damaged.*Copy or train it anew",
    ),
    "cut in the tensors": (
        "reward",
        cut(WEIGHTS, -50),
        r"adapter_model\.safetensors: the file is damaged.*(not fully covered|MetadataIncompleteBuffer)",
    ),
    "a cut config": (
        "sft",
        cut("adapter_config.json", 30),
        r"adapter_config\.json: not valid JSON .*Restore the file",
    ),
    "a list for a config": ("sft", put("adapter_config.json", "[]"), r"adapter_config\.json: not a JSON object"),
    "another kind of adapter": ("sft", change("adapter_config.json", peft_type="IA3"), r"is of type IA3, not LORA"),
    "biases of the base": (
        "reward",
        change("adapter_config.json", bias="lora_only"),
        r"has bias='lora_only', so the adapter changes the backbone itself.* Train an adapter with bias='none'",
    ),
    "residues of the base": (
        "reward",
        change("adapter_config.json", init_lora_weights="pissa_niter_4"),
        r"has init_lora_weights='pissa_niter_4', so the adapter .* Train an adapter with init_lora_weights=True",
    ),
    "tokens of the base": (
        "sft",
        change("adapter_config.json", trainable_token_indices=[5]),
        r"has trainable_token_indices=\[5\], so the adapter",
    ),
    "layers of the base again": (
        "sft",
        change("adapter_config.json", layer_replication=[[0, 2], [1, 2]]),
        r"has layer_replication=\[\[0, 2\], \[1, 2\]\], so the adapter",
    ),
    "whole numbers": (
        "sft",
        tensors(lambda found: {k: v.int() for k, v in found.items()}),
        r"lora_A\.weight is of I32, not of a floating-point type that is trained",
    ),
    "cut metrics": ("reward", put("metrics.json", '{"accuracy"'), r"metrics\.json: not valid JSON"),
    "no head": (
        "reward",
        tensors(lambda found: {k: v for k, v in found.items() if k != HEAD}),
        r"holds no score head",
    ),
    "a head of two": (
        "reward",
        tensors(lambda found: {**found, HEAD: torch.ones(2, 32)}),
        r"score head has 2 outputs",
    ),
}
DAMAGED_SEEN_WITH_THE_MODEL = {
    "another rank": (
        "sft",
        change("adapter_config.json", r=8),
        r"lora_A\.weight has shape \(4, 32\), but needs \(8, 32\) on this backbone",
    ),
    "a tensor too few": (
        "sft",
        tensors(lambda found: dict(list(found.items())[1:])),
        r"1 tensors of the adapter do not",
    ),
    "not finite": ("sft", tensors(with_nan), r"adapter_model\.safetensors: \S+lora_A\.weight is not finite\. Train"),
    "a head of another width": (
        "reward",
        tensors(lambda found: {**found, HEAD: torch.ones(1, 7)}),
        r"the score head reads 7 hidden units, but the backbone has 32",
    ),
    "a cut identity": ("sft", cut("backbone.json", 9), r"backbone\.json: not valid JSON"),
    "an empty identity": (
        "sft",
        put("backbone.json", "{}"),
        r"backbone\.json: 'fingerprint' is missing\. It must be a text",
    ),
    "another tokenizer": (
        "reward",
        add_a_token,
        r"with another tokenizer \(8193 tokens, here 8192; '<extra>' is one that",
    ),
    "no better than chance": ("reward", put("metrics.json", '{"accuracy": 0.5}'), r"PPO is refused before it starts"),
}
SCALES = {
    "no scale": (remove("score_normalization.json"), r"has no score_normalization\.json"),
    "a scale without numbers": (
        put("score_normalization.json", "{}"),
        r"score_normalization\.json: 'mean' is missing\. It must be a number\. Measure the scores anew",
    ),
    "a scale of 0": (
        put("score_normalization.json", '{"mean": 0.0, "std": 0.0, "completions": 8}'),
        r"score_normalization\.json: 'std' is 0\.0, but must be a number above 0\. Measure the scores anew",
    ),
}
OPTIONS = {
    "8 bits": ({"load_in_8bit": True}, r"load_in_8bit=True is not supported\. Set load_in_4bit"),
    "4 bits of no kind": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, r"invalid choice: 'nf5'"),
    "4 bits to be sharded": (
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        r"bnb_4bit_quant_storage='bfloat16' is only for sharding",
    ),
    "4 bits and no dtype": ({"load_in_4bit": True, "dtype": "auto"}, r"dtype='auto' names no dtype for load_in_4bit"),
    "DoRA": ({"use_dora": True}, r"use_dora=True is not supported"),
    "modules to save": ({"lora_modules_to_save": ["lm_head"]}, r"lora_modules_to_save='?\[?'?lm_head"),
    "no such module": (
        {"lora_target_modules": ["q_proj"]},
        r"lora_target_modules: 'q_proj' is no layer of GPT2\w+ that LoRA adapts\. Name some of c_attn, c_fc, c_proj",
    ),
    "more layers than there are": ({"lora_top_layers": 3}, r"lora_top_layers=3: the model has 2 layers"),
    "no such attention": ({"attn_implementation": "fast"}, r"^attn_implementation='fast' is not one of eager, .*sdpa"),
}

PAD_TOKENS = {
    "unknown": (
        "[PAD]",
        r"^pad_token='\[PAD\]' is not a token of \S+tiny0\. Name a special token: '<\|endoftext\|>', '<\|pad\|>'\.$",
    ),
    "misspelt": ("<|endoftxt|>", r"is not a token of \S+tiny0\. Did you mean '<\|endoftext\|>'\? Name"),
    "empty": ("", r"pad_token='' is an empty text\. Give a value, or leave pad_token out"),
    "a piece of text": ("!", r"^pad_token='!' is a piece of ordinary text in \S+tiny0, but decoding leaves out the pad"),
}  # fmt: skip

# Of the adapter that training goes on from: it has rank 4 and adapts all layers.
OTHERWISE = {
    "rank": ({"lora_r": 8}, r"lora_r=8 describes a fresh adapter, but \S+ was saved with r=4\. Leave lora_r unset"),
    "top layers": ({"lora_top_layers": 1}, r"lora_top_layers=1 describes .* with layers_to_transform=None\. Leave"),
    "modules": (
        {"lora_target_modules": ["c_attn"]},
        r"lora_target_modules=.*'c_attn'.* with target_modules=\['c_attn', ",
    ),
    "embeddings": ({"lora_embeddings": True}, r"lora_embeddings=True describes .* Leave lora_embeddings unset"),
}


@pytest.mark.parametrize(("value", "message"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("stage", ["sft", "ppo", "evaluation"])
def test_models(stage, value, message, refuses, world):
    if value is None:
        refuses(stage, message, recipe="model_name_or_path: null\n")
        return
    refuses(stage, message, model_name_or_path=value)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "message"), MODELS_SEEN_IN_LOADING.values(), ids=MODELS_SEEN_IN_LOADING)
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_models_that_do_not_load(stage, spoil, message, refuses):
    refuses(stage, message, loads=True, model_name_or_path=spoiled(spoil, "tiny"))


@pytest.mark.parametrize(("options", "message"), OTHERWISE.values(), ids=OTHERWISE)
def test_options_of_another_adapter_than_the_one_given(options, message, refuses, world):
    refuses("ppo", message, loads=True, sft_adapter=world.sft, **options)


@pytest.mark.parametrize("stage", ["rloo", "grpo", "dpo"])
def test_options_of_another_adapter_in_the_baselines(stage, refuses, world):
    options, message = OTHERWISE["rank"]
    refuses(stage, message, loads=True, sft_adapter=world.sft, **options)


@pytest.mark.parametrize(("stage", "key", "value", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(stage, key, value, message, refuses):
    refuses(stage, message, **{key: value})


@pytest.mark.parametrize(("source", "spoil", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_adapters(source, spoil, message, refuses):
    refuses("ppo", message, **{f"{source}_adapter": spoiled(spoil, source)})


@pytest.mark.parametrize(
    ("source", "spoil", "message"), DAMAGED_SEEN_WITH_THE_MODEL.values(), ids=DAMAGED_SEEN_WITH_THE_MODEL
)
def test_damage_seen_with_the_model(source, spoil, message, refuses):
    refuses("ppo", message, loads=True, **{f"{source}_adapter": spoiled(spoil, source)})


@pytest.mark.parametrize(("spoil", "message"), SCALES.values(), ids=SCALES)
def test_scales_of_scores(spoil, message, refuses):
    refuses("ppo", message, loads=True, normalize_scores=True, reward_adapter=spoiled(spoil, "reward"))


@pytest.mark.parametrize("stage", ["reward", "ppo", "rloo", "dpo", "evaluation", "best_of_n"])
def test_adapters_of_another_base(stage, refuses, world):
    other, tokenizer = load_pretrained(ModelConfig(world.tiny))
    other.transformer.wte.weight.data.mul_(2)
    for part in (other, tokenizer):
        part.save_pretrained(world.folder / "other")
    message = r"was trained on another base, \S+tiny0 \(not quantised, fingerprint \w{12}\), than \S+other \(not"
    refuses(stage, message, loads=True, model_name_or_path=world.folder / "other")


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_model(options, message, refuses):
    refuses("sft", message, loads=True, **options)


# ------------------------------------------------------------------------------------ padding
STAGES = ["sft", "reward", "ppo", "rloo", "grpo", "dpo", "evaluation", "best_of_n"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_pad_token_that_is_not_there(stage, refuses):
    """Before the model is loaded, in each stage."""
    value, message = PAD_TOKENS["unknown"]
    refuses(stage, message, pad_token=value)


@pytest.mark.parametrize(("value", "message"), PAD_TOKENS.values(), ids=PAD_TOKENS)
def test_pad_tokens(value, message, refuses):
    refuses("ppo", message, recipe=f"pad_token: {value!r}\n")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_adapter_of_another_pad_token(stage, refuses):
    """Each stage that reads an adapter."""
    message = (
        r"\S+: the adapter was trained with '<\|pad\|>' as padding, but this run pads with '<\|endoftext\|>'\. .*Set "
    )
    message += r"--pad_token '<\|pad\|>' in every stage, or train the adapter anew\.$"
    refuses(stage, message, loads=True, pad_token="<|endoftext|>")


@pytest.mark.parametrize("key", ["reward_adapter", "sft_adapter"])
def test_the_adapter_of_another_pad_token_is_named(key, refuses):
    """The second adapter that evaluation reads, and the third."""
    name = "sft" if key == "sft_adapter" else "reward"
    spoil = change("backbone.json", pad_token_id=0)
    message = (
        rf"copy-of-{name}0: the adapter was trained with '<\|endoftext\|>' as padding, but this run pads with '<\|pad"
    )
    refuses("evaluation", message, loads=True, **{key: spoiled(spoil, name)})


@pytest.mark.parametrize("value", ["x", -1, 10**9, [0]])
def test_a_pad_token_that_no_tokenizer_has(value, refuses):
    spoil = change("backbone.json", pad_token_id=value)
    message = r"backbone\.json: 'pad_token_id' is .*, but must be a whole number of at least 0 or null"
    if value == 10**9:
        message = r"trained with 1000000000 as padding, but this run pads with '<\|pad\|>'"
    refuses("ppo", message, loads=True, sft_adapter=spoiled(spoil, "sft"))


# ------------------------------------------------------------------------------------ outputs
OUTPUTS = {
    "a file": ("sft", lambda world: world.write("file", "kept"), r"file is a file\. Name a folder"),
    "beneath a file": ("ppo", lambda world: world.write("file", "kept") + "/out", r"file/out': \S+file is a file"),
    "a report beneath a file": ("evaluation", lambda world: world.write("file", "") + "/out", r"file is a file"),
    "where nothing can be made": ("sft", "/proc/spine/out", r"nothing can be written in /proc \("),
    "the SFT adapter it starts from": (
        "ppo",
        lambda world: world.sft,
        r"the run reads this folder and would overwrite",
    ),
    "the reward adapter it reads": (
        "grpo",
        lambda world: world.reward,
        r"the run reads this folder and would overwrite",
    ),
    "the model": ("sft", lambda world: world.tiny, r"the run reads this folder and would overwrite"),
    "another model": (
        "dpo",
        lambda world: world.copy(world.tiny),
        r"holds a model, and an adapter must not be beside it",
    ),
    "a reward adapter": (
        "sft",
        lambda world: world.copy(world.reward),
        r"holds a reward or value adapter, and this run",
    ),
    "a policy": (
        "reward",
        lambda world: world.copy(world.sft),
        r"holds a policy adapter, and this run saves a reward",
    ),
}


@pytest.mark.parametrize(("stage", "value", "message"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(stage, value, message, refuses):
    refuses(stage, rf"^output_dir=.*{message}", output_dir=value)


@pytest.mark.parametrize("beneath", ["value", "checkpoint-4"])
def test_an_adapter_that_the_run_would_write_over_or_remove(beneath, refuses, world):
    shutil.copytree(world.reward if beneath == "value" else world.sft, world.folder / "out" / beneath)
    adapter = {"reward_adapter" if beneath == "value" else "sft_adapter": str(world.folder / "out" / beneath)}
    refuses(
        "ppo",
        rf"^output_dir=\S+out': the run reads \S+out/{beneath} beneath this folder, and would overwrite",
        **adapter,
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("stage", ["reward", "best_of_n"])
def test_a_disk_that_cannot_be_written(stage, number, refuses, monkeypatch):
    """Full, forbidden, read-only, over quota."""

    def fail(**given):
        raise OSError(number, "no")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    refuses(stage, r"^output_dir=\S+: nothing can be written in \S+out \(no\)\. Name another folder")


@pytest.mark.slow
def test_an_earlier_scale_is_not_that_of_a_new_reward_model(world):
    """Trained anew without an SFT policy, scores have no scale: normalize_scores must not find the old one."""
    world.run("reward", sft_adapter=world.sft, recipe="sft_completions: 4\nmax_completion_length: 4\n")
    assert (world.folder / "out" / "score_normalization.json").is_file()
    world.run("reward", sft_adapter="")
    assert not (world.folder / "out" / "score_normalization.json").exists()


def test_the_tokenizer_that_a_stage_leaves_beside_its_adapter_fits(world):
    tokenizer = AutoTokenizer.from_pretrained(world.tiny)
    folder = world.copy(world.sft, tokenizer.save_pretrained)
    backbone, _ = load_backbone(ModelConfig(world.tiny), folder)
    assert set(backbone.peft_config) == {"default"}
