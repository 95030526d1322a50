"""Datasets by name, as batches on the device.

- `loading.batches`, `loading.batches_for`, `loading.samples`, `loading.on_device`,
  `loading.check_classes`: a dataset by name or that of a network, samples of it, any loader, and
  whether the classes fit
- `settings.DataSettings`, `settings.dataset_field`: which dataset, and how it is loaded
- `batches.Batches`, `batches.DeviceLoader`: batches from memory, or from any other loader
- `stream.Stream`: batches of an image folder that does not fit into memory
- `datasets.load`, `datasets.KINDS`: small images, decoded once
- `image_folder.scan_folder`, `image_folder.read_folder`, `image_folder.read_image`: image folders
- `pixels.Split`, `pixels.normalize`: images as uint8, and their normalisation
- `order.rank_slices`, `order.loss_weight`, `order.balanced`: the share of each process, and images
  drawn by class
"""
