"""Shared by the benchmarks: fair timing on a noisy machine, and tables on disk."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

from slimming.reports import tables
from slimming.runtime import optional
from slimming.runtime.device import now

FOLDER = "BENCHMARK_RESULTS"  # the environment variable of another folder for results
RESULTS = Path(os.environ.get(FOLDER, Path(__file__).resolve().parent / "results"))

K = TypeVar("K")
ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}  # those of CPUs


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A process that ends with the context: it gets SIGTERM, and the time to finish."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def in_turns(
    tasks: dict[K, Callable[[], object]], rounds: int, device: torch.device, title: str
) -> dict[K, list[float]]:
    """Seconds of each task in each round; the tasks take turns, after one round of warm-up. A task
    that returns a number has measured its seconds itself."""
    seconds: dict[K, list[float]] = {name: [] for name in tasks}
    for turn in optional.bar(range(rounds + 1), desc=title, disable=None):
        for name, task in tasks.items():
            start = now(device)
            own = task()
            taken = own if isinstance(own, float) else now(device) - start
            if turn:
                seconds[name].append(taken)
    return seconds


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions that figures are measured with."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    libraries = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "torch": torch.__version__,
        **({"CUDA": libraries} if device.type == "cuda" else {}),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": f"python {' '.join(sys.argv)}",
    }


def merged(name: str, rows: list[dict], key: list[str]) -> list[dict]:
    """``rows``, after the rows of the table ``name`` with other values in the ``key`` columns."""
    path = RESULTS / f"{name}.json"
    recorded = json.loads(path.read_text())["rows"] if path.exists() else []
    new = [[row[column] for column in key] for row in rows]
    return [row for row in recorded if [row.get(column) for column in key] not in new] + rows


def write(name: str, about: dict, header: list[str], rows: list[dict], notes: str = "") -> None:
    """Print the table, and write it as Markdown and JSON to `RESULTS`."""
    rows = [{column: row[column] for column in header} | row for row in rows]
    print(tables.table(header, _cells(header, rows)))
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    RESULTS.mkdir(exist_ok=True)
    lines = [f"# {name}", "", facts, "", *markdown(header, rows), "", notes]
    text = "\n".join(lines).rstrip() + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"wrote {RESULTS / name}.md and .json")


def markdown(header: list[str], rows: list[dict]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *_cells(header, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cells(header: list[str], rows: list[dict]) -> list[list[str]]:
    return [[str(row[column]) for column in header] for row in rows]
