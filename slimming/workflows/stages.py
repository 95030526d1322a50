"""The stages of an experiment: base training, pruning, fine-tuning.

Each stage saves its network in the folder of the experiment, and is skipped if it exists already.
"""

import platform
import time
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import widths
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.pruning import slicing
from slimming.pruning.liveness import liveness, liveness_warning
from slimming.reports import tables
from slimming.reports.figures import liveness_text
from slimming.runtime.device import choose_device
from slimming.settings import kept, name_flags
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.training.callbacks import EarlyStopping
from slimming.training.penalties import L1Penalty
from slimming.training.run_folder import RunFolder
from slimming.training.settings import TrainSettings
from slimming.training.trainer import Trainer
from slimming.workflows import training
from slimming.workflows.experiment import Experiment
from slimming.workflows.experiment_settings import ExperimentSettings
from slimming.workflows.methods import METHODS, Pruned, Task
from slimming.workflows.record import WEIGHTS, layer_by_layer
from slimming.workflows.scoring import batches, evaluate


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
    score = loop.test(pruned.model.to(loader.device), loader)
    same_shape = widths(pruned.model) == widths(model)
    cfg = network.cfg if same_shape else slicing.cfg_of(pruned.model)
    before = record.stage("base")
    contents = architecture.contents_of(
        pruned.model.cpu(),
        replace(network, cfg=cfg),
        0,
        score.prec1,
        classes=loader.classes,
        before_pruning={"loss": before["loss"], "prec1": before["top-1"]},
        holds_zeros=settings.pruning.masks or bool(of_base.get("holds_zeros")),
        **({"kept": pruned.kept} if settings.repairing.repair else {}),
    )
    checkpoint.write(target, contents)
    layers = layer_by_layer(model, pruned.model, settings.pruning.masks)
    alive = liveness(pruned.model, model, task.images)
    warnings = _warnings(settings, pruned, layers, alive)
    for line in warnings:
        print(f"warning: {line}")
    record.add(
        *("pruned", target, score, began),
        difference=pruned.difference,
        liveness=alive,
        layers=layers,
        warnings=warnings,
    )
    _print_pruned(pruned, layers, alive)
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
    _train(experiment, trainer, training.hold_zeros(trainer, start), folder)
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
) -> tuple[Trainer, training.Start, RunFolder]:
    """The trainer of a stage, where it starts, and its folder: resumed if the stage was
    interrupted, else from ``weights``, else from random ones."""
    settings, path = experiment.settings, experiment.folder / name
    last = RunFolder(path).last
    start = training.Start.at(refine=weights, resume=last if last.exists() else None)
    data = settings.data.source
    asked = settings.asked(start.contents) | {"dataset": settings.architecture(1).dataset}
    model, network, loaders = training.open_network(train, data, asked, start)
    trainer = Trainer(model, network, *loaders, train, kept=kept(train))
    folder = RunFolder(path, resumed=start.path if start.resumes else None)
    return training.begin(trainer, start), start, folder


def _train(
    experiment: Experiment, trainer: Trainer, callbacks: list[Any], folder: RunFolder
) -> None:
    settings = experiment.settings
    stopping = EarlyStopping(trainer, settings.base.patience)
    training.run_epochs(trainer, [*callbacks, stopping], folder, settings.data)


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
    settings: ExperimentSettings, model: nn.Module, network: Architecture, loader: Batches | Stream
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
    settings: ExperimentSettings, pruned: Pruned, layers: dict[str, list], alive: float | None
) -> list[str]:
    """Warnings if something else was pruned than requested, or if the network is dead."""
    choice, dead = pruned.choice, liveness_warning(alive, pruned.kept)
    lines = [dead] if dead else []
    if choice:
        more = tables.least_warnings(choice) + tables.rounding_warnings(choice)
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


def _print_pruned(pruned: Pruned, layers: dict[str, list], alive: float | None) -> None:
    if pruned.difference is not None:
        difference = f"{pruned.difference:.1e}"
        print(f"slim equals masked: largest difference of the logits {difference} (relative)")
    print(liveness_text(alive))
    for counted, rows in layers.items():
        texts = [[name, f"{before:,}", f"{after:,}"] for name, before, after in rows]
        print(tables.table([counted, "before", "after"], texts))
