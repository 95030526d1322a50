"""The variants of a training step that speed.py compares, each in a process of its own."""

import contextlib
import functools
import io
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.reference import CHANGES, S, changes_of, reference_epoch, update_bn_by_loop
from models import NETWORKS
from slimming.data.batches import Batches, Split
from slimming.runtime.device import Precision, compiled, keep_freed_memory, now
from slimming.training import loop
from slimming.training.penalties import L1Penalty
from slimming.training.trainer import make_optimizer

REFERENCE = "reference"
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # in the names of the calls that start work on a GPU


@dataclass(frozen=True)
class Trial:
    """One way to train one network: ``steps`` batches of ``batch`` images on ``device``."""

    variant: str
    arch: str
    depth: int
    batch: int
    steps: int
    device: str

    @property
    def is_classic(self) -> bool:
        """Whether it is the original loop, with or without some of `CHANGES`."""
        return self.variant in (REFERENCE, *CHANGES[:-1])


def number_format(variant: str) -> str:
    """In what a variant multiplies: fp32, tf32 or bf16; "default" leaves it to PyTorch."""
    if variant.startswith("amp"):
        return "bf16"
    return variant if variant in ("fp32", "tf32") else "default"


def use_format(name: str) -> torch.dtype:
    """Let CUDA multiply fp32 in the format ``name``; the dtype of the factors."""
    if name in ("fp32", "tf32"):  # by default, PyTorch uses TF32 in convolutions alone
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def matmul_peak(name: str, device: torch.device, size: int) -> float:
    """FLOP/s of a product of square matrices in the format ``name``, the best of several runs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    dtype, best = use_format(name), float("inf")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(10):
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return 2 * size**3 / best


process = {}  # the state of a variant's process: its epoch function, its trial, its memory at first


def prepare(trial: Trial, threads: int) -> None:
    """Initialize the process of a variant."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if trial.variant not in (REFERENCE, *CHANGES):
        keep_freed_memory()  # like the scripts
        torch.backends.cudnn.benchmark = True
    process.update(before=_resident_peak(), trial=trial)
    process["epoch"] = make_epoch(trial)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns even if the parent was killed
    os._exit(1)


def ready() -> None:
    """Done when the process is."""


def one_epoch() -> None:
    process["epoch"]()


def peak_memory() -> int | str:
    """The peak memory of this process for its network, in MB."""
    device = torch.device(process["trial"].device)
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    grown = _resident_peak() - process["before"]
    return "-" if math.isnan(grown) else round(grown)


def launches() -> int | str:
    """How many kernels and CUDA graphs a step launches."""
    with torch.profiler.profile() as profile:
        one_epoch()
    events = profile.key_averages()
    count = sum(e.count for e in events if any(word in e.key for word in LAUNCHES))
    return round(count / process["trial"].steps) if count else "-"


def make_epoch(trial: Trial) -> Callable[[], None]:
    """A function that trains ``trial.steps`` batches."""
    torch.manual_seed(0)
    device, count = torch.device(trial.device), trial.steps * trial.batch
    use_format(number_format(trial.variant))
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (count,))
    if trial.is_classic:
        changes = changes_of(trial.variant)
        loader = images, labels, device, changes, trial.batch
        return reference_epoch(trial.arch, trial.depth, *loader)
    split = Split(images.to(device), labels.to(device), [""] * 10)
    loader = Batches(split, trial.batch, augment=True)
    model = NETWORKS[trial.arch](depth=trial.depth).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, 0.01, 0.9, 1e-4)
    precision = Precision(device, amp=number_format(trial.variant) == "bf16")
    penalty = [L1Penalty(model, S)]
    trained = compiled(model, device) if "compile" in trial.variant else model

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(trained, loader, optimizer, 0, penalty, precision, trial.steps + 1)

    return run


def penalty_seconds(trial: Trial) -> float:
    """Median seconds of one call of the penalty."""
    device = torch.device(trial.device)
    model = NETWORKS[trial.arch](depth=trial.depth).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    call = L1Penalty(model, S).on_gradients
    if trial.variant in (REFERENCE, *CHANGES[:2]):
        call = functools.partial(update_bn_by_loop, model)
    times = []
    for _ in range(30):
        start = now(device)
        call()
        times.append(now(device) - start)
    return statistics.median(times)


def _resident_peak() -> float:
    """The peak memory of this process in MB; getrusage would include the parent before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
