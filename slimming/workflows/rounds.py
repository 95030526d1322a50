"""Pruning spread over epochs: which of them prune, how much, by which scores (Lubana and Dick,
ICLR 2021)."""

import argparse
import json
from dataclasses import replace

import torch

from models import widths
from slimming.data import loading
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import importance, ranking, slicing
from slimming.pruning.groups import count_filters, groups
from slimming.pruning.importance import MEASURES, TEMPERATURES, Evidence, Scores
from slimming.pruning.slicing import Slimmed
from slimming.pruning.tracking import Tracker
from slimming.reports import plots
from slimming.runtime import distributed
from slimming.storage import files
from slimming.training import loop
from slimming.training.optimizer import learning_rate, load_momentum
from slimming.training.trainer import Experiment

LR = 0.1
MOST = 0.95  # no layer loses more than this share of its channels: a ranking may take it whole


class Rounds:
    """Which epochs prune, how much, by which scores; and the record of what each round did."""

    def __init__(self, args: argparse.Namespace, experiment: Experiment):
        self.args, self.experiment = args, experiment
        self.first, self.last = args.warmup_epochs, args.warmup_epochs + args.n_rounds
        self.trackers: list[Tracker] = []
        self.writes = distributed.rank() == 0  # asked now: after `fit` the processes are strangers
        told = args.contents.get("flow") if args.resume else None
        try:
            if args.resume and not told:
                raise KeyError("flow")
            self.done = list(told["rounds"]) if told else []
            self.dense = dict(told["dense"]) if told else {}
            self.least = told["least"] if told else {}
            self.initial = told["initial"] if told else self._initial()
            if told and told["tracked"]:
                self._track(experiment.epoch - 1)
                self.trackers[0].load_state_dict(told["tracked"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{args.resume} holds no record of rounds to go on with") from error
        experiment.schedule = self.learning_rate
        experiment.temperature = args.T
        experiment.extras = self.extras

    def learning_rate(self, epoch: int) -> float:
        """--lr_prune in the rounds; else 0.1, 0.01 and 0.001 in the first half, the third and the
        last quarter of --epochs."""
        if self.first <= epoch < self.last:
            return self.args.lr_prune
        return learning_rate(epoch, self.args.epochs, LR)

    def before_epoch(self, epoch: int) -> None:
        """Prune if the epoch is a round; track importance if the next one is."""
        if self.first <= epoch < self.last:
            self._prune(epoch)
        self._track(epoch)
        self._write_statistics()

    def extras(self) -> dict:
        """What a checkpoint needs for --resume."""
        tracked = self.trackers[0].state_dict() if self.trackers else None
        told = {"rounds": self.done, "dense": self.dense, "least": self.least}
        return {"flow": {**told, "initial": self.initial, "tracked": tracked}}

    def removed(self, rounds: int) -> float:
        """The share of the original filters that is gone after so many rounds."""
        if self.args.thresholds:
            return json.loads(self.args.thresholds)[rounds - 1] / 100
        return self.args.prune_percent / 100 * rounds / self.args.n_rounds

    def _prune(self, epoch: int) -> None:
        """One round: of what is left, the share p / (r p + n (1 - p)) with r rounds to go, so that
        each round removes equally many of the original filters."""
        experiment, number = self.experiment, epoch - self.first + 1
        model, images = experiment.model, experiment.test_loader.first(64)
        found = groups(model, images)
        left = count_filters(found)
        if not self.done:
            self.dense = self._size(left)
            if not self.args.bypass:
                full = widths(model).items()
                self.least = {layer: int(width[-1] * (1 - MOST)) + 1 for layer, width in full}
            experiment.full_score = loop.test(model, experiment.test_loader, experiment.precision)
        stay = self.dense["filters"] * (1 - self.removed(number))
        share = max(0.0, 1 - stay / left)
        choice = ranking.choose(found, self._scores(epoch), share, least=self.least)
        slimmed = slicing.apply(model, found, choice, images)
        self._replace(slimmed)
        gone = sum(
            int(g.filters[~choice.keep[g.name]].sum()) for g in found if g.name in choice.keep
        )
        self._record(epoch, slimmed, left, gone)

    def _scores(self, epoch: int) -> Scores:
        """The importance of each filter, the same in every process."""
        args, experiment = self.args, self.experiment
        if self.trackers:
            scores = self.trackers[0].scores()
        else:
            batches = []
            if args.pruning_type not in importance.GRADIENT_FREE:
                balanced = args.pruning_type == "grasp"
                batches = loading.samples(
                    experiment.train_loader, args.imp_samples, epoch, balanced=balanced
                )
            evidence = Evidence(
                experiment.model,
                batches,
                temperature=self._temperature(),
                initial=self.initial,
                use_l2=args.use_l2,
                use_init=args.use_init,
                seed=args.seed + epoch,
            )
            scores = MEASURES[args.pruning_type](evidence)
        return {
            name: distributed.of_the_first(score, experiment.device)
            for name, score in scores.items()
        }

    def _temperature(self) -> float:
        """--grasp_T for GraSP; 1 for grad_preserve, as its paper has it, unless --bypass."""
        args = self.args
        if args.pruning_type == "grasp":
            return args.grasp_T
        return args.T if args.bypass else TEMPERATURES.get(args.pruning_type, args.T)

    def _replace(self, slimmed: Slimmed) -> None:
        """Go on with the slim network; initial values and momentum follow their channels."""
        experiment, dense = self.experiment, self.experiment.model
        names = [name for name, p in dense.named_parameters() if p.requires_grad]
        old = experiment.optimizer.state
        momentum = {
            name: old[p]["momentum_buffer"]
            for name, p in dense.named_parameters()
            if "momentum_buffer" in old[p]
        }
        experiment.train_this(slimmed.model, replace(experiment.network, cfg=slimmed.cfg))
        if self.initial:
            self.initial = slicing.slice_tensors(dense, self.initial, slimmed.kept)
        if self.args.preserve_moment and momentum:
            sliced = slicing.slice_tensors(dense, momentum, slimmed.kept)
            saved = {"state": {i: {"momentum_buffer": sliced[n]} for i, n in enumerate(names)}}
            load_momentum(experiment.optimizer, saved)

    def _record(self, epoch: int, slimmed: Slimmed, before: int, gone: int) -> None:
        size = self._size(before - gone)
        self.done.append({"epoch": epoch, **size, "difference": slimmed.difference})
        left, full = size["filters"], self.dense["filters"]
        print(
            f"round {len(self.done)} of {self.args.n_rounds}: {before} -> {left} of {full} "
            f"filters ({left / full:.1%}), {size['parameters']:,} parameters, "
            f"{size['flops'] / 1e6:.1f} MFLOPs; slim equals masked: {slimmed.difference:.1e}",
            flush=True,
        )
        if slimmed.choice.rescued:
            names = ", ".join(slimmed.choice.rescued)
            print(f"warning: these keep no more channels than a layer must: {names}")

    def _size(self, filters: int) -> dict:
        """Filters, parameters and FLOPs of the network as it is."""
        model, size = self.experiment.model, self.experiment.network.image_size
        parameters, flops = profiling.count_parameters(model), profiling.count_flops(model, size)
        return {"filters": filters, "parameters": parameters, "flops": flops}

    def _track(self, epoch: int) -> None:
        """Track importance through this epoch if --track_importance asks for it and the next one
        prunes."""
        args = self.args
        wanted = args.track_importance or args.pruning_type == "biased_loss_tracked"
        self.trackers.clear()
        if not wanted or not self.first <= epoch + 1 < self.last:
            return
        loader = self.experiment.train_loader
        tracker = Tracker(
            self.experiment.model,
            args.pruning_type,
            steps=len(loader),
            minibatch=lambda: loader.minibatch,
            temperature=self._temperature(),
            batches=args.track_batches,
            alpha=args.alpha,
            initial=self.initial,
            use_l2=args.use_l2,
            use_init=args.use_init,
        )
        self.trackers.append(tracker)

    def _initial(self) -> dict[str, torch.Tensor] | None:
        """θ₀, where --use_init measures the distance from it."""
        if not self.args.use_init:
            return None
        return {n: p.detach().clone() for n, p in self.experiment.model.named_parameters()}

    def report(self) -> None:
        """The picture of the rounds and, with --track_stats, their figures as JSON."""
        history, folder = self.experiment.history, self.experiment.folder.path
        if not self.writes or not history:
            return
        title = (
            f"{self.args.model}, {self.args.pruning_type}, {self.removed(self.args.n_rounds):.0%}"
        )
        picture = plots.draw_rounds(
            history, [self.dense, *self.done], (self.first, self.last), title
        )
        for path in plots.write_picture(folder / "flow.png", picture):
            print(f"wrote {path}")
        if self.args.track_stats:
            self._write_statistics()
            print(f"wrote {folder / 'stats.json'}")

    def _write_statistics(self) -> None:
        """With --track_stats: stats.json, as far as the run has come."""
        if self.args.track_stats and self.writes:
            text = json.dumps(self.statistics(), indent=1)
            files.write_bytes(self.experiment.folder.path / "stats.json", text.encode())

    def statistics(self) -> dict:
        """Loss and top-1 in train and test, each by warm-up, pruning and final training; what each
        round left."""
        stats = {
            part: {phase: [] for phase in ("warmup", "pruning", "final")}
            for part in ("train", "test")
        }
        for record in self.experiment.history:
            epoch = record["epoch"]
            phase = "warmup" if epoch < self.first else "pruning" if epoch < self.last else "final"
            for part in stats:
                figures = {"loss": record[f"{part}_loss"], "top-1": record[f"{part}_prec1"]}
                stats[part][phase].append({"epoch": epoch, "lr": record["lr"], **figures})
        return {**stats, "rounds": self.done, "dense": self.dense}
