"""Measures of the importance of filters, as functions of `Evidence`.

θ are the weights of one filter (of a Conv2d, or a row of a Linear), g their gradient, H the Hessian
of the loss; Σ and ‖·‖ are over the weights of the filter. Papers are cited by arXiv number.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from slimming.errors import UserError
from slimming.pruning.coupling import is_wired
from slimming.pruning.proof import only_logits
from slimming.pruning.scaling import batch_norms, selections
from slimming.pruning.widths import BatchNorm
from slimming.runtime.strides import unit_strides

# Name of a layer -> (channels,) fp32 on the CPU, higher = keep; "name:in" -> the channels it reads
Scores = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]  # by name of the parameter


@dataclass
class Evidence:
    """A network, the images to evaluate it on, and lazily computed gradients of its parameters.

    ``batches`` are normalised images (N, 3, H, W) with labels (N,) on the model's device. The loss
    is cross_entropy(logits / ``temperature``) in eval mode. Means are over all images: minibatches
    are weighted by their size. The mode, running statistics and ``.grad`` of the model do not
    change. Known values can be assigned: ``evidence.gradient = {name: g}``. ``use_l2`` and
    ``use_init`` choose the `bias`; UserError if ``initial``, the θ₀ of use_init, lacks a weight.
    """

    model: nn.Module
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    temperature: float = 1.0
    initial: Tensors | None = None
    use_l2: bool = False
    use_init: bool = False
    seed: int = 0  # of `random`

    def __post_init__(self) -> None:
        if self.use_l2 and self.use_init:
            raise UserError("--use_l2 and --use_init contradict each other: use one of them")
        known = {name: value.shape for name, value in (self.initial or {}).items()}
        if self.use_init and any(known.get(n) != v.shape for n, v in self.values.items()):
            raise UserError("--use_init needs the initial value of every weight: omit it")

    @functools.cached_property
    def parameters(self) -> Tensors:
        """Weights of every Conv2d and Linear, γ and β of every BN, by name."""
        judged = {f"{name}.weight": layer.weight for name, layer in layers(self.model).items()}
        for name, norm in _scaled(self.model, needed=False).items():
            judged |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        return judged

    @functools.cached_property
    def values(self) -> Tensors:
        """θ: the parameters, detached."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @functools.cached_property
    def gradient(self) -> Tensors:
        """g: the mean gradient."""
        return self._mean(self._differentiate)

    @functools.cached_property
    def saliency(self) -> Tensors:
        """|θ·g|, or its running average from a `Tracker`."""
        return {name: (value * self.gradient[name]).abs() for name, value in self.values.items()}

    @functools.cached_property
    def squared_gradient(self) -> Tensors:
        """E[g²]: the mean of the squared gradients of the minibatches."""
        return self._mean(lambda loss: [g.square() for g in self._differentiate(loss)])

    @functools.cached_property
    def hessian_gradient(self) -> Tensors:
        """Hg: the gradient of Σ g(θ)·g over ``parameters``, where the second g is constant."""
        mean = self.gradient.values()

        def product(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
            own = self._differentiate(loss, create_graph=True)
            products = ((a * b).sum() for a, b in zip(own, mean, strict=True))
            return self._differentiate(functools.reduce(operator.add, products))

        return self._mean(product)

    def bias(self, name: str, l2: bool = False) -> torch.Tensor:
        """The factor by which small parameters score lower: |θ − θ₀| with use_init, |θ| with use_l2
        or with ``l2``, the default of the measure; else 1.
        """
        theta = self.values[name]
        if self.use_init and self.initial is not None:
            return (theta - self.initial[name].detach().to(theta)).abs()
        return theta.abs() if self.use_l2 or l2 else theta.new_ones(())

    def _differentiate(
        self, loss: torch.Tensor, create_graph: bool = False
    ) -> tuple[torch.Tensor, ...]:
        weights = list(self.parameters.values())  # zeros where the loss does not depend on them
        return torch.autograd.grad(
            loss, weights, create_graph=create_graph, materialize_grads=True, allow_unused=True
        )

    def _mean(self, derive: Callable) -> Tensors:
        """The mean over all images of ``derive(loss)``, one tensor for each parameter."""
        count = sum(len(labels) for _, labels in self.batches)
        if not count:
            raise UserError(
                "this measure needs images with labels: pass some, or use one of "
                f"{', '.join(GRADIENT_FREE)}"
            )
        mean = {name: torch.zeros_like(value) for name, value in self.values.items()}
        modes = {module: module.training for module in self.model.modules()}  # may be mixed
        frozen = [p for p in self.parameters.values() if not p.requires_grad]
        self.model.eval()
        try:
            for parameter in frozen:
                parameter.requires_grad_()
            for images, labels in self.batches:
                with torch.enable_grad(), unit_strides(self.model):
                    logits = only_logits(self.model(images))
                    terms = derive(F.cross_entropy(logits / self.temperature, labels))
                torch._foreach_add_(list(mean.values()), list(terms), alpha=len(labels) / count)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in frozen:
                parameter.requires_grad_(False)
        return mean


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every Conv2d and Linear of the model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def _scaled(model: nn.Module, needed: bool = True) -> dict[str, BatchNorm]:
    """Every BN with scaling factors; UserError if some are ``needed`` and there are none."""
    norms = {name: norm for name, norm in batch_norms(model).items() if norm.affine}
    if needed and not norms:
        others = ", ".join(name for name in MEASURES if name not in ("bn", "nvidia"))
        raise UserError(f"bn and nvidia need BatchNorm, but the network has none: use {others}")
    return norms


def _sums(e: Evidence, term: Callable[[str], torch.Tensor]) -> Scores:
    """Σ ``term(name of the weight)`` of each filter of each Conv2d and Linear and, for layers after
    a channel selection, of each channel that they read, because no single filter writes it."""
    filters = {n: term(f"{n}.weight").flatten(1).sum(1).float().cpu() for n in layers(e.model)}
    return filters | _input_sums(e, term, _behind_selections(e.model))


def _input_sums(e: Evidence, term: Callable[[str], torch.Tensor], names: Iterable[str]) -> Scores:
    """Σ ``term(name of the weight)`` of each channel that these layers read, as "layer:in"."""
    sums, modules = {}, layers(e.model)
    for name in names:
        terms, groups = term(f"{name}.weight"), getattr(modules[name], "groups", 1)
        terms = terms.view(groups, -1, *terms.shape[1:]).transpose(1, 2).flatten(2)
        sums[f"{name}:in"] = terms.sum(2).flatten().float().cpu()
    return sums


def _behind_selections(model: nn.Module) -> list[str]:
    """The layers that read through a channel selection."""
    if not is_wired(model):
        return []
    whole = selections(model)
    return [wire.layer for wire in model.wiring() if wire.reads in whole]


def mag_based(e: Evidence) -> Scores:
    """‖θ‖₂, the magnitude; with use_init ‖θ − θ₀‖₂ (Lubana and Dick 2021, 2009.11839)."""
    sums = _sums(e, lambda n: e.bias(n, l2=True).square())
    return {name: squares.sqrt() for name, squares in sums.items()}


def l1(e: Evidence) -> Scores:
    """‖θ‖₁; with use_init ‖θ − θ₀‖₁ (Li et al. 2017, 1608.08710)."""
    return _sums(e, lambda n: e.bias(n, l2=True))


def bn(e: Evidence) -> Scores:
    """|γ| of each BN; with use_init |γ − γ₀| (Liu et al. 2017, 1708.06519)."""
    return {n: e.bias(f"{n}.weight", l2=True).float().cpu() for n in _scaled(e.model)}


def loss_based(e: Evidence) -> Scores:
    """Σ|θ·g|, the change of the loss to first order (Lubana and Dick 2021, 2009.11839)."""
    return _sums(e, lambda n: e.bias(n) * e.saliency[n])


def tfo(e: Evidence) -> Scores:
    """|Σ θ·g|, the same for the filter as a whole (Molchanov et al. 2017, 1611.06440)."""
    sums = _sums(e, lambda n: e.bias(n) * e.values[n] * e.gradient[n])
    return {name: change.abs() for name, change in sums.items()}


def fisher(e: Evidence) -> Scores:
    """Σ θ²·E[g²]: the change of the loss to second order (Theis et al. 2018, 1801.05787)."""
    return _sums(e, lambda n: e.bias(n) * e.values[n].square() * e.squared_gradient[n])


def nvidia(e: Evidence) -> Scores:
    """γ²·E[g_γ²] + β²·E[g_β²] of each BN (Molchanov et al. 2019, 1906.10771)."""
    names = _scaled(e.model)
    terms = {n: e.bias(n) * v.square() * e.squared_gradient[n] for n, v in e.values.items()}
    return {n: (terms[f"{n}.weight"] + terms[f"{n}.bias"]).float().cpu() for n in names}


def biased_loss(e: Evidence) -> Scores:
    """Σ|θ|·|θ·g|, with use_init Σ|θ − θ₀|·|θ·g| (Lubana and Dick 2021, 2009.11839)."""
    return _sums(e, lambda n: e.bias(n, l2=True) * e.saliency[n])


def biased_loss_tracked(e: Evidence) -> Scores:
    """Σ|θ|·E, where E is the average of |θ·g| in a `Tracker` (Lubana and Dick 2021, 2009.11839)."""
    return biased_loss(e)


def grasp(e: Evidence) -> Scores:
    """Σ θ·(Hg): pruning the lowest raises ‖g‖. Temperature 200 (Wang et al. 2020, 2002.07376)."""
    return _sums(e, lambda n: e.bias(n) * e.values[n] * e.hessian_gradient[n])


def grad_preserve(e: Evidence) -> Scores:
    """|Σ θ·(Hg)|: pruning the lowest keeps ‖g‖. Temperature 1 (Lubana, Dick 2021, 2009.11839)."""
    return {name: scores.abs() for name, scores in grasp(e).items()}


def random(e: Evidence) -> Scores:
    """Uniform in [0, 1), a function of the seed: the baseline for all measures (no paper)."""
    generator, shapes = torch.Generator().manual_seed(e.seed), _sums(e, e.values.__getitem__)
    return {name: torch.rand(len(s), generator=generator) for name, s in shapes.items()}


def lamp(e: Evidence) -> Scores:
    """‖θ‖² / Σ‖θ_u‖² over the layer's filters with ‖θ_u‖ ≥ ‖θ‖ (Lee et al. 2021, 2010.07611)."""
    scores = {}
    for name, squares in _sums(e, lambda n: e.bias(n, l2=True).square()).items():
        ranked = squares.sort().values
        as_much = ranked.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float32).tiny)
        scores[name] = squares / as_much[torch.searchsorted(ranked, squares)]
    return scores


def taylor_group(e: Evidence) -> Scores:
    """Σ|θ·g| of each filter and of each channel that a layer reads, and |γ·g_γ| of each BN. Sum
    them over coupled layers (DepGraph, Fang et al. 2023, 2301.12900).
    """
    saliency = {n: e.bias(n) * value for n, value in e.saliency.items()}
    term = saliency.__getitem__
    scores = _sums(e, term) | _input_sums(e, term, layers(e.model))
    return scores | {n: saliency[f"{n}.weight"].float().cpu() for n in _scaled(e.model, False)}


Measure = Callable[[Evidence], Scores]
_ALL: tuple[Measure, ...] = (mag_based, l1, bn, loss_based, tfo, fisher, nvidia)
_ALL += (biased_loss, biased_loss_tracked, grasp, grad_preserve, random, lamp, taylor_group)
MEASURES: dict[str, Measure] = {measure.__name__: measure for measure in _ALL}
TEMPERATURES = {"grasp": 200.0, "grad_preserve": 1.0}  # from their papers; others use 1 or --T
GRADIENT_FREE = ("mag_based", "l1", "bn", "random", "lamp")  # these need no images
SECOND_ORDER = ("grasp", "grad_preserve")
