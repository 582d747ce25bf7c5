"""The toy world: a small world whose truth is known, with a real but tiny SDXL and a learned reward to go with it."""
