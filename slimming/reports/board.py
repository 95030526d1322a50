"""TensorBoard."""

from pathlib import Path

from torch import nn

from slimming.pruning.scaling import batch_norms
from slimming.runtime import optional


class TensorBoard:
    """Scalars and a histogram of every BN's γ after each epoch; silent where ``enabled`` is false.

    Epochs from ``start`` on that an earlier, killed run wrote are hidden.
    """

    def __init__(self, folder: Path, start: int, enabled: bool):
        self.writer = None
        if enabled:
            library = optional.load("tensorboard", "torch.utils.tensorboard")
            self.writer = library and library.SummaryWriter(str(folder), purge_step=start or None)

    def add(self, epoch: int, record: dict, model: nn.Module) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        for name, bn in batch_norms(model).items():
            self.writer.add_histogram(f"gamma/{name}", bn.weight.detach().float().cpu(), epoch)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
