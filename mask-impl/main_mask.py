"""Train without channel selection; channels that prune_mask.py set to zero stay zero.

python mask-impl/main_mask.py --refine pruned.pth.tar --dataset cifar100 --arch resnet
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `models` of the main suite

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.train import run as training
from slimming.commands.train.settings import TrainingRun
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import BN_grad_zero, GradientMask, update_bn, updateBN

__all__ = ["BN_grad_zero", "save_checkpoint", "test", "train", "updateBN", "update_bn"]

NETWORKS = importlib.import_module("mask-impl.models").NETWORKS


def make_parser() -> Parser:
    return flags.make_parser(__doc__, TrainingRun)


def main() -> None:
    run, start = training.main_run(flags.parse(make_parser()))
    trainer = training.prepare(run, start, NETWORKS)
    penalty = training.penalty_of(trainer)
    pruned = [GradientMask(trainer.model, trainer.optimizer), *training.hold_zeros(trainer, start)]
    folder = run.folder(trainer.architecture.arch)
    training.run_epochs(
        trainer, [*penalty, *pruned], folder, run.data, not run.output.no_tensorboard
    )


if __name__ == "__main__":
    entry.run(main)
