"""Export networks of each family, dense, slim and masked, in all formats and precisions.

Each network is trained briefly on scikit-learn's digits and loses half of its channels (slim) or
has half of them, or half of its kernels, at zero (masked); then it is fine-tuned. Every file is
proved as export.py does. Stages whose results are in --work are not run again.

    python benchmarks/exports.py [--work exports] [--network vgg ...]
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.reproduce import run
from slimming.cli import entry
from slimming.commands.export import run as exporting
from slimming.commands.export.settings import ExportRun
from slimming.deploy.fold import forms_of
from slimming.deploy.formats import FORMATS, PRECISIONS
from slimming.errors import UserError
from slimming.settings import build

PAPERS = {  # arch: pruning script, depth
    "vgg": ("vggprune.py", 16),
    "resnet": ("resprune.py", 56),
    "densenet": ("denseprune.py", 40),
}
REPAIR = ("--repair", "--repair-images", 512)
TUNING = 4  # epochs after pruning
TORCHVISION = ("resnet18", "mobilenet_v2")
HEADER = ["network", "kind", "file", "form", "MB", "difference", "top-1", "PyTorch fp32"]
NOTES = """`difference`: the largest of the logits in a fresh process from PyTorch's in fp32,
relative to the largest logit; `top-1`: by the engine, on test images of digits; `PyTorch fp32`: the
top-1 to compare it with. `slim`: half of the channels were pruned, `masked`: half of the scaling
factors, or of the kernels in networks of torchvision, are zero; both were fine-tuned."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", choices=(*PAPERS, *TORCHVISION), action="append", help="default: all"
    )
    parser.add_argument("--work", type=Path, default=Path("exports"), help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=8, help="of training (default: 8)")
    parser.add_argument("--test-images", type=int, help="to judge on (default: all)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    about = measure.machine(torch.device("cpu"))
    for name in args.network or (*PAPERS, *TORCHVISION):
        make = of_paper if name in PAPERS else of_torchvision
        for kind, path in make(name, args.work / name, args).items():
            rows = measure.merged("exports-cpu", list(files(kind, path, args)), HEADER[:3])
            measure.write("exports-cpu", about, HEADER, rows, NOTES)


def of_paper(arch: str, work: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The checkpoints of a network of the paper, by kind."""
    script, depth = PAPERS[arch]
    data = ["--dataset", "digits", "--no-cuda"]
    training = [*data, "--batch-size", 16, "--amp"]
    made = {"dense": work / "dense" / "model_best.pth.tar"}
    if not made["dense"].exists():
        network = ["--arch", arch, "--depth", depth, "--epochs", args.epochs]
        sparsity = ["-sr", "--s", 0.001, "--lr", 0.05]
        run("main.py", *sparsity, *network, *training, "--save", work / "dense")
    for kind, prune, train in (
        ("slim", [script, *REPAIR], "main.py"),
        ("masked", ["mask-impl/prune_mask.py"], "mask-impl/main_mask.py"),
    ):
        pruned = work / kind / "pruned.pth.tar"
        if not pruned.exists():
            half = ["--percent", 0.5, "--model", made["dense"]]
            run(*prune, *half, *data, "--save", pruned.parent)
        tuned = work / f"{kind}-refined"
        made[kind] = tuned / "model_best.pth.tar"
        if not made[kind].exists():
            tuning = ["--refine", pruned, "--lr", 0.01, "--epochs", TUNING]
            run(train, *tuning, *training, "--save", tuned)
    return made


def of_torchvision(model: str, work: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The checkpoints of a network of torchvision, by kind."""
    data = ["--dataset", "digits", "--no-cuda", "--model", model, "--save-model"]
    pruning = ["--pruning-ratio", 0.5, "--finetune-epochs", TUNING, "--resume"]
    made: dict[str, Path] = {}
    for kind, method, words in (
        ("slim", "slimming", ["--base-train-epochs", args.epochs, *REPAIR]),
        ("masked", "kernel", ["--skip-base-training", "--model-path", "{dense}"]),
    ):
        folder, pattern = work / kind, f"*/*/{model}_rebuilt.pth"
        if not list(folder.glob(pattern)):
            words = [str(word).format(**made) for word in words]
            run(
                "run.py",
                "--pruning-method",
                method,
                *words,
                *pruning,
                *data,
                "--output-dir",
                folder,
            )
        made[kind] = max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        if kind == "slim":
            made["dense"] = made[kind].with_name(f"{model}_base.pth")
    return made


def files(kind: str, path: Path, args: argparse.Namespace) -> Iterator[dict]:
    """A row for each file that a checkpoint is exported to, or that is refused."""
    values = {"checkpoint": str(path), "no_cuda": True, "max_drop": 2.0, "batch": 16}
    values |= {"test_images": args.test_images, "calibration_images": 64}
    values |= {"format": tuple(FORMATS), "precision": PRECISIONS}
    network = exporting.load(build(ExportRun, values))
    form = "zeros" if "zeros" in forms_of(network.model) else "folded"
    for name, precision in itertools.product(FORMATS, PRECISIONS):
        with tempfile.TemporaryDirectory() as folder:
            network.run = build(ExportRun, values | {"form": form, "save": folder})
            cells = [str(network.network), kind, f"{name} {precision}", form]
            try:
                file = exporting.export(network, name, precision)
                top1 = "" if file.top1 is None else f"{file.top1:.2%}"
                cells += [f"{file.bytes / 1e6:.3f}", f"{file.difference:.1e}", top1]
            except UserError as error:
                print(f"refused: {error}", flush=True)
                cells += ["", "", f"refused: {error}"]
        yield dict(zip(HEADER, [*cells, f"{network.top1:.2%}"], strict=True))


if __name__ == "__main__":
    entry.run(main)
