"""export.py: choose the form of a network, write its files, prove and judge them, time them."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimming.channels.groups import copied
from slimming.commands.export.report import FileRow, as_text
from slimming.commands.export.settings import AUTO, ExportRun
from slimming.data import datasets, loading
from slimming.data.batches import SIZE
from slimming.data.loading import Data
from slimming.deploy import engines, graph
from slimming.deploy.engines import Run
from slimming.deploy.fold import deploy, forms_of
from slimming.deploy.formats import FORMATS
from slimming.deploy.forms import FORMS
from slimming.deploy.graph import Feed, traced
from slimming.errors import Interrupted, UserError, raise_if_of_the_machine
from slimming.measuring import figures
from slimming.runtime import device as runtime_device
from slimming.runtime import optional
from slimming.runtime.device import LAYOUT, choose_device
from slimming.runtime.distributed import one_process
from slimming.slicing.proof import TOLERANCE
from slimming.slicing.prune import without_masked_channels
from slimming.slicing.slim import cfg_of
from slimming.storage import architecture, files
from slimming.storage.architecture import Architecture
from slimming.storage.files import digest
from slimming.training import loop

BATCH = 64


@dataclass
class Source:
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
    test: Data

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
        dense, ours = (figures.count_flops(m, self.feed.size) for m in (self.dense, self.model))
        return dense / ours

    def metadata(self, precision: str, form: str) -> dict[str, str]:
        """What a file says of itself; values that are not text, as JSON."""
        classes = [*self.test.classes]
        classes += map(str, range(len(classes), self.network.num_classes))
        return {
            "network": str(self.network),
            "widths": json.dumps(cfg_of(self.model)),
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


def load(run: ExportRun) -> Source:
    """Load the network of ``run`` and the test data. UserError if one is unavailable."""
    one_process("export.py")
    path, data = run.subject.path, run.data
    request = run.subject.request(replace(data, image_size=None))
    model, network, contents = architecture.load(path, request)
    read = digest(path)  # now: a training may replace the file
    size = data.image_size or network.image_size
    slim = without_masked_channels(model, network.cfg).cpu().eval()
    if slim is not model:
        network = replace(network, cfg=cfg_of(slim))
    size_text = f"{figures.count_parameters(slim):,} parameters"
    print(f"{path}: {network}, {size_text}", flush=True)
    dense = replace(network, cfg=None).build().eval()
    device = choose_device(data.device, data.no_cuda)
    runtime_device.print_load_note(device)
    fed = replace(network, image_size=size)
    test = loading.batches_for(fed, "test", data.test_batch_size, device, data)
    loading.check_classes(test, network.num_classes, contents, path)
    feed = run.graph.feed(size, network.preprocessing)
    return Source(run, path, read, network, slim, dense, feed, test)


def write(
    subject: Source,
    model: nn.Module,
    kind: str,
    precision: str,
    form: str,
    path: Path,
    trying: bool = False,
) -> list[Path]:
    """Write ``model`` in a form of its graph to ``path`` without its ending; the files. If it is
    only ``trying`` how fast that is, one batch calibrates int8. UserError if that is impossible."""
    target = FORMATS[kind]
    batches = subject.calibration[: 1 if trying else None] if precision == "int8" else []
    whole = path.with_name(path.name + target.suffix)
    advice = ". Try another --format or --precision"
    advice += ", or --form plain" if precision != "int8" else ""
    with _explained(f"{kind} {precision} cannot express {subject.network}", advice):
        program = traced(
            deploy(model, dtype=target.dtype(precision), form=FORMS[form]), subject.feed
        )
        facts = subject.metadata(precision, form)
        with writing(subject.run.folder):
            return target.write(program, whole, precision, batches, facts)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Writing to ``folder``: a UserError that names it if that fails."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or folder  # of a rename: the target
        raise UserError(f"cannot write to {place}: {error.strerror or error}") from error


class Runner:
    """Runs the file of a format as fast as it can, on the device of ``subject`` if it can.
    UserError if it fails, also later."""

    def __init__(self, subject: Source, kind: str, precision: str, path: Path):
        device = engines.device_of(kind, str(subject.test.device))
        self.kind, self.precision = kind, precision
        with _explained(f"{kind} cannot load the {precision} file"):
            make, threads = engines.ENGINES[kind], torch.get_num_threads()
            self.engine = make(str(path), precision, threads, device, tuned=True)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with _explained(f"{self.kind} cannot run the {self.precision} file"):
            return self.engine(images)


@contextlib.contextmanager
def _explained(problem: str, advice: str = "") -> Iterator[None]:
    """Errors inside the context as UserErrors: exporters and engines raise types of their own."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{problem}: {reason}{advice}") from error


SECONDS = 1.0  # of measuring the forms of a graph against each other


@dataclass(frozen=True)
class Exported:
    """A file that was written: its ``parts`` (OpenVINO has two), and how it was proved:
    ``difference``, the largest of the logits in a fresh process, relative to the largest logit;
    ``top1``, its accuracy by its engine, measured for lower precisions only."""

    format: str
    precision: str
    form: str
    parts: list[Path]
    difference: float
    top1: float | None

    @property
    def bytes(self) -> int:
        return sum(part.stat().st_size for part in self.parts)


def export(subject: Source, kind: str, precision: str) -> Exported:
    """Write the file of this format (``kind``) and precision. UserError if it computes something
    other than the network; then nothing is written."""
    with _aside(subject.run.folder) as aside:
        form = _asked_form(subject, kind, precision)
        form = form or fastest_form(subject, subject.model, kind, precision, aside)
        stem = subject.path.name.removesuffix(".tar").removesuffix(".pth")
        stem += "" if precision == "fp32" else f"-{precision}"
        parts = write(subject, subject.model, kind, precision, form, aside / stem)
        difference = _difference(subject, kind, precision, parts[0])
        top1 = None if precision == "fp32" else _judge(subject, kind, precision, parts[0])
        kept = [subject.run.folder / part.name for part in parts]
        with writing(subject.run.folder):
            for part, place in reversed(list(zip(parts, kept, strict=True))):  # the graph last
                files.move(part, place)
    judged = "" if top1 is None else f", top-1 {top1:.2%} (fp32: {subject.top1:.2%})"
    print(
        f"{kind} {precision}: wrote {', '.join(map(str, kept))}, form {form}; in a fresh process "
        f"its logits differ by {difference:.1e} (relative) from PyTorch's{judged}",
        flush=True,
    )
    return Exported(kind, precision, form, kept, difference, top1)


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the files to write. UserError if it cannot be written."""
    with files.no_empty_folders(folder, *folder.parents):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            aside = tempfile.TemporaryDirectory(dir=folder, prefix=".export-")
        with aside:
            yield Path(aside.name)


def possible_forms(model: nn.Module, kind: str, precision: str) -> list[str]:
    """The forms that keep a network exact. A clamp at a large value, of a channel with a small γ,
    leaves int8 nothing for other values, and may be out of the range of a graph in fp16; quantizers
    expect BN folded."""
    clamps = precision != "int8" and FORMATS[kind].dtype(precision) != torch.float16
    return [
        name
        for name, form in forms_of(model).items()
        if (clamps or not form.clamp) and (form.fold or precision != "int8")
    ]


def check_forms(subject: Source) -> None:
    """UserError if a file cannot have the form that was asked for."""
    for kind, precision in subject.run.graph.targets:
        _asked_form(subject, kind, precision)


def _asked_form(subject: Source, kind: str, precision: str) -> str | None:
    """The form of the graph that was asked for, if one was. UserError if it is impossible."""
    names, asked = possible_forms(subject.model, kind, precision), subject.run.graph.form
    if asked == AUTO:
        return None
    if asked not in names:
        raise UserError(
            f"--form {asked}: in {kind} {precision} this network has the forms {', '.join(names)}"
        )
    return asked


def fastest_form(subject: Source, model: nn.Module, kind: str, precision: str, aside: Path) -> str:
    """The form of the graph of ``model`` that runs fastest here."""
    names = possible_forms(model, kind, precision)
    if len(names) == 1:
        return names[0]
    fed, runs = subject.feed.of(subject.images[: subject.run.graph.batch]).numpy(), {}
    for name in optional.bar(names, desc=f"{kind} {precision}", leave=False, disable=None):
        path = aside / f"{name}-tried"
        parts = write(subject, model, kind, precision, name, path, trying=True)
        runs[name] = Runner(subject, kind, precision, parts[0])
    tasks = [lambda run=run: run(fed) for run in runs.values()]
    seconds = figures.in_turns(tasks, subject.test.device, SECONDS)
    times = sorted(zip(seconds, runs, strict=True))
    text = ", ".join(f"{name} {1e3 * time:.2f}" for time, name in times)
    which = ", dense network" if model is subject.dense else ""
    print(f"{kind} {precision}{which}: ms by form, batch {len(fed)}: {text}", flush=True)
    return times[0][1]


def _difference(subject: Source, kind: str, precision: str, path: Path) -> float:
    """The largest difference from PyTorch's logits in a fresh process. UserError if it is too
    large for fp32."""
    fed, expected, alone = subject.feed.of(subject.images), subject.logits, not subject.feed.batch
    expected = torch.cat((expected, expected[:1])) if alone else expected
    threads = torch.get_num_threads()
    logits = torch.from_numpy(graph.run_alone(kind, path, precision, fed.numpy(), threads, alone))
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((logits - expected).abs().max() / scale)
    if precision == "fp32" and not difference <= TOLERANCE:
        raise UserError(
            f"{kind} {precision} differs from PyTorch by {difference:.1e} of the largest logit "
            f"(allowed: {TOLERANCE:.0e}): it is not written"
        )
    return difference


def _judge(subject: Source, kind: str, precision: str, path: Path) -> float:
    """The accuracy of a file. UserError if it loses more than --max-drop."""
    top1 = accuracy(subject, Runner(subject, kind, precision, path), f"{kind} {precision}: test")
    drop, limit = 100 * (subject.top1 - top1), subject.run.judging.max_drop
    if round(drop, 6) > limit:  # 0.93 - 0.925 is a little more than 0.005
        raise UserError(
            f"{kind} {precision} has {top1:.2%} top-1, {drop:.2f} points less than fp32 "
            f"({subject.top1:.2%}; --max-drop {limit:g}): it is not written. Raise --max-drop, or "
            "use another --precision or --form"
        )
    return top1


def accuracy(subject: Source, run: Run, title: str) -> float:
    """The accuracy of a file on the test images, 0 to 1; ``title``: of the progress bar."""
    hits, total, size = 0, 0, subject.feed.batch
    for images, labels in optional.bar(subject.judged(), desc=title, leave=False, disable=None):
        size = size or min(len(images), subject.run.graph.batch)
        for few, own in zip(images.split(size), labels.split(size), strict=True):
            rows = torch.arange(size) % len(few)  # engines prepare for each size
            logits = torch.from_numpy(run(subject.feed.of(few[rows]).numpy()))[: len(few)]
            hits += int((logits.argmax(1) == own).sum())
            total += len(own)
    return hits / total


ONE = 1  # the other batch size that is measured


@contextlib.contextmanager
def reported(subject: Source) -> Iterator[list[Exported]]:
    """Prints the table of all files that are in the list at the end, also if one was refused."""
    written: list[Exported] = []
    try:
        try:
            yield written
        except UserError:
            with contextlib.suppress(UserError):  # the first one is told
                _print_table(subject, written)
            raise
        _print_table(subject, written)
    except KeyboardInterrupt:
        done = f"the files above were written ({len(written)}), but not the table"
        raise Interrupted(f"interrupted: {done if written else 'no file was written'}") from None


def _print_table(subject: Source, written: Sequence[Exported]) -> None:
    if written:
        print(f"\n{as_text(rows(subject, written), subject.judged_count)}", flush=True)


@torch.no_grad()
def rows(subject: Source, written: Sequence[Exported]) -> list[FileRow]:
    """For each file, its figures and its latency: all files, the dense network in each engine and
    in PyTorch (on the device of each engine) take turns."""
    device, batch = subject.test.device, subject.run.graph.batch
    places = {e.format: engines.device_of(e.format, str(device)) for e in written}
    dense = {
        place: copied(subject.dense).to(place).to(memory_format=LAYOUT) for place in places.values()
    }
    with tempfile.TemporaryDirectory() as aside:
        runs = {kind: _dense_runner(subject, kind, Path(aside)) for kind in places}
        runs |= {
            f"{e.format} {e.precision}": Runner(subject, e.format, e.precision, e.parts[0])
            for e in written
        }
        times: dict[str, dict[int, float]] = {name: {} for name in (*dense, *runs)}
        for count in [batch] if subject.feed.batch else sorted({ONE, batch}):
            images = subject.images[:count]
            fed: np.ndarray = subject.feed.of(images).numpy()
            tasks: list[Callable[[], object]] = [
                functools.partial(model, images.to(place).contiguous(memory_format=LAYOUT))
                for place, model in dense.items()
            ]
            tasks += [functools.partial(run, fed) for run in runs.values()]
            for name, taken in zip(times, figures.in_turns(tasks, device), strict=True):
                times[name][count] = taken
    return [
        FileRow(
            e.format,
            e.precision,
            places[e.format],
            e.form,
            e.bytes,
            e.difference,
            e.top1,
            times[f"{e.format} {e.precision}"],
            times[e.format],
            times[places[e.format]],
            subject.flop_ratio,
            runs[f"{e.format} {e.precision}"].engine.micro_batch(batch),
        )
        for e in written
    ]


def _dense_runner(subject: Source, kind: str, aside: Path) -> Runner:
    """The dense network in fp32 in the engine of a format, in its fastest form."""
    form = fastest_form(subject, subject.dense, kind, "fp32", aside)
    parts = write(subject, subject.dense, kind, "fp32", form, aside / kind)
    return Runner(subject, kind, "fp32", parts[0])
