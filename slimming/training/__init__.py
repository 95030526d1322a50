"""Train networks: loop, trainer, callbacks, penalties.

- `trainer.Trainer`, `settings.TrainSettings`: a run that can be resumed, and its settings
- `loop.train`, `loop.test`, `loop.Score`: one epoch, and evaluation
- `callbacks.Callback`, `callbacks.CheckpointWriter`, `callbacks.EarlyStopping`,
  `callbacks.EpochPrinter`: the protocol of callbacks, and the common ones
- `penalties.L1Penalty`, `penalties.GradientMask`: sparse γ, and pruned weights that stay zero
- `optimizer.make_optimizer`, `optimizer.learning_rate`: SGD and its schedule
- `run_folder.RunFolder`: the files of a run
"""
