"""LoRA: adapters on the network, and the files that people have."""
