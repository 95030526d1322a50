"""Train a network: baseline, with sparsity (-sr), fine-tune a pruned one (--refine), or continue
(--resume).

    python main.py -sr --s 0.0001 --dataset cifar10 --arch vgg --depth 19
"""

from slimming.cli import entry, flags
from slimming.pruning import kernels
from slimming.storage.checkpoint import save_checkpoint
from slimming.training.loop import test, train
from slimming.training.penalties import GradientMask, L1Penalty, update_bn, updateBN
from slimming.training.trainer import Experiment

__all__ = ["save_checkpoint", "test", "train", "updateBN", "update_bn"]


def main() -> None:
    args = flags.parse_training(__doc__, others=("flowprune", "run"))
    experiment = Experiment(args)
    penalty = [L1Penalty(experiment.model, args.s)] if args.sr else []
    zeros = kernels.held_zeros(experiment.model)  # of run.py --pruning-method kernel
    held = GradientMask(experiment.model, experiment.optimizer, zeros)
    experiment.fit(on_gradients=[*penalty, held])


if __name__ == "__main__":
    entry.run(main)
