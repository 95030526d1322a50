"""Image folders that do not fit into memory: decoded and augmented by DataLoader workers."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from slimming.data import image_folder
from slimming.data.order import balanced, rank_slices
from slimming.data.pixels import normalize
from slimming.errors import UserError, dead_worker_text, is_dead_worker
from slimming.runtime.randomness import AUGMENTATION, STREAMS, epoch_generator
from slimming.storage.preprocessing import CIFAR, Preprocessing


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
        image = image_folder.read_image(path)
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
