"""Files on disk: writing them atomically, checkpoints, and the networks in them.

- `architecture.Architecture`, `architecture.load`, `architecture.rebuild`: the network that a
  checkpoint describes
- `architecture.contents_of`: the contents of a checkpoint to write
- `checkpoint.read`, `checkpoint.write`, `checkpoint.save_checkpoint`: checkpoints; reading runs no
  code
- `claim.claimed`: one run at a time in a folder
- `preprocessing.Preprocessing`: how pictures become the input of a network
- `files.write_bytes`, `files.find`, `files.no_empty_folders`: any file
"""
