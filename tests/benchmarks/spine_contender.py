"""PPO by Spine: one backbone, four roles; started by `ppo_update.py`.

The policy is a fresh adapter, so the reference is the backbone without it, as in TRL's row with LoRA. The reward is
learned: an adapter and a head, on the same layers, from which the value starts. In the row `spine_joint` the value is a
head on the policy's layers, as in the joint Hydra of Santacroce et al. 2023 (arXiv 2309.00754).
"""

import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from pipeline.backbone.adapters import Adapter
from pipeline.backbone.loading import fuse_gelu
from pipeline.backbone.roles import Backbone
from pipeline.rl.config import PPOConfig
from pipeline.rl.trainer import PPOTrainer
from reward_models.learned import LearnedReward
from tests.benchmarks.work import Clock, Turns, Work, arguments, state_bytes


def reward_adapter(work: Work, backbone: Backbone, top: int | None) -> Adapter:
    """A reward adapter with random weights, as if it had been read from a folder."""
    shapes = get_peft_model_state_dict(backbone)  # of the policy's, on the same layers
    weights = {name: torch.randn_like(tensor) * 0.02 for name, tensor in shapes.items()}
    config = LoraConfig(task_type="SEQ_CLS", **work.lora(top))
    return Adapter("reward", config, weights, torch.randn(1, work.hidden) * 0.02)


def make_trainer(work: Work, options: dict, **kwargs) -> PPOTrainer:
    torch.manual_seed(0)
    bf16, top, device = options["dtype"] == "bf16", options["top"], options.get("device", "cpu")
    base = AutoModelForCausalLM.from_config(work.config(options["dtype"], device))
    base = base.to(torch.bfloat16 if bf16 else torch.float32)
    base = fuse_gelu(base).requires_grad_(False)  # as `load_pretrained` does
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", **work.lora(top)))
    backbone.add_role("reward", reward_adapter(work, backbone, top))
    tokenizer, micro = work.tokenizer(), options["microbatch"]
    args = PPOConfig(
        output_dir=options["folder"],
        per_device_train_batch_size=micro,
        steps_per_generation=work.batch // micro,
        gradient_accumulation_steps=work.batch // micro // work.minibatches,
        num_iterations=work.epochs,
        critic="head" if options["row"] == "spine_joint" else "adapter",
        max_completion_length=work.completion,
        generation_kwargs={"min_new_tokens": work.completion},
        max_steps=10_000 * work.epochs * work.minibatches,
        learning_rate=1e-6,
        bf16=bf16,
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return PPOTrainer(
        backbone=backbone,
        reward_funcs=[LearnedReward(backbone, tokenizer)],
        args=args,
        train_dataset=work.prompts().select_columns("prompt"),
        processing_class=tokenizer,
        **kwargs,
    )


def main() -> None:
    work, options, out = arguments()
    clock = Clock()
    turns = Turns(work, clock, work.epochs * work.minibatches, out)
    trainer = make_trainer(work, options, callbacks=[turns])
    turns.state_bytes = lambda: state_bytes(trainer.model, trainer.optimizer)

    generate, roll_out = trainer._generate, trainer._generate_and_score_completions

    def timed_generation(prompts):
        with clock.generating():
            generated = generate(prompts)
        turns.completion_tokens += sum(len(row) for row in generated[1])
        return generated

    def timed_rollout(inputs):
        rollout = roll_out(inputs)
        clock.training_begins()
        return rollout

    trainer._generate, trainer._generate_and_score_completions = timed_generation, timed_rollout
    trainer.train()


if __name__ == "__main__":
    main()
