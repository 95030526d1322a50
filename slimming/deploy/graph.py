"""The graph of a network as other programs run it."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimming.data.batches import denormalize
from slimming.deploy import engines
from slimming.errors import UserError
from slimming.storage.preprocessing import CIFAR, Preprocessing


@dataclass(frozen=True)
class Feed:
    """What a program feeds: images (N, 3, size, size), normalised, fp32. With ``uint8`` raw pixels,
    which the graph normalises as ``preprocessing`` says; with ``nhwc`` as (N, size, size, 3).
    ``batch``: N; None for any."""

    size: int = 32
    uint8: bool = False
    nhwc: bool = False
    batch: int | None = None
    preprocessing: Preprocessing = CIFAR

    def __str__(self) -> str:
        return f"{'uint8' if self.uint8 else 'float32'} {'NHWC' if self.nhwc else 'NCHW'}"

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised ``images`` (N, 3, H, W) as a program feeds them."""
        fed = denormalize(images, self.preprocessing) if self.uint8 else images
        return (fed.permute(0, 2, 3, 1) if self.nhwc else fed).contiguous()


class _Fed(nn.Module):
    """``model`` behind the conversion from what is fed."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, feed: Feed):
        super().__init__()
        self.model, self.feed = model, feed
        self.register_buffer("mean", torch.tensor(feed.preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(feed.preprocessing.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.permute(0, 3, 1, 2) if self.feed.nhwc else images
        return self.model((images / 255 - self.mean) / self.std if self.feed.uint8 else images)


def traced(model: nn.Module, feed: Feed) -> torch.export.ExportedProgram:
    """The graph of ``model`` (a deployment form, on the CPU), from what is fed to logits."""
    example = feed.of(torch.zeros(feed.batch or 2, 3, feed.size, feed.size))  # 1 would be fixed
    return exported(_Fed(model, feed).eval(), example, dynamic=feed.batch is None)


def exported(
    model: nn.Module, example: torch.Tensor, dynamic: bool
) -> torch.export.ExportedProgram:
    """The program of ``model`` for inputs such as ``example``, with any batch size if
    ``dynamic``."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def is_dynamic(program: torch.export.ExportedProgram) -> bool:
    """Whether the batch size is open."""
    return bool(program.range_constraints)


def is_weight(shape: Sequence[int]) -> bool:
    """Whether a constant of this shape is worth a lower precision: it has more than one dimension,
    not only a value for each channel (biases, bounds of clamps)."""
    return sum(size > 1 for size in shape) > 1


def run_alone(
    kind: str, path: Path, precision: str, images: np.ndarray, threads: int = 1, alone: bool = False
) -> np.ndarray:
    """The logits of the file at ``path`` for ``images`` (as they are fed) and, with ``alone``,
    then for the first image alone, computed by its engine in a fresh process. UserError if it fails
    there."""
    with tempfile.TemporaryDirectory() as folder:
        fed, logits = (str(Path(folder, name)) for name in ("images.npy", "logits.npy"))
        np.save(fed, images)
        # as text: this suite is not on the path of the process
        program = Path(engines.__file__).read_text(encoding="utf-8")
        words = ["-c", program, kind, str(path.resolve()), precision, fed, logits, str(threads)]
        words.append(str(int(alone)))
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"{kind} cannot run the {precision} file that was exported: {reason}")
        return np.load(logits)
