"""Bytes on disk: files, checkpoints, and the networks in them."""
