"""The machine and its quirks.

- `device`: device, precision, memory layout, random numbers, threads, workarounds for libraries
- `distributed`: processes started by torchrun
- `optional`: libraries that may be missing
"""
