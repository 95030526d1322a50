"""flowprune.py: prune in rounds while the network trains."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from models import widths
from slimming.channels.groups import count_filters
from slimming.choosing import ranking
from slimming.choosing.importance import GRADIENT_FREE, MEASURES, Evidence, Scores
from slimming.choosing.tracking import Tracker
from slimming.commands.rounds.settings import (
    MAX_PERCENT,
    FlowOutputSettings,
    FlowRun,
    RoundsSettings,
)
from slimming.commands.train.run import Start, begin, find_start, open_network, recorded
from slimming.data import loading
from slimming.errors import UserError
from slimming.measuring.figures import measure
from slimming.reports import plots
from slimming.reports.tables import liveness_text
from slimming.runtime import distributed
from slimming.settings import build, kept
from slimming.slicing.proof import liveness, liveness_warning
from slimming.slicing.prune import Slimmed, apply, groups
from slimming.slicing.slim import slice_tensors
from slimming.sparsity import sliced_state
from slimming.storage import files
from slimming.training import loop
from slimming.training.callbacks import Batch
from slimming.training.trainer import Trainer, load_momentum


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
            self.initial = slice_tensors(model, self.initial, slimmed.kept)

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


PRETRAINED = ("model_best.pth.tar",)  # in a folder


def flow_run(typed: Mapping[str, Any]) -> tuple[FlowRun, Start]:
    """The run of the ``typed`` flags (see `slimming.cli.flags.parse`), and where it starts.

    With ``--resume``, other settings come from the checkpoint. UserError if files are missing or
    contradict the flags.
    """
    rounds, output = build(RoundsSettings, typed), build(FlowOutputSettings, typed)
    pretrained = None if rounds.pretrained_path == "0" else rounds.pretrained_path
    folder = output.folder(rounds.label)
    start = find_start(pretrained, typed.get("resume"), lambda: folder.last, PRETRAINED)
    resume = start.path if start.resumes else None
    values = {**recorded(FlowRun, start, typed), **typed, "resume": resume}
    run = build(FlowRun, values)
    steps = run.rounds.thresholds
    for name in ("n_rounds", "prune_percent") if steps else ():
        value = typed.get(name)
        if value not in (None, getattr(run.rounds, name)):
            raise UserError(f"--{name} {value:g} and --thresholds {steps} contradict: omit one")
    return replace(run, data=run.data.resolved(known=start.resumes)), start


def prepare(run: FlowRun, start: Start) -> Trainer:
    """The trainer of a run. UserError if settings, files or data contradict each other."""
    settings = run.train.settings
    model, network, loaders = open_network(settings, run.data, run.request(start.contents), start)
    trainer = Trainer(
        model,
        network,
        *loaders,
        settings,
        schedule=run.learning_rate,
        temperature=run.importance.T,
        kept=kept(run),
    )
    return begin(trainer, start, refines=False)  # the network is pruned, not fine-tuned


class Rounds:
    """A training callback that prunes at the start of some epochs.

    ``dense`` is the size of the network before the first round (`size_of`), ``done`` its size after
    each round.
    """

    name = "flow"

    def __init__(self, run: FlowRun, trainer: Trainer):
        self.run, self.trainer, self.folder = run, trainer, run.folder.path
        self.writes = distributed.rank() == 0  # now: the process group is gone after `fit`
        self.done: list[dict[str, Any]] = []
        self.dense: dict[str, Any] = {}
        self.least: dict[str, int] = {}  # the minimal number of channels of each layer
        self.scores = FilterScores(run, trainer)
        if trainer.resumed and self.name not in trainer.resumed:
            raise self._without_state()

    def before_epoch(self, epoch: int) -> None:
        """Prune if the epoch starts with a round; track importance if the next one does."""
        if epoch in self.run.rounds.epochs:
            self._prune(epoch)
        self.scores.track(epoch)

    def on_gradients(self, batch: Batch) -> None:
        if self.scores.tracker:
            self.scores.tracker.on_gradients(batch)

    def after_epoch(self, epoch: int) -> None:
        """With --track_stats, write stats.json with the epochs so far."""
        if self.run.output.track_stats and self.writes:
            rounds = {"rounds": self.done, "dense": self.dense}
            stats = statistics(self.trainer.history, self.run.rounds.epochs) | rounds
            files.write_bytes(self.folder / "stats.json", json.dumps(stats, indent=1).encode())

    def state_dict(self) -> dict[str, Any]:
        own = {"rounds": self.done, "dense": self.dense, "least": self.least}
        return own | self.scores.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.done, self.dense = list(state["rounds"]), dict(state["dense"])
            self.least = dict(state["least"])
            self.scores.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._without_state() from error

    def _without_state(self) -> UserError:
        return UserError(
            f"{self.run.train.resume} has no state of pruning rounds to resume: start a new run "
            "from it with --pretrained_path"
        )

    def write_results(self) -> None:
        """Write a picture of the rounds and, with --track_stats, stats.json."""
        history, rounds = self.trainer.history, self.run.rounds
        if not self.writes or not history:
            return
        title = f"{rounds.model}, {rounds.pruning_type}, {rounds.removed(rounds.n_rounds):.0%}"
        phases = rounds.epochs.start, rounds.epochs.stop
        picture = plots.draw_rounds(history, [self.dense, *self.done], phases, title)
        for path in plots.write_picture(self.folder / "flow.png", picture):
            print(f"wrote {path}")
        if self.run.output.track_stats:
            self.after_epoch(history[-1]["epoch"])
            print(f"wrote {self.folder / 'stats.json'}")

    def _prune(self, epoch: int) -> None:
        """One round. With r rounds left of n, it prunes the fraction p / (r p + n (1 - p)) of the
        remaining filters, so that each round removes the same number of filters."""
        trainer, rounds = self.trainer, self.run.rounds
        model, images = trainer.model, trainer.test_loader.first(64)
        coupled = groups(model, images)
        left = count_filters(coupled)
        if not self.done:
            self.dense = size_of(trainer, left)
            if not rounds.bypass:
                full = widths(model).items()
                self.least = {n: int(width[-1] * (1 - MAX_PERCENT / 100)) + 1 for n, width in full}
            trainer.full_score = loop.test(model, trainer.test_loader, trainer.precision)
        stay = self.dense["filters"] * (1 - rounds.removed(rounds.epochs.index(epoch) + 1))
        ratio = max(0.0, 1 - stay / left)
        choice = ranking.choose(coupled, self.scores.of_filters(epoch), ratio, least=self.least)
        slimmed = self._repaired(apply(model, coupled, choice, images))
        alive = liveness(slimmed.model, model, images)
        self._replace(slimmed)
        gone = sum(
            int(g.filters[~choice.kept[g.name]].sum()) for g in coupled if g.name in choice.kept
        )
        size = size_of(trainer, left - gone)
        proof = {"difference": slimmed.difference, "liveness": alive}
        self.done.append({"epoch": epoch, **size, **proof})
        self._print_round(left, slimmed)

    def _repaired(self, slimmed: Slimmed) -> Slimmed:
        """``slimmed``, with --repair repaired."""
        if not self.run.repairing.repair:
            return slimmed
        trainer = self.trainer
        dense, loader = trainer.model, trainer.train_loader
        model = self.run.repairing.repaired(slimmed.model, dense, slimmed.kept, loader).model
        return replace(slimmed, model=model.cpu())

    def _replace(self, slimmed: Slimmed) -> None:
        """Continue with the slim network, and with its initial values and momentum."""
        self.scores.follow(slimmed)
        trainer, dense = self.trainer, self.trainer.model
        momentum = None
        if self.run.train.preserve_moment:
            momentum = sliced_state(dense, slimmed.kept, trainer.optimizer)
        trainer.replace(slimmed.model, replace(trainer.architecture, cfg=slimmed.cfg))
        load_momentum(trainer.optimizer, momentum)

    def _print_round(self, before: int, slimmed: Slimmed) -> None:
        size, full = self.done[-1], self.dense["filters"]
        left = size["filters"]
        print(
            f"round {len(self.done)} of {self.run.rounds.n_rounds}: {before} -> {left} of {full} "
            f"filters ({left / full:.1%}), {size['parameters']:,} parameters, "
            f"{size['flops'] / 1e6:.1f} MFLOPs; slim equals masked: {slimmed.difference:.1e}; "
            f"{liveness_text(size['liveness'])}",
            flush=True,
        )
        if dead := liveness_warning(size["liveness"], slimmed.kept):
            print(f"warning: {dead}")
        if slimmed.choice.rescued:
            names = ", ".join(slimmed.choice.rescued)
            print(f"warning: these layers keep only the minimal number of channels: {names}")


def size_of(trainer: Trainer, filters: int) -> dict[str, Any]:
    """Filters, parameters and FLOPs of the current network."""
    model, size = trainer.model, trainer.architecture.image_size
    (figures,) = measure([model], torch.zeros(1, 3, size, size))
    return {"filters": filters, "parameters": figures.parameters, "flops": figures.flops}


def statistics(history: list[dict[str, Any]], rounds: range) -> dict[str, Any]:
    """Loss and top-1 in training and test, by phase: warm-up, pruning (the epochs in ``rounds``)
    and final training."""
    phases = {"warmup": range(rounds.start), "pruning": rounds}
    stats: dict[str, dict[str, list[dict[str, Any]]]] = {
        part: {phase: [] for phase in (*phases, "final")} for part in ("train", "test")
    }
    for record in history:
        epoch = record["epoch"]
        phase = next((phase for phase, epochs in phases.items() if epoch in epochs), "final")
        for part, by_phase in stats.items():
            figures = {"loss": record[f"{part}_loss"], "top-1": record[f"{part}_prec1"]}
            by_phase[phase].append({"epoch": epoch, "lr": record["lr"], **figures})
    return stats
