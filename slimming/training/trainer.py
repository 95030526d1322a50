"""A training run: its network, data and optimizer, and the record that lets it go on."""

import argparse
import functools
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from models import NETWORKS, PAPER_DEPTH
from slimming.cli.flags import SETTINGS
from slimming.data import loading
from slimming.errors import Interrupted, UserError
from slimming.measuring import profiling
from slimming.reports import plots, tables
from slimming.reports.board import TensorBoard
from slimming.runtime import distributed, threads
from slimming.runtime.device import LAYOUT, choose_device, compiled
from slimming.runtime.precision import Precision
from slimming.runtime.randomness import epoch_generator, seed_everything
from slimming.storage import architecture, checkpoint
from slimming.training import loop
from slimming.training.loop import Score
from slimming.training.optimizer import learning_rate, load_momentum, make_optimizer
from slimming.training.run_folder import RunFolder
from slimming.workflows import before_after

RECORD = ("epoch", "lr", "train_loss", "train_prec1", "test_loss", "test_prec1", "gamma_near_zero")


class Experiment:
    """What the flags of a training script describe, ready to `fit`.

    ``args`` come from `slimming.cli.flags.parse_training`, ``networks`` are constructors by name,
    ``settings`` names what of ``args`` a checkpoint keeps for ``--resume``. The
    network starts with fresh weights, with those of ``--refine``, or where ``--resume`` stopped.
    UserError where flags, files or data do not allow it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        networks: dict = NETWORKS,
        settings: tuple[str, ...] = SETTINGS,
    ):
        self.args, self.settings = args, settings
        self.device = choose_device(args.device, args.no_cuda)
        distributed.start(self.device)
        if args.batch_size < distributed.world_size():
            raise UserError(
                f"--batch-size {args.batch_size} leaves nothing for some of "
                f"{distributed.world_size()} processes: it is that of all together"
            )
        self.precision = Precision(self.device, args.amp)
        seed_everything(args.seed, args.deterministic)
        if args.start:
            model, self.network = architecture.rebuild(
                args.start, args.contents, self._wanted(), networks
            )
            self._load_data(self.network.dataset, self.network.image_size)
            outputs, asked = self.network.num_classes, getattr(args, "num_classes", None)
            loading.check_classes(self.test_loader, outputs, args.contents, args.start, asked)
        else:
            wanted = self._wanted()
            architecture.Network(**wanted | {"num_classes": 1}).check(
                networks
            )  # before any download
            self._load_data(wanted["dataset"], wanted["image_size"])
            self.network = architecture.Network(**wanted | {"num_classes": self._outputs(wanted)})
            model = self.network.build(networks)
        if args.sync_bn:
            model = distributed.synchronize_bn(model, self.device)
        self.epoch, self.best_prec1, self.history = args.start_epoch or 0, 0.0, []
        self.schedule = functools.partial(learning_rate, epochs=args.epochs, lr=args.lr)
        self.temperature = 1.0  # of the training loss
        self.extras: Callable[[], dict] = dict  # what else a script wants in its checkpoints
        self.train_this(model, self.network)
        if args.compile:
            print("note: --compile: the first step of each batch size takes minutes", flush=True)
        self.full_score = self._score_before_pruning()
        if args.resume:
            self._resume()
        elif args.refine and not self.full_score and not args.contents.get("cfg"):
            print(f"note: {args.refine} is not pruned: the full network is trained on")
        distributed.check_same(
            self.epoch,
            self.device,
            "the processes do not start at the same epoch: --save and --resume must be in a folder "
            "that all machines share",
        )
        self.folder = RunFolder(args, self.network.arch)

    def train_this(self, model: nn.Module, network: architecture.Network) -> None:
        """Train ``model`` from now on, with a new optimizer and a new best accuracy."""
        args = self.args
        self.network, self.best_prec1, self.best_is_older = network, 0.0, True
        self.model = model.to(self.device, memory_format=LAYOUT)
        self.trained = distributed.wrap(self.model)
        if args.compile:
            self.trained = compiled(self.trained, self.device)
        self.optimizer = make_optimizer(self.model, args.lr, args.momentum, args.weight_decay)

    def fit(
        self,
        on_gradients: Iterable[Callable[[], None]] = (),
        before_epoch: Callable[[int], None] | None = None,
    ) -> None:
        """Train to the last epoch; after each, evaluate and write the checkpoints.

        ``on_gradients``: see `loop.train`. ``before_epoch`` may change the network
        (`train_this`). Ends early where top-1 has not risen for ``--patience`` epochs. Interrupted
        on Ctrl-C, Diverged if a loss is not finite; the checkpoint of the last whole epoch is there
        in both cases.
        """
        first = distributed.rank() == 0  # it alone writes and speaks
        if first:
            self.folder.prepare()
        print(self._summary(), flush=True)
        if self.epoch < self.args.epochs and not self.args.threads:
            threads.tell_load(self.device)
        events = first and not self.args.no_tensorboard
        board = TensorBoard(self.folder.events, self.epoch, events)
        try:
            for epoch in range(self.epoch, self.args.epochs):
                if self._has_stalled():
                    break
                started = time.perf_counter()
                if before_epoch:
                    before_epoch(epoch)
                learned, score = self._one_epoch(epoch, on_gradients)
                self._save(epoch, learned, score)
                board.add(epoch, self.history[-1], self.model)
                print(self._epoch_text(score, time.perf_counter() - started), flush=True)
            if first:
                self._report()
        except KeyboardInterrupt:
            raise Interrupted(self.folder.how_to_continue()) from None
        finally:
            board.close()
        distributed.stop()

    def _wanted(self) -> dict:
        """The network that the flags ask for; what they leave open is the checkpoint's, or the
        default."""
        args = self.args
        known = architecture.describe(args.start, args.contents, vars(args))
        arch = known["arch"] or "vgg"
        return {
            "arch": arch,
            "depth": known["depth"] or PAPER_DEPTH.get(arch),
            "dataset": known["dataset"] or "cifar100",
            "image_size": known["image_size"] or architecture.Network.image_size,
            "options": known["options"],
            "num_classes": known["num_classes"],
        }

    def _outputs(self, wanted: dict) -> int:
        """As many as the data has classes, or the more that --num_classes asks for."""
        found = len(self.test_loader.classes)
        outputs = wanted["num_classes"] or found
        if outputs < found:
            raise UserError(f"--num_classes {outputs} is too few: the data has {found} classes")
        return outputs

    def _load_data(self, dataset: str, image_size: int) -> None:
        sizes = {"test": self.args.test_batch_size, "train": self.args.batch_size}
        self.test_loader, self.train_loader = (
            loading.batches(dataset, part, size, self.device, image_size, self.args)
            for part, size in sizes.items()  # the smaller part first: it finds what is wrong soon
        )

    def _one_epoch(self, epoch: int, on_gradients) -> tuple[Score, Score]:
        seed = epoch_generator(self.args.seed, epoch, distributed.rank()).initial_seed()
        torch.manual_seed(seed)  # dropout is a function of the epoch: a resumed run draws the same
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(epoch)
        learned = loop.train(
            self.trained,
            self.train_loader,
            self.optimizer,
            epoch,
            on_gradients,
            self.precision,
            self.args.log_interval,
            self.temperature,
        )
        distributed.share_buffers(self.model)
        score = loop.test(self.model, self.test_loader, self.precision)
        return learned, loop.check_finite(score, epoch)

    def _save(self, epoch: int, learned: Score, score: Score) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        best = score.prec1 > self.best_prec1 or self.best_is_older or not self.folder.best.exists()
        self.best_is_older = False
        self.best_prec1 = max(self.best_prec1, score.prec1)
        near_zero = tables.near_zero(self.model)
        values = (epoch, lr, learned.loss, learned.prec1, score.loss, score.prec1, near_zero)
        self.history.append(dict(zip(RECORD, values, strict=True)))
        if distributed.rank():
            return
        contents = architecture.contents_of(
            self.model,
            self.network,
            epoch + 1,
            self.best_prec1,
            self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            history=self.history,
            classes=self.test_loader.classes,
            before_pruning=self.full_score and self.full_score._asdict(),
            settings={name: getattr(self.args, name) for name in self.settings},
        )
        if best:  # first: if the run dies between the two, the epoch is trained and saved again
            checkpoint.write(self.folder.best, {**contents, "optimizer": None})
        checkpoint.write(self.folder.last, {**contents, **self.extras()})

    def _has_stalled(self) -> bool:
        """Whether top-1 has not risen for ``--patience`` epochs."""
        scores = [record["test_prec1"] for record in self.history]
        patience = getattr(self.args, "patience", None)
        if not patience or len(scores) <= patience:
            return False
        stalled = max(scores[-patience:]) <= max(scores[:-patience])
        if stalled:
            print(f"no better top-1 for {patience} epochs: training ends after {len(scores)}")
        return stalled

    def _resume(self) -> None:
        path, contents = self.args.resume, self.args.contents
        if not contents.get("epoch") and not contents.get("optimizer"):
            raise UserError(f"{path} holds no run to continue, only weights: --refine trains them")
        try:
            self.epoch, self.best_prec1 = int(contents["epoch"]), float(contents["best_prec1"])
            self.best_is_older = False
            if self.args.start_epoch is not None:
                self.epoch = self.args.start_epoch
            for saved in contents.get("history", ()):
                record = {name: float(saved[name]) for name in RECORD}
                if record["epoch"] < self.epoch:
                    self.history.append({**record, "epoch": int(record["epoch"])})
            if contents.get("scaler"):
                self.precision.scaler.load_state_dict(contents["scaler"])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be resumed: its record of the run is damaged or missing; --refine "
                "starts from its weights"
            ) from error
        if not load_momentum(self.optimizer, contents.get("optimizer")):
            print(f"note: {path} carries no momentum that fits: training goes on without")

    def _score_before_pruning(self) -> Score | None:
        """What the full network scored, where the weights come from a pruned checkpoint."""
        score = self.args.contents.get("before_pruning")
        try:
            return Score(float(score["loss"]), float(score["prec1"])) if score else None
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{self.args.start} is damaged: before_pruning is {score!r}") from None

    def _summary(self) -> str:
        args = self.args
        if self.epoch >= args.epochs:
            return f"all {args.epochs} epochs are done; a larger --epochs trains on"
        flops = profiling.count_flops(self.model, self.network.image_size)
        penalty = f"sparsity s = {args.s:g}" if args.sr else "no sparsity"
        return (
            f"{self.network}: {profiling.count_parameters(self.model):,} parameters, "
            f"{flops / 1e6:.1f} MFLOPs an image\n"
            f"{self.device}, {self.precision}, {penalty}, epochs {self.epoch} to {args.epochs}, "
            f"results in {self.folder.path}/"
        )

    def _epoch_text(self, score: Score, seconds: float) -> str:
        count, record = self.test_loader.num_images, self.history[-1]
        done, epochs = record["epoch"] + 1, self.args.epochs
        return (
            f"Test set: Average loss: {score.loss:.4f}, Accuracy: {round(score.prec1 * count)}/"
            f"{count} ({score.prec1:.2%})   epoch {done}/{epochs}, lr {record['lr']:g}, "
            f"{seconds:.1f} s, {_duration(seconds * (epochs - done))} left"
        )

    def _report(self) -> None:
        """The curves, how sparse γ is, and a slim network beside the full one that it was."""
        folder, wrote = self.folder, [self.folder.last, self.folder.best]
        if self.history:
            curves = plots.draw_curves(self.history, str(self.network))
            wrote += plots.write_picture(folder.curves, curves)
        print(tables.sparsity_text(self.model))
        print(f"\nbest top-1 {self.best_prec1:.2%}; wrote {', '.join(map(str, wrote))}")
        if self.history and self.full_score:
            last = Score(self.history[-1]["test_loss"], self.history[-1]["test_prec1"])
            print("\nbefore: the full network when it was pruned, after: the slim network now")
            print(
                before_after.against_full(
                    self.model, self.network, last, self.full_score, self.test_loader
                )
            )


def _duration(seconds: float) -> str:
    """Hours and minutes, or seconds where they are few."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes // 60}:{minutes % 60:02d} h"
