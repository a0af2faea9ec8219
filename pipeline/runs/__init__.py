"""What every run has: arguments, launch, checkpoints, output folders."""
