"""The image folder that the steps use: given, unpacked from a tar, or generated."""

import random
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from slimming.errors import UserError

CLASSES = ("blue", "green", "red")
SIZE = 32
TRAIN, TEST = 1024, 256  # generated images of a class: enough to learn colours


def folder(given: Path | None, work: Path) -> Path:
    """The folder of the images: ``given``, or what is in the tar file ``given``, unpacked to
    ``work`` once; without it, generated there. UserError if there are no such images."""
    if given is None:
        target = work / "images-generated"
        return target if target.exists() else _whole(target, generate)
    if given.is_dir():
        return _root(given)
    if not given.exists():
        raise UserError(f"there is no {given}: --data is an image folder, or a tar of one")
    target = work / f"images-{given.name}-{given.stat().st_mtime_ns}"
    return _root(target if target.exists() else _whole(target, lambda place: unpack(given, place)))


def unpack(path: Path, target: Path) -> None:
    """Unpack a tar file, compressed or not. UserError if it is none, or if it holds paths outside
    of the ``target``, links that lead there, or devices."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"this Python cannot unpack {path} safely: unpack it, and use --data DIR")
    try:
        with tarfile.open(path) as archive:
            archive.extractall(target, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"cannot unpack {path}: {error}") from error


def generate(target: Path, train: int = TRAIN, test: int = TEST) -> Path:
    """Write ``train`` and ``test`` images of noise for each class, which has a colour of its own;
    return the folder."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            place = target / split / name
            place.mkdir(parents=True)
            for i in range(count):
                noise = bytearray(random.Random(f"{split}{name}{i}").randbytes(3 * SIZE * SIZE))
                noise[label::3] = bytes(value // 2 for value in noise[label::3])
                Image.frombytes("RGB", (SIZE, SIZE), bytes(noise)).save(place / f"{i}.png")
    return target


def _whole(target: Path, write: Callable[[Path], object]) -> Path:
    """``target``, written by ``write`` as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        write(Path(place) / "images")
        (Path(place) / "images").rename(target)
    return target


def _root(target: Path) -> Path:
    """The folder in ``target`` with train/: itself or the only one in it."""
    for place in (target, *sorted(target.iterdir())):
        if (place / "train").is_dir():
            return place
    raise UserError(f"{target} has no train/ folder: it must hold train/<class>/, test/<class>/")
