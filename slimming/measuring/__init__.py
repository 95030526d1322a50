"""Measure the size and speed of networks.

- `figures.measure`, `figures.Figures`: all figures of a network
- `figures.count_parameters`, `figures.count_flops`, `figures.latencies`: one figure at a time
- `latency.seconds`, `latency.fastest`: layers by their shapes; the multiples that are fastest
"""
