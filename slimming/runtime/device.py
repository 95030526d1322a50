"""The device: precision, memory layout, random numbers, CPU threads, and workarounds for
libraries."""

import contextlib
import ctypes
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from slimming.channels.groups import copied
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime import distributed, optional

LAYOUT = torch.channels_last  # of weights and images: fastest with oneDNN and cuDNN


def choose_device(name: str | None = None, no_cuda: bool = False) -> torch.device:
    """The device ``name``; by default CUDA if it is available and ``no_cuda`` is not set.

    UserError if the device is unavailable.
    """
    name = distributed.local_device(name, no_cuda)
    if no_cuda and (name or "cpu") != "cpu":
        raise UserError(f"`no_cuda` and `device` {name} contradict each other: use one of them")
    automatic = "cuda" if torch.cuda.is_available() and not no_cuda else "cpu"
    try:
        device = torch.device(name or automatic)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} is unavailable: omit `device`, or use `device` cpu"
        ) from error
    return device


@torch.no_grad()
def layout_for(model: nn.Module, images: torch.Tensor) -> torch.memory_format:
    """`LAYOUT`; contiguous, if ``model`` cannot run ``images`` (N, C, H, W) in that layout in eval
    mode: ``x.view(len(x), -1)`` of a channels_last map raises RuntimeError."""
    try:
        tried = copied(model).to(memory_format=LAYOUT).eval()
        tried(images.clone(memory_format=LAYOUT))
    except RuntimeError as error:
        raise_if_of_the_machine(error)
        return torch.contiguous_format
    return LAYOUT


def now(device: torch.device) -> float:
    """The time in seconds, after all that was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` compiled with torch.compile; on CUDA with CUDA graphs.

    The first step with each batch size compiles it. UserError without a compiler, and on CUDA
    without Triton.
    """
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError(
            "`compile` needs a C++ compiler on the CPU: install g++, set CXX to another compiler, "
            "or omit `compile`"
        )
    if device.type == "cuda":
        optional.need("triton", "triton", "`compile` on CUDA")
        if not any(map(shutil.which, [os.environ.get("CC", "gcc"), "clang"])):
            raise UserError(
                "`compile` on CUDA needs a C compiler, for Triton: install gcc, set CC to another "
                "compiler, or omit `compile`"
            )
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    fast = torch.compile(model, mode=mode, dynamic=False)
    assert isinstance(fast, nn.Module)  # compiling a module gives a module
    return fast


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Inside the context, or in a function that this decorates, CUDA multiplies in fp32. By default
    convolutions round their inputs to TF32, which has 3 decimal digits.

    >>> with full_fp32():
    ...     torch.backends.cudnn.allow_tf32
    False
    """
    settings: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    try:
        before = [setting.allow_tf32 for setting in settings]
    except RuntimeError:  # the program sets precision by operator, and knows why
        yield
        return
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


class Precision:
    """fp32, or with ``amp`` bf16 if the device supports it, else fp16 with a gradient scaler."""

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


MAX_THREADS = 1024  # OpenMP aborts the process if the system cannot create a thread


def use_threads(count: int | None) -> None:
    """Use ``count`` threads; call it before any computation. None keeps PyTorch's default:
    OMP_NUM_THREADS (torchrun sets it to 1), or one thread per core."""
    if count:
        torch.set_num_threads(count)


def print_load_note(device: torch.device) -> None:
    """On the CPU, print a note if the load of the machine exceeds its number of cores: on two
    cores, two runs with two threads process 195 images/s each, with one thread 480."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # unavailable on Windows
        return
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        note = f"note: the load of this machine is {load:.1f} (cores: {cores})"
        print(f"{note}: concurrent runs are faster with one thread each", flush=True)


# <malloc.h> of glibc: parameters of mallopt
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees; return whether that succeeded.

    By default glibc returns large blocks to the system and gets them back as new pages, which the
    system clears and maps on first use: every step pays that for its feature maps on the CPU.
    Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


BLOCK = 16  # channels that oneDNN computes at a time, at most


@contextlib.contextmanager
def unit_strides(model: nn.Module) -> Iterator[None]:
    """Inside the context, strided 1x1 convolutions subsample their input and run at stride 1, with
    the same outputs and gradients.

    If such a convolution on the CPU reads fewer channels than a block, as after pruning, oneDNN's
    backward pass writes out of bounds and may crash (uxlfoundation/oneDNN issue 6035).
    """
    undo = []
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and _is_at_risk(conv):
            rows, columns = conv.stride
            hook = conv.register_forward_pre_hook(
                lambda _, inputs, r=rows, c=columns: (inputs[0][..., ::r, ::c],)
            )
            undo.append((conv, conv.stride, hook))
            conv.stride = (1, 1)
    try:
        yield
    finally:
        for conv, stride, hook in undo:
            conv.stride = stride
            hook.remove()


def _is_at_risk(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    few = conv.in_channels < BLOCK and conv.weight.device.type == "cpu"
    return plain and few and conv.stride != (1, 1)


STREAMS = 2  # the version of the streams of `epoch_generator`
SHUFFLE, DROPOUT, AUGMENTATION = range(3)  # what they are for


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch; with ``deterministic`` use only repeatable CUDA kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def epoch_generator(
    *numbers: int, purpose: int = SHUFFLE, version: int = STREAMS
) -> torch.Generator:
    """A generator on the CPU that is a function of the ``numbers`` (seed, epoch, ...).

    Each ``purpose`` has its own stream: the numbers (s, e) and (s, e, 0) alone give the same one.
    In ``version`` 1 of the streams all purposes share one; a checkpoint records the version, so
    that a run is resumed with its own.
    """
    key = (purpose,) if purpose != SHUFFLE and version > 1 else ()
    words = np.random.SeedSequence(numbers, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
