"""Write the files of a network, each proved and judged before it is kept."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.measuring.deploy import forms_of
from slimming.measuring.export import proof
from slimming.measuring.export.engines import Run
from slimming.measuring.export.formats import FORMATS
from slimming.pruning.slicing.proof import TOLERANCE
from slimming.runtime import optional
from slimming.storage import files
from slimming.workflows.exporting.running import Runner, write, writing
from slimming.workflows.exporting.settings import AUTO
from slimming.workflows.exporting.subject import Subject

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


def export(subject: Subject, kind: str, precision: str) -> Exported:
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


def check_forms(subject: Subject) -> None:
    """UserError if a file cannot have the form that was asked for."""
    for kind, precision in subject.run.graph.targets:
        _asked_form(subject, kind, precision)


def _asked_form(subject: Subject, kind: str, precision: str) -> str | None:
    """The form of the graph that was asked for, if one was. UserError if it is impossible."""
    names, asked = possible_forms(subject.model, kind, precision), subject.run.graph.form
    if asked == AUTO:
        return None
    if asked not in names:
        raise UserError(
            f"--form {asked}: in {kind} {precision} this network has the forms {', '.join(names)}"
        )
    return asked


def fastest_form(subject: Subject, model: nn.Module, kind: str, precision: str, aside: Path) -> str:
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
    seconds = profiling.in_turns(tasks, subject.test.device, SECONDS)
    times = sorted(zip(seconds, runs, strict=True))
    text = ", ".join(f"{name} {1e3 * time:.2f}" for time, name in times)
    which = ", dense network" if model is subject.dense else ""
    print(f"{kind} {precision}{which}: ms by form, batch {len(fed)}: {text}", flush=True)
    return times[0][1]


def _difference(subject: Subject, kind: str, precision: str, path: Path) -> float:
    """The largest difference from PyTorch's logits in a fresh process. UserError if it is too
    large for fp32."""
    fed, expected, alone = subject.feed.of(subject.images), subject.logits, not subject.feed.batch
    expected = torch.cat((expected, expected[:1])) if alone else expected
    threads = torch.get_num_threads()
    logits = torch.from_numpy(proof.run_alone(kind, path, precision, fed.numpy(), threads, alone))
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((logits - expected).abs().max() / scale)
    if precision == "fp32" and not difference <= TOLERANCE:
        raise UserError(
            f"{kind} {precision} differs from PyTorch by {difference:.1e} of the largest logit "
            f"(allowed: {TOLERANCE:.0e}): it is not written"
        )
    return difference


def _judge(subject: Subject, kind: str, precision: str, path: Path) -> float:
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


def accuracy(subject: Subject, run: Run, title: str) -> float:
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
