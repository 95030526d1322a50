"""Write a graph in a format, and run its file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimming.errors import UserError, raise_if_of_the_machine
from slimming.measuring.deploy import deploy
from slimming.measuring.export import engines
from slimming.measuring.export.formats import FORMATS
from slimming.measuring.export.graph import traced
from slimming.measuring.forms import FORMS
from slimming.workflows.exporting.subject import Subject


def write(
    subject: Subject,
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

    def __init__(self, subject: Subject, kind: str, precision: str, path: Path):
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
