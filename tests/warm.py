"""Scripts as forks of a process that has imported PyTorch: they start in milliseconds."""

import functools
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300
NOWHERE = [Path(os.devnull)] * 2
LIBRARIES = """
    torchvision torch.utils.tensorboard torch.utils.flop_counter torch.export torch_pruning
    torch.fx.experimental.optimization tqdm sklearn.datasets sklearn.model_selection
    matplotlib.figure matplotlib.backends.backend_agg
""".split()

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


def run(command, *more, **settings) -> subprocess.CompletedProcess:
    """What ``python command more`` prints, and its status; for the settings see `start`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start(command, *more, files=files, **settings)
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT)
        texts = [file.read_text() for file in files]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def start(command, *more, files=NOWHERE, cwd=ROOT, env=None, preexec_fn=None) -> BaseProcess:
    """The process of ``python command more``, to be killed or waited for.

    ``files``: where stdout and stderr go; ``env`` adds to the environment.
    """
    words = [*shlex.split(command), *map(str, more)]
    told = (words, files, str(cwd), env or {}, preexec_fn)
    process = _server.Process(target=_as_command, args=told)
    process.start()
    return process


def on_processes(command, count=2, restarts=0) -> str:
    """The command by which torchrun starts ``command`` on so many processes of this machine."""
    several = f"--nproc-per-node={count} --max-restarts={restarts}"
    # without --, torchrun takes --s for one of its own flags
    return f"-m torch.distributed.run --standalone {several} -- {command}"


def _as_command(
    words: list[str], files: list[Path], cwd: str, env: dict, prepare: Callable | None
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
    if prepare:
        prepare()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        if script.parent == ROOT:
            _time_briefly()
        sys.argv = [str(script), *words[1:]]
        runpy.run_path(str(script), run_name="__main__")


def _time_briefly() -> None:
    """Latency is measured in as few rounds as may be: two seconds each time would be most of what
    some scripts take."""
    from slimming.measuring import profiling

    profiling.latencies = functools.partial(profiling.latencies, seconds=0)
