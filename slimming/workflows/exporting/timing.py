"""The latency of exported files, beside the dense network's."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from slimming.errors import Interrupted, UserError
from slimming.measuring import profiling
from slimming.reports.exports import Row, as_text
from slimming.runtime.device import LAYOUT
from slimming.workflows.exporting.exports import Exported, chosen_form, possible_forms
from slimming.workflows.exporting.running import Runner, write
from slimming.workflows.exporting.settings import AUTO
from slimming.workflows.exporting.subject import Subject

FOLDED = "folded"  # a form of all dense networks
ONE = 1  # the other batch size that is measured


@contextlib.contextmanager
def reported(subject: Subject) -> Iterator[list[Exported]]:
    """Prints the table of all files that are in the list at the end, also if one was refused."""
    written: list[Exported] = []
    try:
        yield written
    except UserError:
        if written:
            print(f"\n{as_text(rows(subject, written))}", flush=True)
        raise
    except KeyboardInterrupt:
        done = f"the files above were written ({len(written)}), but not the table"
        raise Interrupted(f"interrupted: {done if written else 'no file was written'}") from None
    print(f"\n{as_text(rows(subject, written))}")


@torch.no_grad()
def rows(subject: Subject, written: Sequence[Exported]) -> list[Row]:
    """For each file, its figures and its latency: all files, the dense network in each engine and
    in PyTorch take turns."""
    device = subject.test.device
    dense = copy.deepcopy(subject.dense).to(device).to(memory_format=LAYOUT)
    batch = subject.run.graph.batch
    with tempfile.TemporaryDirectory() as aside:
        runs = {kind: _dense_runner(subject, kind, Path(aside)) for kind in _formats(written)}
        runs |= {
            f"{e.format} {e.precision}": Runner(subject, e.format, e.precision, e.parts[0])
            for e in written
        }
        times: dict[str, dict[int, float]] = {name: {} for name in ("PyTorch", *runs)}
        for count in [batch] if subject.feed.batch else sorted({ONE, batch}):
            images = subject.images[:count]
            fed: np.ndarray = subject.feed.of(images).numpy()
            still = images.to(device).contiguous(memory_format=LAYOUT)
            tasks = [lambda: dense(still)]  # noqa: B023  # run in this turn of the loop only
            tasks += [lambda run=run: run(fed) for run in runs.values()]  # type: ignore[misc]  # noqa: B023
            for name, taken in zip(times, profiling.in_turns(tasks, device), strict=True):
                times[name][count] = taken
    return [
        Row(
            e.format,
            e.precision,
            e.form,
            e.bytes,
            e.difference,
            e.top1,
            times[f"{e.format} {e.precision}"],
            times[e.format],
            times["PyTorch"],
            subject.flop_ratio,
            runs[f"{e.format} {e.precision}"].engine.micro_batch(batch),
        )
        for e in written
    ]


def _dense_runner(subject: Subject, kind: str, aside: Path) -> Runner:
    """The dense network in fp32 in the engine of a format, in its fastest form."""
    names, model = possible_forms(subject.dense, kind, "fp32"), subject.dense
    form = subject.run.graph.form
    if form == AUTO:
        form = chosen_form(subject, model, kind, "fp32", aside)
    parts = write(subject, model, kind, "fp32", form if form in names else FOLDED, aside / kind)
    return Runner(subject, kind, "fp32", parts[0])


def _formats(written: Sequence[Exported]) -> list[str]:
    return list(dict.fromkeys(e.format for e in written))
