"""Bytes on disk.

- `files`: whole or not at all; one run at a time in a folder
- `checkpoint.Contents`, `checkpoint.read`, `checkpoint.write`: checkpoints; reading runs no code
- `architecture.Architecture`, `architecture.Request`, `architecture.load`: the network that a
  checkpoint describes, and what a command asks of it
- `preprocessing.Preprocessing`: how pictures become the input of a network
"""
