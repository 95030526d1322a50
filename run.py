"""Run an experiment in one command: train a network, prune it, fine-tune it, and write a report.

python run.py --dataset cifar10 --model resnet18 --pruning-method channel --pruning-ratio 0.5
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.workflows import base_network, experiment_page, scoring, stages
from slimming.workflows.before_after import one_process
from slimming.workflows.experiment import begin_experiment
from slimming.workflows.experiment_settings import ExperimentSettings, read_settings


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ExperimentSettings)


def main() -> None:
    one_process("run.py")
    settings = read_settings(flags.parse(make_parser()))
    if settings.execution.eval_only:
        scoring.print_figures(settings)
        return
    base_network.check(settings)
    given = base_network.given(settings)
    with begin_experiment(settings) as experiment:
        base = stages.train_base(experiment, given)
        if not settings.execution.skip_pruning:
            pruned = stages.prune(experiment, base)
            if settings.repairing.repair:
                pruned = stages.repair(experiment, base, pruned)
            if settings.fine_tuning.finetune_epochs:
                stages.fine_tune(experiment, pruned)
        experiment_page.write(experiment)


if __name__ == "__main__":
    entry.run(main)
