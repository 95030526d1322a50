"""Train networks.

- `loop.train`, `loop.test`: one epoch, and evaluation
- `trainer.Trainer`: a run that can be resumed, with SGD and its schedule
- `penalties.L1Penalty`, `penalties.GradientMask`: sparse γ, and pruned weights that stay zero
- `callbacks.Callback`: the protocol of callbacks, and the common ones
- `settings.TrainSettings`, `settings.RunFolder`: the settings, and the files of a run
"""
