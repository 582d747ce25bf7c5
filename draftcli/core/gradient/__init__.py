"""Which sampler steps carry gradient: one file a mode."""
