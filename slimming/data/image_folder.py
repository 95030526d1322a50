"""Image folders: read into memory, or streamed from disk."""

import contextlib
import functools
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from slimming.data.batches import OFFLINE, SIZE, Split, balanced, normalize, rank_slices
from slimming.errors import UserError, dead_worker_text, is_dead_worker, raise_if_of_the_machine
from slimming.runtime import optional
from slimming.runtime.device import AUGMENTATION, STREAMS, epoch_generator
from slimming.storage import checkpoint, files
from slimming.storage.preprocessing import CIFAR, Preprocessing

if TYPE_CHECKING:
    from PIL import Image

CACHE = ".network-slimming-{split}.pt"
DECODING = 2  # counts the changes of what a file is decoded to, after which no older cache is used


def scan_folder(folder: Path, split: str) -> tuple[Path, list, list[str]]:
    """The folder of a split, its samples as (path, label), and the names of its classes.

    UserError if a class has no images, or train and test do not have the same classes.
    """
    root = _split_folder(folder, split)
    samples, classes = _scan(root)
    if split == "test":
        _, known = _scan(_split_folder(folder, "train"))
        for missing, where in [
            (set(known) - set(classes), root),
            (set(classes) - set(known), _split_folder(folder, "train")),
        ]:
            if missing:
                raise UserError(
                    f"{where} has no images of class {', '.join(sorted(missing))}: "
                    f"every class needs images in train and test; {OFFLINE}"
                )
    return root, samples, classes


def read_folder(folder: Path, split: str, workers: int) -> Split:
    """The images of a split, resized to 32x32, from the cache in ``folder`` if its files are
    unchanged. UserError if an image cannot be read."""
    root, samples, classes = scan_folder(folder, split)
    cache, state = folder / CACHE.format(split=split), _fingerprint(root, samples)
    images = _read_cache(cache, state)
    if images is None:
        images = _decode([path for path, _ in samples], workers, f"decoding {root}")
        _write_cache(cache, state, images)
    labels = torch.tensor([label for _, label in samples])
    return Split(images, labels, classes)


def _split_folder(folder: Path, split: str) -> Path:
    for name in ("train",) if split == "train" else ("test", "val"):
        if (folder / name).is_dir():
            return folder / name
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: set `data` to your image folder; {OFFLINE}")
    kinds = "train/" if split == "train" else "test/ or val/"
    raise UserError(
        f"{folder} has no {kinds} folder: `data` must contain train/<class>/… and "
        f"test/<class>/… (or val/); {OFFLINE}"
    )


def _scan(root: Path) -> tuple[list, list[str]]:
    from PIL import Image
    from torchvision.datasets import ImageFolder

    endings = {end for end, kind in Image.registered_extensions().items() if kind in _formats()}
    try:
        dataset = ImageFolder(
            str(root),
            allow_empty=True,
            is_valid_file=lambda path: Path(path).suffix.lower() in endings,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{root} has no class folders with images ({reason}): store images as "
            f"{root}/<class>/<image>; {OFFLINE}"
        ) from error
    filled = {label for _, label in dataset.samples}
    empty = [name for name, label in dataset.class_to_idx.items() if label not in filled]
    if empty:
        raise UserError(
            f"{root} has no images of class {', '.join(empty)}: every class folder "
            f"needs images that Pillow can read; {OFFLINE}"
        )
    return dataset.samples, dataset.classes


@functools.cache
def _formats() -> list[str]:
    """The formats that Pillow reads, except EPS: an EPS file is code that Ghostscript would run."""
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _decode(paths: list[str], workers: int, title: str) -> torch.Tensor:
    from PIL import Image

    images = np.empty((len(paths), SIZE, SIZE, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        image = read_image(paths[i])
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        images[i] = np.asarray(image)

    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.simplefilter("ignore")  # invalid metadata; a broken image is still an error
        decoded = pool.map(decode, range(len(paths)))
        settings = {"desc": title, "total": len(paths), "unit": "img", "leave": False}
        for _ in optional.bar(decoded, **settings, disable=None):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_image(path: str) -> "Image.Image":
    """The Pillow image in a file, as RGB. UserError with the path if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()) as image:
            return _to_rgb(image)
    except Exception as error:  # each format of Pillow raises its own types
        raise_if_of_the_machine(error)
        raise UserError(f"cannot read the image {path} ({error}): fix or remove it") from error


def _to_rgb(image: "Image.Image") -> "Image.Image":
    """A Pillow image of any mode as RGB; grey with more than 8 bits keeps its upper 8 bits."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: convert them to 8 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        bits = _grey_bits(image, grey)
        image = Image.fromarray((grey >> (bits - 8)).astype(np.uint8))
    return image.convert("RGB")


def _grey_bits(image: "Image.Image", grey: np.ndarray) -> int:
    """The number of bits of the pixels of a Pillow image in mode I or I;16. A 32-bit file does not
    say how many of its bits it uses: 8 or 16, whichever its pixels fit. ValueError if neither."""
    if image.mode != "I" or image.format in ("PNG", "PPM"):  # whose grey has at most 16 bits
        (bits, *_) = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample of a TIFF
        return bits
    if grey.min() < 0 or grey.max() >= 2**16:
        raise ValueError("its pixels are integers of unknown range: convert them to 8 bits")
    return 8 if grey.max() < 2**8 else 16


def _fingerprint(root: Path, samples: list) -> str:
    """A digest of the name, size and modification time of every file."""
    digest = hashlib.sha256(f"{SIZE} {DECODING}".encode())
    for path, _ in samples:
        stat = os.stat(path)
        name = os.path.relpath(path, root)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, state: str) -> torch.Tensor | None:
    try:
        stored = torch.load(cache, weights_only=True)
        return stored["images"] if stored["state"] == state else None
    except Exception as error:  # missing or damaged: decode the images again
        raise_if_of_the_machine(error)
        return None


def _write_cache(cache: Path, state: str, images: torch.Tensor) -> None:
    try:
        contents = checkpoint.serialize({"state": state, "images": images})
        files.write_bytes(cache, contents, suffix=f".{os.getpid()}.tmp")
    except UserError as error:
        print(f"note: the decoded images were not cached for the next run: {error}")


class Stream:
    """The batches of an image folder at ``size`` x ``size`` pixels, like `Batches`, resized,
    cropped and normalised for the network with this ``preprocessing``.

    With ``augment``, random resized crops and horizontal flips; order and augmentation depend on
    ``seed`` and ``epoch``, not on the number of ``workers``. Without it, center crops.
    """

    def __init__(
        self,
        samples: list,
        classes: list[str],
        size: int,
        device: torch.device,
        workers: int,
        batch_size: int,
        augment: bool,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        preprocessing: Preprocessing = CIFAR,
    ):
        self.classes, self.device, self.batch_size, self.size = classes, device, batch_size, size
        self.num_images, self.augment, self.seed = len(samples), augment, seed
        self.epoch, self.rank, self.ranks = 0, rank, ranks
        self.preprocessing, self.workers = preprocessing, workers
        self.dataset = _ImageDataset(samples, size, preprocessing, augment, seed)
        self.loader = self._loader()

    def _loader(self, persistent: bool = False) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=_BatchSampler(self),
            num_workers=self.workers,
            persistent_workers=persistent and self.workers > 0,
            pin_memory=self.device.type == "cuda",
            # a start of workers draws a number: not from dropout's, as a resumed run starts them
            # in another epoch
            generator=torch.Generator(),
        )

    @contextlib.contextmanager
    def keeping_workers(self) -> Iterator[None]:
        """In the block, the workers stay for the next pass; otherwise they end with each pass."""
        self.loader = self._loader(persistent=True)
        try:
            yield
        finally:
            self.loader = self._loader()  # nothing refers to the other one, which ends its workers

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        try:
            with _deaths_of_workers_wait():
                batches = iter(self.loader)
            for images, labels in batches:
                images = images.to(self.device, non_blocking=True)
                yield (
                    normalize(images, self.preprocessing),
                    labels.to(self.device, non_blocking=True),
                )
        except UserError as error:  # a worker wraps the message in a traceback
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        except RuntimeError as error:
            if is_dead_worker(error):
                raise UserError(dead_worker_text(error)) from error
            raise

    def draw(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` random images, equally many of each class, not augmented, and their labels."""
        samples = self.dataset.samples
        labels = torch.tensor([label for _, label in samples])
        chosen = self._center_crops(
            [samples[i] for i in balanced(labels, count, seed).tolist()], 64
        )
        images, numbers = (torch.cat(part) for part in zip(*chosen, strict=True))
        return images, numbers

    def first(self, count: int) -> torch.Tensor:
        """The first images, normalised."""
        chosen = [self.dataset[0, i][0] for i in range(min(count, self.num_images))]
        return normalize(torch.stack(chosen).to(self.device), self.preprocessing)

    def without_augmentation(self) -> "Stream":
        """All of its images in order, as center crops."""
        return self._center_crops(self.dataset.samples, self.batch_size)

    def _center_crops(self, samples: list, batch_size: int) -> "Stream":
        return Stream(
            samples,
            self.classes,
            self.size,
            self.device,
            self.workers,
            batch_size,
            augment=False,
            preprocessing=self.preprocessing,
        )


class _BatchSampler:
    """A batch sampler: lists of (epoch, index), the batches of this process in this epoch."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        stream = self.stream
        order = torch.arange(stream.num_images)
        if stream.augment:
            generator = epoch_generator(stream.seed, stream.epoch)
            order = torch.randperm(stream.num_images, generator=generator)
        for own in rank_slices(stream):
            yield [(stream.epoch, i) for i in order[own].tolist()]


class _ImageDataset(Dataset):
    """(epoch, index) -> an image (3, size, size) uint8 and its label."""

    def __init__(
        self, samples: list, size: int, preprocessing: Preprocessing, augment: bool, seed: int
    ):
        from torchvision.transforms import v2

        self.samples, self.seed, self.augment, self.streams = samples, seed, augment, STREAMS
        how = v2.InterpolationMode(preprocessing.interpolation)
        steps = [v2.Resize(preprocessing.shorter_side(size), how), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size, interpolation=how), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        path, label = self.samples[index]
        image = read_image(path)
        with torch.random.fork_rng(devices=[]):
            numbers = self.seed, epoch, index
            generator = epoch_generator(*numbers, purpose=AUGMENTATION, version=self.streams)
            torch.manual_seed(generator.initial_seed())
            return self.transform(image), label


@contextlib.contextmanager
def _deaths_of_workers_wait() -> Iterator[None]:
    """In the block, a DataLoader may start its processes without its signal handler.

    That handler raises the death of a process in whatever code the main process runs at that
    moment. Without it, the DataLoader itself raises as soon as it waits for that process.
    """
    main = threading.current_thread() is threading.main_thread()
    number = getattr(signal, "SIGCHLD", None) if main else None  # Windows has no SIGCHLD
    before = None if number is None else signal.getsignal(number)
    try:
        yield
    finally:
        if number is not None and before is not None and signal.getsignal(number) != before:
            signal.signal(number, before)
