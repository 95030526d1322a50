"""From the dense network in fp32 to the slim one in int8: accuracy, bytes and latency of each step.

Every file is written by export.py's code, in its fastest form, and proved; all files of one engine
take turns.

    python benchmarks/precisions.py --pair logs/vgg logs/vgg-refined --data DIR [--pair ...]
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from slimming.cli import entry
from slimming.commands.export import run as exporting
from slimming.commands.export.settings import ExportRun
from slimming.settings import build

STEPS = [("dense", "fp32"), *(("slim", precision) for precision in ("fp32", "bf16", "int8"))]
BATCHES = (1, 64)
HEADER = ["network", "FLOPs", "engine", "step", "form", "top-1", "MB", "smaller"]
HEADER += [text for batch in BATCHES for text in (f"ms, batch {batch}", f"faster, batch {batch}")]
HEADER.append("micro-batch")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair",
        type=Path,
        nargs=2,
        action="append",
        required=True,
        metavar=("DENSE", "SLIM"),
        help="checkpoints of one network, or their folders, before and after pruning",
    )
    parser.add_argument("--data", help="folder of their dataset")
    parser.add_argument("--test-images", type=int, help="to judge on (default: all)")
    parser.add_argument("--rounds", type=int, default=25, help="of timing (default: 25)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    values = {
        "data": args.data,
        "no_cuda": True,
        "format": tuple(measure.ENGINES),
        "max_drop": 100.0,
    }
    values |= {"precision": ("fp32", "bf16", "int8"), "test_images": args.test_images}
    about = measure.machine(torch.device("cpu"))
    for pair in args.pair:
        with tempfile.TemporaryDirectory() as folder:
            both = {
                which: exporting.load(
                    build(
                        ExportRun, values | {"checkpoint": str(path), "save": f"{folder}/{which}"}
                    )
                )
                for which, path in zip(("dense", "slim"), pair, strict=True)
            }
            rows = [row for kind in measure.ENGINES for row in steps(both, kind, args.rounds)]
        rows = measure.merged("precisions-cpu", rows, HEADER[:3])
        measure.write("precisions-cpu", about, HEADER, rows, NOTES)


NOTES = """`FLOPs`: of the slim network, relative to the dense one; `smaller` and `faster`: than the
dense network in fp32 in the same engine."""


def steps(both: dict[str, exporting.Source], kind: str, rounds: int) -> Iterator[dict]:
    """A row for each step in the engine of a format."""
    files, runs = {}, {}
    for which, precision in STEPS:
        subject = both[which]
        files[which, precision] = file = exporting.export(subject, kind, precision)
        runs[which, precision] = exporting.Runner(subject, kind, precision, file.parts[0])
    slim = both["slim"]
    network, ratio = str(slim.network).removeprefix("slim "), f"1/{slim.flop_ratio:.2f}"
    taken = {batch: _medians(runs, slim, batch, rounds) for batch in BATCHES}
    whole = files[STEPS[0]].bytes
    for step in STEPS:
        file, top1 = files[step], files[step].top1
        top1 = both[step[0]].top1 if top1 is None else top1
        cells = [network, ratio, measure.ENGINES[kind], " ".join(step), file.form, f"{top1:.2%}"]
        cells += [f"{file.bytes / 1e6:.3f}", f"{whole / file.bytes:.1f}x"]
        for times in taken.values():
            cells += [f"{1e3 * times[step]:.2f}", f"{times[STEPS[0]] / times[step]:.2f}x"]
        cells.append(runs[step].engine.micro_batch(max(BATCHES)))
        yield dict(zip(HEADER, cells, strict=True))


def _medians(
    runs: dict[tuple[str, str], exporting.Runner],
    subject: exporting.Source,
    batch: int,
    rounds: int,
) -> dict[tuple[str, str], float]:
    """Median seconds of each file for this many images."""
    fed = subject.feed.of(subject.images[:batch]).numpy()
    tasks = {step: functools.partial(run, fed) for step, run in runs.items()}
    rounds *= 1 if batch > 1 else 8
    times = measure.in_turns(tasks, rounds, torch.device("cpu"), f"batch {batch}")
    return {step: statistics.median(seconds) for step, seconds in times.items()}


if __name__ == "__main__":
    entry.run(main)
