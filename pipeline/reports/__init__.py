"""Measure trained policies, and draw and write the results."""
