"""The pruning scripts: load the network, choose its channels, and write what is left of it."""

import contextlib
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import NETWORKS
from slimming.channels.groups import declared
from slimming.choosing import allocation
from slimming.choosing.allocation import Prunable
from slimming.choosing.threshold import Choice, Multiples, alive_factors, keep_above
from slimming.commands import pruning
from slimming.commands.prune.settings import PruningRun
from slimming.commands.settings import TO_PRUNE
from slimming.data import loading
from slimming.data.loading import Data
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.measuring.figures import measure
from slimming.reports import plots, tables
from slimming.reports.tables import before_after_text, liveness_text, scores_text
from slimming.runtime.device import choose_device
from slimming.runtime.distributed import one_process
from slimming.settings import name_flags
from slimming.slicing.proof import liveness, liveness_warning
from slimming.slicing.slim import Kept, cfg_of, scatter
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture
from slimming.storage.checkpoint import Contents
from slimming.storage.files import claimed
from slimming.training import loop

RATIO = 0.5  # of the channels, by default
NOTABLE_DROP = 0.005  # a larger drop in top-1 calls for fine-tuning


@dataclass
class Job:
    """A network to prune: the dense ``model``, on the CPU, its file, the target file, and the test
    images that the result is evaluated on."""

    run: PruningRun
    path: Path
    target: Path
    model: nn.Module
    network: Architecture
    contents: Contents
    test_loader: Data

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Claim the folder of the target for a block, see `slimming.storage.files.claimed`."""
        return claimed(self.target.parent, self.run.output.filename)

    @property
    def images(self) -> torch.Tensor:
        """Normalised test images for the proof, on the device of the test data."""
        return self.test_loader.first(64)

    def find_prunable(self) -> Prunable:
        """The network with its coupled channels, and the multiples of --round-to, for "auto"
        measured."""
        coupled, least = declared(self.model), self.run.prune.least
        plain = Prunable(model=self.model, coupled=coupled, least=least)
        round_to = self.run.prune.round_to
        if isinstance(round_to, int):
            return replace(plain, round_to=round_to)
        ratio, name = self.find_ratio(plain, pruning.WITHOUT), self.run.prune.allocation

        def choose(multiple: Multiples) -> Choice:
            return allocation.choose(replace(plain, round_to=multiple), ratio, name)

        budget = self.run.budget
        found = pruning.measured(plain.model, plain.coupled, choose, self.images, budget)
        return replace(plain, round_to=found)

    def find_ratio(self, prunable: Prunable, *notes: str) -> float:
        """The fraction of the channels to prune: --percent, or the least that keeps a budget."""
        budget, given = self.run.budget, self.run.prune.ratio
        if budget.given:
            return budget.find_ratio_for(prunable, self.images, self.run.prune.allocation, *notes)
        return RATIO if given is None else given

    def choose(
        self, prunable: Prunable, threshold: float, ratio: float, at_least_one: bool = True
    ) -> Choice:
        """The channels with |γ| above the ``threshold``, at which ``ratio`` of them go, as far as
        --least and --round-to leave them; or those of another --allocation."""
        allocated = self.run.prune.allocation
        if allocated == "global" and not prunable.least:
            return keep_above(self.model, threshold, ratio, at_least_one, prunable.round_to)
        prunable = replace(prunable, at_least_one=at_least_one)
        return allocation.choose(prunable, ratio, allocated)

    def repaired(self, slim: nn.Module, kept: Kept) -> nn.Module:
        """``slim`` as --repair leaves it."""
        data, device = self.run.data, self.test_loader.device
        loader = loading.batches_for(self.network, "train", data.test_batch_size, device, data)
        return self.run.repairing.repaired(slim, self.model, kept, loader).model


def load(run: PruningRun, arch: str | None, networks: dict = NETWORKS) -> Job:
    """Load the network that ``run`` prunes, and its test data. UserError if it is not an ``arch``,
    or if the result would overwrite a file that is not a result of pruning."""
    one_process("pruning")
    if not run.prune.model:
        raise UserError("--model FILE is required: the checkpoint of the network to prune")
    request = run.network.request(run.data)
    if arch and request.arch not in (None, arch):
        raise UserError(f"--arch {run.network.arch}: this script prunes only {arch}")
    path = files.find(Path(run.prune.model), *TO_PRUNE)
    folder = Path(run.output.save or path.parent)
    request = replace(request, arch=arch or request.arch)
    target = folder / f"{run.output.filename or 'pruned'}.pth.tar"
    if target.exists() and not _replaceable(target, path):
        raise UserError(f"{target} would be overwritten: use another --save or --filename")
    model, network, contents = architecture.load(path, request, networks)
    device = choose_device(run.data.device, run.data.no_cuda)
    loader = loading.batches_for(network, "test", run.data.test_batch_size, device, run.data)
    loading.check_classes(loader, network.num_classes, contents, path)
    return Job(run, path, target, model, network, contents, loader)


def _replaceable(target: Path, model: Path) -> bool:
    """Whether ``target`` is an earlier result of pruning, which has a cfg and is not trained, and
    is not the network to prune now."""
    try:
        contents = checkpoint.read(target)
    except UserError:
        return False
    trained = contents.get("epoch") or contents.get("optimizer")
    return "cfg" in contents and not trained and not (model.exists() and target.samefile(model))


def save_pruned(
    job: Job,
    slim: nn.Module,
    kept: Kept,
    choice: Choice,
    difference: float,
    masked: nn.Module | None = None,
) -> tuple[dict, dict]:
    """Print the channels of each layer and a comparison of both networks; write the result.

    ``kept``: what the slim network holds of each layer; ``difference``: the result of
    `proof.prove_equal`. Writes the slim network, with --repair repaired, or the ``masked`` one that
    is equal to it, a text summary and a picture. Returns the records of the `Figures` before and
    after, each with the "seconds" of its evaluation.
    """
    print_choice(choice)
    print(f"\nslim equals masked: largest difference of the logits {difference:.1e} (relative)\n")
    stages = {"dense": job.model, "pruned": slim}
    if job.run.repairing.repair:
        stages["repaired"] = slim = job.repaired(slim, kept)
        masked = masked and scatter(slim, masked, kept)
    tested = {name: _timed_test(model, job.test_loader) for name, model in stages.items()}
    scores = {name: score for name, (score, _) in tested.items()}
    last, images = next(reversed(scores)), job.images
    score = scores[last]
    alive = liveness(slim, job.model, images)
    before, after = measure([job.model, slim], images, (len(images),), [scores["dense"], score])
    if job.run.repairing.repair:
        print(f"{scores_text(scores)}\n")
    print(before_after_text(before, after))
    print(liveness_text(alive))
    if dead := liveness_warning(alive, kept):
        print(f"warning: {dead}")
    if masked:
        print("after: the equivalent slim network; the file contains the masked one in full shape")
    cfg = cfg_of(job.model, choice.kept)
    network = job.network if masked else replace(job.network, cfg=cfg)
    title = f"{network}, {choice.ratio:.0%} pruned"
    picture = plots.draw_pruning(choice, alive_factors(job.model), title)
    wrote = [_write_network(job, masked or slim, network, cfg, scores)]
    wrote.append(_write_summary(job, slim, cfg, scores))
    wrote += plots.write_picture(wrote[-1].with_suffix(".png"), picture)
    print(f"\nwrote {', '.join(map(str, wrote))}")
    script = "mask-impl/main_mask.py" if masked else "main.py"
    print_next_step(job, scores["dense"].prec1, score.prec1, script)
    return (
        {**before.record(), "seconds": tested["dense"][1]},
        {**after.record(), "seconds": tested[last][1]},
    )


def _write_network(
    job: Job,
    model: nn.Module,
    network: Architecture,
    cfg: list | dict,
    scores: dict[str, loop.Score],
) -> Path:
    """Write the pruned ``model``; in a masked file ``cfg`` is the channels that the mask keeps."""
    more: dict[str, Any] = {"classes": job.test_loader.classes, "cfg": network.cfg or cfg}
    if job.contents.get("holds_zeros") and "repaired" not in scores:  # which fits all weights
        more["holds_zeros"] = True
    first = job.contents.get("before_pruning") or scores["dense"]._asdict()
    if "repaired" in scores:
        more["repair"] = {name: score._asdict() for name, score in scores.items()}
    top1 = scores[next(reversed(scores))].prec1
    contents = architecture.contents_of(model, network, 0, top1, before_pruning=first, **more)
    checkpoint.write(job.target, contents)
    return job.target


def _write_summary(
    job: Job, slim: nn.Module, cfg: list | dict, scores: Mapping[str, loop.Score]
) -> Path:
    """Write prune.txt."""
    tops = [score.prec1 for score in scores.values()]
    text = (
        f"Configuration:\n{cfg}\nNumber of parameters:\n{figures.count_parameters(slim)}\n"
        f"Test accuracy:\n{tops[-1]}\n"
        "Number of parameters with the masks of channel selection, as the original counts:\n"
        f"{figures.count_parameters(slim, masks=True)}\n"
    )
    if "repaired" in scores:
        text += f"Test accuracy of the {', '.join(scores)} network:\n{' '.join(map(str, tops))}\n"
    path = job.target.with_name(f"{job.run.output.filename or 'prune'}.txt")
    files.write_bytes(path, text.encode())
    return path


def _timed_test(model: nn.Module, loader: Data) -> tuple[loop.Score, float]:
    started = time.perf_counter()
    return loop.test(model.to(loader.device), loader), time.perf_counter() - started


def print_choice(choice: Choice) -> None:
    """Print the threshold and the channels of each layer, and warnings."""
    before, after = choice.channels
    threshold = "" if math.isnan(choice.threshold) else f"threshold {choice.threshold:.6g}: "
    print(f"{threshold}{choice.ratio:.0%} of {before} channels")
    print(tables.layers_text(choice))
    for line in tables.least_warnings(choice) + tables.rounding_warnings(choice):
        print(f"warning: {name_flags(line, PruningRun)}")
    if 1 - after / before > choice.ratio + 0.01:
        print(
            f"warning: {1 - after / before:.0%} of the channels were pruned, because many scaling "
            "factors equal the threshold; train the network with -sr before pruning"
        )


def print_next_step(job: Job, before: float, after: float, script: str) -> None:
    """If accuracy dropped, print the command for fine-tuning."""
    if after > before - NOTABLE_DROP:
        return
    data, filename = job.run.data, job.run.output.filename
    words = ["python", script, "--refine", job.target, "--epochs", 160]
    words += ["--data", data.data] if data.data else []
    words += ["--device", data.device] if data.device else []
    words += ["--no-cuda"] if data.no_cuda else []
    refined = f"{filename}_refined" if filename else "refined"
    words += ["--save", job.target.with_name(refined)]
    print(f"top-1 dropped from {before:.2%} to {after:.2%}: fine-tune the network with")
    print("  " + shlex.join(map(str, words)))
