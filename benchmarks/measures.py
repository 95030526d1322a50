"""Compare all measures of importance on one network: size and accuracy after pruning in rounds.

Each row is a run of flowprune.py; `random` is the baseline. An interrupted run is resumed, a
finished one is not repeated.

    python benchmarks/measures.py --measure mag_based --measure random --dataset digits
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from slimming.choosing.importance import MEASURES
from slimming.cli import entry
from slimming.commands.rounds.settings import MODELS
from slimming.runtime.device import choose_device
from slimming.settings import plain_name
from slimming.storage import checkpoint

EPOCH = re.compile(r"epoch (\d+)/\d+, lr \S+, ([\d.]+) s")  # the line that a run prints per epoch
HEADER = ["measure", "network", "data", "pruning", "epochs", "seed", "top-1, last", "top-1, best"]
HEADER += ["parameters", "MFLOPs", "s a round", "s in all"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"action": "append", "metavar": "M"}
    parser.add_argument("--measure", choices=MEASURES, help="default: all, in turn", **several)
    parser.add_argument("--model", choices=MODELS, default="resnet-56")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", help="folder of the dataset")
    text = "name of the data in the table (default: --dataset)"
    parser.add_argument("--data-name", type=plain_name, help=text)
    parser.add_argument("--prune_percent", type=float, default=75)
    parser.add_argument("--n_rounds", type=int, default=5)
    parser.add_argument("--warmup_epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--work", type=Path, default=Path("measures"), help="folder of the runs")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--device")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    name = f"measures-{args.data_name or args.dataset}"
    about = measure.machine(choose_device(args.device))
    for seed in args.seeds:
        for chosen in args.measure or MEASURES:
            rows = measure.merged(name, [row_of(chosen, seed, args)], HEADER[:6])
            measure.write(name, about, HEADER, rows)


def row_of(chosen: str, seed: int, args: argparse.Namespace) -> dict:
    """Finish a run if necessary, and return its row of the table."""
    data, schedule = args.data_name or args.dataset, f"{args.warmup_epochs} + {args.n_rounds}"
    pruning = f"{args.prune_percent:g}% in {args.n_rounds}"
    epochs = f"{args.epochs}, warm-up {args.warmup_epochs}, batch {args.batch_size}"
    amp = " amp" if args.amp else ""
    settings = f"{args.prune_percent:g} {schedule} of {args.epochs} by {args.batch_size}{amp}"
    folder = args.work / f"{data} {args.model} {settings}".replace(" ", "-") / f"{chosen}-{seed}"
    last = folder / "checkpoint.pth.tar"
    if not last.exists() or checkpoint.read(last)["epoch"] < args.epochs:
        run(folder, chosen, seed, args)
    contents = checkpoint.read(last)
    left = contents["flow"]["rounds"][-1]
    seconds = dict(EPOCH.findall(log_of(folder).read_text()))  # of repeated epochs, the last
    seconds = [float(seconds[str(n + 1)]) for n in range(args.epochs)]
    rounds = seconds[args.warmup_epochs : args.warmup_epochs + args.n_rounds]
    return {
        **{"measure": chosen, "network": args.model, "data": data, "pruning": pruning},
        **{"epochs": epochs + amp, "seed": seed, "parameters": f"{left['parameters']:,}"},
        "top-1, last": f"{contents['history'][-1]['test_prec1']:.2%}",
        "top-1, best": f"{contents['best_prec1']:.2%}",
        "MFLOPs": f"{left['flops'] / 1e6:.1f}",
        "s a round": f"{sum(rounds) / len(rounds):.1f}",
        "s in all": f"{sum(seconds):.0f}",
    }


def run(folder: Path, chosen: str, seed: int, args: argparse.Namespace) -> None:
    """Start or resume flowprune.py; its output also goes to the log."""
    names = ("model", "dataset", "data", "prune_percent", "n_rounds", "warmup_epochs", "epochs")
    words = [f"--{n}={getattr(args, n)}" for n in names if getattr(args, n) is not None]
    words += [f"--batch-size={args.batch_size}", *(["--amp"] if args.amp else [])]
    words += ["--device", args.device] if args.device else []
    words += ["--pruning_type", chosen, "--seed", seed, "--save", folder, "--resume", "auto"]
    command = [sys.executable, str(ROOT / "flowprune.py"), *map(str, words)]
    print(f"$ python {shlex.join(['flowprune.py', *command[2:]])}", flush=True)
    log_of(folder).parent.mkdir(parents=True, exist_ok=True)
    with log_of(folder).open("a") as log:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with measure.ended(started) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            status = process.wait()
    if status:
        sys.exit(status)  # the script has printed why; the next start resumes


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


if __name__ == "__main__":
    entry.run(main)
