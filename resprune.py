"""Slim a pre-activation ResNet: prune the channels with the smallest scaling factors.

The sum over the blocks keeps its channels; channel selection after a block's first BN passes on
only those that the block still reads. Inside a block, filters go as in a VGG.

    python resprune.py --dataset cifar10 --depth 164 --percent 0.4 --model logs/model_best.pth.tar
    python resprune.py --ckpt_dir ckpts/preact_res20_sr/best_acc --arch preact_res20
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.errors import UserError
from slimming.pruning import slicing
from slimming.pruning.groups import declared
from slimming.pruning.proof import prove_equal
from slimming.pruning.threshold import choose_channels
from slimming.reports import preact
from slimming.settings import build, part, setting
from slimming.storage import architecture, checkpoint, files
from slimming.workflows import before_after
from slimming.workflows.settings import PrunedOutputSettings, PruneSettings, PruningRun


@dataclass(frozen=True)
class ResPruneSettings(PruneSettings):
    """What to prune, by the name that the suite of preact_res20 gives it too."""

    ckpt_dir: str | None = setting(
        None,
        "--model, but then 0.4 is the default of --percent, results go by default to "
        "./ckpts/pruned/preact_res<depth>_pruned.pth.tar, and a summary line by line is printed",
        "--ckpt_dir",
        metavar="PATH",
    )


@dataclass(frozen=True)
class ResOutputSettings(PrunedOutputSettings):
    """Where results go, by either name."""

    save_dir: str | None = setting(None, "the same as --save", "--save_dir", metavar="DIR")


@dataclass(frozen=True)
class ResPruningRun(PruningRun):
    """All of resprune.py."""

    prune: ResPruneSettings = part(ResPruneSettings)
    output: ResOutputSettings = part(ResOutputSettings)


def make_parser() -> Parser:
    return flags.make_parser(__doc__, ResPruningRun)


def complete(typed: Mapping[str, Any]) -> ResPruningRun:
    """The run that was typed. ``--ckpt_dir`` is ``--model`` with the defaults of another suite."""
    values = {"save": typed.get("save_dir"), **typed}
    run = build(ResPruningRun, values)
    if not run.prune.ckpt_dir:
        return run
    if run.prune.model:
        raise UserError("--model and --ckpt_dir name the same thing: give one of them")
    path = files.find(Path(run.prune.ckpt_dir), *before_after.TO_PRUNE)
    values = {"percent": 0.4, **values, "model": str(path)}
    if not run.output.save:
        asked = run.network.asked(run.data)
        depth = architecture.describe(path, checkpoint.read(path), asked)["depth"]
        name = run.output.filename or f"preact_res{depth}_pruned"  # several share that folder
        values |= {"save": "ckpts/pruned", "filename": name}
    return build(ResPruningRun, values)


def main() -> None:
    run = complete(flags.parse(make_parser()))
    dense = before_after.load(run, arch="resnet")
    choice = choose_channels(dense.model, run.prune.percent, round_to=run.prune.round_to)
    kept = slicing.kept_channels(dense.model, declared(dense.model), choice.keep)
    slim = slicing.sliced(dense.model, kept)
    proof = prove_equal(slim, slicing.masked(dense.model, kept), dense.images)
    measured = before_after.save_pruned(dense, slim, choice, proof)
    if run.prune.ckpt_dir:
        print(f"\n{preact.text(dense, slim, choice, *measured)}")


if __name__ == "__main__":
    entry.run(main)
