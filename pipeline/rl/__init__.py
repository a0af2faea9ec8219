"""PPO: its maths, its trainer, and its checks before and during training."""
