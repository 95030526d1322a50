"""TensorBoard."""

from pathlib import Path

from slimming.channels.scaling import batch_norms
from slimming.runtime import optional
from slimming.training.trainer import Trainer


class TensorBoard:
    """A training callback: writes scalars and a histogram of every BN's γ after each epoch.

    Hides the events that an earlier, killed run wrote for the same epochs.
    """

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer = trainer
        library = optional.load("tensorboard", "torch.utils.tensorboard")
        start = trainer.epoch or None
        self.writer = library and library.SummaryWriter(str(folder), purge_step=start)

    def after_epoch(self, epoch: int) -> None:
        if self.writer is None:
            return
        for name, value in self.trainer.history[-1].items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        norms = batch_norms(self.trainer.model)
        for name, bn in {name: bn for name, bn in norms.items() if bn.affine}.items():
            self.writer.add_histogram(f"gamma/{name}", bn.weight.detach().float().cpu(), epoch)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
