"""Pictures as PNG, and TensorBoard."""

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn

from slimming.channels.scaling import batch_norms
from slimming.choosing.threshold import Choice
from slimming.runtime import optional
from slimming.storage import files
from slimming.training.trainer import Trainer

Drawn = ParamSpec("Drawn")


def picture(draw: Callable[Drawn, bytes]) -> Callable[Drawn, bytes | None]:
    """``draw``, returning None if matplotlib is unavailable."""

    @functools.wraps(draw)
    def drawn(*args: Drawn.args, **more: Drawn.kwargs) -> bytes | None:
        return draw(*args, **more) if optional.load("matplotlib", "matplotlib.figure") else None

    return drawn


def write_picture(path: Path, drawn: bytes | None) -> list[Path]:
    """Write a picture, if there is one; return the files that were written."""
    if drawn is None:
        return []
    files.write_bytes(path, drawn)
    return [path]


@picture
def draw_curves(history: list[dict], title: str) -> bytes:
    """A PNG picture of loss and top-1 by epoch, from the records of each epoch."""
    figure, (losses, accuracies) = blank_figure(1, 2, (10, 3.8))
    epochs = [record["epoch"] + 1 for record in history]
    for part, style in (("train", ".--"), ("test", ".-")):
        loss, prec1 = (
            [record[f"{part}_{name}"] for record in history] for name in ("loss", "prec1")
        )
        losses.plot(epochs, loss, style, label=part)
        accuracies.plot(epochs, [100 * value for value in prec1], style, label=part)
    for axes, name in ((losses, "cross entropy"), (accuracies, "top-1 (%)")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return to_png(figure, title)


@picture
def draw_rounds(
    history: list[dict], rounds: list[dict], phases: tuple[int, int], title: str
) -> bytes:
    """A PNG picture of top-1 by epoch, with the pruning rounds (epochs ``phases[0]`` to
    ``phases[1]``) shaded, and of FLOPs and filters, of the dense network (``rounds[0]``) and
    after each round."""
    figure, (accuracies, sizes) = blank_figure(1, 2, (10, 3.8))
    epochs = [record["epoch"] + 1 for record in history]
    for part, style in (("train", ".--"), ("test", ".-")):
        accuracies.plot(epochs, [100 * r[f"{part}_prec1"] for r in history], style, label=part)
    accuracies.axvspan(phases[0] + 0.5, phases[1] + 0.5, color="#c9d3de", label="rounds")
    accuracies.set(xlabel="epoch", ylabel="top-1 (%)")
    accuracies.legend()
    numbers = range(len(rounds))
    sizes.plot(numbers, [r["flops"] / 1e6 for r in rounds], "o-", color="#c23b22", label="MFLOPs")
    sizes.set(xlabel="round", ylabel="MFLOPs an image")
    filters = sizes.twinx()
    filters.plot(numbers, [r["filters"] for r in rounds], "s-", color="#1f5a96", label="filters")
    filters.set(ylabel="filters")
    for axes in (sizes, filters):
        axes.set_ylim(bottom=0)
    lines = [line for axes in (sizes, filters) for line in axes.get_lines()]
    sizes.legend(lines, [line.get_label() for line in lines])
    for axes in (accuracies, sizes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return to_png(figure, title)


@picture
def draw_pruning(choice: Choice, factors: torch.Tensor, title: str) -> bytes:
    """A PNG picture of the kept channels per layer and the distribution of |γ| with threshold."""
    figure, (layers, histogram) = blank_figure(1, 2, (12, 4.2))
    before = [int(mask.sum()) for mask in choice.alive.values()]
    after = [int(mask.sum()) for mask in choice.kept.values()]
    draw_bars(layers, list(choice.kept), before, after)
    layers.set(xlabel="BN layer, in the order of the forward pass", ylabel="channels")
    histogram.hist(factors.double().numpy(), bins=100, color="#1f5a96")
    if not math.isnan(choice.threshold):
        label = f"threshold {choice.threshold:.3g} ({choice.ratio:.0%})"
        histogram.axvline(choice.threshold, color="#c23b22", label=label)
        histogram.legend()
    histogram.set(xlabel="|γ|", ylabel="channels", yscale="log")
    return to_png(figure, title)


@picture
def draw_weights(before: nn.Module, after: nn.Module) -> bytes:
    """A PNG picture of the distribution of the nonzero weights of convolutions, with the number
    of zeros in the legend."""
    figure, axes = blank_figure(1, 1, (10, 3.8))
    axes.set_yscale("log")
    tallest = 5.0
    both = [(conv_weights(model), name) for model, name in ((before, "before"), (after, "after"))]
    widest = max(float(weights.abs().max()) if len(weights) else 0.0 for weights, _ in both) or 1.0
    for (weights, name), color in zip(both, ("#a9b8c8", "#1f5a96"), strict=True):
        rest = weights[weights != 0]
        zeros = len(weights) - len(rest)
        zeros_text = f"{zeros:,} of {len(weights):,} are zero ({zeros / max(1, len(weights)):.1%})"
        counts, edges = torch.histogram(rest, 121, range=(-widest, widest))
        tallest = max(tallest, float(counts.max()))
        axes.stairs(
            counts, edges, color=color, fill=name == "before", label=f"{name}: {zeros_text}"
        )
    axes.set(xlabel="weight of a convolution, without zeros", ylabel="weights")
    axes.set_ylim(0.8, 2 * tallest)
    axes.legend()
    return to_png(figure, "Weights before and after")


def conv_weights(model: nn.Module) -> torch.Tensor:
    """All finite weights of the convolutions as one float vector on the CPU."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    parts = [layer.weight.detach().flatten().float().cpu() for layer in layers]
    weights = torch.cat([torch.zeros(0), *parts])
    return weights[weights.isfinite()]


@picture
def draw_layers(rows: list[tuple[str, int, int]], counted: str) -> bytes:
    """A PNG picture of the number of filters (or of what is ``counted``) in each layer (name,
    before, after)."""
    figure, axes = blank_figure(1, 1, (10, 4.2))
    names, before, after = zip(*rows, strict=True) if rows else ((), (), ())
    draw_bars(axes, names, before, after)
    axes.set(xlabel="layer, in the order of the forward pass", ylabel=counted)
    return to_png(figure, "Layers before and after")


def draw_bars(axes: Any, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Two overlaid bars for each layer, with layer names if there is space."""
    places = range(1, len(names) + 1)
    axes.bar(places, before, width=0.9, color="#c9d3de", label="before")
    axes.bar(places, after, width=0.9, color="#1f5a96", label="kept")
    if len(places) <= 40:
        axes.set_xticks(places, list(names), rotation=90, fontsize=6)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def blank_figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns)


def to_png(figure: Any, title: str) -> bytes:
    """The figure with a title, as PNG."""
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


class TensorBoard:
    """A training callback: writes scalars and a histogram of every BN's γ after each epoch.

    Hides the events that an earlier, killed run wrote for the same epochs.
    """

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer = trainer
        library = optional.load("tensorboard", "torch.utils.tensorboard")
        start = trainer.epoch or None
        self.writer = library and library.SummaryWriter(str(folder), purge_step=start)

    def after_epoch(self, epoch: int) -> None:
        if self.writer is None:
            return
        for name, value in self.trainer.history[-1].items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        norms = batch_norms(self.trainer.model)
        for name, bn in {name: bn for name, bn in norms.items() if bn.affine}.items():
            self.writer.add_histogram(f"gamma/{name}", bn.weight.detach().float().cpu(), epoch)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
