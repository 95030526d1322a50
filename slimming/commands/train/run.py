"""main.py: open a run, train it in its folder, and tell its results."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import NETWORKS, PAPER_DEPTH
from slimming.commands.settings import PRUNED
from slimming.commands.train.settings import TrainingRun
from slimming.data import loading
from slimming.data.datasets import DataSettings
from slimming.data.loading import Data
from slimming.errors import Interrupted, UserError
from slimming.measuring.figures import measure
from slimming.reports import plots, tables
from slimming.reports.plots import TensorBoard
from slimming.reports.tables import before_after_text, size_text
from slimming.runtime import device as runtime_device
from slimming.runtime import distributed
from slimming.runtime.device import choose_device, seed_everything
from slimming.settings import Dataclass, Spec, build, flag_names, kept, specs
from slimming.slicing import kernels
from slimming.slicing.prune import without_masked_channels
from slimming.sparsity import Sparsity
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture, Request
from slimming.storage.checkpoint import Contents
from slimming.training import loop
from slimming.training.callbacks import CheckpointWriter, EpochPrinter
from slimming.training.loop import Score
from slimming.training.penalties import GradientMask, L1Penalty
from slimming.training.settings import RunFolder, TrainSettings
from slimming.training.trainer import Trainer


def against_full(
    model: nn.Module,
    network: Architecture,
    score: loop.Score,
    before: loop.Score,
    loader: Data,
) -> str:
    """Compare a fine-tuned slim network with the full one, which scored ``before`` at pruning.

    A masked network is measured as the equivalent slim one.
    """
    full = replace(network, cfg=None).build().to(loader.device)
    model = without_masked_channels(model, network.cfg).to(loader.device)
    images = loader.first(64)
    return before_after_text(*measure([full, model], images, (len(images),), [before, score]))


# In a folder, the first pattern that matches a file.
TO_REFINE = (*PRUNED, "*_rebuilt.pth", "*_pruned.pth")
TO_RESUME = ("checkpoint.pth.tar",)
DIFFERENT_EPOCHS = (
    "the processes do not start at the same epoch: use a folder for --save and --resume that all "
    "machines share"
)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, if any, its contents, and whether it is resumed."""

    path: str | None = None
    contents: Contents = field(default_factory=Contents)
    resumes: bool = False

    @classmethod
    def at(cls, refine: str | Path | None, resume: str | Path | None) -> "Start":
        """Start from the file to ``resume``, else from the one to ``refine``, else from none."""
        path = resume or refine
        return cls(str(path), checkpoint.read(path), bool(resume)) if path else cls()


def main_run(typed: Mapping[str, Any]) -> tuple[TrainingRun, Start]:
    """The run of the ``typed`` flags (see `slimming.cli.flags.parse`), and where it starts.

    With ``--resume``, other settings come from the checkpoint. UserError if files are missing or
    contradict the flags.
    """
    run = build(TrainingRun, typed)
    start = find_start(run.start.refine, run.start.resume, lambda: _last_of(run))
    run = build(TrainingRun, {**recorded(TrainingRun, start, typed), **typed})
    path = {"refine": None, "resume": start.path} if start.resumes else {"refine": start.path}
    return run.starting_from(**{"resume": None, **path}), start


def _last_of(run: TrainingRun) -> Path:
    """The checkpoint that --resume auto looks for: the one that a new run would write."""
    arch, refine = None, run.start.refine
    if refine and run.named_by_file:
        start = Start.at(files.find(Path(refine), *TO_REFINE), None)
        arch = architecture.describe(start.path, start.contents, Request()).arch
    return run.starting_from(refine=refine, resume=None).folder(arch).last


def find_start(
    refine: str | None,
    resume: str | None,
    last: Callable[[], Path],
    patterns: tuple[str, ...] = TO_REFINE,
) -> Start:
    """Where a run starts: from the checkpoint to ``resume`` ("auto" is ``last()``, if it exists),
    else from the file to ``refine``, or the first of ``patterns`` in that folder. UserError if the
    file is missing."""
    if resume == "auto":
        resume = str(path) if (path := last()).exists() else None
    if resume:
        return Start.at(None, files.find(Path(resume), *TO_RESUME))
    return Start.at(refine and files.find(Path(refine), *patterns), None)


def recorded(kind: type[Dataclass], start: Start, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this ``kind`` in the checkpoint of a resumed run; prints a note for each that
    was ``typed`` with another value. UserError for an invalid value."""
    stored = start.contents.get("settings") if start.resumes else None
    stored = stored if isinstance(stored, dict) else {}
    values = {}
    for entry, spec in specs(kind):
        value = stored.get(entry.name)
        if not spec.kept or type(value) is not type(entry.default):
            continue
        values[entry.name] = _checked(value, flag_names(entry, spec)[0], spec, start)
        now = typed.get(entry.name, value)
        if now != value:
            flag = flag_names(entry, spec)[0]
            print(f"note: {flag} is {now} now, it was {value} in {start.path}")
    return values


def _checked(value: Any, flag: str, spec: Spec, start: Start) -> Any:
    if isinstance(value, bool):
        return value
    try:
        if spec.choices and value not in spec.choices:
            raise ValueError(f"must be one of {', '.join(spec.choices)}, not {value!r}")
        return spec.parse(str(value))
    except ValueError as error:
        raise UserError(f"{start.path} is damaged: its {flag} {error}") from error


def prepare(run: TrainingRun, start: Start, networks: dict = NETWORKS) -> Trainer:
    """The trainer of a run: its network with random weights, or with those of ``start``.

    ``networks`` are constructors by name. UserError if settings, files or data contradict each
    other.
    """
    model, network, loaders = open_run(run, start, networks)
    return begin(Trainer(model, network, *loaders, run.train, kept=kept(run)), start)


def open_run(
    run: TrainingRun, start: Start, networks: dict = NETWORKS
) -> tuple[nn.Module, Architecture, tuple[Data, Data]]:
    """`open_network` as the flags of a run ask for it."""
    return open_network(run.train, run.data, run.network.request(run.data), start, networks)


def open_network(
    train: TrainSettings,
    data: DataSettings,
    request: Request,
    start: Start,
    networks: dict = NETWORKS,
) -> tuple[nn.Module, Architecture, tuple[Data, Data]]:
    """The network, its architecture, and its (training, test) batches.

    What the ``request`` leaves open comes from the checkpoint, or is a default.
    """
    device = choose_device(data.device, data.no_cuda)
    distributed.start(device)
    if train.batch_size < distributed.world_size():
        raise UserError(
            f"--batch-size {train.batch_size} is too small for {distributed.world_size()} "
            "processes: use at least one image per process"
        )
    seed_everything(train.seed, train.deterministic)
    known = _with_defaults(architecture.describe(start.path, start.contents, request))
    if start.path:
        model, network = architecture.restore(start.path, start.contents, known, networks)
        loaders = _load_data(train, data, network, device)
        outputs = network.num_classes
        loading.check_classes(loaders[1], outputs, start.contents, start.path, request.num_classes)
    else:
        network = replace(known, num_classes=1).architecture()
        network.check(networks)  # before any download
        loaders = _load_data(train, data, network, device)
        outputs = _outputs(known.num_classes, len(loaders[1].classes))
        network = replace(network, num_classes=outputs)
        model = network.build(networks)
    if train.sync_bn:
        model = distributed.synchronize_bn(model, device)
    return model, network, loaders


def _with_defaults(known: Request) -> Request:
    arch = known.arch or "vgg"
    return replace(
        known,
        arch=arch,
        depth=known.depth or PAPER_DEPTH.get(arch),
        dataset=known.dataset or "cifar100",
    )


def _outputs(asked: int | None, classes: int) -> int:
    """The number of outputs: the requested number, by default that of the classes."""
    if asked and asked < classes:
        raise UserError(
            f"--num_classes must be at least {classes}, the classes of the data, not {asked}"
        )
    return asked or classes


def _load_data(
    train: TrainSettings, data: DataSettings, network: Architecture, device: torch.device
) -> tuple[Data, Data]:
    sizes = {"test": data.test_batch_size, "train": train.batch_size}
    test, training = (
        loading.batches_for(network, part, size, device, data, train.seed)
        for part, size in sizes.items()  # the smaller split first, to raise errors early
    )
    return training, test


def begin(trainer: Trainer, start: Start, refines: bool = True) -> Trainer:
    """``trainer``, with the state of ``start`` if it resumes a run. Prints a note if a run that
    ``refines`` starts from a network that is not pruned."""
    if trainer.settings.compile:
        print("note: --compile: the first step with each batch size takes minutes", flush=True)
    trainer.full_score = _score_before_pruning(start)
    if start.resumes and start.path:
        trainer.from_contents(start.path, start.contents)
    elif refines and start.path and not trainer.full_score and not start.contents.get("cfg"):
        print(f"note: {start.path} is not pruned: training continues with the full network")
    distributed.check_same(trainer.epoch, trainer.device, DIFFERENT_EPOCHS)
    return trainer


def hold_zeros(trainer: Trainer, start: Start) -> list[GradientMask]:
    """A callback that keeps the zeros of convolutions at zero if the file of ``start`` says that
    pruning made them, as those of run.py --pruning-method kernel and intra-kernel do; else none.
    Prints a note if it has many zeros and does not say so."""
    trainer.holds_zeros = bool(start.contents.get("holds_zeros"))
    if trainer.holds_zeros:
        return [GradientMask(trainer.model, trainer.optimizer, kernels.zero_masks)]
    weights = [layer.weight for layer in kernels.convolutions(trainer.model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if zeros > kernels.SPARSE * sum(weight.numel() for weight in weights):
        print(
            f"note: {zeros:,} weights of convolutions are zero. {start.path} does not say that "
            "they were pruned, so they are trained like all others"
        )
    return []


def _score_before_pruning(start: Start) -> Score | None:
    """The score of the full network, if the weights come from a pruned checkpoint."""
    score = start.contents.get("before_pruning")
    try:
        return Score(float(score["loss"]), float(score["prec1"])) if score else None
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{start.path} is damaged: before_pruning is {score!r}") from None


def run_epochs(
    trainer: Trainer,
    callbacks: list[Any],
    folder: RunFolder,
    data: DataSettings,
    tensorboard: bool = True,
) -> None:
    """Train to the last epoch with ``callbacks``, `in_folder` ``folder``."""
    with in_folder(trainer, callbacks, folder, data, tensorboard):
        trainer.fit()


@contextlib.contextmanager
def in_folder(
    trainer: Trainer,
    callbacks: list[Any],
    folder: RunFolder,
    data: DataSettings,
    tensorboard: bool = True,
) -> Iterator[None]:
    """Around the epochs of a run: with ``callbacks``, and those that save checkpoints to ``folder``
    and print after each epoch; then print the results. Raises Interrupted on Ctrl-C; the checkpoint
    of the last complete epoch is kept then, and if a loss is not finite. UserError if another run
    writes to the folder."""
    trainer.add(*callbacks)  # first: if one cannot resume, the folder stays unchanged
    with folder.claimed():
        held = [mask.summary() for mask in trainer.callbacks if isinstance(mask, GradientMask)]
        first = distributed.rank() == 0  # only this process writes and prints
        if first:
            folder.prepare()
        print("\n".join(filter(None, [summary(trainer, folder), *held])), flush=True)
        if trainer.epoch < trainer.settings.epochs and not data.threads:
            runtime_device.print_load_note(trainer.device)
        trainer.add(CheckpointWriter(trainer, folder.last, folder.best), folder)
        if first and tensorboard:
            trainer.add(TensorBoard(trainer, folder.events))
        trainer.add(EpochPrinter(trainer))
        try:
            yield
            if first:
                print_results(trainer, folder)
        except KeyboardInterrupt:
            raise Interrupted(folder.how_to_continue()) from None
    distributed.stop()


def penalty_of(trainer: Trainer) -> list[L1Penalty | Sparsity]:
    """With -sr the --penalty on the scaling factors: by default s · Σ|γ| (`L1Penalty`)."""
    model, settings = trainer.model, trainer.settings
    if not settings.sr:
        return []
    if settings.penalty == "l1":
        return [L1Penalty(model, settings.s)]
    images = trainer.test_loader.first(2)
    return [Sparsity(model, images, settings.s, penalty=settings.penalty)]


def summary(trainer: Trainer, folder: RunFolder) -> str:
    """A summary of the run that is about to start."""
    settings, network = trainer.settings, trainer.architecture
    if trainer.epoch >= settings.epochs:
        return f"all {settings.epochs} epochs are done; use a larger --epochs to train longer"
    image = torch.zeros(1, 3, network.image_size, network.image_size)
    (figures,) = measure([trainer.model], image)
    kind = "" if settings.penalty == "l1" else f" ({settings.penalty})"
    penalty = f"sparsity s = {settings.s:g}{kind}" if settings.sr else "no sparsity"
    return (
        f"{network}: {size_text(figures)} an image\n"
        f"{trainer.device}, {trainer.precision}, {penalty}, epochs {trainer.epoch} to "
        f"{settings.epochs}, results in {folder.path}/"
    )


def print_results(trainer: Trainer, folder: RunFolder) -> None:
    """Plot the curves, print the sparsity of γ, and compare a slim network with the full one."""
    wrote, history = [p for p in (folder.last, folder.best) if p.exists()], trainer.history
    if history:
        curves = plots.draw_curves(history, str(trainer.architecture))
        wrote += plots.write_picture(folder.curves, curves)
    print(tables.sparsity_text(trainer.model))
    results = f"in {', '.join(map(str, wrote))}" if not trainer.seconds else ""
    results = results or f"wrote {', '.join(map(str, wrote))}"
    print(f"\nbest top-1 {trainer.best_prec1:.2%}; {results if wrote else 'nothing was trained'}")
    if history and trainer.full_score:
        last = Score(history[-1]["test_loss"], history[-1]["test_prec1"])
        print("\nbefore: the full network when it was pruned, after: the pruned network now")
        network, loader = trainer.architecture, trainer.test_loader
        score = trainer.full_score
        print(against_full(trainer.model, network, last, score, loader))
