"""Measures of the importance of filters, and the `Evidence` that they are functions of.

θ are the weights of one filter (of a Conv2d, or a row of a Linear), g their gradient, H the Hessian
of the loss; Σ and ‖·‖ are over the weights of the filter. Papers are cited by arXiv number.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.groups import behind_selections, lists_widths
from slimming.channels.inputs import Inputs, only_logits
from slimming.channels.kinds import Convolution
from slimming.channels.scaling import batch_norms
from slimming.channels.widths import BatchNorm
from slimming.choosing.moments import Gram, input_grams
from slimming.choosing.obs import elimination_errors
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime.device import unit_strides

Tensors = dict[str, torch.Tensor]  # by name of the parameter
NO_IMAGES = "this measure needs images: pass some, or use l1"
NO_LABELS = "this measure needs images with labels: pass some, or use obs or l1"
ONE_TENSOR = "this measure needs inputs that are one tensor: use another one, or l1"


@dataclass
class Evidence:
    """A network, the images to evaluate it on, and lazily computed gradients of its parameters.

    ``batches`` are normalised images (N, 3, H, W), or other `Inputs`, with labels (N,) on the
    model's device. The loss is cross_entropy(logits / ``temperature``) in eval mode, or
    ``loss(outputs)`` of what the model returns, the mean over its samples. Without that function
    gradients need labels; with None instead of labels, they raise UserError. Means are over all
    images: minibatches are weighted by their size. The mode, running statistics and ``.grad`` of
    the model do not change.
    Known values can be assigned: ``evidence.gradient = {name: g}``. ``use_l2`` and
    ``use_init`` choose the `bias`; UserError if ``initial``, the θ₀ of use_init, lacks a weight.
    """

    model: nn.Module
    batches: Sequence[tuple[Inputs, torch.Tensor | None]]
    temperature: float = 1.0
    initial: Tensors | None = None
    use_l2: bool = False
    use_init: bool = False
    seed: int = 0  # of `random`
    loss: Callable[[Any], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.use_l2 and self.use_init:
            raise UserError("`use_l2` and `use_init` contradict each other: use one of them")
        known = {name: value.shape for name, value in (self.initial or {}).items()}
        if self.use_init and any(known.get(n) != v.shape for n, v in self.values.items()):
            raise UserError("`use_init` needs the initial value of every weight: omit it")

    @functools.cached_property
    def parameters(self) -> Tensors:
        """Weights of every convolution and Linear, γ and β of every BN, by name."""
        judged = {f"{name}.weight": layer.weight for name, layer in layers(self.model).items()}
        for name, norm in scaled_norms(self.model).items():
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

    @functools.cached_property
    def inputs(self) -> dict[str, Gram]:
        """The moments of what each layer reads: see `input_grams`."""
        if not self.batches:
            raise UserError(NO_IMAGES)
        images = [images for images, _ in self.batches if isinstance(images, torch.Tensor)]
        if len(images) < len(self.batches):
            raise UserError(ONE_TENSOR)
        return input_grams(self.model, torch.cat(images), self.seed)

    def bias(self, name: str, l2: bool = False) -> torch.Tensor:
        """The factor by which small parameters score lower: |θ − θ₀| with use_init, |θ| with use_l2
        or with ``l2``, the default of the measure; else 1.
        """
        theta = self.values[name]
        if self.use_init and self.initial is not None:
            return (theta - self.initial[name].detach().to(theta)).abs()
        return theta.abs() if self.use_l2 or l2 else theta.new_ones(())

    def _loss(self, outputs: Any, labels: torch.Tensor | None) -> torch.Tensor:
        """The loss of what the model returns. UserError if it cannot be differentiated."""
        try:
            if self.loss is None:
                assert labels is not None  # `_mean` has looked
                loss = F.cross_entropy(only_logits(outputs) / self.temperature, labels)
            else:
                loss = self.loss(outputs)
        except Exception as error:  # whatever the user's function does
            raise_if_of_the_machine(error)
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the loss of these outputs fails ({type(error).__name__}: {reason}): pass labels "
                "(N,) from 0 to the number of classes - 1, or `loss`, a function of the outputs"
            ) from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UserError(
                "`loss` must return a tensor of one number that depends on the weights of the "
                "network, such as the mean over the samples"
            )
        return loss

    def _differentiate(
        self, loss: torch.Tensor, create_graph: bool = False
    ) -> tuple[torch.Tensor, ...]:
        weights = list(self.parameters.values())  # zeros where the loss does not depend on them
        return torch.autograd.grad(
            loss, weights, create_graph=create_graph, materialize_grads=True, allow_unused=True
        )

    def _mean(self, derive: Callable) -> Tensors:
        """The mean over all images of ``derive(loss)``, one tensor for each parameter."""
        sizes = [arguments.count(inputs) for inputs, _ in self.batches]
        count = sum(sizes)
        labelled = self.loss or all(labels is not None for _, labels in self.batches)
        if not count or not labelled:
            raise UserError(NO_LABELS)
        mean = {name: torch.zeros_like(value) for name, value in self.values.items()}
        frozen = [p for p in self.parameters.values() if not p.requires_grad]
        with arguments.modes_kept(self.model):
            self.model.eval()
            try:
                for parameter in frozen:
                    parameter.requires_grad_()
                for size, (inputs, labels) in zip(sizes, self.batches, strict=True):
                    with torch.enable_grad(), unit_strides(self.model):
                        terms = derive(self._loss(arguments.call(self.model, inputs), labels))
                    torch._foreach_add_(list(mean.values()), list(terms), alpha=size / count)
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
        return mean


def layers(model: nn.Module) -> dict[str, Any]:
    """Every convolution, transposed ones too, and every Linear of the model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Convolution | nn.Linear)}


def scaled_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Every BN with scaling factors, by its name."""
    return {name: norm for name, norm in batch_norms(model).items() if norm.affine}


# Name of a layer -> (channels,) fp32 on the CPU, higher = keep; "name:in" -> the channels it reads
Scores = dict[str, torch.Tensor]


class Measure(NamedTuple):
    """A measure: the ``score`` of each filter as a function of evidence. Without ``images`` it
    looks at weights alone; its paper divides logits by ``temperature`` (None: 1, or --T); one of
    ``second_order`` differentiates twice."""

    score: Callable[[Evidence], Scores]
    images: bool = True
    temperature: float | None = None
    second_order: bool = False

    def __call__(self, evidence: Evidence) -> Scores:
        return _on_cpu(self.score(evidence))


def _on_cpu(scores: Scores) -> Scores:
    """The same on the CPU as fp32, in one copy: every copy waits for the GPU."""
    if not scores:
        return scores
    together = torch.cat([score.float() for score in scores.values()]).cpu()
    parts = together.split([len(score) for score in scores.values()])
    return dict(zip(scores, parts, strict=True))


def _scaled(model: nn.Module) -> dict[str, BatchNorm]:
    """Every BN with scaling factors; UserError if there are none."""
    norms = scaled_norms(model)
    if not norms:
        others = ", ".join(name for name in MEASURES if name not in ("bn", "nvidia"))
        raise UserError(f"bn and nvidia need BatchNorm, but the network has none: use {others}")
    return norms


def _sums(e: Evidence, term: Callable[[str], torch.Tensor]) -> Scores:
    """Σ ``term(name of the weight)`` of each filter of each convolution and Linear and, for layers
    after a channel selection, of each channel that they read: no single filter writes it."""
    filters = {
        name: _by_filter(layer, term(f"{name}.weight")).flatten(1).sum(1)
        for name, layer in layers(e.model).items()
    }
    gated = behind_selections(e.model) if lists_widths(e.model) else []
    return filters | _input_sums(e, term, gated)


def _by_filter(layer: nn.Module, terms: torch.Tensor) -> torch.Tensor:
    """``terms`` of the weight (inputs, outputs of a group, ...) of a transposed convolution with
    its filters first, as those of other layers are."""
    if not getattr(layer, "transposed", False):
        return terms
    return terms.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def _input_sums(e: Evidence, term: Callable[[str], torch.Tensor], names: Iterable[str]) -> Scores:
    """Σ ``term(name of the weight)`` of each channel that these layers read, as "layer:in"."""
    sums, modules = {}, layers(e.model)
    for name in names:
        terms, groups = term(f"{name}.weight"), getattr(modules[name], "groups", 1)
        terms = _by_filter(modules[name], terms)
        terms = terms.view(groups, -1, *terms.shape[1:]).transpose(1, 2).flatten(2)
        sums[f"{name}:in"] = terms.sum(2).flatten()
    return sums


def mag_based(e: Evidence) -> Scores:
    """‖θ‖₂, the magnitude; with use_init ‖θ − θ₀‖₂ (Lubana and Dick 2021, 2009.11839)."""
    sums = _sums(e, lambda n: e.bias(n, l2=True).square())
    return {name: squares.sqrt() for name, squares in sums.items()}


def l1(e: Evidence) -> Scores:
    """‖θ‖₁; with use_init ‖θ − θ₀‖₁ (Li et al. 2017, 1608.08710)."""
    return _sums(e, lambda n: e.bias(n, l2=True))


def bn(e: Evidence) -> Scores:
    """|γ| of each BN; with use_init |γ − γ₀| (Liu et al. 2017, 1708.06519)."""
    return {n: e.bias(f"{n}.weight", l2=True) for n in _scaled(e.model)}


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
    return {n: terms[f"{n}.weight"] + terms[f"{n}.bias"] for n in names}


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
    for name, squares in _on_cpu(_sums(e, lambda n: e.bias(n, l2=True).square())).items():
        ranked = squares.sort().values
        as_much = ranked.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float32).tiny)
        places = torch.searchsorted(ranked, squares).clamp_max(len(ranked) - 1)  # NaN is beyond
        scores[name] = squares / as_much[places]
    return scores


def taylor_group(e: Evidence) -> Scores:
    """Σ|θ·g| of each filter and of each channel that a layer reads, and |γ·g_γ| of each BN. Sum
    them over coupled layers (DepGraph, Fang et al. 2023, 2301.12900).
    """
    saliency = {n: e.bias(n) * value for n, value in e.saliency.items()}
    term = saliency.__getitem__
    scores = _sums(e, term) | _input_sums(e, term, layers(e.model))
    return scores | {n: saliency[f"{n}.weight"] for n in scaled_norms(e.model)}


def obs(e: Evidence) -> Scores:
    """What of a layer's output is lost with an input when the others stand in for it, as well as
    they can: the error of `elimination_errors` (ZipLM, Kurtić et al. 2023, 2302.04089)."""
    return {
        f"{name}:in": elimination_errors(layers(e.model)[name].weight, gram)
        for name, gram in e.inputs.items()
    }


MEASURES: dict[str, Measure] = {
    "mag_based": Measure(mag_based, images=False),
    "l1": Measure(l1, images=False),
    "bn": Measure(bn, images=False),
    "loss_based": Measure(loss_based),
    "tfo": Measure(tfo),
    "fisher": Measure(fisher),
    "nvidia": Measure(nvidia),
    "biased_loss": Measure(biased_loss),
    "biased_loss_tracked": Measure(biased_loss_tracked),
    "grasp": Measure(grasp, temperature=200.0, second_order=True),
    "grad_preserve": Measure(grad_preserve, temperature=1.0, second_order=True),
    "random": Measure(random, images=False),
    "lamp": Measure(lamp, images=False),
    "taylor_group": Measure(taylor_group),
    "obs": Measure(obs),
}
TEMPERATURES = {name: m.temperature for name, m in MEASURES.items() if m.temperature}
GRADIENT_FREE = [name for name, m in MEASURES.items() if not m.images]  # these need no images
SECOND_ORDER = [name for name, m in MEASURES.items() if m.second_order]
