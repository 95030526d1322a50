"""What measures of importance are functions of: a network, inputs, and what they say of it.

θ are the parameters, g their gradient, H the Hessian of the loss.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs, only_logits
from slimming.channels.kinds import Convolution
from slimming.channels.scaling import batch_norms
from slimming.channels.widths import BatchNorm
from slimming.choosing.moments import Gram, input_grams
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
        modes = {module: module.training for module in self.model.modules()}  # may be mixed
        frozen = [p for p in self.parameters.values() if not p.requires_grad]
        self.model.eval()
        try:
            for parameter in frozen:
                parameter.requires_grad_()
            for size, (inputs, labels) in zip(sizes, self.batches, strict=True):
                with torch.enable_grad(), unit_strides(self.model):
                    terms = derive(self._loss(arguments.call(self.model, inputs), labels))
                torch._foreach_add_(list(mean.values()), list(terms), alpha=size / count)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in frozen:
                parameter.requires_grad_(False)
        return mean


def layers(model: nn.Module) -> dict[str, Any]:
    """Every convolution, transposed ones too, and every Linear of the model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Convolution | nn.Linear)}


def scaled_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Every BN with scaling factors, by its name."""
    return {name: norm for name, norm in batch_norms(model).items() if norm.affine}
