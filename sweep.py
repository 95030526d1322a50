"""Look before you prune: what each percentage would give, for several allocations to layers.

Measures parameters, FLOPs, latency, and accuracy as pruned and repaired, from 5 to 95 percent, on
training images that are held back; names the best point, and prints the command that prunes there.

    python sweep.py logs/vgg/model_best.pth.tar
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.sweep import run as sweep_run
from slimming.commands.sweep.settings import SweepRun
from slimming.settings import build
from slimming.storage.files import claimed


def make_parser() -> Parser:
    return flags.make_parser(__doc__, SweepRun)


def main() -> None:
    run = build(SweepRun, flags.parse(make_parser()))
    swept = sweep_run.load(run)
    with claimed(run.folder), sweep_run.continuable(swept):
        fitted = sweep_run.within_budget(swept)
        sweep_run.measure(swept, [*sweep_run.candidates(swept), *fitted])
        sweep_run.repair_front(swept)
        best = sweep_run.choose(swept, fitted)
        sweep_run.test(swept, best)
        sweep_run.report(swept, best)


if __name__ == "__main__":
    entry.run(main)
