"""Scripts as forks of a process that has imported PyTorch: they start in milliseconds."""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300
LIBRARIES = ["torchvision", "torch.utils.tensorboard", "torch.export", "torch_pruning"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


def run(command, *more, cwd=ROOT, env=None, preexec_fn=None) -> subprocess.CompletedProcess:
    """What ``python command more`` prints, and its status; ``env`` adds to the environment."""
    script, *words = [*shlex.split(command), *map(str, more)]
    words = [str(ROOT / script), *words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        told = (words, files, str(cwd), env or {}, preexec_fn)
        process = _server.Process(target=_as_script, args=told)
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, TIMEOUT)
        return subprocess.CompletedProcess(words, process.exitcode, *(f.read_text() for f in files))


def _as_script(
    words: list[str], files: list[Path], cwd: str, env: dict, prepare: Callable | None
) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(env)
    libraries = [path for path in sys.path if ROOT not in (Path(path), Path(path).parent)]
    sys.argv, sys.path = words, [os.path.dirname(words[0]), *libraries]
    if prepare:
        prepare()
    runpy.run_path(words[0], run_name="__main__")
