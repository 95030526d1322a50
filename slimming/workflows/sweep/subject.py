"""The network that sweep.py prunes, and the images that it judges slim ones by."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.pixels import SIZE
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.pruning import allocation, slicing
from slimming.pruning.allocation import Prunable
from slimming.pruning.choice import Choice
from slimming.pruning.evidence import scaled_norms
from slimming.pruning.one_pass import OnePass
from slimming.pruning.repair import LEAST, repair
from slimming.pruning.slicing.trial import groups
from slimming.runtime.device import choose_device
from slimming.storage import architecture
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.workflows.before_after import one_process
from slimming.workflows.experiment_settings import PruningSettings
from slimming.workflows.repairing import RepairSettings
from slimming.workflows.settings import PruneSettings
from slimming.workflows.sweep.record import SweepRecord, digest
from slimming.workflows.sweep.settings import SEARCH, SweepRun

SCRIPTS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
BATCH = 256
THRESHOLD = "global"  # the allocation that needs scaling factors


@dataclass(frozen=True)
class Candidate:
    """A fraction to prune, and how it is allocated."""

    allocation: str
    ratio: float

    @property
    def id(self) -> str:
        return f"{self.allocation} {100 * self.ratio:.6g} %"


@dataclass
class Subject:
    """The network to prune, and the images that its slim ones are repaired and judged on."""

    run: SweepRun
    path: Path
    network: Architecture
    prunable: Prunable
    calibration: torch.Tensor
    judged: list[tuple[torch.Tensor, torch.Tensor]]
    test: Batches | Stream
    record: SweepRecord

    @property
    def allocations(self) -> list[str]:
        """The allocations that make a curve, without search."""
        names = [name for name in self.run.points.allocation if name != SEARCH]
        scaled = scaled_norms(self.prunable.model)
        return [name for name in names if scaled or name != THRESHOLD]

    @property
    def searched(self) -> list[str]:
        """The random allocations that search tries."""
        points = self.run.points
        count = points.candidates if SEARCH in points.allocation else 0
        return [f"random-{i + 1}" for i in range(count)]

    @property
    def images(self) -> torch.Tensor:
        """The images that latency is measured with."""
        few, count = self.test.first(64), self.run.budget.latency_batch
        return few[torch.arange(count, device=few.device) % len(few)]

    def top1(self, model: nn.Module) -> float:
        """The accuracy on the held-back training images."""
        return loop.test(model.to(self.test.device), self.judged).prec1

    def slim(self, candidate: Candidate) -> tuple[Choice, nn.Module, slicing.Kept]:
        """The slim network of a candidate, not proved."""
        choice = allocation.choose(self.prunable, candidate.ratio, candidate.allocation)
        return choice, *self.prunable.slim(choice)

    @cached_property
    def one_pass(self) -> OnePass:
        """Repair in closed form."""
        return OnePass(self.prunable.model, self.calibration, self.run.judging.repair_seed)

    def layer_by_layer(self, slim: nn.Module, kept: slicing.Kept) -> nn.Module:
        """``slim`` repaired as --repair does."""
        seed = self.run.judging.repair_seed
        return repair(slim, self.prunable.model, kept, self.calibration, seed).model


def load(run: SweepRun) -> Subject:
    """Load the network and the images of ``run``. UserError if one is unavailable, or if the
    network cannot be slimmed."""
    one_process("sweep.py")
    path, judging, data = run.subject.path, run.judging, run.data
    model, network, contents = architecture.load(path, run.subject.asked(data))
    device = choose_device(data.device, data.no_cuda)
    size = data.test_batch_size
    training, test = (
        loading.batches_for(network, part, size, device, data) for part in ("train", "test")
    )
    loading.check_classes(test, network.num_classes, contents, path)
    wanted = judging.held_back + judging.repair_images
    images, labels = training.draw(wanted, judging.repair_seed)
    held_back = min(judging.held_back, len(images) // 3)
    if len(images) - held_back < LEAST or not held_back:
        raise UserError(f"{len(images)} training images are too few to repair and to judge by")
    if len(images) < wanted:
        print(
            f"note: of {len(images)} training images, {held_back} are held back to measure "
            f"accuracy, and repair uses {len(images) - held_back}"
        )
    judged = list(
        zip(images[:held_back].split(BATCH), labels[:held_back].split(BATCH), strict=True)
    )
    coupled = groups(model, test.first(1))
    prunable = Prunable(model, coupled, run.points.round_to, least=run.points.least)
    basis: dict[str, Any] = {
        "checkpoint": digest(path),
        "dataset": network.dataset,
        "training images": training.num_images,
        "--held-back": judging.held_back,
        "--repair-images": judging.repair_images,
        "--repair-seed": judging.repair_seed,
        "--least": run.points.least,
        "--round-to": run.points.round_to,
        "--latency-batch": run.budget.latency_batch,
        "--device": device.type,
    }
    if THRESHOLD in run.points.allocation and not scaled_norms(model):
        print("note: the network has no BatchNorm, so there is no global threshold to try")
        if run.points.allocation == (THRESHOLD,):
            raise UserError("no allocation is left to try: use --allocation uniform,lamp")
    record = SweepRecord(run.folder, basis)
    return Subject(run, path, network, prunable, images[held_back:], judged, test, record)


def command(subject: Subject, candidate: Candidate) -> str:
    """The command that prunes at ``candidate``."""
    run, network = subject.run, subject.network
    ratio, name = f"{candidate.ratio:.9g}", candidate.allocation
    if network.arch in SCRIPTS:
        words = ["python", SCRIPTS[network.arch], "--model", str(subject.path), "--percent", ratio]
        words += [] if name == THRESHOLD else ["--allocation", name]
    else:
        words = ["python", "run.py", "--model", network.arch, "--dataset", network.dataset]
        words += ["--skip-base-training", "--model-path", str(subject.path)]
        words += ["--pruning-ratio", ratio, "--allocation", name, "--finetune-epochs", "0"]
    defaults = vars(RepairSettings())
    least = (PruneSettings if network.arch in SCRIPTS else PruningSettings).least  # the default
    more: dict[str, Any] = {
        "--least": run.points.least if run.points.least != least else None,
        "--round-to": run.points.round_to if run.points.round_to > 1 else None,
        "--depth": network.depth if network.arch not in SCRIPTS else run.subject.depth,
        "--image-size": network.image_size if network.image_size != SIZE else None,
        "--data": run.data.data,
        "--device": run.data.device,
    }
    for field in ("repair_images", "repair_seed"):
        value = getattr(run.judging, field)
        more[f"--{field.replace('_', '-')}"] = None if value == defaults[field] else value
    if network.arch in SCRIPTS:
        more |= {"--arch": run.subject.arch, "--dataset": run.data.dataset}
    words += [str(word) for pair in more.items() if pair[1] is not None for word in pair]
    words += ["--no-cuda"] if run.data.no_cuda else []
    folder = run.folder / f"{name}-{100 * candidate.ratio:.4g}"
    save = "--save" if network.arch in SCRIPTS else "--output-dir"
    return shlex.join([*words, "--repair", save, str(folder)])
