"""Callbacks of training: one protocol, with optional methods only."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.choosing.threshold import near_zero
from slimming.data.image_folder import Stream
from slimming.data.loading import Data
from slimming.errors import UserError
from slimming.runtime import distributed
from slimming.runtime.device import DROPOUT, LAYOUT, STREAMS, Precision, compiled, epoch_generator
from slimming.storage import checkpoint
from slimming.storage.architecture import Architecture, contents_of
from slimming.storage.checkpoint import Contents
from slimming.training import loop
from slimming.training.loop import Score
from slimming.training.settings import TrainSettings


def call(callbacks: Iterable[Any], method: str, *args: Any) -> None:
    """Call ``method`` of each callback that has it."""
    for callback in callbacks:
        if hasattr(callback, method):
            getattr(callback, method)(*args)


def make_optimizer(
    model: nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD over all parameters that need a gradient, scaling factors included, as in the paper."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    fused = trainable[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(trainable, lr, momentum, weight_decay=weight_decay, fused=fused)
    if momentum:  # zeros, because the fused kernel does not define a first step that overflows
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def load_momentum(optimizer: torch.optim.Optimizer, saved: dict | None) -> bool:
    """Load the momentum of a saved optimizer, but not its settings, which come from the flags.

    Returns False, with nothing changed, if it does not fit the parameters.
    """
    if saved is None:
        return False
    parameters = optimizer.param_groups[0]["params"]
    try:
        # sorted; in files of the original suite the indices have gaps, because it counts masks too
        stored = [saved["state"][i]["momentum_buffer"] for i in sorted(saved["state"])]
        fits = [s.shape == p.shape for s, p in zip(stored, parameters, strict=True)]
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    if all(fits):
        for parameter, buffer in zip(parameters, stored, strict=True):
            own = torch.empty_like(parameter).copy_(buffer)  # in the layout of the parameter
            optimizer.state[parameter]["momentum_buffer"] = own
    return all(fits)


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """``lr`` divided by 10 at int(epochs / 2) and again at int(3 epochs / 4)."""
    milestones = (int(epochs * 0.5), int(epochs * 0.75))
    return lr * 0.1 ** sum(epoch >= max(1, milestone) for milestone in milestones)


RECORD = ("epoch", "lr", "train_loss", "train_prec1", "test_loss", "test_prec1", "gamma_near_zero")


class Trainer:
    """Train ``model`` with ``settings``, and evaluate it after each epoch.

    ``optimizer`` makes the optimizer of a network, ``schedule`` returns the learning rate of an
    epoch, by default those of the paper; ``temperature`` is that of the training loss; ``kept`` are
    the settings to save in checkpoints.
    The ``callbacks`` (see `slimming.training.callbacks`) may `replace` the network. ``history`` has
    a record (RECORD) of each epoch, ``full_score`` the score of the network before it was pruned,
    if it was. ``holds_zeros``: a callback keeps the zeros of convolutions at zero, and checkpoints
    say so; ``streams``: the version of its random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        train_loader: Data,
        test_loader: Data,
        settings: TrainSettings,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        schedule: Callable[[int], float] | None = None,
        *,
        temperature: float = 1.0,
        kept: dict[str, Any] | None = None,
    ):
        self.settings, self.temperature, self.kept = settings, temperature, kept or {}
        self.train_loader, self.test_loader = train_loader, test_loader
        self.device = test_loader.device
        self.precision = Precision(self.device, settings.amp)
        self.schedule = schedule or functools.partial(
            learning_rate, epochs=settings.epochs, lr=settings.lr
        )
        self.make_optimizer = optimizer or functools.partial(
            make_optimizer,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.callbacks: list[Any] = []
        self.history: list[dict[str, Any]] = []
        self.full_score: Score | None = None
        self.holds_zeros, self.streams = False, STREAMS
        self.epoch, self.seconds, self.stopped = settings.start_epoch or 0, 0.0, False
        self.resumed: Mapping[str, Any] = {}  # the checkpoint that is resumed
        self.replace(model, architecture)

    def replace(self, model: nn.Module, architecture: Architecture) -> None:
        """Train ``model`` from now on, with a new optimizer and a new best accuracy. Callbacks are
        told (``on_replace``)."""
        settings = self.settings
        self.architecture, self.best_prec1, self.best_is_older = architecture, 0.0, True
        self.model = model.to(self.device).to(memory_format=LAYOUT)
        self.trained = distributed.wrap(self.model)
        if settings.compile:
            self.trained = compiled(self.trained, self.device)
        self.optimizer = self.make_optimizer(self.model)
        call(self.callbacks, "on_replace", self.model)

    def add(self, *callbacks: Any) -> None:
        """Add ``callbacks``. Those with a state get that of the resumed run; prints a note if it
        has none for one of them."""
        for callback in callbacks:
            name = getattr(callback, "name", None)
            if name and self.resumed and hasattr(callback, "load_state_dict"):
                if name in self.resumed:
                    callback.load_state_dict(self.resumed[name])
                else:
                    print(f"note: the resumed run has no state of {name!r}, which starts anew")
            self.callbacks.append(callback)

    def fit(self) -> None:
        """Train to the last epoch. Raises Diverged if a loss is not finite."""
        with self.running():
            for epoch in self.epochs():
                trained = loop.train(
                    self.trained,
                    self.train_loader,
                    self.optimizer,
                    epoch,
                    self.callbacks,
                    self.precision,
                    self.settings.log_interval,
                    self.temperature,
                )
                tested = loop.test(self.model, self.test_loader, self.precision)
                self.end_epoch(epoch, trained, tested)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around `epochs`: workers of the loaders live on, callbacks are closed."""
        try:
            with self.train_loader.keeping_workers(), self.test_loader.keeping_workers():
                yield
        finally:
            call(self.callbacks, "close")

    def epochs(self) -> Iterator[int]:
        """The epochs that are left. Each starts with ``before_epoch`` of the callbacks, with its
        learning rate, and with its own random numbers, so that a resumed run repeats it."""
        for epoch in range(self.epoch, self.settings.epochs):
            self.started = time.perf_counter()
            call(self.callbacks, "before_epoch", epoch)
            if self.stopped:
                return
            numbers = self.settings.seed, epoch, distributed.rank()
            generator = epoch_generator(*numbers, purpose=DROPOUT, version=self.streams)
            torch.manual_seed(generator.initial_seed())
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule(epoch)
            yield epoch

    def end_epoch(self, epoch: int, trained: Score, tested: Score) -> None:
        """Record the scores of an epoch, then ``after_epoch`` of the callbacks, which save and
        print. Raises Diverged if the loss on test data is not finite."""
        loop.check_finite(tested, epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        values = (epoch, lr, *trained, *tested, near_zero(self.model))
        self.history.append(dict(zip(RECORD, values, strict=True)))
        self.seconds = time.perf_counter() - self.started
        call(self.callbacks, "after_epoch", epoch)

    def save(self, last: Path, best: Path) -> None:
        """Write the checkpoint of the last epoch, and also as the best one if it is."""
        prec1 = self.history[-1]["test_prec1"]
        is_best = prec1 > self.best_prec1 or self.best_is_older or not best.exists()
        self.best_is_older, self.best_prec1 = False, max(self.best_prec1, prec1)
        if distributed.rank():
            return
        contents = self.to_contents()
        if is_best:  # first: if the run is killed in between, it repeats and saves the epoch
            checkpoint.write(best, {**contents, "optimizer": None})
        states = {c.name: c.state_dict() for c in self.callbacks if hasattr(c, "state_dict")}
        checkpoint.write(last, {**contents, **states})

    def to_contents(self) -> Contents:
        """The contents of a checkpoint of the run. `from_contents` reads them."""
        return contents_of(
            self.model,
            self.architecture,
            self.history[-1]["epoch"] + 1,
            self.best_prec1,
            self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            history=self.history,
            classes=self.test_loader.classes,
            before_pruning=self.full_score and self.full_score._asdict(),
            settings=self.kept,
            holds_zeros=self.holds_zeros,
            streams=self.streams,
        )

    def from_contents(self, path: str, contents: Contents) -> None:
        """Resume the run of the checkpoint at ``path``, whose weights are already in the network.
        UserError if its state is damaged or missing."""
        if not contents.get("epoch") and not contents.get("optimizer"):
            raise UserError(f"{path} has only weights, no run to resume: train them with `refine`")
        try:
            self.epoch, self.best_prec1 = int(contents["epoch"]), float(contents["best_prec1"])
            self.best_is_older, self.resumed = False, contents
            self.streams = int(contents.get("streams", 1))
            if self.epoch < 0 or not 1 <= self.streams <= STREAMS:
                raise ValueError(self.epoch, self.streams)
            if isinstance(self.train_loader, Stream):
                self.train_loader.dataset.streams = self.streams
            if self.settings.start_epoch is not None:
                self.epoch = self.settings.start_epoch
            for saved in contents.get("history", ()):
                record = {name: float(saved[name]) for name in RECORD}
                if record["epoch"] < self.epoch:
                    self.history.append({**record, "epoch": int(record["epoch"])})
            if contents.get("scaler"):
                self.precision.scaler.load_state_dict(contents["scaler"])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be resumed, because the state of its run is damaged or missing: "
                "use `refine` to start from its weights"
            ) from error
        if not load_momentum(self.optimizer, contents.get("optimizer")):
            print(f"note: {path} has no momentum that fits: training continues without it")
