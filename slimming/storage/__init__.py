"""Files on disk: writing them atomically, checkpoints, and the networks in them."""
