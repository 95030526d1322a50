"""Train without channel selection. Channels that prune_mask.py zeroed stay at exactly zero.

python mask-impl/main_mask.py --refine pruned.pth.tar --dataset cifar100 --arch resnet
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `models` is the suite's

from slimming.cli import entry, flags
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import BN_grad_zero, GradientMask, L1Penalty, updateBN
from slimming.training.trainer import Experiment

__all__ = ["BN_grad_zero", "save_checkpoint", "test", "train", "updateBN"]

NETWORKS = importlib.import_module("mask-impl.models").NETWORKS


def main() -> None:
    args = flags.parse_training(__doc__)
    experiment = Experiment(args, NETWORKS)
    penalty = [L1Penalty(experiment.model, args.s)] if args.sr else []
    pruned = GradientMask(experiment.model, experiment.optimizer)
    experiment.fit(on_gradients=[*penalty, pruned])


if __name__ == "__main__":
    entry.run(main)
