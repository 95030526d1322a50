"""How pictures become the input of a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become the input of a network: part of its description, like its image size.

    A pixel x (0 to 255) becomes (x / 255 - ``mean``) / ``std``, each three numbers for R, G and B;
    the defaults are those of CIFAR. Pictures that are streamed from disk are resized with
    ``interpolation`` and cropped in the center: ``crop`` = (7, 8) means that 7/8 of their shorter
    side is left.
    """

    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)
    crop: tuple[int, int] = (7, 8)
    interpolation: str = "bilinear"

    @classmethod
    def read(cls, stored: Any) -> "Preprocessing":
        """The preprocessing ``stored`` in a checkpoint. ValueError if it is invalid."""
        if not isinstance(stored, dict) or stored.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(stored)
        mean, std, crop = (_numbers(stored[name]) for name in ("mean", "std", "crop"))
        found = cls(mean, std, (int(crop[0]), int(crop[-1])), stored["interpolation"])
        whole = len(crop) == 2 and crop == found.crop and 0 < found.crop[0] <= found.crop[1]
        if not (len(mean) == len(std) == 3 and min(std) > 0 and whole):
            raise ValueError(stored)
        if found.interpolation not in INTERPOLATIONS:
            raise ValueError(stored)
        return found

    def to_store(self) -> dict[str, Any]:
        """The dict to store in a checkpoint."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in vars(self).items()}

    def shorter_side(self, image_size: int) -> int:
        """The pixels to which the shorter side of a picture is resized before the crop."""
        left, whole = self.crop
        return image_size * whole // left


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not all(type(v) in (int, float) for v in values):
        raise ValueError(values)
    return tuple(values)


CIFAR = Preprocessing()
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
