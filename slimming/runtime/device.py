"""The device, its memory layout, and torch.compile."""

import os
import shutil
import time

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
