"""PPO: its maths, its trainer, and what is looked at before and during training."""
