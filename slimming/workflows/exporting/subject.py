"""The network that export.py writes, and the images that files are proved and judged on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from slimming.data import datasets, loading
from slimming.data.batches import Batches
from slimming.data.pixels import SIZE
from slimming.data.stream import Stream
from slimming.measuring import profiling
from slimming.measuring.export.graph import Feed
from slimming.pruning import slicing
from slimming.runtime import threads
from slimming.runtime.device import choose_device
from slimming.storage import architecture
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.workflows.before_after import one_process
from slimming.workflows.evaluation import without_masked_channels
from slimming.workflows.exporting.settings import ExportRun
from slimming.workflows.sweep.record import digest

BATCH = 64


@dataclass
class Subject:
    """A network (``model``, on the CPU; a masked one is sliced) from the checkpoint at ``path``
    with the SHA-256 ``digest``, the ``dense`` one of its architecture with random weights, and real
    images."""

    run: ExportRun
    path: Path
    digest: str
    network: Architecture
    model: nn.Module
    dense: nn.Module
    feed: Feed
    test: Batches | Stream

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalised test images for the proof, and to measure with: a batch, and at least 64 if
        the file accepts any number."""
        batch = self.run.graph.batch
        few, count = self.test.first(64).cpu(), self.feed.batch or max(batch, 64)
        return few[torch.arange(count) % len(few)]

    @cached_property
    def logits(self) -> torch.Tensor:
        """PyTorch's answer to `images`."""
        with torch.no_grad():
            return self.model(self.images)

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        """Batches of training images, as programs feed them."""
        run, network = self.run, self.network
        size = self.feed.batch or BATCH
        fed = replace(network, image_size=self.feed.size)
        training = loading.batches_for(fed, "train", size, self.test.device, run.data)
        judging = run.judging
        images, _ = training.draw(judging.calibration_images, judging.calibration_seed)
        rows = torch.arange(-(-len(images) // size) * size) % len(images)
        return [self.feed.of(images[few].cpu()) for few in rows.split(size)]

    @property
    def judged_count(self) -> int:
        """The number of images in `judged`."""
        count, whole = self.run.judging.test_images, self.test.num_images
        return whole if count is None else min(count, whole)

    def judged(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The test images that lower precisions are judged on, and their labels, in batches."""
        batches = iter(self.test)
        if self.judged_count < self.test.num_images:
            images, labels = self.test.draw(self.judged_count, seed=0)
            batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        for images, labels in batches:
            yield images.cpu(), labels.cpu()

    @cached_property
    def top1(self) -> float:
        """The accuracy in fp32, by PyTorch."""
        return loop.test(self.model, self.judged()).prec1

    @cached_property
    def flop_ratio(self) -> float:
        """FLOPs of the dense network divided by those of this one."""
        dense, ours = (profiling.count_flops(m, self.feed.size) for m in (self.dense, self.model))
        return dense / ours

    def metadata(self, precision: str, form: str) -> dict[str, str]:
        """What a file says of itself; values that are not text, as JSON."""
        classes = [*self.test.classes]
        classes += map(str, range(len(classes), self.network.num_classes))
        return {
            "network": str(self.network),
            "widths": json.dumps(slicing.cfg_of(self.model)),
            "classes": json.dumps(classes),
            "input": str(self.feed),
            "image_size": str(self.feed.size),
            "crop": self._crop(),
            "interpolation": self.network.preprocessing.interpolation,
            "mean": json.dumps(self.network.preprocessing.mean),
            "std": json.dumps(self.network.preprocessing.std),
            "precision": precision,
            "form": form,
            "source": f"{self.path.name} (SHA-256 {self.digest})",
        }

    def _crop(self) -> str:
        """How a picture becomes an image of the network's size: as in training."""
        if self.feed.size != SIZE:
            left, whole = self.network.preprocessing.crop
            return f"center {left}/{whole}"
        border = datasets.KINDS[self.network.dataset].border
        return f"pad {border}" if border else "whole"


def load(run: ExportRun) -> Subject:
    """Load the network of ``run`` and the test data. UserError if one is unavailable."""
    one_process("export.py")
    path, data = run.subject.path, run.data
    asked = run.subject.asked(replace(data, image_size=None))
    model, network, contents = architecture.load(path, asked)
    read = digest(path)  # now: a training may replace the file
    size = data.image_size or network.image_size
    slim = without_masked_channels(model, network).cpu().eval()
    if slim is not model:
        network = replace(network, cfg=slicing.cfg_of(slim))
    size_text = f"{profiling.count_parameters(slim):,} parameters"
    print(f"{path}: {network}, {size_text}", flush=True)
    dense = replace(network, cfg=None).build().eval()
    device = choose_device(data.device, data.no_cuda)
    threads.print_load_note(device)
    fed = replace(network, image_size=size)
    test = loading.batches_for(fed, "test", data.test_batch_size, device, data)
    loading.check_classes(test, network.num_classes, contents, path)
    feed = run.graph.feed(size, network.preprocessing)
    return Subject(run, path, read, network, slim, dense, feed, test)
