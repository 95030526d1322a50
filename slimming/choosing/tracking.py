"""Track importance during training as a moving average (Lubana and Dick, 2009.11839)."""

from typing import Any

import torch
from torch import nn

from slimming.choosing.importance import MEASURES, SECOND_ORDER, Evidence, Scores, Tensors
from slimming.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]


class Tracker:
    """Average importance over the last ``batches`` minibatches of every ``steps`` of training.

    A training callback, between backward and step: A = ``alpha`` · A + (1 − ``alpha``) · now, reset
    every ``steps``. It averages the scores of each minibatch, or |θ·g| for biased_loss_tracked.
    Second-order measures run their own passes through the batch, because training has freed the
    graph. ``options`` are ``temperature``, ``initial``, ``use_l2`` and ``use_init`` of `Evidence`.
    """

    name = "tracker"

    def __init__(
        self,
        model: nn.Module,
        measure: str,
        steps: int,
        batches: int = 20,
        alpha: float = 0.8,
        **options: Any,
    ):
        self.model, self.measure, self.alpha = model, measure, alpha
        self.steps, self.start, self.options = steps, max(0, steps - batches), options
        self._evidence()  # raises now rather than after an epoch
        self.count = 0
        self.average: Tensors | Scores = {}

    @torch.no_grad()
    def on_gradients(self, batch: Batch | None = None) -> None:
        """Add the gradients of a ``batch`` to the average. Only second-order measures need the
        batch itself: images (N, 3, H, W) and labels (N,)."""
        position, self.count = self.count % self.steps, self.count + 1
        if position == self.start:
            self.average = {}
        if position >= self.start:
            now = self._now(batch)
            # if it is not finite, the gradient scaler of fp16 skips this step too
            finite = torch.stack([value.isfinite().all() for value in now.values()]).all()
            if self.average:  # without waiting for the device
                self.average = {
                    n: torch.where(finite, now[n].lerp(old, self.alpha), old)
                    for n, old in self.average.items()
                }
            elif finite:
                self.average = now

    def scores(self) -> Scores:
        """The current average; UserError if there is none."""
        if not self.average:
            raise UserError("no minibatch has been tracked yet: train longer before pruning")
        if self.measure != "biased_loss_tracked":
            return dict(self.average)
        evidence = self._evidence()
        evidence.saliency = self.average
        return MEASURES[self.measure](evidence)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the average, for `load_state_dict`."""
        return {"count": self.count, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the average of a `state_dict`."""
        values = self._evidence().values
        self.count = state["count"]
        self.average = {n: v.to(values.get(n, v)) for n, v in state["average"].items()}

    def _evidence(self) -> Evidence:
        return Evidence(self.model, [], **self.options)

    def _now(self, batch: Batch | None) -> Tensors | Scores:
        evidence = self._evidence()
        if self.measure in SECOND_ORDER:
            if batch is None:
                raise UserError(f"{self.measure} needs the images of a batch: pass it to the call")
            evidence.batches = [batch]
            return MEASURES[self.measure](evidence)
        weights = evidence.parameters
        evidence.gradient = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()
        }
        if self.measure == "biased_loss_tracked":
            return evidence.saliency
        evidence.squared_gradient = {n: g.square() for n, g in evidence.gradient.items()}
        return MEASURES[self.measure](evidence)
