"""Comparing fine-tuned models with their base: metrics of images, comparisons, the report."""
