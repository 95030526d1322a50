"""Run one step in a process group of its own, and record what came of it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.steps import Setup, Step

ROOT = Path(__file__).resolve().parents[2]
TAIL = 25  # lines of the output of a failed step that are recorded
PATIENCE = 10  # seconds to end in


def run_step(step: Step, setup: Setup, seconds: float, record: Record) -> None:
    """Run a step for so many ``seconds`` at most, and add its tables, even of a part of it, and
    its state to the ``record``: done, failed or out of time."""
    command = step.command(replace(setup, seconds=seconds))
    print(f"{step.name}: python {command}", flush=True)
    setup.work.mkdir(parents=True, exist_ok=True)
    log = setup.work / f"{step.name}.log"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        status = _run(command, log, seconds, Path(folder))
        found = sorted(Path(folder).glob("*.json"))
        results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    result: dict[str, Any] = {
        "state": {0: "done", None: "out of time"}.get(status, "failed"),
        "seconds": round(time.monotonic() - began),
        "date": date.today().isoformat(),
        "summary": "" if results or not lines else lines[-1].strip(),
        "tables": results,
    }
    for table in results.values():
        table["about"].pop("command", None)  # it has paths of this machine
    if status != 0:
        here = f"{ROOT}{os.sep}"
        result["error"] = [line.replace(here, "") for line in lines[-TAIL:]]
        print("\n".join(result["error"]))
    record.add(step.name, result)
    print(f"{step.name}: {result['state']} after {result['seconds']} s ({log})", flush=True)


def _run(command: str, log: Path, seconds: float, results: Path) -> int | None:
    """The exit status of ``python command``, None if it was ended after so many ``seconds``."""
    env = {**os.environ, measure.FOLDER: str(results), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End what is left of the process and of those that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
