"""The name of a dataset -> batches on the device."""
