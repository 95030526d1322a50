"""One epoch of training, and evaluation."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from slimming.data import loading
from slimming.data.batches import Batches, Loader, loss_weight
from slimming.errors import Diverged, UserError
from slimming.runtime import distributed, optional
from slimming.runtime.device import LAYOUT, Precision, unit_strides


class Score(NamedTuple):
    """Mean cross entropy and top-1 accuracy (a fraction, 0 to 1) over a pass through the data."""

    loss: float
    prec1: float


def train(
    model: nn.Module,
    loader: Batches | Iterable,
    optimizer: torch.optim.Optimizer,
    epoch: int = 0,
    callbacks: Iterable[Any] = (),
    precision: Precision | None = None,
    log_interval: int = 100,
    temperature: float = 1.0,
) -> Score:
    """Train one epoch on the (images, labels) of ``loader``: `Batches`, a DataLoader of torch, or
    any other iterable. ``callbacks`` with ``on_gradients(batch)`` edit the gradients between
    backward and step, those with ``after_step(optimizer)`` parameters after it
    (`slimming.training.callbacks`).

    They get final gradients: unscaled under mixed precision, and averaged over the processes if
    ``model`` comes from `distributed.wrap`. Raises Diverged if the loss is not finite, which is
    checked whenever a line is printed and at the end of the epoch. Minimises the cross entropy of
    logits / ``temperature``, and returns that of the logits. UserError if there are no batches.
    """
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    loader = loading.on_device(loader, device)
    loader.epoch = epoch
    model.train()
    meter = _Meter(device)
    with unit_strides(model), _progress(loader, epoch, log_interval) as show_progress:
        for step, (images, labels) in enumerate(loader, start=1):
            images = images.to(memory_format=LAYOUT)
            optimizer.zero_grad()
            with precision.autocast():
                logits = model(images)
                softened = logits if temperature == 1 else logits / temperature
                loss = F.cross_entropy(softened, labels)
            weight = loss_weight(loader, step - 1, len(labels))
            precision.scaler.scale(loss if weight == 1 else loss * weight).backward()
            precision.scaler.unscale_(optimizer)
            for callback in callbacks:
                if hasattr(callback, "on_gradients"):
                    callback.on_gradients((images, labels))
            precision.scaler.step(optimizer)
            precision.scaler.update()
            for callback in callbacks:
                if hasattr(callback, "after_step"):
                    callback.after_step(optimizer)
            plain = loss if temperature == 1 else F.cross_entropy(logits.detach(), labels)
            meter.add(plain, logits, labels)
            show_progress(step, meter)
    distributed.broadcast_buffers(model)  # BN statistics, which are those of each process
    return check_finite(meter.global_score(), epoch)


@torch.no_grad()
def test(model: nn.Module, loader: Batches | Iterable, precision: Precision | None = None) -> Score:
    """Loss and top-1 of the model in eval mode over ``loader``, see `train`."""
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    model.eval()
    meter = _Meter(device)
    for images, labels in loading.on_device(loader, device):
        with precision.autocast():
            logits = model(images.to(memory_format=LAYOUT))
            loss = F.cross_entropy(logits, labels)
        meter.add(loss, logits, labels)
    return meter.global_score()


class _Meter:
    """Sums of loss and correct predictions, which stay on the device until they are read."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack((loss.float() * len(labels), hits.float()))
        self.count += len(labels)

    def score(self) -> Score:
        """The score of this process so far."""
        return Score(*(value / self.count for value in self.sums.tolist()))

    def global_score(self) -> Score:
        """The score of all processes together."""
        counted = torch.tensor([float(self.count)], device=self.sums.device)
        loss, hits, count = distributed.all_reduce_sum(torch.cat((self.sums, counted))).tolist()
        if not count:
            raise UserError(
                "the loader has no batches: it needs at least one image (with drop_last, one "
                "whole batch; with several processes, an image for each)"
            )
        return Score(loss / count, hits / count)


def check_finite(score: Score, epoch: int) -> Score:
    """``score``, or Diverged if its loss is not finite."""
    if not math.isfinite(score.loss):
        raise Diverged(
            f"the loss is {score.loss} in epoch {epoch}: the run diverged. Lower `lr` "
            "(or `s`), and resume from the last checkpoint or start again"
        )
    return score


@contextlib.contextmanager
def _progress(
    loader: Loader, epoch: int, log_interval: int
) -> Iterator[Callable[[int, "_Meter"], None]]:
    """Show a progress bar on a terminal; elsewhere print a line every ``log_interval`` batches."""
    num_images, start, shown = loader.num_images, time.perf_counter(), 0.0
    first = distributed.rank() == 0
    terminal = first and sys.stderr.isatty() and sys.stdout.isatty()
    bar = optional.bar(
        total=num_images or None,
        desc=f"epoch {epoch}",
        unit="img",
        leave=False,
        disable=not terminal,
    )
    terminal = not bar.disable

    def show_progress(step: int, meter: _Meter) -> None:
        nonlocal shown
        done = min(step * loader.batch_size, num_images) if num_images else meter.count
        elapsed = time.perf_counter() - start
        due = elapsed - shown > 1 if terminal else step % log_interval == 0
        if not first or (not due and done != num_images):
            return
        shown = elapsed
        score = check_finite(meter.score(), epoch)  # synchronises: once per second or line
        if terminal:
            bar.set_postfix_str(f"loss {score.loss:.4f}, top-1 {score.prec1:.2%}", refresh=False)
            bar.update(done - bar.n)
        if terminal and done != num_images:
            return
        bar.clear()
        part = f"{done}/{num_images} ({done / num_images:.0%})" if num_images else f"{done} images"
        print(
            f"Train Epoch: {epoch} [{part}]\t"
            f"Loss: {score.loss:.6f}\tTop-1: {score.prec1:.2%}\t"
            f"{done / elapsed:.0f} images/s",
            flush=True,
        )

    with bar:
        yield show_progress
