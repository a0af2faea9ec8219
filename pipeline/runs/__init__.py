"""Modules that every run uses: arguments, launch, checkpoints, output folders."""
