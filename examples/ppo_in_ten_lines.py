"""Run PPO from Python, without a recipe: a backbone, a reward, prompts, options, a trainer.

    python examples/ppo_in_ten_lines.py

It takes about a minute on 2 CPU cores. Every update is a line with the mean score: completions become shorter.
"""

from datasets import Dataset
from trl import ModelConfig

from pipeline.backbone.roles import load_backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.trainer import PPOTrainer


def brief(completion_ids: list[list[int]], **columns) -> list[float]:
    return [1 - len(tokens) / 16 for tokens in completion_ids]


backbone, tokenizer = load_backbone(ModelConfig("data/backbone", lora_target_modules="all-linear"), policy=None)
prompts = Dataset.from_dict({"prompt": ["The film", "A", "It's a", "This is", "Not", "One of the", "An", "For"] * 8})
sizes = {"per_device_train_batch_size": 32, "max_completion_length": 16, "max_steps": 60, "logging_steps": 4}
args = PPOConfig("runs/ten_lines", learning_rate=1e-3, bf16=False, use_cpu=True, save_strategy="no", **sizes)
trainer = PPOTrainer(backbone, [brief], args, prompts, tokenizer)
trainer.train()
trainer.save_model()
