"""Prove and measure everything on one CUDA GPU, step by step.

Each step is a process with a time limit. Its result is written as soon as it ends, to
benchmarks/results/gpu-<name of the GPU>/: the same command goes on with what is missing or failed.

    python benchmarks/gpu.py [--minutes 25] [--data DIR] [--list] [--only STEP] [--dry-run]
"""

import argparse
import contextlib
import re
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from benchmarks.on_gpu import images
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.running import run_step
from benchmarks.on_gpu.steps import STEPS, Setup, Step
from slimming.cli import entry
from slimming.errors import Interrupted, UserError
from slimming.reports import tables
from slimming.runtime.device import choose_device
from slimming.settings import number

PATIENCE = 600  # seconds for a step of a dry run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "time for all steps; those that do not fit are left for the next call (default: 25)"
    parser.add_argument("--minutes", type=number(float, 1), default=25, metavar="M", help=text)
    text = "image folder (train/<class>/, test/<class>/) or a tar of it (default: generated images)"
    parser.add_argument("--data", type=Path, metavar="DIR", help=text)
    parser.add_argument("--list", action="store_true", help="print the steps and their time limits")
    text = "run this step alone, even if it is done; may be repeated"
    parser.add_argument("--only", action="append", choices=[s.name for s in STEPS], help=text)
    text = "run every step on the CPU with tiny networks, and keep no result"
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.list:
        print_list()
        return
    deadline = time.monotonic() + 60 * args.minutes
    with contextlib.ExitStack() as stack:
        record, setup = begin(args, stack)
        steps = [s for s in STEPS if s.name in (args.only or [s.name])]
        missing = [s for s in steps if args.only or not record.is_done(s.name)]
        for name in [s.name for s in steps if s not in missing]:
            print(f"{name}: done before")
        try:
            left = run_steps(missing, setup, record, deadline)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; go on with: {again()}") from None
    if left:
        print(f"no time was left for {', '.join(left)}: go on with: {again()}")
    failed = [step.name for step in steps if record.has_failed(step.name)]
    if failed:
        raise UserError(f"{', '.join(failed)} failed: {record.text} says why")


def begin(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Record, Setup]:
    """The record of the results so far, and what the steps run on."""
    if args.dry_run:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = images.generate(folder / "images", train=12, test=4)
        record = Record(folder / "results", measure.machine(torch.device("cpu")))
        return record, Setup("cpu", data, folder / "work", dry=True)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU: --dry-run runs every step on the CPU, to test it")
    device = choose_device("cuda")
    name = f"gpu-{slug(torch.cuda.get_device_name(device))}"
    work = ROOT / "reproduce" / name
    data = images.folder(args.data, work)
    return Record(measure.RESULTS / name, measure.machine(device)), Setup("cuda", data, work)


def slug(name: str) -> str:
    """The name of a GPU as part of a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def run_steps(steps: list[Step], setup: Setup, record: Record, deadline: float) -> list[str]:
    """Run the steps in order until the ``deadline``; the names of those that are left. In a dry run
    times do not count: two at a time, and all."""
    if setup.dry:
        pool = ThreadPoolExecutor(2)
        try:
            list(pool.map(lambda step: run_step(step, setup, PATIENCE, record), steps))
        finally:
            pool.shutdown(cancel_futures=True)
        return []
    for done, step in enumerate(steps):
        left = deadline - time.monotonic()
        if left < step.least:
            return [s.name for s in steps[done:]]
        run_step(step, setup, min(60 * (step.minutes or 1e9), left), record)
    return []


def print_list() -> None:
    rows = [[s.name, f"{s.minutes:g} min" if s.minutes else "the rest", s.what] for s in STEPS]
    header = ["step", "at most"]
    lines = tables.table(header, [row[:2] for row in rows]).splitlines()
    for line, what in zip(lines, ["what it does", "", *(row[2] for row in rows)], strict=True):
        print(f"{line}  {what}".rstrip())


def again() -> str:
    return shlex.join(["python", *sys.argv])


if __name__ == "__main__":
    entry.run(main)
