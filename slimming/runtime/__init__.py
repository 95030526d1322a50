"""The machine: device, precision, processes, memory, and workarounds for libraries.

- `device.choose_device`, `device.compiled`, `device.LAYOUT`: the device, torch.compile on it, and
  the memory layout of images
- `distributed.start`, `distributed.stop`, `distributed.wrap`, `distributed.all_reduce_sum`, ...:
  processes started by torchrun
- `memory.keep_freed_memory`: reuse what a training step frees
- `optional.load`, `optional.need`, `optional.bar`: libraries that may be missing
- `precision.Precision`, `precision.full_fp32`: fp32, bf16 or fp16; fp32 without TF32
- `randomness.seed_everything`, `randomness.epoch_generator`: random numbers as functions of a seed
- `strides.unit_strides`: a workaround for strided 1x1 convolutions in oneDNN
- `threads.use`, `threads.print_load_note`: CPU threads, and the load of the machine
"""
