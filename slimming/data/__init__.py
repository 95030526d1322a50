"""Datasets by name, as batches on the device."""
