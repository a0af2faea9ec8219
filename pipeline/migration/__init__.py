"""Recipes from the configs of other projects: one module for each project that `pipeline.migrate` reads."""
