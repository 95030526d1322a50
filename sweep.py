"""Look before you prune: what each percentage would give, for several allocations to layers.

Measures parameters, FLOPs, latency, and accuracy as pruned and repaired, from 5 to 95 percent, on
training images that are held back; names the best point, and prints the command that prunes there.

    python sweep.py logs/vgg/model_best.pth.tar
"""

from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.sweep import run as sweep
from slimming.commands.sweep.settings import SweepRun
from slimming.storage.files import claimed


def make_parser() -> Parser:
    return flags.make_parser(__doc__, SweepRun)


def main() -> None:
    run: SweepRun = flags.read(make_parser())
    swept = sweep.load(run)
    with claimed(run.folder), sweep.continuable(swept):
        fitted = sweep.within_budget(swept)
        sweep.measure(swept, [*sweep.candidates(swept), *fitted])
        sweep.repair_front(swept)
        best = sweep.choose(swept, fitted)
        sweep.test(swept, best)
        sweep.report(swept, best)


if __name__ == "__main__":
    entry.run(main)
