"""A training run: its network, data and optimizer, and the files that let it go on at any time."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from models import NETWORKS, PAPER_DEPTH
from slimming import before_after, checkpoint, data, profiling, reporting, training
from slimming.cli import SETTINGS
from slimming.errors import Interrupted, UserError


class Experiment:
    """What the flags of a training script describe, ready to `fit`.

    ``args`` come from `slimming.cli.parse_training`, ``networks`` are constructors by name. The
    network starts with fresh weights, with those of ``--refine``, or where ``--resume`` stopped.
    """

    def __init__(self, args: argparse.Namespace, networks: dict = NETWORKS):
        self.args = args
        self.device = training.choose_device(args.device, args.no_cuda)
        self.precision = training.Precision(self.device, args.amp)
        self.network, self.train_loader, self.test_loader = self._network_and_data(networks)
        training.seed_everything(args.seed, args.deterministic)
        if args.start:
            model = checkpoint.load_network(args.start, args.contents, self.network, networks)
        else:
            model = self.network.build(networks)
        self.model = model.to(self.device, memory_format=training.memory_format(model))
        self.optimizer = training.make_optimizer(
            self.model, args.lr, args.momentum, args.weight_decay
        )
        self.epoch, self.best_prec1, self.history = args.start_epoch or 0, 0.0, []
        self.before_pruning = self._before_pruning()
        if args.resume:
            self._resume()
        self.folder = self._folder()
        name = args.filename
        self.last = self.folder / f"{name or 'checkpoint'}.pth.tar"
        self.best = self.folder / f"{name + '_best' if name else 'model_best'}.pth.tar"
        self.curves = self.folder / f"{name + '_' if name else ''}curves.png"
        self.events = self.folder / (f"tensorboard_{name}" if name else "tensorboard")

    def fit(self, on_gradients: Iterable[Callable[[], None]] = ()) -> None:
        """Train to the last epoch; after each, evaluate and write the checkpoints.

        ``on_gradients``: see `slimming.training.train`. Interrupted on Ctrl-C, Diverged if the
        loss is not finite; the checkpoint of the last whole epoch is there in both cases.
        """
        args, first = self.args, self.epoch
        if first >= args.epochs:
            print(f"{self.last}: all {args.epochs} epochs are done; --epochs N trains on")
            return
        self._set_aside_older_run()
        print(self._summary(), flush=True)
        board = reporting.TensorBoard(self.events, first, not args.no_tensorboard)
        try:
            for epoch in range(first, args.epochs):
                started = time.perf_counter()
                lr = training.learning_rate(epoch, args.epochs, args.lr)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                learned = training.train(
                    self.model,
                    self.train_loader,
                    self.optimizer,
                    epoch,
                    on_gradients,
                    self.precision,
                    args.log_interval,
                )
                score = training.test(self.model, self.test_loader, self.precision)
                self._save(epoch, lr, learned, score)
                board.add(epoch, self.history[-1], self.model)
                self._print_epoch(score, lr, time.perf_counter() - started)
        except KeyboardInterrupt:
            raise Interrupted(self._how_to_continue()) from None
        finally:
            board.close()
        if self.before_pruning and self.network.cfg:
            print(
                "\nfull network before pruning, slim network now:\n"
                + before_after.against_full(
                    self.model, self.network, score, self.before_pruning, self.test_loader
                )
                + "\n"
            )
        reporting.draw_curves(self.curves, self.history, str(self.network))
        print(f"best top-1 {self.best_prec1:.2%}; wrote {self.last}, {self.best}, {self.curves}")
        print(reporting.sparsity_text(self.model))

    def _network_and_data(self, networks: dict):
        args = self.args
        flags = {"arch": args.arch, "depth": args.depth, "dataset": args.dataset}
        known = checkpoint.describe(args.start, args.contents, flags)
        known["arch"] = known["arch"] or "vgg"
        known["depth"] = known["depth"] or PAPER_DEPTH.get(known["arch"])
        known["dataset"] = known["dataset"] or "cifar100"
        with torch.device("meta"):  # is there such a network? asked before any download
            checkpoint.Network(**{**known, "num_classes": 1}).build(networks)
        train_loader, test_loader = (
            data.batches(
                known["dataset"], args.data, part, size, self.device, args.workers, args.seed
            )
            for part, size in (("train", args.batch_size), ("test", args.test_batch_size))
        )
        known["num_classes"] = data.agree_on_classes(train_loader, known["num_classes"], args.start)
        return checkpoint.Network(**known), train_loader, test_loader

    def _folder(self) -> Path:
        args = self.args
        if args.save:
            return Path(args.save)
        if args.resume:
            return Path(args.resume).parent
        if args.tag or (args.spelled or "").startswith("preact_res"):
            parts = [args.spelled or self.network.arch, "sr" if args.sr else None, args.tag]
            return Path("ckpts") / "_".join(part for part in parts if part)
        return Path("logs")

    def _before_pruning(self) -> training.Score | None:
        """What the full network scored, where the weights come from a pruned checkpoint."""
        score = self.args.contents.get("before_pruning")
        try:
            return training.Score(float(score["loss"]), float(score["prec1"])) if score else None
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{self.args.start} is damaged: before_pruning is {score!r}") from None

    def _resume(self) -> None:
        path, contents = self.args.resume, self.args.contents
        try:
            self.epoch, self.best_prec1 = int(contents["epoch"]), float(contents["best_prec1"])
            self.history = [dict(r) for r in contents.get("history", []) if r["epoch"] < self.epoch]
            if contents.get("scaler"):
                self.precision.scaler.load_state_dict(contents["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be resumed: its record of the run is damaged or "
                "missing; --refine starts from its weights"
            ) from error
        if not self._load_momentum(contents.get("optimizer")):
            print(f"note: {path} carries no momentum that fits: training goes on without")
        if self.args.start_epoch is not None:
            self.epoch = self.args.start_epoch

    def _load_momentum(self, saved: dict | None) -> bool:
        """Take the optimizer's state, but not its settings: those are what the flags say."""
        fresh = self.optimizer.state_dict()
        parameters = self.optimizer.param_groups[0]["params"]
        try:
            momentum = {i: saved["state"][i]["momentum_buffer"] for i in saved["state"]}
            if any(momentum[i].shape != parameters[i].shape for i in momentum):
                return False
            self.optimizer.load_state_dict({**fresh, "state": saved["state"]})
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            return False
        return True

    def _save(self, epoch: int, lr: float, learned: training.Score, score: training.Score) -> None:
        best = score.prec1 > self.best_prec1 or not self.history
        self.best_prec1 = max(self.best_prec1, score.prec1)
        self.history.append(
            {
                "epoch": epoch,
                "lr": lr,
                "train_loss": learned.loss,
                "train_prec1": learned.prec1,
                "test_loss": score.loss,
                "test_prec1": score.prec1,
                "gamma_near_zero": reporting.near_zero(self.model),
            }
        )
        contents = checkpoint.contents_of(
            self.model,
            self.network,
            epoch + 1,
            self.best_prec1,
            self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            history=self.history,
            before_pruning=self.before_pruning and self.before_pruning._asdict(),
            settings={name: getattr(self.args, name) for name in SETTINGS},
        )
        if best:  # first: if the run dies between the two, the epoch is trained and saved again
            checkpoint.write(self.best, {**contents, "optimizer": None})
        checkpoint.write(self.last, contents)

    def _set_aside_older_run(self) -> None:
        """Another run's results in the same folder are moved, not overwritten."""
        if not self.last.exists() or (self.args.resume and self.last.samefile(self.args.resume)):
            return
        number = 1
        while (self.folder / f"previous-{number}").exists():
            number += 1
        aside = self.folder / f"previous-{number}"
        aside.mkdir()
        for path in (self.last, self.best, self.curves, self.events):
            if path.exists():
                os.replace(path, aside / path.name)
        print(f"note: {self.folder} held another run; its files are now in {aside}")

    def _summary(self) -> str:
        args = self.args
        penalty = f"sparsity s = {args.s:g}" if args.sr else "no sparsity"
        flops = profiling.count_flops(self.model) / 1e6
        return (
            f"{self.network}: {profiling.count_parameters(self.model):,} parameters, "
            f"{flops:.1f} MFLOPs an image\n{self.device}, {self.precision}, {penalty}, epochs "
            f"{self.epoch} to {args.epochs}, results in {self.folder}/"
        )

    def _print_epoch(self, score: training.Score, lr: float, seconds: float) -> None:
        count, done = self.test_loader.num_images, self.history[-1]["epoch"] + 1
        left = seconds * (self.args.epochs - done)
        print(
            f"Test set: Average loss: {score.loss:.4f}, Accuracy: {round(score.prec1 * count)}/"
            f"{count} ({score.prec1:.2%})   epoch {done}/{self.args.epochs}, lr {lr:g}, "
            f"{seconds:.1f} s, {left / 60:.0f} min left",
            flush=True,
        )

    def _how_to_continue(self) -> str:
        if not self.last.exists():
            return "interrupted in the first epoch, before a checkpoint was written: start again"
        words = ["python", *sys.argv]
        if self.args.resume in words:
            at = words.index(self.args.resume)
            del words[at - 1 if words[at - 1] == "--resume" else at : at + 1]
        return f"interrupted; continue with: {shlex.join([*words, '--resume', str(self.last)])}"
