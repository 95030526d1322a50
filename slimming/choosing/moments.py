"""What layers read, as moments: rows of a matrix product, sums over them, and ridge regression."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import Convolution
from slimming.runtime.device import full_fp32

FEATURES = 6_144  # weights of an output, at most: a regression takes their square in memory
Fitted = Convolution | nn.Linear


def obstacle(layer: Fitted) -> str | None:
    """Why the weights of a layer cannot be fitted, if they cannot be."""
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from other parameters"
    features = matrix(layer).shape[2]
    if features > FEATURES:
        return f"each of its outputs has {features} weights, more than {FEATURES}"
    return None


def matrix(layer: Fitted) -> torch.Tensor:
    """The weights of a layer as (groups, outputs of a group, features F)."""
    if isinstance(layer, nn.Linear):
        return layer.weight[None]
    weight = layer.weight.unflatten(0, (layer.groups, -1))
    return (weight.transpose(1, 2) if layer.transposed else weight).flatten(2)


@torch.no_grad()
def add_to_weight(layer: Fitted, change: torch.Tensor) -> None:
    """Add ``change``, in the form of `matrix`, to the weights of a layer."""
    if isinstance(layer, nn.Linear):
        layer.weight += change[0]
        return
    if layer.transposed:  # stored as (inputs, outputs of a group, ...)
        taps = layer.weight[0, 0].numel()
        change = change.unflatten(2, (-1, taps)).transpose(1, 2)
    layer.weight += change.reshape(layer.weight.shape)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's output that is channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def positions(value: torch.Tensor, dim: int) -> torch.Size:
    """The shape (N, ...) of the positions of ``value``, whose dimension ``dim`` is channels."""
    return value.movedim(dim, -1).shape[:-1]


def draw(shape: torch.Size, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """About ``count`` of the positions (N, ...) of this shape, equally many for each of N, drawn by
    ``generator``; all of them where there are no more. One index (N, P) for each dimension."""
    samples, size = shape[0], shape[1:].numel()
    places = torch.arange(size).expand(samples, size)
    if count < samples * size:
        places = torch.randint(size, (samples, -(-count // samples)), generator=generator)
    return [torch.arange(samples)[:, None].expand_as(places), *_unravelled(places, shape[1:])]


def centre(shape: torch.Size) -> list[torch.Tensor]:
    """The position in the middle of each of N, as from `draw`."""
    samples = torch.arange(shape[0])[:, None]
    return [samples, *(torch.full_like(samples, size // 2) for size in shape[1:])]


def picked(value: torch.Tensor, dim: int, places: list[torch.Tensor]) -> torch.Tensor:
    """The channels (N · P, C) of ``value``, in its dimension ``dim``, at these positions."""
    found = value.movedim(dim, -1)[tuple(index.to(value.device) for index in places)]
    return found.flatten(0, 1)


def patches(layer: Fitted, read: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """What ``layer`` reads of ``read`` (N, C, ...) for its outputs at these positions: (groups,
    N · P, F), with F as in `matrix`."""
    if isinstance(layer, nn.Linear):
        return picked(read, -1, places)[None]
    if layer.padding_mode != "zeros":
        read = F.pad(read, _reversed(_padding(layer)), layer.padding_mode)
    samples, *outputs = (place.to(read.device) for place in places)
    taps, inside, count = [], None, len(outputs)
    for d, output in enumerate(outputs):
        at, valid = _taps(layer, output, d, read.shape[2 + d])
        shape = [*output.shape, *[1] * count]
        shape[2 + d] = -1
        taps.append(at.reshape(shape))
        valid = valid.reshape(shape)
        inside = valid if inside is None else inside & valid
    where = (samples.view(*samples.shape, *[1] * count), *taps)
    rows = read.movedim(1, -1)[where]
    if inside is not None and not inside.all():
        rows = torch.where(inside[..., None], rows, 0)
    rows = rows.flatten(0, 1).flatten(1, -2)  # (N · P, taps, C)
    found = rows.mT.reshape(len(rows), layer.groups, -1)
    return found.transpose(0, 1)


def _taps(
    layer: Convolution, output: torch.Tensor, d: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along the spatial dimension ``d``, which has ``size`` inputs: those (N, P, taps) that outputs
    (N, P) read, and whether they exist; others are read as zeros."""
    kernel = torch.arange(layer.kernel_size[d], device=output.device) * layer.dilation[d]
    stride = layer.stride[d]
    if layer.transposed:
        at = output[..., None] + int(layer.padding[d]) - kernel
        whole = at % stride == 0
        at = at.div(stride, rounding_mode="floor")
    else:
        left = _padding(layer)[d][0] if layer.padding_mode == "zeros" else 0
        at = output[..., None] * stride + kernel - left
        whole = torch.ones_like(at, dtype=torch.bool)
    return at.clamp(0, size - 1), whole & (at >= 0) & (at < size)


def _padding(layer: Convolution) -> list[tuple[int, int]]:
    """How many places are added before and behind, for each spatial dimension."""
    if isinstance(layer.padding, str):
        wide = [0] * len(layer.kernel_size)
        if layer.padding == "same":
            sizes = zip(layer.dilation, layer.kernel_size, strict=True)
            wide = [dilation * (kernel - 1) for dilation, kernel in sizes]
        return [(each // 2, each - each // 2) for each in wide]
    return [(each, each) for each in layer.padding]


def _reversed(padding: list[tuple[int, int]]) -> list[int]:
    """In the order of `torch.nn.functional.pad`: of the last dimension first."""
    return [size for pair in reversed(padding) for size in pair]


def _unravelled(places: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
    """Flat places as one index for each dimension of ``shape``."""
    found = []
    for size in reversed(shape):
        found.append(places % size)
        places = places // size
    return found[::-1]


STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs, if none is chosen


class Gram:
    """Sums over samples x (G, n, F) of G independent regressions, in fp64."""

    def __init__(self, groups: int, features: int, device: torch.device) -> None:
        self.count = 0
        self.x = torch.zeros(groups, 1, features, dtype=torch.double, device=device)
        self.xx = torch.zeros(groups, features, features, dtype=torch.double, device=device)

    def add_inputs(self, x: torch.Tensor) -> None:
        """Count n more samples."""
        self.count += x.shape[1]
        self.x += x.sum(1, keepdim=True, dtype=torch.double)
        self.xx += x.mT @ x

    def covariance(self) -> torch.Tensor:
        """Cov(x, x) (G, F, F)."""
        mean = self.x / self.count
        return torch.baddbmm(self.xx, mean.mT, mean, beta=1 / self.count, alpha=-1)

    def penalty(self, strength: float) -> torch.Tensor:
        """λ (G, 1): ``strength`` times the mean square of the features."""
        squares = self.xx.diagonal(dim1=1, dim2=2) / self.count
        return strength * squares.mean(1, keepdim=True)


class Moments(Gram):
    """Sums over samples x (G, n, F) and r (G, n, O), in fp64."""

    def __init__(self, groups: int, features: int, outputs: int, device: torch.device) -> None:
        super().__init__(groups, features, device)
        self.r = torch.zeros(groups, 1, outputs, dtype=torch.double, device=device)
        self.xr = torch.zeros(groups, features, outputs, dtype=torch.double, device=device)

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        """Count n more samples."""
        self.add_inputs(x)
        self.r += r.sum(1, keepdim=True, dtype=torch.double)
        self.xr += x.mT @ r

    def __iadd__(self, other: "Moments") -> "Moments":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def cross(self) -> torch.Tensor:
        """Cov(x, r) (G, F, O)."""
        return self.xr / self.count - (self.x / self.count).mT @ (self.r / self.count)

    def intercept(self, slope: torch.Tensor) -> torch.Tensor:
        """Mean (G, 1, O) of r - x · ``slope``."""
        return (self.r - self.x @ slope) / self.count


def solve(xx: torch.Tensor, penalty: torch.Tensor, xr: torch.Tensor) -> torch.Tensor:
    """(xx + λ I)⁻¹ xr for covariances ``xx`` (G, F, F) and ``xr`` (G, F, O), with λ = ``penalty``
    (G, 1); 0 where there is no unique solution."""
    regular = xx.clone()
    regular.diagonal(dim1=1, dim2=2).add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(regular)
    return torch.where(failed[:, None, None] == 0, torch.cholesky_solve(xr, factor), 0)


def ridge(moments: Moments, strength: float) -> torch.Tensor:
    """The slope (G, F, O) that minimises |r - x · slope|² + λ |slope|² over centred samples, where
    λ is ``strength`` times the mean square of the features; 0 where there is no unique one."""
    return solve(moments.covariance(), moments.penalty(strength), moments.cross())


WIDE, FEW = 1024, 64  # features of a wide layer, and of its outputs those that choose a strength


def best_ridge(
    moments: Moments, held_back: Moments, strengths: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope (G, F, O) and intercept (G, 1, O) fitted to all samples, ``held_back`` included, with
    the one of the ``strengths`` that predicts those best from the others; where the samples have
    more than `WIDE` features, as some of the outputs tell, in fp32."""
    xx, xr = moments.covariance(), moments.cross()
    theirs, goal = held_back.covariance(), held_back.cross()
    if xx.shape[1] > WIDE:
        step = -(-xr.shape[2] // FEW)
        xx, xr, theirs, goal = (t.float() for t in (xx, xr[..., ::step], theirs, goal[..., ::step]))
    explained = {}
    for strength in strengths:
        slope = solve(xx, moments.penalty(strength).to(xx.dtype), xr)
        explained[strength] = float((slope * (2 * goal - theirs @ slope)).sum(dtype=torch.double))
    del xx, theirs
    moments += held_back
    slope = ridge(moments, max(explained, key=explained.__getitem__))
    return slope, moments.intercept(slope)


BATCH = 128  # samples, at most
ELEMENTS = 2**22  # of the inputs of a batch: 27 images of 224 x 224 pixels


def batch_size(inputs: Inputs) -> int:
    """How many samples of ``inputs`` run at a time, so that their activations are no large ones."""
    each = sum(t[:1].numel() for t in arguments.tensors(inputs) if t.dim())
    return max(1, min(BATCH, ELEMENTS // max(1, each)))


POSITIONS = 16_384  # sampled positions of the output of a layer, over all images


@full_fp32()
@torch.no_grad()
def input_grams(model: nn.Module, inputs: Inputs, seed: int = 0) -> dict[str, Gram]:
    """The moments of what each convolution and Linear reads for ``inputs``, by its name; layers
    that cannot be fitted, or that do not run, are left out."""
    generator = torch.Generator().manual_seed(seed)
    batches = arguments.split(inputs, batch_size(inputs))
    grams: dict[str, Gram] = {}

    def look(name: str, layer: Fitted, given: Any, out: torch.Tensor) -> None:
        read = arguments.tensors(given)[0]
        places = draw(positions(out, channel_dim(layer)), POSITIONS // len(batches), generator)
        x = patches(layer, read, places)
        grams[name] = grams.get(name) or Gram(len(x), x.shape[2], x.device)
        grams[name].add_inputs(x)

    hooks = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, out, name=name: look(name, layer, (args, kwargs), out),
            with_kwargs=True,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, Fitted) and not getattr(layer, "transposed", False)
        if not obstacle(layer)
    ]
    with arguments.modes_kept(model):
        model.eval()
        try:
            for batch in batches:
                arguments.call(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    order = [name for name, _ in model.named_modules() if name in grams]
    return {name: grams[name] for name in order}
