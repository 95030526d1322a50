"""Load a network to prune, compare it with the result, and write the result."""

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
from slimming.pruning.slicing import Kept
from slimming.pruning.sparsity import alive_factors
from slimming.reports import plots, tables
from slimming.reports.figures import before_after_text, scores_text
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.workflows.settings import PruningRun

STAGES = ("dense", "pruned", "repaired")
NOTABLE_DROP = 0.005  # a larger drop in top-1 calls for fine-tuning


# In a folder, the first pattern that matches a file.
PRUNED = ("pruned.pth.tar", "*_pruned.pth.tar")
TO_PRUNE = ("model_best.pth.tar", "*_best.pth.tar", *PRUNED)


@dataclass
class Dense:
    """The network to prune, on the CPU, its file, the target file, and the test images that the
    result is evaluated on."""

    run: PruningRun
    path: Path
    target: Path
    model: nn.Module
    network: Architecture
    contents: dict
    test_loader: Batches | Stream

    @property
    def images(self) -> torch.Tensor:
        """Normalised test images for the proof, on the device of the test data."""
        return self.test_loader.first(64)

    def repaired(self, slim: nn.Module, kept: Kept) -> nn.Module:
        """``slim`` as --repair leaves it."""
        data, network, device = self.run.data, self.network, self.test_loader.device
        size = data.test_batch_size
        loader = loading.batches(network.dataset, "train", size, device, network.image_size, data)
        return self.run.repairing.of(slim, self.model, kept, loader).model


def load(run: PruningRun, arch: str | None, networks: dict = NETWORKS) -> Dense:
    """Load the network that ``run`` prunes, and its test data. UserError if it is not an ``arch``,
    or if the result would overwrite a file that is not a result of pruning."""
    one_process("pruning")
    if not run.prune.model:
        raise UserError("--model FILE is required: the checkpoint of the network to prune")
    asked = run.network.asked(run.data)
    if arch and asked["arch"] not in (None, arch):
        raise UserError(f"--arch {run.network.arch} is not supported: this script prunes a {arch}")
    path = files.find(Path(run.prune.model), *TO_PRUNE)
    folder = Path(run.output.save or path.parent)
    asked["arch"] = arch or asked["arch"]
    target = folder / f"{run.output.filename or 'pruned'}.pth.tar"
    if target.exists() and not _replaceable(target, path):
        raise UserError(f"{target} would be overwritten: use another --save or --filename")
    model, network, contents = architecture.load(path, asked, networks)
    device = choose_device(run.data.device, run.data.no_cuda)
    loader = loading.batches(
        network.dataset, "test", run.data.test_batch_size, device, network.image_size, run.data
    )
    loading.check_classes(loader, network.num_classes, contents, path)
    return Dense(run, path, target, model, network, contents, loader)


def one_process(work: str) -> None:
    """UserError if torchrun started several processes; ``work`` is what does not support them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{work} runs in a single process: start it without torchrun")


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
    dense: Dense,
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
    models = [model.to(dense.test_loader.device) for model in (dense.model, slim)]
    if dense.run.repairing.repair:
        models.append(dense.repaired(slim, kept))
    scores, seconds = zip(*(_timed_test(m, dense.test_loader) for m in models), strict=True)
    slim, stages = models[-1], dict(zip(STAGES, scores, strict=False))
    images, ends = dense.images, (0, -1)
    before, after = measure(
        [models[i] for i in ends], images, (len(images),), [scores[i] for i in ends]
    )
    if len(stages) == len(STAGES):
        print(f"{scores_text(stages)}\n")
    print(before_after_text(before, after))
    if masked:
        masked = slicing.spread(slim, masked, kept)
        print("after: the equivalent slim network; the file contains the masked one in full shape")

    cfg = slicing.cfg_of(dense.model, choice.keep)
    network = dense.network if masked else replace(dense.network, cfg=cfg)
    full = dense.contents.get("before_pruning") or scores[0]._asdict()  # before the first pruning
    more = {"before_pruning": full, "classes": dense.test_loader.classes}
    more["cfg"] = network.cfg or cfg  # in a masked file: the channels that the mask keeps
    if len(stages) == len(STAGES):
        more["repair"] = {name: score._asdict() for name, score in stages.items()}
    contents = architecture.contents_of(masked or slim, network, 0, scores[-1].prec1, **more)
    text = (
        f"Configuration:\n{cfg}\nNumber of parameters:\n{after.parameters}\n"
        f"Test accuracy:\n{after.top1}\n"
        "Number of parameters with the masks of channel selection, as the original counts:\n"
        f"{profiling.count_parameters(slim, masks=True)}\n"
    )
    if len(stages) == len(STAGES):
        text += "Test accuracy of the dense, the pruned and the repaired network:\n"
        text += " ".join(str(score.prec1) for score in stages.values()) + "\n"
    target, name = dense.target, dense.run.output.filename or "prune"
    summary, picture = (target.with_name(f"{name}.{ending}") for ending in ("txt", "png"))
    title = f"{network}, {choice.ratio:.0%} pruned"
    drawn = plots.draw_pruning(choice, alive_factors(dense.model), title)
    checkpoint.write(target, contents)
    files.write_bytes(summary, text.encode())
    wrote = [target, summary, *plots.write_picture(picture, drawn)]
    print(f"\nwrote {', '.join(map(str, wrote))}")
    script = "mask-impl/main_mask.py" if masked else "main.py"
    print_next_step(dense, scores[0].prec1, scores[-1].prec1, script)
    return (
        {**before.record(), "seconds": seconds[0]},
        {**after.record(), "seconds": seconds[-1]},
    )


def _timed_test(model: nn.Module, loader: Batches | Stream) -> tuple[loop.Score, float]:
    started = time.perf_counter()
    return loop.test(model, loader), time.perf_counter() - started


def print_choice(choice: Choice) -> None:
    """Print the threshold and the channels of each layer, and warnings."""
    before, after = choice.channels
    print(f"threshold {choice.threshold:.6g}: {choice.ratio:.0%} of {before} channels")
    print(tables.layers_text(choice))
    for name in choice.rescued:
        print(
            f"warning: {name} would lose every channel; it keeps the one with the largest scaling "
            "factor"
        )
    for line in tables.rounding_warnings(choice):
        print(f"warning: {line}")
    if 1 - after / before > choice.ratio + 0.01:
        print(
            f"warning: {1 - after / before:.0%} of the channels were pruned, because many scaling "
            "factors equal the threshold; train the network with -sr before pruning"
        )


def against_full(
    model: nn.Module,
    network: Architecture,
    score: loop.Score,
    before: loop.Score,
    loader: Batches | Stream,
) -> str:
    """Compare a fine-tuned slim network with the full one, which scored ``before`` at pruning.

    A masked network is measured as the equivalent slim one.
    """
    full = replace(network, cfg=None).build().to(loader.device)
    if not network.cfg and is_wired(model):
        model = slicing.without_dead_channels(model).to(loader.device)
    images = loader.first(64)
    return before_after_text(*measure([full, model], images, (len(images),), [before, score]))


def print_next_step(dense: Dense, before: float, after: float, script: str) -> None:
    """If accuracy dropped, print the command for fine-tuning."""
    if after > before - NOTABLE_DROP:
        return
    data, filename = dense.run.data, dense.run.output.filename
    words = ["python", script, "--refine", dense.target, "--epochs", 160]
    words += ["--data", data.data] if data.data else []
    words += ["--device", data.device] if data.device else []
    words += ["--no-cuda"] if data.no_cuda else []
    refined = f"{filename}_refined" if filename else "refined"
    words += ["--save", dense.target.with_name(refined)]
    print(f"top-1 dropped from {before:.2%} to {after:.2%}: fine-tune the network with")
    print("  " + shlex.join(map(str, words)))
