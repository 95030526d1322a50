"""Measure the size and speed of networks.

- `figures.measure`, `figures.Figures`, `figures.latency_by_batch`: all figures of a network
- `profiling.count_parameters`, `profiling.count_flops`, `profiling.count_all`,
  `profiling.latencies`: one figure at a time
- `layer_times.seconds`, `layer_times.calls`: layers, by their shapes
- `rounding.fastest`: the multiples of channels with which layers are fastest
- `deploy.deploy`, `forms.FORMS`: the deployment form, for inference only, and other forms
- `export`: files that other programs run
"""
