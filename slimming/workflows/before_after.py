"""What pruning cost and what it brought: both networks measured, compared, and written down."""

import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import NETWORKS
from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.measuring.figures import measure
from slimming.pruning import slicing
from slimming.pruning.choice import Choice
from slimming.pruning.coupling import is_wired
from slimming.pruning.sparsity import alive_factors
from slimming.reports import plots, tables
from slimming.reports.figures import before_after_text
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.workflows.settings import PruningRun

LOST = 0.005  # a drop in top-1 that fine-tuning should win back


# In a folder, the first of them that is there.
PRUNED = ("pruned.pth.tar", "*_pruned.pth.tar")
TO_PRUNE = ("model_best.pth.tar", "*_best.pth.tar", *PRUNED)


@dataclass
class Dense:
    """The network to prune, on the CPU, the file it is from and the one it goes to, and the test
    images that judge the result."""

    run: PruningRun
    path: Path
    target: Path
    model: nn.Module
    network: Architecture
    contents: dict
    test_loader: Batches | Stream

    @property
    def images(self) -> torch.Tensor:
        """The real images that pruning is proved on, normalised, on the test data's device."""
        return self.test_loader.first(64)


def load(run: PruningRun, arch: str | None, networks: dict = NETWORKS) -> Dense:
    """The network that ``run`` prunes, and its test data. UserError if it is not of ``arch``, or
    if what would be written replaces anything but an earlier result of pruning."""
    one_process("pruning")
    if not run.prune.model:
        raise UserError("--model FILE is needed: the checkpoint of the network to prune")
    asked = run.network.asked(run.data)
    if arch and asked["arch"] not in (None, arch):
        raise UserError(f"--arch {run.network.arch} is not for this script: it slims a {arch}")
    path = files.find(Path(run.prune.model), *TO_PRUNE)
    folder = Path(run.output.save or path.parent)
    asked["arch"] = arch or asked["arch"]
    target = folder / f"{run.output.filename or 'pruned'}.pth.tar"
    if target.exists() and not _replaceable(target, path):
        raise UserError(f"{target} is there and would be lost: give another --save or --filename")
    model, network, contents = architecture.load(path, asked, networks)
    device = choose_device(run.data.device, run.data.no_cuda)
    loader = loading.batches(
        network.dataset, "test", run.data.test_batch_size, device, network.image_size, run.data
    )
    loading.check_classes(loader, network.num_classes, contents, path)
    return Dense(run, path, target, model, network, contents, loader)


def one_process(work: str) -> None:
    """UserError if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{work} is work for one process: start it without torchrun")


def _replaceable(target: Path, model: Path) -> bool:
    """Whether ``target`` is the result of an earlier pruning, which says how wide the network is,
    and not what is to be pruned now."""
    try:
        contents = checkpoint.read(target)
    except UserError:
        return False
    trained = contents.get("epoch") or contents.get("optimizer")
    return "cfg" in contents and not trained and not (model.exists() and target.samefile(model))


def save_pruned(
    dense: Dense,
    slim: nn.Module,
    choice: Choice,
    difference: float,
    masked: nn.Module | None = None,
) -> tuple[dict, dict]:
    """Print the channels layer by layer and both networks side by side; write the result.

    ``difference``: what `proof.prove_equal` found. Writes the slim network, or the ``masked`` one
    that it stands for, a summary in text and a picture. Returns the records of the `Figures` before
    and after, each with the "seconds" that the test images took.
    """
    print_choice(choice)
    print(f"\nslim equals masked: largest difference of the logits {difference:.1e} (relative)\n")
    models = [model.to(dense.test_loader.device) for model in (dense.model, slim)]
    scores, seconds = zip(*(_timed_test(m, dense.test_loader) for m in models), strict=True)
    images = dense.images
    before, after = measure(models, images, (len(images),), scores)
    print(before_after_text(before, after))
    if masked:
        print("after: the slim network that the mask stands for; the file keeps the full shape")

    kept = slicing.cfg_of(dense.model, choice.keep)
    network = dense.network if masked else replace(dense.network, cfg=kept)
    full = dense.contents.get("before_pruning") or scores[0]._asdict()  # of the first pass
    more = {"before_pruning": full, "classes": dense.test_loader.classes}
    more["cfg"] = network.cfg or kept  # beside the weights of a full network: what a mask keeps
    contents = architecture.contents_of(masked or slim, network, 0, scores[1].prec1, **more)
    text = (
        f"Configuration:\n{kept}\nNumber of parameters:\n{after.parameters}\n"
        f"Test accuracy:\n{after.top1}\n"
        "Number of parameters with the masks of channel selection, as the original counts:\n"
        f"{profiling.count_parameters(slim, masks=True)}\n"
    )
    target, name = dense.target, dense.run.output.filename or "prune"
    summary, picture = (target.with_name(f"{name}.{ending}") for ending in ("txt", "png"))
    title = f"{network}, {choice.ratio:.0%} pruned"
    drawn = plots.draw_pruning(choice, alive_factors(dense.model), title)
    checkpoint.write(target, contents)
    files.write_bytes(summary, text.encode())
    wrote = [target, summary, *plots.write_picture(picture, drawn)]
    print(f"\nwrote {', '.join(map(str, wrote))}")
    script = "mask-impl/main_mask.py" if masked else "main.py"
    print_next_step(dense, scores[0].prec1, scores[1].prec1, script)
    return (
        {**before.record(), "seconds": seconds[0]},
        {**after.record(), "seconds": seconds[1]},
    )


def _timed_test(model: nn.Module, loader: Batches | Stream) -> tuple[loop.Score, float]:
    started = time.perf_counter()
    return loop.test(model, loader), time.perf_counter() - started


def print_choice(choice: Choice) -> None:
    """The threshold and the channels of each layer, with a warning for each that was rescued."""
    before, after = choice.channels
    print(f"threshold {choice.threshold:.6g}: {choice.ratio:.0%} of {before} channels")
    print(tables.layers_text(choice))
    for name in choice.rescued:
        print(
            f"warning: {name} would have lost every channel; it keeps the one with the largest "
            "scaling factor"
        )
    for line in tables.rounding_warnings(choice):
        print(f"warning: {line}")
    if 1 - after / before > choice.ratio + 0.01:
        print(
            f"warning: {1 - after / before:.0%} were pruned, because many scaling factors equal "
            "the threshold; was the network trained with -sr?"
        )


def against_full(
    model: nn.Module,
    network: Architecture,
    score: loop.Score,
    before: loop.Score,
    loader: Batches | Stream,
) -> str:
    """A fine-tuned slim network beside the full one, which scored ``before`` when it was pruned.

    A masked network is measured as the slim one that it stands for.
    """
    full = replace(network, cfg=None).build().to(loader.device)
    if not network.cfg and is_wired(model):
        model = slicing.without_dead_channels(model).to(loader.device)
    images = loader.first(64)
    return before_after_text(*measure([full, model], images, (len(images),), [before, score]))


def print_next_step(dense: Dense, before: float, after: float, script: str) -> None:
    """Where accuracy was lost, say how to win it back."""
    if after > before - LOST:
        return
    data, filename = dense.run.data, dense.run.output.filename
    words = ["python", script, "--refine", dense.target, "--epochs", 160]
    words += ["--data", data.data] if data.data else []
    words += ["--device", data.device] if data.device else []
    words += ["--no-cuda"] if data.no_cuda else []
    refined = f"{filename}_refined" if filename else "refined"
    words += ["--save", dense.target.with_name(refined)]
    print(f"top-1 fell from {before:.2%} to {after:.2%}: fine-tune the network next")
    print("  " + shlex.join(map(str, words)))
