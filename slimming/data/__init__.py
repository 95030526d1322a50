"""Datasets by name, as batches on the device.

- `loading.batches`, `loading.batches_for`, `loading.samples`: a dataset by name or that of a
  network, and samples of it
- `datasets.DataSettings`, `datasets.load`: which dataset, and how it is loaded
- `batches.Batches`: from memory; `image_folder.Stream`: from a folder that does not fit into it
"""
