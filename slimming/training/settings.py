"""The settings of training, and the files of a run."""

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimming.errors import UserError
from slimming.runtime import distributed
from slimming.settings import count, count_from_zero, fraction, not_negative, seed, setting
from slimming.storage.files import claimed
from slimming.training.penalties import PENALTIES

START_FLAGS = ("--refine", "--resume", "--start-epoch")  # dropped when a run continues


class RunFolder:
    """The files of a run: ``last`` and ``best`` checkpoint, ``curves``, TensorBoard ``events``.

    ``resumed``: the checkpoint to resume from, if any. The folder is ``path``, else the one of
    ``resumed``, else ./logs. ``name`` replaces checkpoint and model_best in file names; a run that
    is resumed in its folder keeps its name.
    """

    def __init__(
        self, path: str | Path | None, name: str | None = None, resumed: str | Path | None = None
    ):
        self.resumed = Path(resumed) if resumed else None
        self.path = Path(path or (self.resumed.parent if self.resumed else "logs"))
        self.name = name = name or self._name_of_resumed(elsewhere=bool(path))
        self.last = self.path / f"{name or 'checkpoint'}.pth.tar"
        self.best = self.path / f"{name + '_best' if name else 'model_best'}.pth.tar"
        self.curves = self.path / f"{name + '_' if name else ''}curves.png"
        self.events = self.path / (f"tensorboard_{name}" if name else "tensorboard")

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Claim the folder for a block, see `slimming.storage.files.claimed`. Processes of torchrun
        are one run: the first one claims it."""
        return contextlib.nullcontext() if distributed.rank() else claimed(self.path, self.name)

    def after_epoch(self, epoch: int) -> None:
        """In ckpts, where the suite of preact_res20 has the best model in a folder best_acc, make
        that folder, with a link to ours."""
        link = self.path / "best_acc" / self.best.name
        if self.path.parent.name == "ckpts" and not distributed.rank() and not link.is_symlink():
            with contextlib.suppress(OSError):  # a file system without links
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(Path("..", self.best.name))

    def prepare(self) -> None:
        """Create the folder. Results of another run in it are moved aside, not overwritten.

        Events alone do not count: they are of a run that stopped before its first checkpoint.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"cannot create the folder {self.path}: {error.strerror}; use another `save`"
            ) from error
        older = [p for p in (self.best, self.curves, self.events, self.last) if p.exists()]
        continued = self.resumed and self.last.exists() and self.last.samefile(self.resumed)
        if continued or older in ([], [self.events]):
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        aside = self.path / f"previous-{number}"
        aside.mkdir()
        for path in older:  # the checkpoint last, so that an interrupted move is completed later
            os.replace(path, aside / path.name)
        print(f"note: {self.path} contained another run; its files were moved to {aside}")

    def _name_of_resumed(self, elsewhere: bool) -> str | None:
        """The ``--filename`` of the run that wrote the resumed checkpoint."""
        if not self.resumed or elsewhere:
            return None
        name = self.resumed.name.removesuffix(".pth.tar").removesuffix("_best")
        return None if name in ("checkpoint", "model") else name

    def how_to_continue(self) -> str:
        """The command that continues the run after an interruption."""
        if not self.last.exists():
            return "interrupted before the first checkpoint was written: start again"
        words, skip = ["python"], False
        if distributed.launched():
            here, everywhere = (os.environ[n] for n in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
            how = f"--nproc-per-node={here}" if here == everywhere else "(same flags as before)"
            words = [f"torchrun {how} --"]
        for word in sys.argv:
            if not skip and not word.startswith(tuple(f"{flag}=" for flag in START_FLAGS)):
                words.append(word)
            skip = word in START_FLAGS
            if skip:
                words.pop()
        command = f"{words[0]} {shlex.join([*words[1:], '--resume', str(self.last)])}"
        return f"interrupted; continue with: {command}"


@dataclass(frozen=True)
class TrainSettings:
    """One training run; the defaults are those of the paper. Fields that are ``kept`` are restored
    from the checkpoint when a run is resumed."""

    title: ClassVar[str] = "training"
    sr: bool = setting(
        False,
        "train with the L1 penalty on the scaling factors",
        *("-sr", "--sparsity-regularization"),
        kind="on/off",
        kept=True,
    )
    s: float = setting(
        1e-4,
        "strength of the penalty",
        *("--s", "--sparsity"),  # torchrun reads --s as an abbreviation of its own flags
        metavar="S",
        parse=not_negative,
        kept=True,
    )
    penalty: str = setting(
        "l1",
        "with -sr: l1, the subgradient of the paper; prox, a proximal step, which makes scaling "
        "factors exactly zero; polar, which parts them into zero and not zero; group, by l1 those "
        "of coupled channels together",
        choices=tuple(PENALTIES),
        kept=True,
    )
    batch_size: int = setting(
        64, "batch size of all processes", metavar="N", parse=count, kept=True
    )
    epochs: int = setting(160, "number of epochs", metavar="N", parse=count, kept=True)
    start_epoch: int | None = setting(
        None, "first epoch, counted from 0", metavar="N", parse=count_from_zero
    )
    lr: float = setting(
        0.1,
        "learning rate, divided by 10 after 1/2 and 3/4 of the epochs",
        metavar="R",
        parse=not_negative,
        kept=True,
    )
    momentum: float = setting(0.9, "momentum of SGD", metavar="M", parse=fraction, kept=True)
    weight_decay: float = setting(
        1e-4,
        "weight decay",
        "--weight-decay",
        "--wd",
        metavar="W",
        parse=not_negative,
        kept=True,
    )
    seed: int = setting(
        1,
        "random seed of weights, shuffling and augmentation",
        metavar="N",
        parse=seed,
        kept=True,
    )
    log_interval: int = setting(100, "print a line every N batches", metavar="N", parse=count)
    amp: bool = setting(
        False,
        "mixed precision: bf16, or fp16 on older GPUs",
        *("--amp", "-amp_loss"),
        kind="on/off",
        kept=True,
    )
    deterministic: bool = setting(
        False, "deterministic CUDA kernels (the CPU always is)", kind="on/off", kept=True
    )
    compile: bool = setting(
        False,
        "compile the network with torch.compile, with CUDA graphs on CUDA",
        kind="switch",
    )
    sync_bn: bool = setting(
        False, "synchronise BatchNorm over all processes (CUDA, torchrun)", kind="switch"
    )

    def __post_init__(self) -> None:
        if self.penalty != "l1" and not self.sr:
            raise UserError(f"`penalty` {self.penalty} needs `sr`: add it")
