"""Train networks: loop, trainer, callbacks, penalties."""
