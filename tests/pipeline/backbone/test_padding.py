"""`pipeline.backbone.padding`: which token pads, that every stage and plain peft read scores at the same place, and that
nothing depends on what padding is made of."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from data.listing import LISTING
from data.prompts import tokenize_prompts
from pipeline import ppo, reward, sft
from pipeline.backbone import padding
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.identity import IDENTITY
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.lora import LoraArguments
from pipeline.backbone.padding import choose_pad_token
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone, load_backbone
from pipeline.backbone.sampling import sample
from pipeline.rl.config import PPOConfig
from pipeline.rl.measuring import measure
from pipeline.rl.trainer import PPOTrainer
from pipeline.runs.command_line import parse
from reward_models.functions import RewardArguments
from reward_models.learned import KNOWN_SCORES, LearnedReward, with_known_scores


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[3]
END, TEXT_END, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(special: list[str], *, template: str | None = None, opens: bool = False, **named):
    """A byte-level tokenizer of the 256 bytes and these special tokens, which come first. With `opens` it writes its bos
    token before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    if opens:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    return fast


def make_model(folder: Path, tokenizer, **config) -> str:
    """A random two-layer Llama in bfloat16, whose output head is not tied to its embeddings."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    options = {**shape, "max_position_embeddings": 128, "initializer_range": 0.2, **special, **config}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **options)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """Its tokens are named and used as SmolLM2-135M-Instruct's."""
    named = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": TEXT_END}
    tokenizer = make_tokenizer([TEXT_END, START, END, "<repo_name>"], template=CHATML, **named)
    return make_model(tmp_path_factory.mktemp("chat_model"), tokenizer)


# ------------------------------------------------------------------------------------------ which token pads
CHOICES = {
    # special tokens, what the tokenizer says of them, other tokens that end texts, the token that pads
    "its own": (["<e>", "[PAD]", "<pad>"], {"pad_token": "<pad>"}, [], "<pad>"),
    "a name with pad": (["<e>", TEXT_END, "<|reserved_0|>", "<|finetune_right_pad_id|>"], {}, [], "<|finetune_right_pad_id|>"),
    "the first of two": (["<e>", "<|vision_pad|>", "<|image_pad|>"], {}, [], "<|vision_pad|>"),
    "no such word in the name": (["<e>", "<|ipad|>", "<|unpadded|>"], {}, [], "<e>"),
    "the end of a document": (["<e>", "<|reserved_0|>", TEXT_END], {"pad_token": "<e>"}, [], TEXT_END),
    "an unknown token that is never written": (["<e>", TEXT_END], {"unk_token": TEXT_END}, [], TEXT_END),
    "a reserved one": (["<e>", "<a>", "<|reserved_special_token_5|>", "<unused0>"], {}, [], "<|reserved_special_token_5|>"),
    "names that say another use": (["<e>", "<repo_name>", "<|im_start|>"], {}, [], "<e>"),
    "the end of the text alone": (["<e>"], {"bos_token": "<e>"}, [], "<e>"),
    "one that ends turns, by the configs": (["<e>", TEXT_END, "<unused0>"], {}, [TEXT_END], "<unused0>"),
    "its own, which ends turns by the configs": (
        ["<e>", "<pad>", "<unused0>"],
        {"pad_token": "<pad>"},
        ["<pad>"],
        "<unused0>",
    ),
    "its own, and none is free": (["<e>", "<f>"], {"pad_token": "<f>"}, ["<f>"], "<f>"),
    "one that the template writes": (["<e>", TEXT_END, "<unused0>"], {"template": f"{TEXT_END}x"}, [], "<unused0>"),
    "one that opens texts": (["<|pad|>", "<e>", "<unused0>"], {"bos_token": "<|pad|>"}, [], "<unused0>"),
    "one that parts texts": (["<|pad|>", "<e>"], {"sep_token": "<|pad|>"}, [], "<e>"),
}  # fmt: skip


@pytest.mark.parametrize(("special", "says", "ends", "pads"), CHOICES.values(), ids=CHOICES)
def test_which_token_pads(special, says, ends, pads, capsys):
    tokenizer = make_tokenizer(special, eos_token="<e>", **says)
    own = tokenizer.pad_token
    padding._say.cache_clear()
    for _ in range(2):  # a stage that loads the model twice says it once
        tokenizer.pad_token = own
        choose_pad_token(tokenizer, {tokenizer.convert_tokens_to_ids(end) for end in ends})
        assert tokenizer.pad_token == pads
    said = capsys.readouterr().out
    assert said.count("\n") == (pads != own or pads in ("<e>", *ends))
    if pads in ("<e>", *ends):
        assert f"Padding is {pads!r}, which also ends texts" in said and "cannot see whether a completion has" in said
    elif pads != own:
        assert said.startswith(f"Padding is {pads!r}: the tokenizer") and said.endswith(
            "To use another token, set --pad_token.\n"
        )


def test_a_token_that_the_tokenizer_writes_does_not_pad():
    tokenizer = make_tokenizer(["<unused0>", "<e>", "<unused1>"], eos_token="<e>", bos_token="<unused0>", opens=True)
    tokenizer.bos_token = None  # what it writes counts, not what it is called
    assert tokenizer("a")["input_ids"][0] == 0
    choose_pad_token(tokenizer, set())
    assert tokenizer.pad_token == "<unused1>"


def test_an_added_token_that_is_not_special_does_not_pad():
    """Such as Qwen's <|fim_pad|>, which has a use."""
    tokenizer = make_tokenizer(["<e>", "<unused0>"], eos_token="<e>")
    tokenizer.add_tokens(["<|fim_pad|>"])
    choose_pad_token(tokenizer, set())
    assert tokenizer.pad_token == "<unused0>"


@pytest.mark.parametrize("head", [False, True])
def test_the_model_is_told(head, chat_model, tmp_path):
    """Model and classifier choose alike, by the generation config too, which a classifier is loaded without."""
    base, tokenizer = load_pretrained(ModelConfig(chat_model), head=head)
    assert tokenizer.pad_token == TEXT_END and base.config.pad_token_id == tokenizer.pad_token_id == 0
    assert base.get_input_embeddings().padding_idx == 0  # an adapter of the embeddings may learn the end of a turn
    assert head or base.generation_config.pad_token_id == 0
    folder = shutil.copytree(chat_model, tmp_path / "two_ends")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    base, tokenizer = load_pretrained(ModelConfig(str(folder)), head=head)
    assert tokenizer.pad_token == END and base.config.pad_token_id == 2
    base, tokenizer = load_pretrained(ModelConfig(str(folder)), head=head, pad_token="<repo_name>")
    assert tokenizer.pad_token == "<repo_name>" and base.config.pad_token_id == 3


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig, PPOConfig])
def test_one_spelling_for_all_stages(config, recwarn):
    """TRL warns of its option, since one is to set the tokenizer's pad token: our stages do."""
    args = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--pad_token", END]
    assert parse(config, args=args)[0].pad_token == END
    assert not [warning for warning in recwarn if "pad_token" in str(warning.message)]


def test_the_embedded_backbone_pads_as_ever(capsys):
    base, tokenizer = load_pretrained(ModelConfig(str(ROOT / "data" / "backbone")))
    assert tokenizer.pad_token == "<|pad|>" and base.config.pad_token_id == tokenizer.pad_token_id
    assert "Pads" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ where scores are read
CASES = [(kind, pad) for kind in ("text", "chat") for pad in (END, TEXT_END)]
PROMPTS = ["The film", "A", "For all its charm, it", "One of"]
GOOD, BAD = [" is good.", " fine film!", " moves.", " the best."], [" is bad.", " poor film.", " bores.", " many"]


def pairs(kind: str) -> list[dict]:
    rows = [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)]
    if kind == "text":
        return rows
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in rows]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(stage, types: tuple, folder: Path, model: str, rows: list[dict], **options) -> None:
    """Run a stage for a few steps in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "model_name_or_path": model,
        "dataset_name": write(folder.parent / f"{folder.name}.jsonl", rows),
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
        "save_strategy": "no",
        "max_steps": 3,
        "learning_rate": 0.02,
        **options,
    }
    flags = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    stage.main(*parse(*types, args=flags))


REWARD, SFT, PPO = reward.OPTIONS, sft.OPTIONS, ppo.OPTIONS


@pytest.fixture(scope="module")
def rewards(chat_model, tmp_path_factory) -> dict[tuple, dict]:
    """For each case a reward adapter of the reward stage, with its scores of the chosen texts as the stage itself reads
    them, the tokens of these, and the scores by the code of docs/ppo-details.md in an interpreter without ours."""
    found, root = {}, tmp_path_factory.mktemp("rewards")

    def keep(trainer) -> dict:
        rows = trainer.eval_dataset
        batch = trainer.data_collator([rows[i] for i in range(len(rows))])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found[case] = {"ids": rows["chosen_ids"][:], "stage": logits.squeeze(-1)[: len(rows)]}
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "held_out_margins", keep)
        for case in CASES:
            kind, pad = case
            folder = root / f"{kind}-{len(found)}"
            held_out = write(root / "held-out.jsonl", pairs(kind))
            options = {"max_length": 128, "pad_token": pad, "lora_top_layers": 1, "eval_dataset_name": held_out}
            train(reward, REWARD, folder, chat_model, pairs(kind), **options)
            found[case]["folder"] = str(folder)
    plain = json.loads(subprocess.check_output([sys.executable, "-c", plain_script(found)], cwd=root, text=True))
    for case, scores in zip(found, plain, strict=True):
        found[case]["plain"] = torch.tensor(scores)
    return found


def plain_script(found: dict[tuple, dict]) -> str:
    """The two pieces of code of docs/ppo-details.md, for each case with its folder, and with these texts or conversations."""
    text = (ROOT / "docs" / "ppo-details.md").read_text()
    first, second = (block.split("```")[0] for block in text.split("```python\n")[1:])
    script = "import json, sys\nfound = []\n"
    for (kind, _), case in found.items():
        load, _, use_texts = first.partition("texts = [")
        assert load.count('"runs/demo/reward"') == 1
        script += load.replace('"runs/demo/reward"', repr(case["folder"]))
        rows = pairs(kind)
        if kind == "text":
            texts = [row["prompt"] + row["chosen"] for row in rows]
            script += f"texts = {texts!r}\n{use_texts.split(chr(10), 1)[1]}"
        else:
            chats = [row["prompt"] + row["chosen"] for row in rows]
            script += f"chats = {chats!r}\n{second.split(chr(10), 1)[1]}"
    script = script.replace("print(", "found.append(")
    assert script.count("found.append(") == len(found)
    return script + "assert not {'pipeline', 'reward_models', 'trl'} & set(sys.modules)\nprint(json.dumps(found))"


@pytest.fixture
def roles(chat_model, rewards):
    """A trainer of PPO with a case's reward adapter, and its learned reward."""

    def roles(case, tmp_path):
        folder = rewards[case]["folder"]
        torch.manual_seed(1)
        backbone, tokenizer = load_backbone(
            ModelConfig(chat_model), None, lora=LoraArguments(lora_top_layers=1), pad_token=case[1]
        )
        learned = learned_rewards(RewardArguments(reward_adapter=[folder]), backbone, tokenizer)
        args = PPOConfig(
            str(tmp_path), per_device_train_batch_size=2, report_to="none", bf16=False, use_cpu=True
        )  # rows of two lengths share a pass
        prompts = [row["prompt"] for row in pairs(case[0])]
        data = Dataset.from_dict({"prompt": prompts})
        trainer = PPOTrainer(backbone, learned, args, data, processing_class=tokenizer)
        return trainer, learned[0], prompts, tokenize_prompts(prompts, tokenizer)

    return roles


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_read_the_same_score_at_the_same_place(case, rewards, roles, tmp_path):
    """Reward stage, PPO (prompts padded at the left, completions at the right, from the trunk), evaluation and best-of-n
    (padded at the right), and plain transformers, of the same texts."""
    trainer, learned, prompts, prompt_ids = roles(case, tmp_path)
    tokenizer, backbone, ids = trainer.processing_class, trainer.model.eval(), rewards[case]["ids"]
    assert all(row[: len(prompt)] == prompt for row, prompt in zip(ids, prompt_ids, strict=True))
    assert all(row.count(tokenizer.eos_token_id) == (1 if case[0] == "text" else 2) for row in ids)
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    completions = [row[len(prompt) :] for row, prompt in zip(ids, prompt_ids, strict=True)]
    assert len({len(row) for row in ids}) > 2 and len({len(row) for row in prompt_ids}) > 2  # so there is padding

    scores = {"reward": rewards[case]["stage"], "plain": rewards[case]["plain"]}
    scores["evaluation"] = torch.tensor(learned(prompts, completions))
    with torch.no_grad():
        rows = *trainer._pad(prompt_ids, side="left"), *trainer._pad(completions, side="right")
        assert trainer._roles_on_trunk == [learned.role]
        found = measure(backbone, *rows, temperature=1.0, batch_size=len(ids), reward_roles=[learned.role])
        known = [row[KNOWN_SCORES] for row in with_known_scores([{}] * len(ids), found.scores)]
        scores["ppo"] = torch.tensor(learned(prompts, completions, known_scores=known))
        hidden = [backbone.hidden_states("reward", torch.tensor([row]), torch.ones(1, len(row)))[0] for row in ids]
        place = -1 if case[1] == TEXT_END else -2  # the token that ends it, or the one before
        scores["by hand"] = torch.stack([backbone._read("reward", row[place]) for row in hidden])
    assert scores["by hand"].std() > 0.1
    for name, found in scores.items():
        torch.testing.assert_close(
            found, scores["by hand"], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_reward_model_sees_an_ending_unless_it_is_padding(case, rewards, roles, tmp_path):
    """Scores of completions with and without the token that ends them."""
    trainer, learned, prompts, prompt_ids = roles(case, tmp_path)
    completions = [row[len(prompt) :] for row, prompt in zip(rewards[case]["ids"], prompt_ids, strict=True)]
    whole = torch.tensor(learned(prompts, completions))
    cut = torch.tensor(learned(prompts, [row[:-1] for row in completions]))
    if case[1] == END:
        torch.testing.assert_close(whole, cut, atol=1e-5, rtol=0)
    else:
        assert (whole - cut).abs().min() > 1e-3


def test_nothing_depends_on_what_padding_is_made_of(chat_model, rewards, tmp_path):
    """With another embedding of the pad token, all that is sampled, scored and learned is the same to the bit."""
    case = ("chat", TEXT_END)
    prompts = [row["prompt"] for row in pairs("chat")] * 2

    def outcome(embedding: float | None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = ModelConfig(chat_model, lora_target_modules=["q_proj", "v_proj"])
        backbone, tokenizer = load_backbone(model, None, lora=LoraArguments())
        assert tokenizer.pad_token == TEXT_END
        adapter = read_adapter(rewards[case]["folder"], needs_head=True, base=backbone.get_base_model())
        if embedding is not None:
            backbone.get_base_model().get_input_embeddings().weight.data[tokenizer.pad_token_id] = embedding
        backbone.add_role("reward", adapter)
        backbone.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(4, 260, 8)]  # so that some end early
        settings = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 8}
        settings |= {"max_completion_length": 6, "learning_rate": 1e-2, "seed": 0, "save_strategy": "no"}
        trainer = PPOTrainer(
            backbone,
            [LearnedReward(backbone, tokenizer)],
            PPOConfig(str(tmp_path), **settings, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True),
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )
        torch.manual_seed(4)
        trainer.train()
        ends = trainer._rollout
        assert not ends.completion_mask.all() and not ends.prompt_mask.all()  # there is padding on both sides
        learned = [p.detach().clone() for p in backbone.role_parameters("policy", "value")]
        (batch,) = sample(
            backbone.eval(),
            "policy",
            tokenize_prompts(prompts, tokenizer),
            tokenizer,
            max_completion_length=6,
            temperature=1.0,
            batch_size=8,
            share_seed=(5,),
        )
        return [*learned, batch.completion_ids, backbone.scores(*batch[:2]), ends.returns, ends.advantages]

    expected = outcome(None)
    for embedding in (0.0, 7.0):
        for ours, theirs in zip(outcome(embedding), expected, strict=True):
            assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------ the same in all stages
def identity(folder: Path) -> dict:
    return json.loads((folder / IDENTITY).read_text())


@pytest.fixture
def spoiled(rewards, tmp_path):
    """A copy of the reward adapter that was trained with <|im_end|> as padding, without what `forget` names."""

    def spoiled(*forget: str) -> str:
        folder = Path(shutil.copytree(rewards["chat", END]["folder"], tmp_path / "adapter"))
        (folder / LISTING).unlink()  # earlier releases wrote none
        if "pad_token_id" in forget:
            record = identity(folder)
            del record["pad_token_id"]
            (folder / IDENTITY).write_text(json.dumps(record))
        if "identity" in forget:
            (folder / IDENTITY).unlink()
        if "tokenizer" in forget:
            for path in folder.glob("tokenizer*"):
                path.unlink()
        return str(folder)

    return spoiled


OLD = {
    "of today": (),
    "of before, with its tokenizer": ("pad_token_id",),
    "of before, without": ("pad_token_id", "tokenizer"),
    "made elsewhere, with its tokenizer": ("identity",),
}


@pytest.mark.parametrize("forget", OLD.values(), ids=OLD)
def test_a_reward_model_of_another_pad_token_is_refused(forget, spoiled, chat_model):
    folder = spoiled(*forget)
    base, tokenizer = load_pretrained(ModelConfig(chat_model))
    with pytest.raises(
        ValueError, match=r"was trained with '<\|im_end\|>' as padding, but this run pads with '<\|endof"
    ):
        read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer)
    base, tokenizer = load_pretrained(ModelConfig(chat_model), pad_token=END)  # the message's remedy
    assert read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer).head is not None


def test_the_tokenizer_beside_an_adapter_says_how_it_was_padded(spoiled, chat_model):
    """Trained by TRL alone, say, with a pad token that the base's tokenizer does not name."""
    folder = spoiled("identity")
    base, tokenizer = load_pretrained(ModelConfig(chat_model), pad_token="<repo_name>")
    tokenizer.save_pretrained(folder)
    assert read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer).head is not None
    base, tokenizer = load_pretrained(ModelConfig(chat_model), pad_token=END)
    with pytest.raises(
        ValueError, match=r"was trained with '<repo_name>' as padding, but this run pads with '<\|im_end"
    ):
        read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer)


def test_of_an_adapter_that_says_nothing_nothing_is_asked(spoiled, chat_model):
    base, tokenizer = load_pretrained(ModelConfig(chat_model))
    folder = spoiled("identity", "tokenizer")
    assert read_adapter(folder, needs_head=True, base=base, tokenizer=tokenizer).head is not None


def test_a_policy_of_before_is_taken_with_any_pad_token(chat_model, tmp_path):
    base, tokenizer = load_pretrained(ModelConfig(chat_model), pad_token=END)
    Backbone(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_role("policy", tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base, tokenizer = load_pretrained(ModelConfig(chat_model))
    with pytest.raises(ValueError, match=r"Set --pad_token '<\|im_end\|>' in every stage, or train the adapter anew"):
        read_adapter(str(tmp_path), needs_head=False, base=base, tokenizer=tokenizer)
    record = identity(tmp_path)
    del record["pad_token_id"]
    (tmp_path / IDENTITY).write_text(json.dumps(record))
    assert read_adapter(str(tmp_path), needs_head=False, base=base, tokenizer=tokenizer).head is None


@pytest.mark.slow
@pytest.mark.parametrize(("named", "pad"), [({}, TEXT_END), ({"pad_token": END}, END)], ids=["chosen", "named"])
def test_all_stages_store_the_pad_token(named, pad, chat_model, tmp_path, capsys):
    padding._say.cache_clear()
    prompts = [{"prompt": row["prompt"]} for row in pairs("chat")]
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in pairs("chat")]
    options = {"max_length": 128, **named}
    train(sft, SFT, tmp_path / "sft", chat_model, chats, **options)
    options |= {"sft_adapter": tmp_path / "sft", "sft_completions": 4, "max_completion_length": 4}
    train(reward, REWARD, tmp_path / "reward", chat_model, pairs("chat") * 8, eval_dataset_name="", **options)
    options = {**named, "sft_adapter": tmp_path / "sft", "reward_adapter": tmp_path / "reward"}
    options |= {"max_completion_length": 4, "per_device_train_batch_size": 4, "num_iterations": 1}
    train(ppo, PPO, tmp_path / "ppo", chat_model, prompts, **options, save_strategy="steps", save_steps=2)
    assert capsys.readouterr().out.count("Padding is") == (not named)
    for folder in ("sft", "reward", "ppo", "ppo/value", "ppo/checkpoint-2", "ppo/checkpoint-2/value"):
        assert identity(tmp_path / folder)["pad_token_id"] == (0 if pad == TEXT_END else 2)
    for folder in ("sft", "reward", "ppo", "ppo/checkpoint-2"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).pad_token == pad


def ones(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_is_not_resumed_with_another_pad_token(stage, chat_model, tmp_path):
    prompts = [{"prompt": row["prompt"]} for row in pairs("chat")]
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in pairs("chat")]
    rewards = {"reward_funcs": "tests.pipeline.backbone.test_padding.ones", "max_completion_length": 4}
    run = {
        "sft": (sft, SFT, tmp_path / "out", chat_model, chats),
        "ppo": (ppo, PPO, tmp_path / "out", chat_model, prompts),
    }[stage]
    options = {"max_length": 128} if stage == "sft" else {**rewards, "per_device_train_batch_size": 4}
    train(*run, **options, save_strategy="steps", save_steps=2)
    message = (
        r"checkpoint-2: written with '<\|endoftext\|>' as padding, and this run pads with '<\|im_end\|>'\. Set --pad"
    )
    with pytest.raises(ValueError, match=message):
        train(*run, **options, pad_token=END, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    train(*run, **options, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    assert identity(tmp_path / "out")["pad_token_id"] == 0
