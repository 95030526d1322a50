"""The machine and its quirks: device, precision, processes, memory, strides."""
