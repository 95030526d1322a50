"""The importance of the filters of a network that trains, for the round that is next."""

from typing import Any

import torch

from slimming.data import loading
from slimming.pruning import slicing
from slimming.pruning.importance import GRADIENT_FREE, MEASURES, Evidence, Scores
from slimming.pruning.slicing import Slimmed
from slimming.pruning.tracking import Tracker
from slimming.runtime import distributed
from slimming.training.trainer import Trainer
from slimming.workflows.flow_settings import FlowRun


class FilterScores:
    """Scores by the measure of ``run``: of images when it is time, or averaged by a ``tracker``
    through the epoch before.

    ``initial`` are the values that --use_init measures the distance from.
    """

    def __init__(self, run: FlowRun, trainer: Trainer):
        self.run, self.trainer, self.measure = run, trainer, run.rounds.pruning_type
        self.tracker: Tracker | None = None
        self.initial: dict[str, torch.Tensor] | None = None
        if run.importance.use_init:
            named = trainer.model.named_parameters()
            self.initial = {name: p.detach().clone() for name, p in named}

    def of_filters(self, epoch: int) -> Scores:
        """The importance of each filter at the beginning of an epoch, the same in every process."""
        scores = self.tracker.scores() if self.tracker else self._measure(epoch)
        device = self.trainer.device
        return {name: distributed.of_the_first(score, device) for name, score in scores.items()}

    def track(self, epoch: int) -> None:
        """Average importance through this epoch if the next one is a round that needs it."""
        self.tracker = None
        if self.run.tracks and epoch + 1 in self.run.rounds.epochs:
            self.tracker = Tracker(
                self.trainer.model,
                self.measure,
                steps=len(self.trainer.train_loader),
                batches=self.run.importance.track_batches,
                alpha=self.run.importance.alpha,
                **self._options(),
            )

    def follow(self, slimmed: Slimmed) -> None:
        """Keep of the initial values of the trainer's network what is kept of its channels."""
        if self.initial:
            model = self.trainer.model
            self.initial = slicing.slice_tensors(model, self.initial, slimmed.kept)

    def state_dict(self) -> dict[str, Any]:
        tracked = self.tracker.state_dict() if self.tracker else None
        return {"initial": self.initial, "tracked": tracked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial = state["initial"]
        if state["tracked"]:
            self.track(self.trainer.epoch - 1)
            if self.tracker:  # else no longer asked for
                self.tracker.load_state_dict(state["tracked"])

    def _measure(self, epoch: int) -> Scores:
        batches = []
        if self.measure not in GRADIENT_FREE:
            loader, count = self.trainer.train_loader, self.run.importance.imp_samples
            balanced = self.measure == "grasp"
            batches = loading.samples(loader, count, epoch, balanced=balanced)
        seed = self.run.train.seed + epoch
        evidence = Evidence(self.trainer.model, batches, seed=seed, **self._options())
        return MEASURES[self.measure](evidence)

    def _options(self) -> dict[str, Any]:
        """Those of `Evidence`."""
        bias = {"use_l2": self.run.importance.use_l2, "use_init": self.run.importance.use_init}
        return {"temperature": self.run.temperature, "initial": self.initial, **bias}
