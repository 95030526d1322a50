"""The latency of exported files, beside the dense network's."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from slimming.channels.groups import copied
from slimming.errors import Interrupted, UserError
from slimming.measuring import profiling
from slimming.measuring.export import engines
from slimming.reports.exports import Row, as_text
from slimming.runtime.device import LAYOUT
from slimming.workflows.exporting.exports import Exported, fastest_form
from slimming.workflows.exporting.running import Runner, write
from slimming.workflows.exporting.subject import Subject

ONE = 1  # the other batch size that is measured


@contextlib.contextmanager
def reported(subject: Subject) -> Iterator[list[Exported]]:
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


def _print_table(subject: Subject, written: Sequence[Exported]) -> None:
    if written:
        print(f"\n{as_text(rows(subject, written), subject.judged_count)}", flush=True)


@torch.no_grad()
def rows(subject: Subject, written: Sequence[Exported]) -> list[Row]:
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
            for name, taken in zip(times, profiling.in_turns(tasks, device), strict=True):
                times[name][count] = taken
    return [
        Row(
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


def _dense_runner(subject: Subject, kind: str, aside: Path) -> Runner:
    """The dense network in fp32 in the engine of a format, in its fastest form."""
    form = fastest_form(subject, subject.dense, kind, "fp32", aside)
    parts = write(subject, subject.dense, kind, "fp32", form, aside / kind)
    return Runner(subject, kind, "fp32", parts[0])
