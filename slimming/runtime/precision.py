"""fp32 or mixed precision."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
