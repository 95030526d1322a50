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
from slimming.measuring.deploy import deploy, forms_of
from slimming.measuring.export import engines, proof
from slimming.measuring.export.formats import FORMATS
from slimming.measuring.export.graph import traced
from slimming.measuring.forms import Form
from slimming.pruning.proof import TOLERANCE
from slimming.runtime import optional
from slimming.storage import files
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
    else than the network; then nothing is written."""
    with _aside(subject.run.folder) as aside:
        name = _fastest(subject, kind, precision, aside)
        form = forms_of(subject.model)[name]
        stem = subject.path.name.partition(".")[0]
        stem += "" if precision == "fp32" else f"-{precision}"
        parts = _write(subject, subject.model, kind, precision, (name, form), aside / stem)
        difference = _difference(subject, kind, precision, parts[0])
        top1 = None if precision == "fp32" else _judge(subject, kind, precision, parts[0])
        kept = [_kept(part, subject.run.folder) for part in reversed(parts)][::-1]
    print(
        f"{kind} {precision}: wrote {', '.join(map(str, kept))}, form {name}; in a fresh process "
        f"its logits differ by {difference:.1e} (relative) from PyTorch's",
        flush=True,
    )
    return Exported(kind, precision, name, kept, difference, top1)


def dense_engine(subject: Subject, kind: str, aside: Path) -> engines.Engine:
    """The dense network in fp32 in the engine of this format."""
    name, form = list(forms_of(subject.dense).items())[1]
    parts = _write(subject, subject.dense, kind, "fp32", (name, form), aside / f"dense-{kind}")
    return engine(subject, kind, "fp32", parts[0])


def engine(subject: Subject, kind: str, precision: str, path: Path) -> engines.Engine:
    """What runs a file on the device of ``subject``."""
    device, threads = subject.test.device.type, torch.get_num_threads()
    try:
        return engines.ENGINES[kind](str(path), precision, threads, device)
    except Exception as error:  # each engine raises types of its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{kind} cannot load the {precision} file it exported: {reason}") from error


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the files to write. UserError if it cannot be written."""
    with files.no_empty_folders(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
                yield Path(aside)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def _fastest(subject: Subject, kind: str, precision: str, aside: Path) -> str:
    """The form of the graph to write: the one asked for, or the fastest."""
    forms = forms_of(subject.model)
    asked = subject.run.graph.form
    if asked != AUTO:
        if asked not in forms:
            raise UserError(f"--form {asked}: this network has the forms {', '.join(forms)}")
        return asked
    exact = precision in ("fp32", "bf16")  # clamps of large values leave nothing to other values
    names = [name for name, form in forms.items() if exact or (form.fold and not form.clamp)]
    if len(names) == 1:
        return names[0]
    tried = "fp32" if precision == "int8" else precision
    fed, runs = subject.feed.of(subject.images).numpy(), {}
    for name in optional.bar(names, desc=f"{kind} {precision}", leave=False, disable=None):
        path = aside / f"{name}-tried"
        parts = _write(subject, subject.model, kind, tried, (name, forms[name]), path)
        runs[name] = engine(subject, kind, tried, parts[0])
    tasks = [lambda run=run: run(fed) for run in runs.values()]
    seconds = profiling.in_turns(tasks, subject.test.device, SECONDS)
    times = sorted(zip(seconds, runs, strict=True))
    text = ", ".join(f"{name} {1e3 * time:.2f}" for time, name in times)
    print(f"{kind} {precision}: ms of {len(fed)} images by form: {text}", flush=True)
    return times[0][1]


def _write(
    subject: Subject,
    model: nn.Module,
    kind: str,
    precision: str,
    named: tuple[str, Form],
    path: Path,
) -> list[Path]:
    """Write ``model`` in a form to ``path`` without its ending; the files."""
    name, form = named
    target = FORMATS[kind]
    batches = subject.calibration if precision == "int8" else []
    metadata = subject.metadata(precision, name)
    try:
        program = traced(deploy(model, target.dtype(precision), form), subject.feed)
        whole = path.with_name(path.name + target.suffix)
        return target.write(program, whole, precision, batches, metadata)
    except OSError:
        raise
    except Exception as error:  # exporters and quantizers raise types of their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{kind} {precision} cannot express {subject.network}: {reason}. Try another --format "
            "or --precision, or --form plain"
        ) from error


def _difference(subject: Subject, kind: str, precision: str, path: Path) -> float:
    """The largest difference from PyTorch's logits in a fresh process. UserError if it is too
    large for fp32."""
    fed, expected = subject.feed.of(subject.images).numpy(), subject.logits.numpy()
    logits = proof.run_alone(kind, path, precision, fed, torch.get_num_threads())
    difference = float(abs(logits - expected).max() / max(abs(expected).max(), 1e-30))
    if precision == "fp32" and not difference <= TOLERANCE:
        raise UserError(
            f"{kind} {precision} differs from PyTorch by {difference:.1e} of the largest logit "
            f"(allowed: {TOLERANCE:.0e}): nothing is written"
        )
    return difference


def _judge(subject: Subject, kind: str, precision: str, path: Path) -> float:
    """The accuracy of a file. UserError if it loses more than --max-drop."""
    run, hits, total = engine(subject, kind, precision, path), 0, 0
    size = subject.feed.batch or subject.run.graph.batch
    bar = optional.bar(subject.judged, desc=f"{kind} {precision}: test", leave=False, disable=None)
    for images, labels in bar:
        for few, own in zip(images.split(size), labels.split(size), strict=True):
            rows = torch.arange(size if subject.feed.batch else len(few)) % len(few)
            logits = torch.from_numpy(run(subject.feed.of(few[rows]).numpy()))[: len(few)]
            hits += int((logits.argmax(1) == own).sum())
            total += len(own)
    top1, drop = hits / total, 100 * (subject.top1 - hits / total)
    if drop > subject.run.judging.max_drop:
        raise UserError(
            f"{kind} {precision} has {top1:.2%} top-1, {drop:.2f} points less than fp32 "
            f"({subject.top1:.2%}; --max-drop {subject.run.judging.max_drop:g}): it is not "
            "written. Raise --max-drop, or use another --precision or --form"
        )
    return top1


def _kept(part: Path, folder: Path) -> Path:
    """Move a finished file to its place; a reader sees the old one or the new one."""
    return part.replace(folder / part.name)
