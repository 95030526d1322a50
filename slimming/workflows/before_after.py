"""What pruning cost and what it brought: both networks measured, told, and written down."""

import argparse
import shlex
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from models import NETWORKS
from slimming.data import loading
from slimming.data.batches import Batches
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import wired
from slimming.pruning.choice import Choice
from slimming.pruning.scaling import alive_channels
from slimming.pruning.threshold import keep_one
from slimming.reports import plots, tables
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Network
from slimming.training import loop

LOST = 0.005  # a drop in top-1 that fine-tuning should win back


@dataclass
class Dense:
    """The network to prune, on the CPU, and the test images that judge the result."""

    args: argparse.Namespace
    model: nn.Module
    network: Network
    contents: dict
    test_loader: Batches

    @property
    def images(self) -> torch.Tensor:
        """The real images that pruning is proved on, normalised, on the test data's device."""
        return self.test_loader.first(64)


def load(args: argparse.Namespace, arch: str | None, networks: dict = NETWORKS) -> Dense:
    """The network in ``args.model`` and its test data. UserError if it is not of ``arch``."""
    if arch and args.arch not in (None, arch):
        raise UserError(f"--arch {args.spelled} is not for this script: it slims a {arch}")
    given = {**vars(args), "arch": arch or args.arch}
    model, network, contents = architecture.load(args.model, given, networks)
    device = choose_device(args.device, args.no_cuda)
    loader = loading.batches(
        network.dataset, "test", args.test_batch_size, device, network.image_size, args
    )
    loading.check_classes(loader, network.num_classes, contents, args.model)
    return Dense(args, model, network, contents, loader)


def report(
    dense: Dense,
    slim: nn.Module,
    choice: Choice,
    difference: float,
    masked: nn.Module | None = None,
) -> tuple[dict, dict]:
    """Print the channels layer by layer and both networks side by side; write the result.

    ``difference``: what `pruning.prove_equal` found. Writes into ``args.save`` the slim network,
    or the ``masked`` one that it stands for, a summary in text and a picture. Returns what
    `measure` found of the network before and after, and the "seconds" that the test images took.
    """
    print_choice(choice)
    print(f"\nslim equals masked: largest difference of the logits {difference:.1e} (relative)\n")
    models = [model.to(dense.test_loader.device) for model in (dense.model, slim)]
    scores, seconds = zip(*(_timed_test(m, dense.test_loader) for m in models), strict=True)
    before, after = measure(models, scores, dense.images)
    before["seconds"], after["seconds"] = seconds
    print(before_after_text(before, after))
    if masked:
        print("after: the slim network that the mask stands for; the file keeps the full shape")

    args = dense.args
    kept = wired.cfg_of(dense.model, choice.keep)
    network = dense.network if masked else replace(dense.network, cfg=kept)
    full = dense.contents.get("before_pruning") or scores[0]._asdict()  # of the first pass
    more = {"before_pruning": full, "classes": dense.test_loader.classes}
    more["cfg"] = network.cfg or kept  # beside the weights of a full network: what a mask keeps
    contents = architecture.contents_of(masked or slim, network, 0, after["top-1"], **more)
    text = (
        f"Configuration:\n{kept}\nNumber of parameters:\n{after['parameters']}\n"
        f"Test accuracy:\n{after['top-1']}\n"
        "Number of parameters with the masks of channel selection, as the original counts:\n"
        f"{profiling.count_parameters(slim, masks=True)}\n"
    )
    summary = args.save / f"{args.filename or 'prune'}.txt"
    picture = args.save / f"{args.filename or 'prune'}.png"
    title = f"{network}, {choice.percent:.0%} pruned"
    drawn = plots.draw_pruning(choice, tables.alive_factors(dense.model), title)
    checkpoint.write(args.target, contents)
    files.write_bytes(summary, text.encode())
    wrote = [args.target, summary, *plots.write_picture(picture, drawn)]
    print(f"\nwrote {', '.join(map(str, wrote))}")
    print_next_step(
        dense, before["top-1"], after["top-1"], "mask-impl/main_mask.py" if masked else "main.py"
    )
    return before, after


def _timed_test(model: nn.Module, loader: Batches) -> tuple[loop.Score, float]:
    started = time.perf_counter()
    return loop.test(model, loader), time.perf_counter() - started


def print_choice(choice: Choice) -> None:
    """The threshold and the channels of each layer, with a warning for each that was rescued."""
    before, after = choice.channels
    print(f"threshold {choice.threshold:.6g}: {choice.percent:.0%} of {before} channels")
    print(tables.layers_text(choice))
    for name in choice.rescued:
        print(
            f"warning: {name} would have lost every channel; it keeps the one with the largest "
            "scaling factor"
        )
    for line in tables.rounding_warnings(choice):
        print(f"warning: {line}")
    if 1 - after / before > choice.percent + 0.01:
        print(
            f"warning: {1 - after / before:.0%} were pruned, because many scaling factors equal "
            "the threshold; was the network trained with -sr?"
        )


def against_full(
    model: nn.Module,
    network: Network,
    score: loop.Score,
    before: loop.Score,
    loader: Batches,
) -> str:
    """A fine-tuned slim network beside the full one, which scored ``before`` when it was pruned.

    A masked network is measured as the slim one that it stands for.
    """
    full = replace(network, cfg=None).build().to(loader.device)
    if not network.cfg and hasattr(model, "wiring"):
        keep = keep_one(model, alive_channels(model))
        model = wired.slim(model, keep).to(loader.device)
    return before_after_text(*measure([full, model], [before, score], loader.first(64)))


def measure(models: list[nn.Module], scores: list[loop.Score], images: torch.Tensor) -> list[dict]:
    """Accuracy, size and speed of each model; ``images`` (N, 3, H, W) are what latency is of."""
    times = profiling.latencies(models, images)
    return [
        {
            "top-1": score.prec1,
            "loss": score.loss,
            "parameters": profiling.count_parameters(model),
            "FLOPs": profiling.count_flops(model, images.shape[-1]),
            "bytes": profiling.count_bytes(model),
            "latency": seconds,
            "batch": len(images),
        }
        for model, score, seconds in zip(models, scores, times, strict=True)
    ]


def before_after_text(before: dict, after: dict) -> str:
    """A table of what `measure` found: before, after, their ratio and their difference."""
    shown = {
        "top-1": ("top-1", "{:.2%}", 1, "{:+.2f} points", 100),
        "loss": ("loss", "{:.4f}", 1, "{:+.4f}", 1),
        "parameters": ("parameters", "{:,}", 1, "{:+,}", 1),
        "FLOPs": ("MFLOPs an image", "{:,.1f}", 1e-6, "{:+,.1f}", 1e-6),
        "bytes": ("file size (MB)", "{:.2f}", 1e-6, "{:+.2f}", 1e-6),
        "latency": (f"latency, batch {before['batch']} (ms)", "{:.1f}", 1e3, "{:+.1f}", 1e3),
    }
    rows = []
    for key, (title, form, scale, signed, unit) in shown.items():
        old, new = before[key], after[key]
        cells = [form.format(value * scale) for value in (old, new)]
        change = signed.format((new - old) * unit)
        rows.append([title, *cells, f"{old / new:.2f}x" if new else "-", change])
    return tables.table(["", "before", "after", "before/after", "change"], rows)


def print_next_step(dense: Dense, before: float, after: float, script: str) -> None:
    """Where accuracy was lost, say how to win it back."""
    if after > before - LOST:
        return
    args = dense.args
    words = ["python", script, "--refine", args.target, "--epochs", 160]
    words += ["--data", args.data] if args.data else []
    words += ["--device", args.device] if args.device else []
    words += ["--no-cuda"] if args.no_cuda else []
    words += ["--save", args.save / (f"{args.filename}_refined" if args.filename else "refined")]
    print(f"top-1 fell from {before:.2%} to {after:.2%}: fine-tune the network next")
    print("  " + shlex.join(map(str, words)))
