"""Train a network from scratch, optionally with sparsity (-sr), fine-tune a pruned one (--refine),
or resume a run (--resume).

    python main.py -sr --s 0.0001 --dataset cifar10 --arch vgg --depth 19
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.train import run as train_run
from slimming.commands.train.settings import TrainingRun
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import L1Penalty, update_bn, updateBN

__all__ = ["save_checkpoint", "test", "train", "updateBN", "update_bn"]


def make_parser() -> Parser:
    return flags.make_parser(__doc__, TrainingRun, others=("flowprune", "run"))


def main() -> None:
    run, start = train_run.main_run(flags.parse(make_parser()))
    trainer = train_run.prepare(run, start)
    penalty = [L1Penalty(trainer.model, run.train.s)] if run.train.sr else []
    held = train_run.hold_zeros(trainer, start)
    folder = run.folder(trainer.architecture.arch)
    train_run.run_epochs(
        trainer, [*penalty, *held], folder, run.data, not run.output.no_tensorboard
    )


if __name__ == "__main__":
    entry.run(main)
