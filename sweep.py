"""Look before you prune: what each percentage would give, for several allocations to layers.

Measures parameters, FLOPs, latency, and accuracy as pruned and repaired, from 5 to 95 percent, on
training images that are held back; names the best point, and prints the command that prunes there.

    python sweep.py logs/vgg/model_best.pth.tar
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.settings import build
from slimming.workflows import sweep, sweep_subject
from slimming.workflows.sweep_settings import SweepRun


def make_parser() -> Parser:
    return flags.make_parser(__doc__, SweepRun)


def main() -> None:
    run = build(SweepRun, flags.parse(make_parser()))
    subject = sweep_subject.load(run)
    with sweep.continuable(subject):
        fitted = sweep.within_budget(subject)
        sweep.measure(subject, [*sweep.candidates(subject), *fitted])
        sweep.repair_front(subject)
        best = sweep.choose(subject, fitted)
        sweep.test(subject, best)
    sweep.report(subject, best)


if __name__ == "__main__":
    entry.run(main)
