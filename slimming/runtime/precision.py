"""fp32 or mixed precision."""

import contextlib

import torch


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
