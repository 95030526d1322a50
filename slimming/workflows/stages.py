"""The stages of one experiment (run.py): base training, pruning, fine-tuning, report.

Each leaves its result in the experiment's folder and is skipped where that is there already.
"""

import argparse
import platform
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from models import NETWORKS, constructor, widths
from slimming.cli import flags
from slimming.data import loading
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import kernels, slicing
from slimming.reports import page, plots, tables
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Network
from slimming.training import loop
from slimming.training.penalties import GradientMask, L1Penalty
from slimming.training.trainer import Experiment
from slimming.workflows.methods import METHODS, loader_of
from slimming.workflows.record import WEIGHTS, Record, figures, layer_by_layer, stage_text

CAPTIONS = {
    "curves-base": "Base training, epoch by epoch",
    "curves-fine-tuned": "Fine-tuning, epoch by epoch",
    "weights": "The weights of all convolutions, before and after",
    "layers": "Each layer, before and after",
}


def train_base(args: argparse.Namespace, given: Path | None, folder: Path, record: Record) -> Path:
    """The base network: trained here, or with --skip-base-training the ``given`` one."""
    base, began = folder / f"{args.model}_base.pth", time.perf_counter()
    if record.done("base"):
        return base
    if args.skip_base_training:
        print(f"the base network is {given}")
        record.update(base_from=str(given))
        files.write_bytes(base, given.read_bytes())
        score, history = _test(args, base), checkpoint.read(base).get("history", ())
    else:
        settings = _settings(args, folder / "base", args.base_train_epochs, start=given)
        settings.sr = args.pruning_method == "slimming" and not args.skip_pruning
        experiment = Experiment(settings)
        penalty = [L1Penalty(experiment.model, args.s)] if settings.sr else []
        experiment.fit(on_gradients=penalty)
        files.write_bytes(base, experiment.folder.best.read_bytes())
        score, history = _best_score(experiment), experiment.history
    record.add("base", base, score, began, history, **_about(args, base))
    return base


def prune(args: argparse.Namespace, base: Path, folder: Path, record: Record) -> Path:
    """Prune by --pruning-method, prove it, and write the network."""
    pruned, began = folder / f"{args.model}_pruned.pth", time.perf_counter()
    if record.done("pruned"):
        return pruned
    model, network, _ = architecture.load(base)
    loader = loader_of(args, network, "test")
    slim, choice, difference = METHODS[args.pruning_method](args, model, network, loader)
    before = next(s for s in record.facts["stages"] if s["name"] == "base")
    more = {"before_pruning": {"loss": before["loss"], "prec1": before["top-1"]}}
    cfg = network.cfg if widths(slim) == widths(model) else slicing.cfg_of(slim)
    score = loop.test(slim.to(loader.device), loader)
    written = architecture.contents_of(
        slim.cpu(), replace(network, cfg=cfg), 0, score.prec1, classes=loader.classes, **more
    )
    checkpoint.write(pruned, written)
    layers = layer_by_layer(model, slim, "kernel" in args.pruning_method)
    warnings = [f"{name} keeps one channel alone" for name in choice.rescued] if choice else []
    warnings += tables.rounding_warnings(choice) if choice else []
    if "kernel" in args.pruning_method:
        warnings += _short_of(args, layers[WEIGHTS])
    for line in warnings:
        print(f"warning: {line}")
    found = {"difference": difference, "layers": layers, "warnings": warnings}
    record.add("pruned", pruned, score, began, **found)
    if difference is not None:
        print(f"slim equals masked: largest difference of the logits {difference:.1e} (relative)")
    for counted, rows in layers.items():
        texts = [[name, f"{before:,}", f"{after:,}"] for name, before, after in rows]
        print(tables.table([counted, "before", "after"], texts))
    return pruned


def fine_tune(args: argparse.Namespace, pruned: Path, folder: Path, record: Record) -> Path:
    """Train what is left; weights that were pruned by mask stay zero."""
    rebuilt, began = folder / f"{args.model}_rebuilt.pth", time.perf_counter()
    if record.done("fine-tuned"):
        return rebuilt
    settings = _settings(args, folder / "finetune", args.finetune_epochs, start=pruned)
    settings.lr = args.finetune_lr
    experiment = Experiment(settings)
    held = kernels.zero_masks(experiment.model)
    experiment.fit(on_gradients=[GradientMask(experiment.model, experiment.optimizer, held)])
    files.write_bytes(rebuilt, experiment.folder.best.read_bytes())
    record.add("fine-tuned", rebuilt, _best_score(experiment), began, experiment.history)
    return rebuilt


def report(args: argparse.Namespace, folder: Path, record: Record, config: dict) -> None:
    """Latency of all stages side by side, pictures, report.html; drop what --save-model keeps."""
    models, pictures = {}, {}
    for stage in record.facts["stages"]:
        models[stage["name"]], network, _ = architecture.load(folder / stage["file"])
        if stage["history"]:
            title = f"{stage['name']}: {network}"
            pictures[f"curves-{stage['name']}"] = plots.draw_curves(stage["history"], title)
    _time(args, list(models.values()), network, record)
    if len(models) > 1:
        pictures["weights"] = plots.draw_weights(models["base"], list(models.values())[-1])
        counted, rows = list(record.facts["layers"].items())[-1]
        pictures["layers"] = plots.draw_layers(rows, counted)
    for name, picture in pictures.items():
        plots.write_picture(folder / f"{name}.png", picture)
    told = {CAPTIONS[name]: picture for name, picture in pictures.items() if picture}
    page.write_report(folder / "report.html", config, record.facts, told)
    if not args.save_model:
        last = folder / record.facts["stages"][-1]["file"]
        for path in (*folder.glob("*/*.pth.tar"), *folder.glob("*.pth")):
            if path != last:
                path.unlink()
        print(f"of the networks {last.name} alone is kept: --save-model keeps all")
    print(f"wrote {folder / 'report.html'}")


def evaluate(args: argparse.Namespace) -> None:
    """Print accuracy, size and work of the network in --model-path."""
    score = _test(args, args.model_path)
    model, network, _ = architecture.load(args.model_path, {"arch": args.arch})
    print(stage_text({"name": str(network), **figures(model, network, score)}))


def _settings(args, save: Path, epochs: int, start: Path | None = None) -> argparse.Namespace:
    """The flags of main.py that a training stage stands for; it goes on where it stopped."""
    told = vars(flags.training_parser("").parse_args([]))
    settings = argparse.Namespace(**{**told, **vars(args)})
    settings.save, settings.epochs, settings.lr = save, epochs, args.learning_rate
    settings.amp, settings.sr, settings.tag, settings.filename = not args.no_fp16, False, None, None
    last = save / "checkpoint.pth.tar"
    settings.resume = str(last) if last.exists() else None
    settings.refine = str(start) if start and not settings.resume else None
    settings.start = settings.resume or settings.refine
    settings.contents = checkpoint.read(settings.start) if settings.start else {}
    settings.dataset = args.dataset or "cifar10"
    if settings.start:
        settings.depth = None
    return settings


def given_base(args: argparse.Namespace) -> Path | None:
    """The network that base training starts from or, with --skip-base-training, is replaced by;
    None for fresh weights. UserError if it cannot be had."""
    if args.model_path:
        _test(args, args.model_path)
        return args.model_path
    if args.weights:
        return _pretrained(args, args.output_dir)
    if not args.skip_base_training:
        return None
    pattern = f"{args.model}_*_{args.label}_*/{args.model}_base.pth"
    found = sorted((args.output_dir / args.label).glob(pattern), key=lambda p: p.stat().st_mtime)
    if found:
        return found[-1]
    return _pretrained(args, args.output_dir)


def _pretrained(args: argparse.Namespace, folder: Path) -> Path:
    """torchvision's weights as a checkpoint for this data."""
    if args.arch in NETWORKS:
        raise UserError(
            f"{args.arch} is not torchvision's, so no weights for it can be had: leave --weights "
            "and --skip-base-training out, or name a network with --model-path"
        )
    loader = loading.batches(
        args.dataset or "cifar10", "test", 1, torch.device("cpu"), args.image_size or 32, args
    )
    network = Network(
        args.arch, None, args.dataset or "cifar10", len(loader.classes), None, args.image_size or 32
    )
    try:
        model = constructor(args.arch)(
            num_classes=network.num_classes,
            image_size=network.image_size,
            weights=args.weights or "DEFAULT",
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"no pretrained {args.model} can be had ({error}): train one with --save-model and "
            "without --skip-base-training, or name one with --model-path"
        ) from error
    path = folder / f"{args.model}_pretrained.pth"
    more = {"classes": loader.classes}
    checkpoint.write(path, architecture.contents_of(model, network, 0, 0.0, **more))
    return path


def _test(args: argparse.Namespace, path: Path) -> loop.Score:
    given = {"arch": args.arch, "dataset": args.dataset, "image_size": args.image_size}
    model, network, contents = architecture.load(path, given)
    loader = loader_of(args, network, "test")
    loading.check_classes(loader, network.num_classes, contents, str(path))
    return loop.test(model.to(loader.device), loader)


def _best_score(experiment: Experiment) -> loop.Score:
    best = max(experiment.history, key=lambda record: record["test_prec1"])
    return loop.Score(best["test_loss"], best["test_prec1"])


def _short_of(args: argparse.Namespace, rows: list) -> list[str]:
    """Say how much of the weights went; a warning if that is much less than --pruning-ratio."""
    gone = 1 - sum(after for _, _, after in rows) / sum(before for _, before, _ in rows)
    print(f"{args.pruning_method}: {gone:.1%} of the weights are removed or zero")
    if gone > args.pruning_ratio - 0.1:
        return []
    why = "linear layers and depthwise convolutions have no kernels to lose"
    if args.pruning_method == "intra-kernel":
        why = "linear layers and 1x1 kernels have no patterns"
    return [
        f"{args.pruning_method} removed {gone:.1%} of the weights, not {args.pruning_ratio:.0%}: "
        f"{why}; --pruning-method channel takes filters of every layer"
    ]


def _about(args: argparse.Namespace, path: Path) -> dict:
    _, network, _ = architecture.load(path)
    device = choose_device(args.device, args.no_cuda)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    date = f"{datetime.now():%Y-%m-%d %H:%M}"
    return {"network": str(network), "date": date, "device": str(device), "versions": versions}


def _time(args: argparse.Namespace, models: list[nn.Module], network: Network, record: Record):
    """Latency at batch 1 and 64 of all stages, in turns."""
    images = loader_of(args, network, "test").first(64)
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)[:64]  # of a smaller data set some twice
    models = [model.to(images.device) for model in models]
    for batch in (1, 64):
        times = profiling.latencies(models, images[:batch])
        for stage, seconds in zip(record.facts["stages"], times, strict=True):
            stage.setdefault("latency", {})[str(batch)] = seconds
    record.update()
