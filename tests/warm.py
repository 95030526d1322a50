"""Scripts as forks of a process that has imported the suite: they start in milliseconds."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": True}  # the store is that of who started the processes
NOWHERE = [Path(os.devnull)] * 2
LIBRARIES = """
    torchvision torch.utils.tensorboard torch.utils.flop_counter torch.export
    torch.fx.experimental.optimization tqdm sklearn.datasets sklearn.model_selection
    matplotlib.figure matplotlib.backends.backend_agg
""".split()
SUITE = """
    slimming.commands.experiment.run slimming.commands.rounds.run slimming.commands.prune.run
    slimming.commands.export.run slimming.commands.sweep.run
    slimming.commands.evaluate.run slimming.cli.entry slimming.commands.sweep.report
""".split()

PICTURES = [m.name for m in pkgutil.iter_modules(PIL.__path__, "PIL.") if "Plugin" in m.name]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([*LIBRARIES, *PICTURES, *SUITE])


def run(command, *more, processes=1, env=None, **settings) -> subprocess.CompletedProcess:
    """What ``python command more`` prints, and its status; for the settings see `start`.

    With several ``processes``, each has the environment that torchrun would give it; when one of
    them fails, the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        envs = [env or {}]
        if processes > 1:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            envs = [
                {**envs[0], **_of_rank(rank, processes, store.port)} for rank in range(processes)
            ]
        started = [start(command, *more, files=files, env=each, **settings) for each in envs]
        for process in started:
            stack.callback(process.kill)
        deadline, waiting = time.monotonic() + TIMEOUT, started
        while waiting and not any(process.exitcode for process in started):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(command, TIMEOUT)
            multiprocessing.connection.wait([process.sentinel for process in waiting], TIMEOUT)
            waiting = [process for process in waiting if process.is_alive()]
        status = next((process.exitcode for process in started if process.exitcode), 0)
        for process in waiting:
            process.terminate()
            process.join(TIMEOUT)
        return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))


def _of_rank(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun says in the environment of a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    more = {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    return {key: str(value) for key, value in {**numbers, **more, **AGENT}.items()}


def start(
    command, *more, files=NOWHERE, cwd=ROOT, env=None, preexec_fn=None, short=True
) -> BaseProcess:
    """The process of ``python command more``, to be killed or waited for.

    ``files``: where stdout and stderr go; ``env`` adds to the environment; ``short``: whether it
    takes the shortcuts of `shorten`.
    """
    words = [*shlex.split(command), *map(str, more)]
    told = (words, files, str(cwd), env or {}, preexec_fn, short)
    process = _server.Process(target=_as_command, args=told)
    process.start()
    return process


def on_processes(command, count=2, restarts=0) -> str:
    """The command by which torchrun starts ``command`` on so many processes of this machine."""
    several = f"--nproc-per-node={count} --max-restarts={restarts}"
    # without --, torchrun takes --s for one of its own flags
    return f"-m torch.distributed.run --standalone {several} -- {command}"


def _as_command(
    words: list[str],
    files: list[Path],
    cwd: str,
    env: dict,
    prepare: Callable | None,
    short: bool,
) -> None:
    """Become ``python words``, where the first is a script of the suite, or -m."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # as usual: a forkserver comes from ours
    script = ROOT / words[0]
    libraries = [path for path in sys.path if ROOT not in (Path(path), Path(path).parent)]
    sys.path = [str(script.parent), *libraries]
    if script.parent.name == "tests":
        sys.path.append(str(ROOT))
    elif prepare:  # imports with something missing
        for name in [n for n in sys.modules if n.partition(".")[0] in ("slimming", "models")]:
            del sys.modules[name]
    if prepare:
        prepare()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        if short and (script.parent == ROOT or (script.parent.name == "mask-impl" and not prepare)):
            shorten()
        sys.argv = [str(script), *words[1:]]
        runpy.run_path(str(script), run_name="__main__")


def shorten(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """What takes most of the seconds of many a script in this process is not done: latencies are
    not measured, but grow with the images and from network to network; tasks take as few turns as
    may be; a file of the slim network is timed as that of the dense one;
    PyTorch's files of half precision run in no process of their own; of a plot, nothing is
    drawn but its frame. Tests of these do without this."""
    from slimming.commands.export import run as export_run
    from slimming.deploy import engines, graph
    from slimming.measuring import figures

    in_turns, rows, run_alone = figures.in_turns, export_run.rows, graph.run_alone

    def latencies(models: Sequence, images: Sequence, seconds: float = 0) -> list[float]:
        return [(len(images) + i) / 1e3 for i in range(len(models))]

    def few_turns(tasks: Sequence, device: object, seconds: float = 0) -> list[float]:
        return in_turns(tasks, device, seconds=0)

    def rows_of(subject: object, written: Sequence[Any]) -> list:
        def first_file(subject: object, kind: str, aside: Path) -> object:
            file = next(file for file in written if file.format == kind)
            return export_run.Runner(subject, kind, file.precision, file.parts[0])

        set_attribute(export_run, "_dense_runner", first_file)
        return rows(subject, written)

    def in_here(
        kind: str, path: Path, precision: str, images: Any, threads: int = 1, alone: bool = False
    ) -> Any:
        if kind != "torch" or precision in ("fp32", "int8"):
            return run_alone(kind, path, precision, images, threads, alone)
        more = [*images, *images[: int(alone)]]
        return engines.ENGINES[kind](str(path), precision)(np.stack(more))

    set_attribute(graph, "run_alone", in_here)
    set_attribute(export_run, "rows", rows_of)
    set_attribute(figures, "latencies", latencies)
    set_attribute(figures, "in_turns", few_turns)
    try:
        from matplotlib.figure import Figure
    except ImportError:  # hidden by a test
        return
    save = Figure.savefig

    def savefig(figure: Figure, *words: Any, **settings: Any) -> None:
        save(Figure(figure.get_size_inches()), *words, **settings)

    set_attribute(Figure, "savefig", savefig)
