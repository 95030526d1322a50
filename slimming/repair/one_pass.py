"""Repair in closed form, from the moments of the inputs of the dense network's layers.

The moments are computed once and serve any choice of channels: after that, a repair takes a
fraction of a second, plus one forward pass for the statistics of BNs. Unlike
`slimming.repair.layer_by_layer`, it does not compensate for the errors of earlier layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from slimming.channels.groups import copied
from slimming.channels.scaling import Masks, batch_norms
from slimming.channels.widths import BatchNorm, layer_of
from slimming.choosing.moments import (
    STRENGTH,
    Fitted,
    Gram,
    batch_size,
    input_grams,
    solve,
)
from slimming.repair.streaming import FEWEST
from slimming.runtime.device import full_fp32, layout_for

LARGEST = 100.0  # limit of the factor by which a running variance changes


def rows(value: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, ...) as rows (n, C)."""
    return value.movedim(1, -1).flatten(0, -2)


def mean_and_variance(values: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) of all rows of some (N, C, ...), in fp64."""
    counts, means, variances = [], [], []
    for value in values:
        var, mean = torch.var_mean(rows(value), 0, correction=0)
        counts.append(value.numel() // value.shape[1])
        means.append(mean.double())
        variances.append(var.double())
    share = torch.tensor(counts, dtype=torch.double, device=means[0].device)[:, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    return mean, (share * (torch.stack(variances) + (torch.stack(means) - mean).square())).sum(0)


def move_statistics(
    norm: BatchNorm, shift: torch.Tensor, var: torch.Tensor, var_before: torch.Tensor
) -> None:
    """Move the running mean of ``norm`` by ``shift`` (C,), and its running variance by the ratio of
    the variances (C,) of its input after and before.

    The statistics are not replaced by those of these images, which differ from the running ones
    even if nothing was pruned.
    """
    assert norm.running_mean is not None and norm.running_var is not None  # eval mode needs both
    ratio = torch.where(var_before > 0, var / var_before, 1).clamp(1 / LARGEST, LARGEST)
    norm.running_mean += shift
    norm.running_var *= ratio


FORWARD = 256  # images in the forward pass for the statistics of BNs


class OnePass:
    """The moments of a ``dense`` network's layers for ``images`` (N, 3, H, W) of the training data,
    normalised. They suffice to repair any slim network that is cut from it. The statistics are
    those of at most 256 images, of fewer if they are large."""

    def __init__(self, dense: nn.Module, images: torch.Tensor, seed: int = 0):
        self.dense = copied(dense).to(images.device).eval()
        self.grams = input_grams(self.dense, images, seed)
        self.images = images[: max(FEWEST, min(FORWARD, 2 * batch_size(images)))]
        self.statistics = input_statistics(self.dense, self.images)

    def repaired(self, slim: nn.Module, kept: Mapping[str, Masks]) -> nn.Module:
        """A copy of ``slim``, the dense network without what is not in ``kept``, `refit` and
        `recalibrated`."""
        return self.recalibrated(refit(slim, self.dense, kept, self.grams), kept)

    def recalibrated(self, fitted: nn.Module, kept: Mapping[str, Masks]) -> nn.Module:
        """``fitted`` itself: the running statistics of each BN move as those of its input have
        moved between the dense network and this one."""
        fitted = fitted.to(self.images.device)
        norms = batch_norms(fitted)

        def move(name: str, mean: torch.Tensor, var: torch.Tensor) -> None:
            stays = kept.get(name, {}).get("out", slice(None))
            mean_before, var_before = (values[stays] for values in self.statistics[name])
            if norms[name].running_mean is not None:
                move_statistics(norms[name], mean - mean_before, var, var_before)

        input_statistics(fitted, self.images, move)
        return fitted


@full_fp32()
def input_statistics(
    model: nn.Module,
    images: torch.Tensor,
    before_norm: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance (C,) of what each BN of ``model`` reads for one batch of ``images``, by its
    name; ``before_norm(name, mean, var)`` is called before it runs."""
    layout = layout_for(model, images[:1])  # without the hooks below: it runs a copy, hooks and all
    found = {}

    def read(name: str, inputs: tuple[torch.Tensor]) -> None:
        found[name] = mean_and_variance(inputs)
        if before_norm:
            before_norm(name, *found[name])

    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: read(name, inputs))
        for name, norm in batch_norms(model).items()
    ]
    try:
        with torch.no_grad():
            model(images.contiguous(memory_format=layout))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def refit(
    slim: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], grams: Mapping[str, Gram]
) -> nn.Module:
    """A copy of ``slim``, the ``dense`` network without what is not in ``kept``, whose layers
    reproduce the dense ones as well as they can from the inputs that are left, if those are as in
    the dense network; ``grams`` are `input_grams` of it. BN statistics stay as they are."""
    fitted = copied(slim).to(next(dense.parameters()).device)
    for layer, weight, gram, inputs in layers_to_fit(fitted, dense, kept, grams):
        stays = inputs.repeat_interleave(weight.shape[3])
        lost = weight.flatten(2)[:, :, ~stays]
        xx = gram.covariance()
        from_kept = xx[:, stays]
        missing = from_kept[:, :, ~stays] @ lost.mT
        slope = solve(from_kept[:, :, stays], gram.penalty(STRENGTH), missing)
        layer.weight += slope.mT.reshape(layer.weight.shape)
        if layer.bias is not None:
            mean = gram.x / gram.count
            layer.bias += (mean[:, :, ~stays] @ lost.mT - mean[:, :, stays] @ slope).flatten()
    return fitted


def layers_to_fit(
    fitted: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], grams: Mapping[str, Gram]
) -> Iterator[tuple[Fitted, torch.Tensor, Gram, torch.Tensor]]:
    """Each layer of the slim network ``fitted`` that lost inputs, the ``dense`` weights of the
    outputs that it keeps (groups, outputs, inputs, taps) in fp64, the moments of what it reads, and
    which inputs of a group stay."""
    for name, gram in grams.items():
        inputs = kept.get(name, {}).get("in")
        if inputs is None or inputs.all():
            continue
        full, groups = layer_of(dense, name).weight, len(gram.x)
        weight = full if "out" not in kept[name] else full[kept[name]["out"]]
        stays = inputs.view(groups, -1)[0].to(gram.xx.device)
        weight = weight.double().reshape(groups, -1, len(stays), full[0, 0].numel())
        layer = layer_of(fitted, name)
        assert isinstance(layer, Fitted)  # others have no moments
        yield layer, weight, gram, stays
