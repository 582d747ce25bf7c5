"""How it runs here: device, precision, placement, folding, caches, processes."""
