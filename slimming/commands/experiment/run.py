"""run.py: the folder of an experiment, the base network, and the stages in their order."""

import contextlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import nn

from models import NETWORKS, widths, zoo
from slimming.channels.groups import check_names
from slimming.choosing import allocation, importance, ranking
from slimming.choosing.allocation import Prunable
from slimming.commands.experiment.methods import METHODS, Task
from slimming.commands.experiment.record import WEIGHTS, Record, figures_of, layer_by_layer
from slimming.commands.experiment.settings import BaseTrainingSettings, ExperimentSettings
from slimming.commands.train import run
from slimming.data import loading
from slimming.data.batches import SIZE
from slimming.data.loading import Data
from slimming.errors import Interrupted, UserError
from slimming.reports import tables
from slimming.reports.tables import liveness_text, stage_text
from slimming.runtime.device import choose_device
from slimming.settings import flat, kept, name_flags, specs
from slimming.slicing.proof import liveness, liveness_warning
from slimming.slicing.prune import Slimmed, groups
from slimming.slicing.slim import cfg_of
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture
from slimming.storage.files import claimed
from slimming.training import loop
from slimming.training.callbacks import EarlyStopping
from slimming.training.penalties import L1Penalty
from slimming.training.settings import RunFolder, TrainSettings
from slimming.training.trainer import Trainer

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
    size = settings.request().image_size
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


class Evaluated(NamedTuple):
    """A network, its architecture, and its score on the test data."""

    model: nn.Module
    network: Architecture
    score: loop.Score


def batches(settings: ExperimentSettings, network: Architecture, part: str) -> Data:
    """The 'train' or 'test' batches of the network's data, on the device."""
    data = settings.data.source
    device = choose_device(data.device, data.no_cuda)
    size = data.test_batch_size if part == "test" else settings.base.batch_size
    return loading.batches_for(network, part, size, device, data, settings.base.seed)


def evaluate(settings: ExperimentSettings, path: Path) -> Evaluated:
    """Evaluate the network in ``path``. UserError if it is not the requested one, or its classes
    are not those of the data."""
    contents = checkpoint.read(path)
    model, network = architecture.rebuild(path, contents, settings.request(contents))
    loader = batches(settings, network, "test")
    loading.check_classes(loader, network.num_classes, contents, str(path))
    score = loop.test(model.to(loader.device), loader)
    return Evaluated(model.cpu(), network, score)


def print_figures(settings: ExperimentSettings) -> None:
    """Print the accuracy, size and FLOPs of the network in --model-path."""
    path = settings.execution.model_path
    assert path, "--eval-only needs --model-path"
    model, network, score = evaluate(settings, path)
    print(stage_text(str(network), figures_of(model, network, score)))


SPARSE = "slimming"  # the pruning method whose base network is trained with a penalty
# the settings that a base network depends on
OF_BASE = {"model", "depth", "weights", "dataset", "data", "image_size", "no_fp16", "s"}
OF_BASE |= {entry.name for entry, _ in specs(BaseTrainingSettings)}


def check_base(settings: ExperimentSettings) -> None:
    """UserError, before any training, if the data is unavailable or the network cannot be pruned by
    --pruning-method."""
    pruning = settings.pruning
    slices = not settings.execution.skip_pruning and pruning.pruning_method != "intra-kernel"
    loader = _test_images(settings)
    network = settings.architecture(len(loader.classes))
    model = network.build().eval()
    check_names(model, pruning.ignore)
    if not slices:
        return
    pixels = network.image_size
    removable = groups(model, torch.zeros(1, 3, pixels, pixels), pruning.ignore)
    if pruning.allocation:
        allocation.choose(Prunable(model, removable), pruning.pruning_ratio, pruning.allocation)
    elif pruning.measure in importance.GRADIENT_FREE:
        scores = importance.MEASURES[pruning.measure](importance.Evidence(model, []))
        ranking.choose(removable, scores, pruning.pruning_ratio)


def find_base(settings: ExperimentSettings) -> Path | None:
    """The checkpoint that base training starts from, or that replaces it with --skip-base-training;
    None for random weights. UserError if it is unavailable."""
    path = settings.execution.model_path
    if path:
        evaluate(settings, path)
        return path
    if settings.network.weights:
        return _pretrained(settings)
    if not settings.execution.skip_base_training:
        return None
    return _latest(settings) or _pretrained(settings)


def _latest(settings: ExperimentSettings) -> Path | None:
    """The base network that the latest experiment with this network, data and settings of base
    training saved, if any."""
    model, data = settings.network.model, settings.data.name
    pattern, depth = f"{model}_*_{data}_*/{model}_base.pth", settings.architecture(1).depth
    kept = (settings.network.output_dir / data).glob(pattern)
    for path in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            fits = checkpoint.read(path).get("depth") in (None, depth)
        except UserError as error:  # of another experiment
            print(f"note: {error}: it is left out of the search for a base network")
            continue
        sparse = path.parent.name.startswith(f"{model}_{SPARSE}_")
        same = same_settings(path.parent / "config.json", settings, OF_BASE)
        if fits and same and sparse == (settings.pruning.pruning_method == SPARSE):
            return path
        if fits:
            print(f"note: {path} was trained with other settings: --model-path takes it anyway")
    return None


def _pretrained(settings: ExperimentSettings) -> Path:
    """Save torchvision's weights as a checkpoint for this data."""
    model = settings.network.model
    arch = settings.request().arch or model
    if arch in NETWORKS:
        raise UserError(
            f"pretrained weights of {arch} are unavailable, because it is not from torchvision: "
            "omit --weights and --skip-base-training, or give a network with --model-path"
        )
    loader = _test_images(settings)
    network = settings.architecture(len(loader.classes))
    try:
        pretrained = zoo.classifier(
            arch,
            num_classes=network.num_classes,
            image_size=network.image_size,
            weights=settings.network.weights or "DEFAULT",
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"pretrained weights of {model} are unavailable ({error}): train it with --save-model "
            "and without --skip-base-training, or give a network with --model-path"
        ) from error
    path = settings.network.output_dir / f"{model}_pretrained.pth"
    contents = architecture.contents_of(pretrained, network, 0, 0.0, classes=loader.classes)
    checkpoint.write(path, contents)
    return path


def _test_images(settings: ExperimentSettings) -> Data:
    """The test images on the CPU, one per batch, for the classes of the data."""
    network = settings.architecture(num_classes=1)
    size, data = network.image_size, settings.data.source
    return loading.batches(network.dataset, "test", 1, torch.device("cpu"), size, data)


def train_base(experiment: Experiment, given: Path | None) -> Path:
    """Train the base network, or copy the ``given`` one with --skip-base-training."""
    settings, record = experiment.settings, experiment.record
    base, began = experiment.network_file("base"), time.perf_counter()
    if record.done("base"):
        return base
    if settings.execution.skip_base_training:
        assert given, "--skip-base-training needs a network to start from"
        print(f"the base network is {given}")
        record.update(base_from=str(given))
        _, network, score = evaluate(settings, given)
        contents = checkpoint.read(given)
        if contents.get("arch"):
            files.write_bytes(base, given.read_bytes())
        else:  # of the original suite: the next stages need no flags
            checkpoint.write(base, {**contents, **asdict(network)})
        history = contents.get("history", ())
    else:
        slimming = settings.pruning.pruning_method == "slimming"
        sparse = slimming and not settings.execution.skip_pruning
        epochs, lr = settings.base.base_train_epochs, settings.base.learning_rate
        train = _train_settings(settings, epochs, lr, sparse)
        trainer, _, folder = _open(experiment, "base", train, given)
        penalty = [L1Penalty(trainer.model, train.s)] if sparse else []
        _train(experiment, trainer, penalty, folder)
        files.write_bytes(base, folder.best.read_bytes())
        score, history = _best_score(trainer), trainer.history
    record.add("base", base, score, began, history, **_about(settings, base))
    return base


def prune(experiment: Experiment, base: Path) -> Path:
    """Prune with --pruning-method, prove the result, and save the network."""
    settings, record = experiment.settings, experiment.record
    target, began = experiment.network_file("pruned"), time.perf_counter()
    if record.done("pruned"):
        return target
    model, network, of_base = architecture.load(base)
    loader = batches(settings, network, "test")
    task = _task(settings, model, network, loader)
    pruned = METHODS[settings.pruning.pruning_method](task)
    slimmed = pruned if isinstance(pruned, Slimmed) else None  # or some weights are zero now
    slim = pruned.model if isinstance(pruned, Slimmed) else pruned
    score = loop.test(slim.to(loader.device), loader)
    cfg = network.cfg if widths(slim) == widths(model) else cfg_of(slim)
    before = record.stage("base")
    contents = architecture.contents_of(
        slim.cpu(),
        replace(network, cfg=cfg),
        0,
        score.prec1,
        classes=loader.classes,
        before_pruning={"loss": before["loss"], "prec1": before["top-1"]},
        holds_zeros=settings.pruning.masks or bool(of_base.get("holds_zeros")),
        **({"kept": slimmed.kept if slimmed else {}} if settings.repairing.repair else {}),
    )
    checkpoint.write(target, contents)
    layers = layer_by_layer(model, slim, settings.pruning.masks)
    alive = liveness(slim, model, task.images)
    warnings = _warnings(settings, slimmed, layers, alive)
    for line in warnings:
        print(f"warning: {line}")
    record.add(
        *("pruned", target, score, began),
        difference=slimmed.difference if slimmed else None,
        liveness=alive,
        layers=layers,
        warnings=warnings,
    )
    _print_pruned(slimmed, layers, alive)
    return target


def repair(experiment: Experiment, base: Path, pruned: Path) -> Path:
    """Repair the pruned network on training images, and save it."""
    settings, record = experiment.settings, experiment.record
    target, began = experiment.network_file("repaired"), time.perf_counter()
    if record.done("repaired"):
        return target
    (dense, _, _), (slim, network, contents) = map(architecture.load, (base, pruned))
    training, test = (batches(settings, network, part) for part in ("train", "test"))
    repaired = settings.repairing.repaired(slim, dense, contents.pop("kept"), training)
    score = loop.test(repaired.model, test)
    contents |= {"state_dict": repaired.model.cpu().state_dict(), "best_prec1": score.prec1}
    contents["holds_zeros"] = False  # repair fits all weights
    checkpoint.write(target, contents)
    record.add("repaired", target, score, began, divergence=[repaired.before, repaired.after])
    return target


def fine_tune(experiment: Experiment, pruned: Path) -> Path:
    """Fine-tune the pruned network; weights that were set to zero stay zero."""
    settings, record = experiment.settings, experiment.record
    rebuilt, began = experiment.network_file("rebuilt"), time.perf_counter()
    if record.done("fine-tuned"):
        return rebuilt
    tuning = settings.fine_tuning
    train = _train_settings(settings, tuning.finetune_epochs, tuning.finetune_lr)
    trainer, start, folder = _open(experiment, "finetune", train, pruned)
    start.contents.setdefault("holds_zeros", settings.pruning.masks)  # of an older version
    _train(experiment, trainer, run.hold_zeros(trainer, start), folder)
    files.write_bytes(rebuilt, folder.best.read_bytes())
    record.add("fine-tuned", rebuilt, _best_score(trainer), began, trainer.history)
    return rebuilt


def _train_settings(
    settings: ExperimentSettings, epochs: int, lr: float, sparse: bool = False
) -> TrainSettings:
    base = settings.base
    return TrainSettings(
        sr=sparse,
        s=base.s,
        batch_size=base.batch_size,
        epochs=epochs,
        lr=lr,
        weight_decay=base.weight_decay,
        seed=base.seed,
        amp=not settings.execution.no_fp16,
    )


def _open(
    experiment: Experiment, name: str, train: TrainSettings, weights: Path | None
) -> tuple[Trainer, run.Start, RunFolder]:
    """The trainer of a stage, where it starts, and its folder: resumed if the stage was
    interrupted, else from ``weights``, else from random ones."""
    settings, path = experiment.settings, experiment.folder / name
    last = RunFolder(path).last
    start = run.Start.at(refine=weights, resume=last if last.exists() else None)
    data = settings.data.source
    request = replace(settings.request(start.contents), dataset=settings.architecture(1).dataset)
    model, network, loaders = run.open_network(train, data, request, start)
    trainer = Trainer(model, network, *loaders, train, kept=kept(train))
    folder = RunFolder(path, resumed=start.path if start.resumes else None)
    return run.begin(trainer, start), start, folder


def _train(
    experiment: Experiment, trainer: Trainer, callbacks: list[Any], folder: RunFolder
) -> None:
    settings = experiment.settings
    stopping = EarlyStopping(trainer, settings.base.patience)
    run.run_epochs(trainer, [*callbacks, stopping], folder, settings.data)


def _best_score(trainer: Trainer) -> loop.Score:
    best = max(trainer.history, key=lambda record: record["test_prec1"])
    return loop.Score(best["test_loss"], best["test_prec1"])


def _about(settings: ExperimentSettings, path: Path) -> dict[str, Any]:
    _, network, _ = architecture.load(path)
    device = choose_device(settings.data.device, settings.data.no_cuda)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    date = f"{datetime.now():%Y-%m-%d %H:%M}"
    return {"network": str(network), "date": date, "device": str(device), "versions": versions}


def _task(
    settings: ExperimentSettings, model: nn.Module, network: Architecture, loader: Data
) -> Task:
    pruning, images = settings.pruning, loader.first(64)
    find_ratio = partial(settings.budget.find_ratio, model, images)
    return Task(
        model,
        images,
        lambda: batches(settings, network, "train"),
        pruning.pruning_ratio,
        pruning.measure,
        local=not pruning.global_pruning,
        least=pruning.least,
        round_to=pruning.round_to,
        budget=settings.budget,
        ignore=pruning.ignore,
        seed=settings.base.seed,
        allocation=pruning.allocation,
        find_ratio=find_ratio if settings.budget.given else None,
    )


def _warnings(
    settings: ExperimentSettings,
    slimmed: Slimmed | None,
    layers: dict[str, list],
    alive: float | None,
) -> list[str]:
    """Warnings if something else was pruned than requested, or if the network is dead."""
    dead = liveness_warning(alive, slimmed.kept if slimmed else {})
    lines = [dead] if dead else []
    if slimmed:
        more = tables.least_warnings(slimmed.choice) + tables.rounding_warnings(slimmed.choice)
        lines += [name_flags(line, ExperimentSettings) for line in more]
    if settings.pruning.masks:
        lines += _short_of(settings, layers[WEIGHTS])
    return lines


def _short_of(settings: ExperimentSettings, rows: list) -> list[str]:
    """Print the fraction of pruned weights; warn if it is much less than --pruning-ratio."""
    method, ratio = settings.pruning.pruning_method, settings.pruning.pruning_ratio
    gone = 1 - sum(after for _, _, after in rows) / sum(before for _, before, _ in rows)
    print(f"{method}: {gone:.1%} of the weights are removed or zero")
    if gone > ratio - 0.1:
        return []
    why = "linear layers and depthwise convolutions have no kernels to prune"
    if method == "intra-kernel":
        why = "linear layers and 1x1 kernels have no patterns"
    return [
        f"{method} removed {gone:.1%} of the weights, not {ratio:.0%}: "
        f"{why}; --pruning-method channel prunes filters of every layer"
    ]


def _print_pruned(slimmed: Slimmed | None, layers: dict[str, list], alive: float | None) -> None:
    if slimmed:
        difference = f"{slimmed.difference:.1e}"
        print(f"slim equals masked: largest difference of the logits {difference} (relative)")
    print(liveness_text(alive))
    for counted, rows in layers.items():
        texts = [[name, f"{before:,}", f"{after:,}"] for name, before, after in rows]
        print(tables.table([counted, "before", "after"], texts))
