"""A training run: its network, data and optimizer, and the record that lets it go on."""

import argparse
import time
from collections.abc import Callable, Iterable

from models import NETWORKS, PAPER_DEPTH
from slimming import before_after, checkpoint, data, profiling, reporting, training
from slimming.errors import Interrupted, UserError
from slimming.flags import SETTINGS
from slimming.run_folder import RunFolder
from slimming.training import Score

RECORD = ("epoch", "lr", "train_loss", "train_prec1", "test_loss", "test_prec1", "gamma_near_zero")


class Experiment:
    """What the flags of a training script describe, ready to `fit`.

    ``args`` come from `slimming.flags.parse_training`, ``networks`` are constructors by name. The
    network starts with fresh weights, with those of ``--refine``, or where ``--resume`` stopped.
    UserError where flags, files or data do not allow it.
    """

    def __init__(self, args: argparse.Namespace, networks: dict = NETWORKS):
        self.args = args
        self.device = training.choose_device(args.device, args.no_cuda)
        self.precision = training.Precision(self.device, args.amp)
        training.seed_everything(args.seed, args.deterministic)
        if args.start:
            model, self.network = checkpoint.rebuild(
                args.start, args.contents, self._wanted(), networks
            )
            self._load_data(self.network.dataset, self.network.num_classes)
        else:
            wanted = self._wanted()
            checkpoint.Network(**wanted, num_classes=1).check(networks)  # before any download
            self._load_data(wanted["dataset"], None)
            self.network = checkpoint.Network(
                **wanted, num_classes=len(self.test_loader.split.classes)
            )
            model = self.network.build(networks)
        self.model = model.to(self.device, memory_format=training.memory_format(model))
        self.optimizer = training.make_optimizer(
            self.model, args.lr, args.momentum, args.weight_decay
        )
        self.epoch, self.best_prec1, self.history = args.start_epoch or 0, 0.0, []
        self.full_score = self._score_before_pruning()
        if args.resume:
            self._resume()
        self.folder = RunFolder(args, self.network.arch)

    def fit(self, on_gradients: Iterable[Callable[[], None]] = ()) -> None:
        """Train to the last epoch; after each, evaluate and write the checkpoints.

        ``on_gradients``: see `slimming.training.train`. Interrupted on Ctrl-C, Diverged if a loss
        is not finite; the checkpoint of the last whole epoch is there in both cases.
        """
        self.folder.prepare()
        print(self._summary(), flush=True)
        board = reporting.TensorBoard(self.folder.events, self.epoch, not self.args.no_tensorboard)
        try:
            for epoch in range(self.epoch, self.args.epochs):
                started = time.perf_counter()
                learned, score = self._one_epoch(epoch, on_gradients)
                self._save(epoch, learned, score)
                board.add(epoch, self.history[-1], self.model)
                print(self._epoch_text(score, time.perf_counter() - started), flush=True)
            self._report()
        except KeyboardInterrupt:
            raise Interrupted(self.folder.how_to_continue()) from None
        finally:
            board.close()

    def _wanted(self) -> dict:
        """The network that the flags ask for; what they leave open is the checkpoint's, or the
        default."""
        args = self.args
        flags = {"arch": args.arch, "depth": args.depth, "dataset": args.dataset}
        known = checkpoint.describe(args.start, args.contents, flags)
        arch = known["arch"] or "vgg"
        return {
            "arch": arch,
            "depth": known["depth"] or PAPER_DEPTH.get(arch),
            "dataset": known["dataset"] or "cifar100",
        }

    def _load_data(self, dataset: str, num_classes: int | None) -> None:
        args = self.args

        def load(part: str, size: int) -> data.Batches:
            return data.batches(
                dataset, args.data, part, size, self.device, args.workers, args.seed
            )

        self.test_loader = load("test", args.test_batch_size)  # small: finds what is wrong soon
        data.check_classes(self.test_loader, num_classes, args.start)
        self.train_loader = load("train", args.batch_size)

    def _one_epoch(self, epoch: int, on_gradients) -> tuple[Score, Score]:
        lr = training.learning_rate(epoch, self.args.epochs, self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        learned = training.train(
            self.model,
            self.train_loader,
            self.optimizer,
            epoch,
            on_gradients,
            self.precision,
            self.args.log_interval,
        )
        score = training.test(self.model, self.test_loader, self.precision)
        return learned, training.check_finite(score, epoch)

    def _save(self, epoch: int, learned: Score, score: Score) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        best = score.prec1 > self.best_prec1 or not self.folder.best.exists()
        self.best_prec1 = max(self.best_prec1, score.prec1)
        near_zero = reporting.near_zero(self.model)
        values = (epoch, lr, learned.loss, learned.prec1, score.loss, score.prec1, near_zero)
        self.history.append(dict(zip(RECORD, values, strict=True)))
        contents = checkpoint.contents_of(
            self.model,
            self.network,
            epoch + 1,
            self.best_prec1,
            self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            history=self.history,
            before_pruning=self.full_score and self.full_score._asdict(),
            settings={name: getattr(self.args, name) for name in SETTINGS},
        )
        if best:  # first: if the run dies between the two, the epoch is trained and saved again
            checkpoint.write(self.folder.best, {**contents, "optimizer": None})
        checkpoint.write(self.folder.last, contents)

    def _resume(self) -> None:
        path, contents = self.args.resume, self.args.contents
        try:
            self.epoch, self.best_prec1 = int(contents["epoch"]), float(contents["best_prec1"])
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
        if not training.load_momentum(self.optimizer, contents.get("optimizer")):
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
        penalty = f"sparsity s = {args.s:g}" if args.sr else "no sparsity"
        return (
            f"{self.network}: {profiling.count_parameters(self.model):,} parameters, "
            f"{profiling.count_flops(self.model) / 1e6:.1f} MFLOPs an image\n"
            f"{self.device}, {self.precision}, {penalty}, epochs {self.epoch} to {args.epochs}, "
            f"results in {self.folder.path}/"
        )

    def _epoch_text(self, score: Score, seconds: float) -> str:
        count, record = self.test_loader.num_images, self.history[-1]
        done, epochs = record["epoch"] + 1, self.args.epochs
        return (
            f"Test set: Average loss: {score.loss:.4f}, Accuracy: {round(score.prec1 * count)}/"
            f"{count} ({score.prec1:.2%})   epoch {done}/{epochs}, lr {record['lr']:g}, "
            f"{seconds:.1f} s, {seconds * (epochs - done) / 60:.0f} min left"
        )

    def _report(self) -> None:
        """The curves, how sparse γ is, and a slim network beside the full one that it was."""
        folder, wrote = self.folder, [self.folder.last, self.folder.best]
        if self.history:
            picture = reporting.draw_curves(self.history, str(self.network))
            checkpoint.write_bytes(folder.curves, picture)
            wrote.append(folder.curves)
        print(reporting.sparsity_text(self.model))
        print(f"\nbest top-1 {self.best_prec1:.2%}; wrote {', '.join(map(str, wrote))}")
        if self.history and self.full_score and self.network.cfg:
            last = Score(self.history[-1]["test_loss"], self.history[-1]["test_prec1"])
            print("\nbefore: the full network when it was pruned, after: the slim network now")
            print(
                before_after.against_full(
                    self.model, self.network, last, self.full_score, self.test_loader
                )
            )
