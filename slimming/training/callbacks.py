"""Callbacks of training: the protocol, with optional methods only, and those of every run."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from slimming.data.loading import Data
from slimming.training.settings import TrainSettings

Batch = tuple[torch.Tensor, torch.Tensor]  # images (N, 3, H, W), labels (N,)


class Callback(Protocol):
    """The protocol of a callback: any object with some of these methods.

    >>> class Clip:
    ...     "Keep gradients small."
    ...     def __init__(self, trainer, limit):
    ...         self.trainer, self.limit = trainer, limit
    ...     def on_gradients(self, batch):
    ...         torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), self.limit)

    The network and its parameters may be replaced during training: find them in the trainer in
    each call, or implement `on_replace`. ``name`` is the key of its state in a checkpoint; a
    callback without state needs none.
    """

    name: str

    def before_epoch(self, epoch: int) -> None:
        """Called before epoch ``epoch``, from 0. It may replace the network of the trainer."""

    def on_replace(self, model: nn.Module) -> None:
        """Called when the trainer continues with another network, ``model``."""

    def on_gradients(self, batch: Batch) -> None:
        """Called between backward and step, when gradients are final: unscaled under mixed
        precision, and averaged over processes."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of ``optimizer``."""

    def after_epoch(self, epoch: int) -> None:
        """Called after the evaluation of an epoch; the trainer's history has its record."""

    def close(self) -> None:
        """Called after the last epoch, or after an error."""

    def state_dict(self) -> dict[str, Any]:
        """The state for ``--resume``: tensors, numbers, strings, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""


class Run(Protocol):
    """The part of `slimming.training.trainer.Trainer` that callbacks use."""

    settings: TrainSettings
    test_loader: Data
    history: list[dict[str, Any]]
    seconds: float
    stopped: bool

    def save(self, last: Path, best: Path) -> None:
        """Write the checkpoints of an epoch."""


class EarlyStopping:
    """Stop training when top-1 has not improved for ``patience`` epochs; 0 disables it."""

    def __init__(self, trainer: Run, patience: int):
        self.trainer, self.patience = trainer, patience

    def before_epoch(self, epoch: int) -> None:
        scores = [record["test_prec1"] for record in self.trainer.history]
        if not self.patience or len(scores) <= self.patience:
            return
        if max(scores[-self.patience :]) <= max(scores[: -self.patience]):
            self.trainer.stopped = True
            reason = f"top-1 has not improved for {self.patience} epochs"
            print(f"{reason}: training stops after {epoch}")


class CheckpointWriter:
    """Save the last and the best checkpoint after each epoch, in the first process."""

    def __init__(self, trainer: Run, last: Path, best: Path):
        self.trainer, self.last, self.best = trainer, last, best

    def after_epoch(self, epoch: int) -> None:
        self.trainer.save(self.last, self.best)


class EpochPrinter:
    """Print the scores of an epoch, and the estimated time left."""

    def __init__(self, trainer: Run):
        self.trainer = trainer

    def after_epoch(self, epoch: int) -> None:
        trainer, record = self.trainer, self.trainer.history[-1]
        images, done, epochs = trainer.test_loader.num_images, epoch + 1, trainer.settings.epochs
        loss, prec1, seconds = record["test_loss"], record["test_prec1"], trainer.seconds
        print(
            f"Test set: Average loss: {loss:.4f}, Accuracy: {round(prec1 * images)}/"
            f"{images} ({prec1:.2%})   epoch {done}/{epochs}, lr {record['lr']:g}, "
            f"{seconds:.1f} s, {_duration(seconds * (epochs - done))} left",
            flush=True,
        )


def _duration(seconds: float) -> str:
    """Hours and minutes; below 100 s, seconds."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes // 60}:{minutes % 60:02d} h"
