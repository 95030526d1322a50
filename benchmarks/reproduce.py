"""Run the paper's workflow for each network: baseline, sparsity, pruning, fine-tuning.

Each stage is a command of this suite. An interrupted stage is resumed, a finished one is not
repeated. The table compares the results to the published figures.

    python benchmarks/reproduce.py --arch vgg --dataset cifar10 --epochs 160
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from slimming.cli import entry
from slimming.measuring import figures
from slimming.runtime.device import choose_device
from slimming.settings import plain_name
from slimming.storage import architecture, checkpoint

# arch: pruning script, depth, s, percentages
CASES = {
    "vgg": ("vggprune.py", 19, 1e-4, (0.7,)),
    "resnet": ("resprune.py", 164, 1e-5, (0.4, 0.6)),
    "densenet": ("denseprune.py", 40, 1e-5, (0.4, 0.6)),
}
# Top-1 (%) after sparsity, pruning, fine-tuning and parameters (M) before and after, on CIFAR-10,
# as published with another implementation of the original scripts
PUBLISHED = {
    ("vgg", 0.7): "92.0 / 91.9 / 92.4, 20.04 -> 2.25 M",
    ("resnet", 0.6): "93.9 / 13.8 / 94.3, 1.73 -> 1.12 M",
    ("densenet", 0.6): "92.8 / 11.6 / 93.27, 1.07 -> 0.49 M",
}
HEADER = ["network", "data", "epochs", "baseline", "sparsity", "pruned", "fine-tuned"]
HEADER += ["parameters", "published (CIFAR-10, 160 epochs)"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=CASES, help="default: all, in turn")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", help="folder of the dataset")
    parser.add_argument(
        "--data-name",
        type=plain_name,
        help="name of the data in the table (default: --dataset)",
    )
    parser.add_argument("--epochs", type=int, default=160, help="epochs of each training stage")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="folder of the runs")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--device")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    name = args.data_name or args.dataset
    for arch in args.arch or CASES:
        rows = measure.merged(f"reproduce-{name}", reproduce(arch, args), HEADER[:3])
        about = measure.machine(choose_device(args.device))
        measure.write(f"reproduce-{name}", about, HEADER, rows)


def reproduce(arch: str, args: argparse.Namespace) -> list[dict]:
    """Run the unfinished stages of one network, and return its rows of the table."""
    script, depth, s, ratios = CASES[arch]
    name = args.data_name or args.dataset
    work = args.work / f"{name}-{args.epochs}{'-amp' if args.amp else ''}"
    data = ["--dataset", args.dataset, *(["--data", args.data] if args.data else [])]
    data += ["--device", args.device] if args.device else []
    network = ["--arch", arch, "--depth", depth]
    baseline = train(work / f"{arch}-baseline", network, data, args)
    sparse = train(work / f"{arch}-sparse", ["-sr", "--s", s, *network], data, args)
    rows = []
    for ratio in ratios:
        folder = work / f"{arch}-{ratio:.0%}".replace("%", "")
        pruned = folder / "pruned.pth.tar"
        if not pruned.exists():
            chosen = ["--percent", ratio, "--model", sparse, "--save", folder]
            run(script, *data, "--depth", depth, *chosen)
        tuned = train(folder / "tuned", ["--refine", pruned], data, args)
        stages = [checkpoint.read(path) for path in (baseline, sparse, pruned, tuned)]
        names = ("baseline", "sparsity", "pruned", "fine-tuned")
        scores = {n: f"{c['best_prec1']:.2%}" for n, c in zip(names, stages, strict=True)}
        sizes = [figures.count_parameters(architecture.load(p)[0]) for p in (sparse, tuned)]
        rows.append(
            {
                "network": f"{arch}-{depth} at {ratio:.0%}",
                "data": name,
                "epochs": f"{args.epochs}{' amp' if args.amp else ''}",
                **scores,
                "parameters": f"{sizes[0]:,} -> {sizes[1]:,}",
                HEADER[-1]: PUBLISHED.get((arch, ratio), "-"),
            }
        )
    return rows


def train(folder: Path, words: list, data: list, args: argparse.Namespace) -> Path:
    """Finish a run of main.py in ``folder`` if necessary, and return its best checkpoint."""
    last = folder / "checkpoint.pth.tar"
    if not last.exists() or checkpoint.read(last)["epoch"] < args.epochs:
        more = ["--resume", "auto", "--epochs", args.epochs, "--save", folder]
        run("main.py", *words, *data, *more, *(["--amp"] if args.amp else []))
    return folder / "model_best.pth.tar"


def run(script: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    print(f"$ python {shlex.join([script, *command[2:]])}", flush=True)
    with measure.ended(subprocess.Popen(command)) as process:
        status = process.wait()
    if status:
        sys.exit(status)  # the script has printed why; the next start resumes


if __name__ == "__main__":
    entry.run(main)
