"""The device, its memory layout, and torch.compile."""

import os
import shutil

import torch
from torch import nn

from slimming.errors import UserError
from slimming.runtime import distributed

LAYOUT = torch.channels_last  # of weights and images: oneDNN and cuDNN convolve it fastest


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
    fast = torch.compile(model, mode=mode, dynamic=False)
    assert isinstance(fast, nn.Module)  # a module's compiled form is one too
    return fast
