"""Small images as uint8 (N, 3, 32, 32), and their normalisation."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from slimming.storage.preprocessing import CIFAR, Preprocessing

SIZE = 32
BORDER = 2  # black pixels around 28x28 images

OFFLINE = "`dataset` digits needs no download"


class Split(NamedTuple):
    """Images (N, 3, 32, 32) uint8, their labels (N,) int64, and the names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


MEAN, STD = CIFAR.mean, CIFAR.std


def normalize(images: torch.Tensor, preprocessing: Preprocessing = CIFAR) -> torch.Tensor:
    """Normalise uint8 (N, 3, H, W) images for the network with this ``preprocessing``:
    (x / 255 - mean) / std, as floats."""
    mean, std = _mean_and_std(preprocessing, images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def denormalize(images: torch.Tensor, preprocessing: Preprocessing = CIFAR) -> torch.Tensor:
    """The uint8 images that `normalize` turns into these (N, 3, H, W)."""
    mean, std = _mean_and_std(preprocessing, images.device)
    return (images.float() * std).add_(mean).mul_(255).round_().clamp_(0, 255).byte()


@functools.cache  # a copy in each batch would synchronise with the GPU
def _mean_and_std(
    preprocessing: Preprocessing, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    both = preprocessing.mean, preprocessing.std
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in both)
    return mean, std


def to_32x32(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, 32, 32) from grey images (N, H, W) or from (N, 3, H, W).

    28x28 images are padded with `BORDER` black pixels, others are resized (bilinear).
    """
    if images.dim() == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    if images.shape[2:] == (28, 28):
        return F.pad(images, 4 * (BORDER,))
    if images.shape[2:] == (SIZE, SIZE):
        return images.contiguous()
    resized = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).byte()
