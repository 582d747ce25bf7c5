"""Prompts x seeds x {base, tuned, annealed} -> pictures, files and sheets."""
