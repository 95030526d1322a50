"""The public API: sparsity training; slim a network, repair it, save it, load it, deploy it."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from slimming import slicing
from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.measuring.deploy import deploy
from slimming.measuring.figures import Figures
from slimming.pruning import importance
from slimming.pruning.choice import LEAST
from slimming.pruning.liveness import liveness, liveness_warning
from slimming.pruning.repair import repair as fit
from slimming.storage import checkpoint
from slimming.training.penalties import L1Penalty, updateBN

__all__ = ["L1Penalty", "Slim", "deploy", "load", "prune", "repair", "save", "updateBN"]
PROBES = 64  # images that tell whether a repaired network is alive
SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Slim:
    """A slim network: ``model``, in eval mode on the CPU; ``cfg``, the widths of its layers (a list
    for the paper's networks); ``figures``, its cost (parameters, FLOPs per image, bytes);
    ``difference``, the proof: the largest difference between its logits and those of the masked
    dense network, in which no layer reads the removed channels, relative to the largest logit;
    ``kept``, which channels of each layer of the dense network are left; ``notes``, what `repair`
    left as it was or discarded, and why; ``liveness``, how much its outputs vary from image to
    image, as a fraction of how much those of the dense network do: near 0 the proof holds, but the
    network is constant (None for fewer than 2 images, or if the outputs of the dense network are
    constant)."""

    model: nn.Module
    cfg: dict | list
    figures: Figures
    difference: float
    kept: slicing.Kept = field(repr=False)
    notes: list[str] = field(default_factory=list)
    liveness: float | None = None


def prune(
    model: nn.Module,
    images: torch.Tensor,
    ratio: float = 0.5,
    *,
    measure: str = "lamp",
    scope: str = "global",
    labels: torch.Tensor | None = None,
    least: float = LEAST,
    round_to: int = 1,
    ignore: str | Iterable[str] = (),
) -> Slim:
    """Remove the fraction ``ratio`` (0 <= ratio < 1) of the filters of any CNN, and prove the
    result.

    ``images`` (N, 3, H, W) are normalised inputs; the result is proved on them, and a warning is
    given if its outputs hardly depend on them. ``measure`` is one of
    `slimming.pruning.importance.MEASURES`; those with gradients also need ``labels`` (N,). In one
    ranking over the network, scores must be comparable between layers: those of lamp are, sums
    such as l1 are not, and empty layers (benchmarks/defaults.py).
    ``scope`` ranks filters over the whole network ("global") or prunes the same fraction of each
    layer ("layer"). Each layer keeps at least the fraction ``least`` (0 to 1) of its channels, or
    1 - ``ratio`` if that is less, and a multiple of ``round_to``; the layers or modules named in
    ``ignore`` are not pruned. ``model`` is not changed. UserError if the network cannot be slimmed
    exactly, or an argument is invalid.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> slim = prune(net, torch.rand(2, 3, 8, 8), ratio=0.5)
    >>> slim.model[0].out_channels, slim.cfg["0"], slim.figures.parameters
    (4, [3, 4], 1562)
    """
    judge = importance.MEASURES.get(measure)
    if judge is None or measure == "biased_loss_tracked":  # which needs a training run
        names = ", ".join(name for name in importance.MEASURES if name != "biased_loss_tracked")
        raise UserError(f"unknown measure {measure!r}: use {names}")
    if scope not in SCOPES:
        raise UserError(f"scope must be 'global' or 'layer', not {scope!r}")
    temperature = importance.TEMPERATURES.get(measure, 1.0)
    slimmed = slicing.prune(
        model,
        judge(importance.Evidence(model, [(images, labels)], temperature)),
        ratio,
        images,
        local=scope == "layer",
        round_to=round_to,
        least=least,
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
    )
    (cost,) = figures.measure([slimmed.model], images[:1].cpu())
    alive = liveness(slimmed.model, model, images)
    if dead := liveness_warning(alive, slimmed.kept):
        warnings.warn(dead, stacklevel=2)
    return Slim(slimmed.model, slimmed.cfg, cost, slimmed.difference, slimmed.kept, liveness=alive)


def repair(slim: Slim, dense: nn.Module, inputs: Inputs, seed: int = 0) -> Slim:
    """Fit the weights of a slim network to reproduce the activations of the ``dense`` network that
    it was pruned from, layer by layer: least squares, without labels or gradients.

    ``inputs`` are at least 32, better 2,048, training samples, as the network reads them, on the
    device to use: images (N, 3, H, W), a tuple of arguments or a dict of them. One sample in eight
    is held back to judge the result, by the divergence of predictions, or by the relative error of
    outputs that are no logits. The model keeps its dtype. A repair that does not bring its outputs
    closer to those of the dense network is discarded. That, and layers that cannot be fitted, are
    in ``notes`` of the result and in a warning each. UserError if the network fails on ``inputs``.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> images = torch.rand(64, 3, 8, 8)
    >>> slim = prune(net, images, ratio=0.5)
    >>> repaired = repair(slim, net, images)
    >>> errors = [(s.model(images) - net(images)).norm() for s in (slim, repaired)]
    >>> bool(errors[1] < errors[0])
    True
    """
    repaired = fit(slim.model, dense, slim.kept, inputs, seed)
    notes = repaired.notes if repaired.helped else [*repaired.notes, str(repaired)]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if not repaired.helped:
        return replace(slim, notes=notes)
    alive = liveness(repaired.model, dense, arguments.first(inputs, PROBES))
    return replace(slim, model=repaired.model.cpu(), notes=notes, liveness=alive)


def save(slim: Slim | nn.Module, path: str | Path) -> None:
    """Write a slim network, its widths and its weights, atomically.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> path = Path(tempfile.mkdtemp(), "slim.pth")
    >>> save(prune(net, torch.rand(2, 3, 8, 8)), path)
    >>> load(path, build=lambda: net)[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    model = slim.model if isinstance(slim, Slim) else slim
    contents = {"cfg": slicing.cfg_of(model), "state_dict": model.state_dict()}
    checkpoint.write(path, contents)


def load(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Load the slim network from a file of `save` or a checkpoint of the scripts, in eval mode.

    ``build`` returns the dense network; its layers get the widths in the file. Loading runs no code
    from the file. UserError if it is damaged or of another network.

    >>> import tempfile
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> path = Path(tempfile.mkdtemp(), "slim.pth")
    >>> save(prune(build(), torch.rand(2, 3, 8, 8)), path)
    >>> load(path, build)[0].out_channels
    4
    """
    model = build()
    state = checkpoint.fitted(checkpoint.read(path)["state_dict"], model)
    return slicing.load_slim_state(model, state).eval()
