"""PPO by TRL 1.12.0, the last release with a PPOTrainer: started by `ppo_update.py` in a virtual environment of its own.

As its users have it: four models. With `lora`, the policy is an adapter and the reference is the policy without it; the
reward model and the value model are whole models still.
"""

import os

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from tests.benchmarks.work import Clock, Turns, arguments, state_bytes


def main() -> None:
    work, options, out = arguments()
    torch.manual_seed(0)
    if options["dtype"] == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its Accelerator does not read args.bf16
    # Trained weights stay in float32 under autocast; what is frozen can be in bfloat16.
    frozen = torch.bfloat16 if options["dtype"] == "bf16" else torch.float32
    device = options["device"]
    config = work.config(options["dtype"], device)
    lora = options["row"] == "trl_lora"
    policy = AutoModelForCausalLM.from_config(config).to(frozen if lora else torch.float32)
    value, reward = (
        AutoModelForSequenceClassification.from_config(work.config(options["dtype"], device, num_labels=1))
        for _ in range(2)
    )
    reference = None
    if not lora:
        reference = AutoModelForCausalLM.from_config(config)
        reference.load_state_dict(policy.state_dict())
        reference.to(frozen)
    micro = options["microbatch"]
    args = PPOConfig(
        output_dir=options["folder"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=work.batch // micro,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        total_episodes=10_000 * work.batch,
        response_length=work.completion,
        local_rollout_forward_batch_size=work.batch,
        temperature=1.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        learning_rate=1e-6,
        bf16=options["dtype"] == "bf16",
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    turns = Turns(work, clock, 1, out)
    trainer = PPOTrainer(
        args=args,
        processing_class=work.tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward.requires_grad_(False).to(frozen),
        value_model=value,
        train_dataset=work.prompts().remove_columns("prompt"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **work.lora(None)) if lora else None,
        callbacks=[turns],
    )
    turns.state_bytes = lambda: state_bytes(trainer.model, trainer.optimizer)

    generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(model, queries, *args):
        with clock.generating():
            sequences, logits = generate(model, queries, *args)
        turns.completion_tokens += sequences[:, queries.shape[1] :].numel()
        return sequences, logits

    def timed_accumulate(*models):
        clock.training_begins()
        return accumulate(*models)

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = timed_generation, timed_accumulate
    trainer.train()


if __name__ == "__main__":
    main()
