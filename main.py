"""Train a network from scratch, optionally with sparsity (-sr), fine-tune a pruned one (--refine),
or resume a run (--resume).

    python main.py -sr --s 0.0001 --dataset cifar10 --arch vgg --depth 19
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import L1Penalty, update_bn, updateBN
from slimming.workflows import training
from slimming.workflows.settings import TrainingRun

__all__ = ["save_checkpoint", "test", "train", "updateBN", "update_bn"]


def make_parser() -> Parser:
    return flags.make_parser(__doc__, TrainingRun, others=("flowprune", "run"))


def main() -> None:
    run, start = training.main_run(flags.parse(make_parser()))
    trainer = training.prepare(run, start)
    penalty = [L1Penalty(trainer.model, run.train.s)] if run.train.sr else []
    held = training.hold_zeros(trainer, start)
    folder = run.folder(trainer.architecture.arch)
    training.run_epochs(trainer, [*penalty, *held], folder, run.data, not run.output.no_tensorboard)


if __name__ == "__main__":
    entry.run(main)
