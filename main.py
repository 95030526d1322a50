"""Train a network from scratch, optionally with sparsity (-sr), fine-tune a pruned one (--refine),
or resume a run (--resume).

    python main.py -sr --s 0.0001 --dataset cifar10 --arch vgg --depth 19
"""

from torch import nn, optim

from slimming.cli import entry, flags
from slimming.commands.train import run as training
from slimming.commands.train.settings import TrainingRun
from slimming.settings import kept
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import update_bn, updateBN
from slimming.training.trainer import Trainer, learning_rate, make_optimizer

__all__ = ["save_checkpoint", "test", "train", "updateBN", "update_bn"]


def make_parser() -> flags.Parser:
    return flags.make_parser(__doc__, TrainingRun, others=("flowprune", "run"))


def main() -> None:
    run, start = training.main_run(flags.parse(make_parser()))
    model, network, (training_data, test_data) = training.open_run(run, start)
    settings, folder = run.train, run.folder(network.arch)

    def optimizer(model: nn.Module) -> optim.Optimizer:
        return make_optimizer(model, settings.lr, settings.momentum, settings.weight_decay)

    def schedule(epoch: int) -> float:  # divided by 10 after 1/2 and 3/4 of the epochs
        return learning_rate(epoch, settings.epochs, settings.lr)

    loaders = training_data, test_data
    trainer = Trainer(model, network, *loaders, settings, optimizer, schedule, kept=kept(run))
    training.begin(trainer, start)
    penalty = training.penalty_of(trainer)  # s · Σ|γ|, or another --penalty
    zeros = training.hold_zeros(trainer, start)

    callbacks = [*penalty, *zeros]
    with (
        training.in_folder(trainer, callbacks, folder, run.data, not run.output.no_tensorboard),
        trainer.running(),
    ):
        for epoch in trainer.epochs():
            trained = train(
                trainer.trained,
                training_data,
                trainer.optimizer,
                epoch,
                trainer.callbacks,  # the penalty acts around the step of the optimizer
                trainer.precision,
                settings.log_interval,
            )
            tested = test(trainer.model, test_data, trainer.precision)
            trainer.end_epoch(epoch, trained, tested)  # saves checkpoints, prints


if __name__ == "__main__":
    entry.run(main)
