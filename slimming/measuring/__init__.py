"""Measure the size and speed of networks.

- `figures.measure`, `figures.Figures`, `figures.latency_by_batch`: all figures of a network
- `profiling.count_parameters`, `profiling.count_flops`, `profiling.count_all`,
  `profiling.latencies`: one figure at a time
- `deploy.deploy`: the deployment form, for inference only
"""
