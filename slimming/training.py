"""One epoch of training, evaluation, the optimizer and its schedule, devices and precision."""

import contextlib
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from slimming import data, distributed, optional
from slimming.data import Batches
from slimming.errors import Diverged, UserError
from slimming.strides import unit_strides

LAYOUT = torch.channels_last  # of weights and images: oneDNN and cuDNN convolve it fastest


class Score(NamedTuple):
    """Mean cross entropy and top-1 accuracy (a fraction, 0 to 1) over a pass through the data."""

    loss: float
    prec1: float


def choose_device(name: str | None = None, no_cuda: bool = False) -> torch.device:
    """The device called ``name``; without a name CUDA if there is one and ``no_cuda`` is not set.

    UserError if there is no such device.
    """
    name = distributed.local_device(name, no_cuda)
    if no_cuda and (name or "cpu") != "cpu":
        raise UserError(f"--no-cuda and --device {name} contradict each other")
    automatic = "cuda" if torch.cuda.is_available() and not no_cuda else "cpu"
    try:
        device = torch.device(name or automatic)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"the device {name!r} cannot be used here: leave --device out, or use --device cpu"
        ) from error
    return device


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch; with ``deterministic`` use only repeatable CUDA kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


class Precision:
    """fp32, or with ``amp`` bf16 where the device has it, else fp16 with a gradient scaler."""

    def __init__(self, device: torch.device, amp: bool = False):
        self.device, self.dtype = device, torch.float32
        if amp:
            old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
            self.dtype = torch.float16 if old_gpu else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` for torch.compile; on CUDA its kernels are replayed as CUDA graphs.

    The first step of each batch size compiles it. UserError on the CPU without a C++ compiler.
    """
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(
            "--compile needs a C++ compiler on the CPU: install g++, name another in CXX, or leave "
            "--compile out"
        )
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(model, mode=mode, dynamic=False)


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float):
    """SGD over everything that has a gradient, scaling factors included, as in the paper."""
    learned = [p for p in model.parameters() if p.requires_grad]
    fused = learned[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(learned, lr, momentum, weight_decay=weight_decay, fused=fused)
    if momentum:  # zeros, because the fused kernel leaves a first step that overflows undefined
        for parameter in learned:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def load_momentum(optimizer: torch.optim.Optimizer, saved: dict | None) -> bool:
    """Take the momentum of a saved optimizer, but not its settings: those are what the flags say.

    False, with nothing changed, if it does not fit the parameters.
    """
    parameters = optimizer.param_groups[0]["params"]
    try:
        stored = [saved["state"][i]["momentum_buffer"] for i in range(len(saved["state"]))]
        fits = [s.shape == p.shape for s, p in zip(stored, parameters, strict=True)]
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    if all(fits):
        for parameter, buffer in zip(parameters, stored, strict=True):
            own = torch.empty_like(parameter).copy_(buffer)  # the fused kernel needs its layout
            optimizer.state[parameter]["momentum_buffer"] = own
    return all(fits)


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """``lr`` divided by 10 at int(epochs / 2) and again at int(3 epochs / 4)."""
    milestones = (int(epochs * 0.5), int(epochs * 0.75))
    return lr * 0.1 ** sum(epoch >= max(1, milestone) for milestone in milestones)


def train(
    model: nn.Module,
    loader: Batches | Iterable,
    optimizer: torch.optim.Optimizer,
    epoch: int = 0,
    on_gradients: Iterable[Callable[[], None]] = (),
    precision: Precision | None = None,
    log_interval: int = 100,
    temperature: float = 1.0,
) -> Score:
    """Train one epoch on the (images, labels) of ``loader``: `Batches`, a DataLoader of torch, or
    any other iterable. Each of ``on_gradients`` edits the gradients between backward and step.

    They find gradients that are whole: unscaled under mixed precision, and averaged over the
    processes if ``model`` is what `slimming.distributed.wrap` made. Diverged if the loss is not
    finite, found when a line is printed and at the end of the epoch. What is minimised is the cross
    entropy of logits / ``temperature``; what is returned is that of the logits.
    """
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    loader = data.on_device(loader, device)
    loader.epoch = epoch
    model.train()
    meter = _Meter(device)
    with unit_strides(model), _progress(loader, epoch, log_interval) as report:
        for step, (images, labels) in enumerate(loader, start=1):
            images = images.to(memory_format=LAYOUT)
            optimizer.zero_grad()
            with precision.autocast():
                logits = model(images)
                softened = logits if temperature == 1 else logits / temperature
                loss = F.cross_entropy(softened, labels)
            weight = data.weight(loader, step - 1, len(labels))
            precision.scaler.scale(loss if weight == 1 else loss * weight).backward()
            precision.scaler.unscale_(optimizer)
            loader.minibatch = images, labels  # for a hook that asks
            for edit in on_gradients:
                edit()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            plain = loss if temperature == 1 else F.cross_entropy(logits.detach(), labels)
            meter.add(plain, logits, labels)
            report(step, meter)
    return check_finite(meter.score_of_all(), epoch)


@torch.no_grad()
def test(model: nn.Module, loader: Batches | Iterable, precision: Precision | None = None) -> Score:
    """Loss and top-1 of the model in eval mode over ``loader``, see `train`."""
    device = next(model.parameters()).device
    precision = precision or Precision(device)
    model.eval()
    meter = _Meter(device)
    for images, labels in data.on_device(loader, device):
        with precision.autocast():
            logits = model(images.to(memory_format=LAYOUT))
            loss = F.cross_entropy(logits, labels)
        meter.add(loss, logits, labels)
    return meter.score_of_all()


class _Meter:
    """Sums of loss and hits that stay on the device until somebody asks."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack((loss.float() * len(labels), hits.float()))
        self.count += len(labels)

    def score(self) -> Score:
        """Of this process so far."""
        return Score(*(total / self.count for total in self.sums.tolist()))

    def score_of_all(self) -> Score:
        """Of all processes together."""
        counted = torch.tensor([float(self.count)], device=self.sums.device)
        loss, hits, count = distributed.total(torch.cat((self.sums, counted))).tolist()
        return Score(loss / count, hits / count)


def check_finite(score: Score, epoch: int) -> Score:
    """``score``, or Diverged if its loss is not finite."""
    if not math.isfinite(score.loss):
        raise Diverged(
            f"the loss is {score.loss} in epoch {epoch}: the run diverged. Lower --lr "
            "(or --s), and continue from the last checkpoint or start again"
        )
    return score


@contextlib.contextmanager
def _progress(loader: Batches, epoch: int, log_interval: int):
    """A bar on a terminal, a line every ``log_interval`` batches elsewhere."""
    total, start, shown = loader.num_images, time.perf_counter(), 0.0
    first = distributed.rank() == 0
    terminal = first and sys.stderr.isatty() and sys.stdout.isatty()
    settings = {"total": total or None, "desc": f"epoch {epoch}", "unit": "img", "leave": False}
    bar = optional.bar(**settings, disable=not terminal)
    terminal = not bar.disable

    def report(step: int, meter: _Meter) -> None:
        nonlocal shown
        done = min(step * loader.batch_size, total) if total else meter.count
        elapsed = time.perf_counter() - start
        due = elapsed - shown > 1 if terminal else step % log_interval == 0
        if not first or (not due and done != total):
            return
        shown = elapsed
        score = check_finite(meter.score(), epoch)  # waits for the device: once a second, or a line
        if terminal:
            bar.set_postfix_str(f"loss {score.loss:.4f}, top-1 {score.prec1:.2%}", refresh=False)
            bar.update(done - bar.n)
        if terminal and done != total:
            return
        bar.clear()
        part = f"{done}/{total} ({done / total:.0%})" if total else f"{done} images"
        print(
            f"Train Epoch: {epoch} [{part}]\t"
            f"Loss: {score.loss:.6f}\tTop-1: {score.prec1:.2%}\t"
            f"{done / elapsed:.0f} images/s",
            flush=True,
        )

    with bar:
        yield report
