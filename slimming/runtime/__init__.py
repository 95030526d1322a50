"""The machine: device, precision, processes, memory, and workarounds for libraries."""
