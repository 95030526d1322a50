"""The importance of filters during training, for the next round of pruning."""

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
    """Scores by the measure of ``run``: computed on images at the start of a round, or averaged by
    a ``tracker`` over the epoch before it.

    ``initial`` are the initial values for --use_init.
    """

    def __init__(self, run: FlowRun, trainer: Trainer):
        self.run, self.trainer, self.measure = run, trainer, run.rounds.pruning_type
        self.tracker: Tracker | None = None
        self.initial: dict[str, torch.Tensor] | None = None
        if run.importance.use_init:
            named = trainer.model.named_parameters()
            self.initial = {name: p.detach().clone() for name, p in named}

    def of_filters(self, epoch: int) -> Scores:
        """The importance of each filter at the start of an epoch, the same in every process."""
        scores = self.tracker.scores() if self.tracker else self._measure(epoch)
        device = self.trainer.device
        return {n: distributed.broadcast_from_first(score, device) for n, score in scores.items()}

    def track(self, epoch: int) -> None:
        """Average importance over this epoch if the next one starts with a round that needs it."""
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
        """Slice the initial values to the channels that the trainer's network keeps."""
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
            if self.tracker:  # not if the flags disable it now
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
        """The options of `Evidence`."""
        bias = {"use_l2": self.run.importance.use_l2, "use_init": self.run.importance.use_init}
        return {"temperature": self.run.temperature, "initial": self.initial, **bias}
