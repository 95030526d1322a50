"""Look before you prune: what each percentage would give, for several allocations to layers.

Measures parameters, FLOPs, latency, and accuracy as pruned and repaired, from 5 to 95 percent, on
training images that are held back; names the best point, and prints the command that prunes there.

    python sweep.py logs/vgg/model_best.pth.tar
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.settings import build
from slimming.storage.claim import claimed
from slimming.workflows.sweep import points, subject
from slimming.workflows.sweep.settings import SweepRun


def make_parser() -> Parser:
    return flags.make_parser(__doc__, SweepRun)


def main() -> None:
    run = build(SweepRun, flags.parse(make_parser()))
    swept = subject.load(run)
    with claimed(run.folder), points.continuable(swept):
        fitted = points.within_budget(swept)
        points.measure(swept, [*points.candidates(swept), *fitted])
        points.repair_front(swept)
        best = points.choose(swept, fitted)
        points.test(swept, best)
        points.report(swept, best)


if __name__ == "__main__":
    entry.run(main)
