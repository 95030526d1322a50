"""Prune and train in rounds, by any measure of importance (Lubana and Dick, ICLR 2021).

After --warmup_epochs of training, each of --n_rounds epochs starts by removing the same number of
filters, the least important first; the remaining --epochs train the slim network.

    python flowprune.py --model=resnet-56 --pruning_type=mag_based --prune_percent=75 --n_rounds=25
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.rounds import run as rounds
from slimming.commands.rounds.settings import FlowRun
from slimming.commands.train.run import run_epochs


def make_parser() -> Parser:
    return flags.make_parser(__doc__, FlowRun)


def main() -> None:
    run, start = rounds.flow_run(flags.parse(make_parser()))
    trainer = rounds.prepare(run, start)
    pruning = rounds.Rounds(run, trainer)
    with run.folder.claimed():
        run_epochs(trainer, [pruning], run.folder, run.data, not run.output.no_tensorboard)
        pruning.write_results()


if __name__ == "__main__":
    entry.run(main)
