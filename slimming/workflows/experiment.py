"""An experiment of run.py: its settings, its folder, and the results of its stages."""

import contextlib
import json
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from slimming.data.pixels import SIZE
from slimming.errors import Interrupted
from slimming.settings import flat
from slimming.storage import files
from slimming.storage.claim import claimed
from slimming.workflows.experiment_settings import ExperimentSettings
from slimming.workflows.record import Record

PASSING = {"resume", "save_model", "eval_only", "command"}  # may differ when resuming
PASSING |= {"workers", "threads", "device", "no_cuda"}  # depend on the machine


@dataclass(frozen=True)
class Experiment:
    """A running experiment: its stages write files to ``folder`` and results to ``record``."""

    settings: ExperimentSettings
    folder: Path
    record: Record

    @property
    def config(self) -> dict[str, Any]:
        """See `config_of`."""
        return config_of(self.settings)

    def network_file(self, suffix: str) -> Path:
        """The file of the network from the stage ``suffix``: base, pruned or rebuilt."""
        return self.folder / f"{self.settings.network.model}_{suffix}.pth"


@contextlib.contextmanager
def begin_experiment(settings: ExperimentSettings) -> Iterator[Experiment]:
    """Start a new experiment or, with --resume, continue an unfinished one. Printed output is also
    written to log.txt; Ctrl-C prints the command that continues it."""
    folder, method = _choose_folder(settings), {}
    if not settings.execution.skip_pruning:
        pruning = settings.pruning
        method = {"method": pruning.pruning_method, "ratio": pruning.pruning_ratio}
    config = json.dumps(config_of(settings), indent=1).encode()
    with claimed(folder), _logged(folder / "log.txt"), _interruption(folder):
        files.write_bytes(folder / "config.json", config)
        yield Experiment(settings, folder, Record(folder / "metrics.json", **method))


def config_of(settings: ExperimentSettings) -> dict[str, Any]:
    """All settings of the experiment by name, and the command that repeats it."""
    size = settings.asked()["image_size"]
    values = flat(settings) | {
        "importance": settings.pruning.importance_or_default,
        "ignore": list(settings.pruning.ignore),
        "dataset": settings.data.name,
        "data": settings.data.source.data,
        "image_size": settings.data.image_size or (size if size != SIZE else None),
    }
    config = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
    return {**config, "command": shlex.join(["python", *sys.argv])}


def same_settings(
    config: Path, settings: ExperimentSettings, names: Collection[str] | None = None
) -> bool:
    """Whether the experiment in ``config`` has these ``settings``, or those called ``names``."""
    try:
        recorded = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    ours, defaults = (
        json.loads(json.dumps(config_of(s))) for s in (settings, ExperimentSettings())
    )
    pruning = settings.pruning
    if (pruning.global_pruning or pruning.allocation) and not pruning.masks:
        defaults["least"] = 0.0  # before there was --least, a layer could keep one channel
    recorded = {**defaults, **recorded}  # an older version knew fewer settings
    compared = ours.keys() - PASSING if names is None else names
    return all(recorded.get(n) == ours[n] for n in compared)


def _choose_folder(settings: ExperimentSettings) -> Path:
    """<output-dir>/<dataset>/<model>_<method>_<dataset>_<time>; with --resume, the folder of the
    latest unfinished experiment with the same settings, if there is one."""
    network, data = settings.network, settings.data.name
    parent = network.output_dir / data
    stem = f"{network.model}_{settings.pruning.pruning_method}_{data}"
    if settings.execution.resume:
        for config in sorted(parent.glob(f"{stem}_*/config.json"), reverse=True):
            unfinished = not (config.parent / "report.html").exists()
            if unfinished and same_settings(config, settings):
                print(f"resuming {config.parent}")
                return config.parent
        print("note: there is no unfinished experiment with these settings: starting a new one")
    name, number = f"{stem}_{datetime.now():%Y%m%d_%H%M%S}", 1
    folder = parent / name
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # of another experiment that began in this second
            if not folder.is_dir():
                raise
        number += 1
        folder = folder.with_name(f"{name}-{number}")


@contextlib.contextmanager
def _interruption(folder: Path) -> Iterator[None]:
    """Ctrl-C prints the command that continues the experiment."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        words = [word for word in sys.argv if word != "--resume"]
        command = shlex.join(["python", *words, "--resume"])
        raise Interrupted(f"interrupted in {folder}; continue with: {command}") from None


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Printed output is also written to the file."""
    with open(path, "a") as file, contextlib.redirect_stdout(_Tee(sys.stdout, file)):
        yield


class _Tee:
    """Write to two streams; all other attributes are those of the first."""

    def __init__(self, screen: TextIO, file: TextIO):
        self.screen, self.file = screen, file

    def write(self, text: str) -> int:
        self.file.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        self.file.flush()
        self.screen.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)
