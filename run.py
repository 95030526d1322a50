"""Run an experiment in one command: train a network, prune it, fine-tune it, and write a report.

python run.py --dataset cifar10 --model resnet18 --pruning-method channel --pruning-ratio 0.5
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.experiment import report
from slimming.commands.experiment import run as stages
from slimming.commands.experiment.run import begin_experiment
from slimming.commands.experiment.settings import ExperimentSettings, read_settings
from slimming.runtime.distributed import one_process


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ExperimentSettings)


def main() -> None:
    one_process("run.py")
    settings = read_settings(flags.parse(make_parser()))
    if settings.execution.eval_only:
        stages.print_figures(settings)
        return
    stages.check_base(settings)
    given = stages.find_base(settings)
    with begin_experiment(settings) as experiment:
        base = stages.train_base(experiment, given)
        if not settings.execution.skip_pruning:
            pruned = stages.prune(experiment, base)
            if settings.repairing.repair:
                pruned = stages.repair(experiment, base, pruned)
            if settings.fine_tuning.finetune_epochs:
                stages.fine_tune(experiment, pruned)
        report.write(experiment)


if __name__ == "__main__":
    entry.run(main)
