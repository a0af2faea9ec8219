"""Small models for the tests: a two-layer GPT-2 with the embedded tokenizer, and adapters on it."""

import gc
import os


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: E402
from trl import ModelConfig  # noqa: E402

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.identity import fingerprint, write_identity
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.rewards import learned_rewards
from pipeline.backbone.roles import Backbone  # noqa: E402
from pipeline.rl.config import PPOConfig
from pipeline.rl.trainer import PPOTrainer  # noqa: E402
from reward_models.functions import RewardArguments
from reward_models.normalization import Normalization  # noqa: E402


ROOT = Path(__file__).parents[1]
PROMPTS = ["The film", "A", "It's a", "One of the best", "This is", "An", "For all its", "Not"]


def pytest_collection_modifyitems(config, items):
    """Shared out over processes, files with many slow tests come first, so that none is left for the end."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish(session):
    """Garbage is looked for only among what the tests make: accelerate looks before each training, and that took a quarter of
    the time of a test that trains."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Folder of a random two-layer GPT-2 with the embedded tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "backbone")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    # A wide initialisation, so that predictions differ from token to token as a trained model's do.
    GPT2LMHeadModel(GPT2Config(**shape, **special, initializer_range=0.2)).save_pretrained(folder)
    return folder


def make_adapter(base_folder: str, folder: Path, *, head: bool, seed: int) -> str:
    """A LoRA adapter with random weights, and a score head if `head`, saved as a stage saves it."""
    base, _ = load_pretrained(ModelConfig(base_folder), head=head)
    identity = fingerprint(base)
    config = LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        r=4,
        target_modules=["c_attn", "c_proj", "c_fc"],
        modules_to_save=["score"] if head else None,
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    write_identity(folder, base.config, identity)
    return str(folder)


@pytest.fixture(scope="session")
def sft_adapter(tiny, tmp_path_factory) -> str:
    return make_adapter(tiny, tmp_path_factory.mktemp("sft"), head=False, seed=1)


@pytest.fixture(scope="session")
def reward_adapter(tiny, tmp_path_factory) -> str:
    folder = make_adapter(tiny, tmp_path_factory.mktemp("reward"), head=True, seed=2)
    Normalization(mean=0.5, std=2.0, completions=8).save(folder)
    return folder


@pytest.fixture(scope="session")
def other_reward_adapter(tiny, tmp_path_factory) -> str:
    return make_adapter(tiny, tmp_path_factory.mktemp("other_reward"), head=True, seed=3)


def make_likely(backbone: Backbone, *tokens: int) -> None:
    """From here on, each of these tokens comes about a third as often as all others together."""

    def hook(module, inputs, logits):
        likely = torch.isin(torch.arange(logits.shape[-1]), torch.tensor(tokens))
        return torch.where(likely, logits.logsumexp(dim=-1, keepdim=True) - 1.1, logits)  # e^-1.1 = 1/3

    backbone.get_base_model().lm_head.register_forward_hook(hook)


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def backbone(tiny, sft_adapter, reward_adapter) -> Backbone:
    """Policy, reward and value on one tiny GPT-2, dropout off."""
    base, _ = load_pretrained(ModelConfig(tiny))
    backbone = Backbone(base, read_adapter(sft_adapter, base=base))
    backbone.add_role("reward", read_adapter(reward_adapter, needs_head=True, base=base))
    backbone.add_value()
    backbone.train_only("policy", "value")
    return backbone.eval()


@pytest.fixture
def make_trainer(tiny, sft_adapter, reward_adapter, tokenizer, tmp_path):
    """Makes a PPO trainer on a tiny GPT-2, of two updates of two epochs of two minibatches, each in two pieces."""

    def make(
        reward_funcs=None,
        prompts=PROMPTS,
        *,
        held_out=None,
        texts=None,
        normalize_scores=False,
        policy=None,
        **options,
    ):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, policy or read_adapter(sft_adapter, base=base))
        rewards = RewardArguments(reward_adapter=[reward_adapter], normalize_scores=normalize_scores)
        learned = learned_rewards(rewards, backbone, tokenizer)
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "max_completion_length": 6,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return PPOTrainer(
            backbone=backbone,
            reward_funcs=reward_funcs or learned,
            args=PPOConfig(**{**settings, **options}),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            eval_dataset=Dataset.from_dict({"prompt": held_out}) if held_out else None,
            processing_class=tokenizer,
            texts=texts,
        )

    return make
