"""Prune the channels of a pre-activation ResNet with the smallest scaling factors.

The residual sum keeps its channels; channel selection after the first BN of a block keeps only
those that the block still reads. Inside a block, filters are removed as in a VGG.

    python resprune.py --dataset cifar10 --depth 164 --percent 0.4 --model logs/model_best.pth.tar
    python resprune.py --ckpt_dir ckpts/preact_res20_sr/best_acc --arch preact_res20
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimming.choosing.threshold import sorted_factors
from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.prune import report
from slimming.commands.prune.run import load, save_pruned
from slimming.commands.prune.settings import PrunedOutputSettings, PruneSettings, PruningRun
from slimming.commands.settings import TO_PRUNE
from slimming.errors import UserError
from slimming.settings import build, part, setting
from slimming.slicing.proof import prove_equal
from slimming.slicing.slim import masked, slim_to
from slimming.storage import architecture, checkpoint, files


@dataclass(frozen=True)
class ResPruneSettings(PruneSettings):
    """What to prune, with the flag of the suite of preact_res20 as well."""

    ckpt_dir: str | None = setting(
        None,
        "same as --model, but --percent defaults to 0.4, the result to "
        "./ckpts/pruned/preact_res<depth>_pruned.pth.tar, and a summary is printed",
        "--ckpt_dir",
        metavar="PATH",
    )


@dataclass(frozen=True)
class ResOutputSettings(PrunedOutputSettings):
    """Where results are written, by either name."""

    save_dir: str | None = setting(None, "same as --save", "--save_dir", metavar="DIR")


@dataclass(frozen=True)
class ResPruningRun(PruningRun):
    """All settings of resprune.py."""

    prune: ResPruneSettings = part(ResPruneSettings)
    output: ResOutputSettings = part(ResOutputSettings)


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ResPruningRun)


def complete(typed: Mapping[str, Any]) -> ResPruningRun:
    """The run of the ``typed`` flags; ``--ckpt_dir`` is ``--model`` with other defaults."""
    if {"save", "save_dir"} <= typed.keys() and typed["save"] != typed["save_dir"]:
        raise UserError("--save and --save_dir give different folders: use one of them")
    values = {"save": typed.get("save_dir"), **typed}
    run = build(ResPruningRun, values)
    if not run.prune.ckpt_dir:
        return run
    if run.prune.model:
        raise UserError("--model and --ckpt_dir both give the checkpoint: use one of them")
    path = files.find(Path(run.prune.ckpt_dir), *TO_PRUNE)
    values = {**({} if run.budget.given else {"ratio": 0.4}), **values, "model": str(path)}
    if not run.output.save:
        request = run.network.request(run.data)
        depth = architecture.describe(path, checkpoint.read(path), request).depth
        name = run.output.filename or f"preact_res{depth}_pruned"  # depths share that folder
        values |= {"save": "ckpts/pruned", "filename": name}
    return build(ResPruningRun, values)


def main() -> None:
    run = complete(flags.parse(make_parser()))
    job = load(run, arch="resnet")
    with job.claimed():
        prunable = job.find_prunable()
        ratio = job.find_ratio(prunable)  # --percent, or what a budget takes
        factors = sorted_factors(job.model)  # |γ| of the whole network
        threshold = float(factors[int(len(factors) * ratio)])
        choice = job.choose(prunable, threshold, ratio)
        slim, kept = slim_to(job.model, prunable.coupled, choice.kept)
        difference = prove_equal(slim, masked(job.model, kept), job.images)
        measured = save_pruned(job, slim, kept, choice, difference)
        if run.prune.ckpt_dir:
            print(f"\n{report.text(job, slim, choice, *measured)}")


if __name__ == "__main__":
    entry.run(main)
