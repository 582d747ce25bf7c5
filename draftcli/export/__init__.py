"""LoRA merging and file formats: what was trained, as other programs open it, checked before it is handed over."""
