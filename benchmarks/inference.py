"""Measure how fast pruned networks run, compared to the ratio of their FLOPs.

Each network is pruned at the paper's percentage. The slim network runs in PyTorch, as it is and in
its deployment form, and in each engine that is installed, in each form of its graph; the table has
the fastest form. All of them and the dense network take turns on the same batch. The scaling
factors are random, or those of a run with -sr, which lead to other shapes.

    python benchmarks/inference.py [--model logs/model_best.pth.tar ...] [--device cuda] [--quick]
"""

import argparse
import copy
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, plain
from benchmarks.plain import Passes
from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import declared
from slimming.channels.scaling import batch_norms
from slimming.choosing.threshold import Choice, choose_channels
from slimming.cli import entry
from slimming.commands.export.run import possible_forms
from slimming.deploy.engines import ENGINES, Engine, Run, device_of
from slimming.deploy.fold import deploy, forms_of
from slimming.deploy.formats import FORMATS
from slimming.deploy.forms import FORMS
from slimming.deploy.graph import Feed, traced
from slimming.errors import UserError
from slimming.measuring import figures as measuring_figures
from slimming.runtime import optional
from slimming.runtime.device import LAYOUT, choose_device, compiled
from slimming.storage import architecture, files

CASES = {"vgg": (19, 0.7), "resnet": (164, 0.4), "densenet": (40, 0.4)}
RUNNERS = {  # device -> format -> precisions
    "cpu": {"onnx": ("fp32",), "openvino": ("fp32", "bf16")},
    "cuda": {"onnx": ("fp32", "fp16")},
}
PYTORCH = {  # device -> precisions beside fp32
    "cpu": {"bf16": torch.bfloat16},
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16},
}
HEADER = ["network", "γ", "batch", "FLOP ratio", "runs in", "form", "dense ms", "slim ms"]
HEADER += ["micro-batch", "speed-up", "realised", "over plain PyTorch", "realised over it"]

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Pass:
    """A forward pass."""

    engine: Engine
    images: Any

    def __call__(self) -> Any:
        return self.engine(self.images)


Runs = dict[tuple[str, str], Pass]  # by (runs in, form)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if available")
    text = "checkpoint of a run with -sr, to prune in addition to networks with random factors"
    parser.add_argument("--model", type=Path, action="append", default=[], help=text)
    parser.add_argument("--network", choices=CASES, action="append", help="default: all")
    parser.add_argument(
        "--batch", type=int, action="append", metavar="N", help="batch size (default: 64 and 1)"
    )
    parser.add_argument(
        "--engine",
        choices=("onnx", "openvino", "none"),
        action="append",
        help="default: all installed",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also by torch.compile; on CUDA with CUDA graphs"
    )
    parser.add_argument("--quick", action="store_true", help="run fewer rounds, without engines")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    engines = ["none"] if args.quick and not args.engine else args.engine or installed(device)
    networks = [(arch, "random", random_network(arch)) for arch in args.network or CASES]
    for path in args.model:
        model, network, _ = architecture.load(files.find(path, "model_best.pth.tar"))
        networks.append((network.arch, "trained", model))
    name = f"inference-{device.type}{'-quick' if args.quick else ''}"
    about, rows = measure.machine(device), []
    for compiling in (False, True) if args.compile else (False,):  # which takes minutes: last
        for arch, factors, dense in networks:
            slim, ratio = pruned(dense, CASES[arch][1]), CASES[arch][1]
            title = {"network": f"{arch}-{dense.depth} at {ratio:.0%}", "γ": factors}
            with tempfile.TemporaryDirectory() as folder, beside(dense, device) as outside:
                kinds = [] if compiling else engines
                loaded = [in_engines(m, kinds, device, Path(folder)) for m in (dense, slim)]
                for batch in args.batch or (64, 1):
                    rounds = (3 if args.quick else 15) * (1 if batch > 1 else 4)
                    images = torch.randn(batch, 3, 32, 32)
                    both = [
                        in_pytorch(model, images.to(device), compiling)
                        | {name: Pass(run, images.numpy()) for name, run in own.items()}
                        for model, own in zip((dense, slim), loaded, strict=True)
                    ]
                    here = {**title, "batch": batch}
                    passes = outside and outside(images)
                    rows += timed(both, passes, rounds, device, here, flops(dense, slim))
                    measure.write(name, about, HEADER, rows, NOTES)


NOTES = """`slim ms` is that of the fastest form of the graph, `dense ms` the same of the dense
network; `speed-up` is over the dense network in PyTorch, as it is, in fp32, in a process that keeps
freed memory, as the scripts of this suite do; `over plain PyTorch`: in one that does not, which is
PyTorch's default. That network runs whole batches, as PyTorch does; `micro-batch`: how many images
the slim one runs at a time. `realised` is a speed-up / the FLOP ratio."""


def beside(dense: nn.Module, device: torch.device) -> AbstractContextManager[Passes | None]:
    """The dense network in a process with PyTorch's defaults, which are the same on CUDA."""
    return plain.process(dense) if device.type == "cpu" else nullcontext()


def installed(device: torch.device) -> list[str]:
    """The engines that can be used on this device."""
    found = []
    for kind in RUNNERS.get(device.type, {}):
        try:
            FORMATS[kind].check(kind, "fp32")
        except UserError as error:
            print(f"note: {error}")
            continue
        if device_of(kind, str(device)) == str(device):
            found.append(kind)
        else:
            print(f"note: the package of {kind} runs on CPUs only: pip install onnxruntime-gpu")
    return found


def random_network(arch: str) -> nn.Module:
    """A network of the paper's depth with random scaling factors."""
    torch.manual_seed(0)
    dense = NETWORKS[arch](depth=CASES[arch][0]).eval()
    for bn in batch_norms(dense).values():
        bn.weight.data.uniform_(0, 1)
        bn.bias.data.normal_(0, 0.1)
    return dense


def pruned(dense: nn.Module, ratio: float) -> nn.Module:
    """The slim network, by the paper's threshold."""
    return slim_of(dense, choose_channels(dense, ratio))


def slim_of(dense: nn.Module, choice: Choice) -> nn.Module:
    """The network that keeps the chosen channels."""
    return slicing.sliced(dense, slicing.kept_channels(declared(dense), choice.kept))


def flops(dense: nn.Module, slim: nn.Module) -> float:
    return measuring_figures.count_flops(dense) / measuring_figures.count_flops(slim)


def in_pytorch(model: nn.Module, images: torch.Tensor, compiling: bool) -> Runs:
    """A forward pass in PyTorch: as it is, deployed, in bf16; or as it is and compiled in bf16."""
    images = images.to(memory_format=LAYOUT)
    model = model.to(images.device).to(memory_format=LAYOUT).eval()
    forms = {("PyTorch", AS_IT_IS): model}
    if compiling:
        fixed = compiled(deploy(model, dtype=torch.bfloat16), images.device)
        forms["torch.compile bf16", "clamp"] = fixed
    else:
        for name, form in fast(model):
            forms["PyTorch", name] = deploy(model, form=form)
            for low, dtype in PYTORCH.get(images.device.type, {}).items():
                forms[f"PyTorch {low}", name] = deploy(model, dtype=dtype, form=form)
    return {
        (place, name): Pass(
            Engine(
                functools.partial(_run, form),
                tuned=not (compiling or name == AS_IT_IS or images.is_cuda),
            ),
            images,
        )
        for (place, name), form in forms.items()
    }


def in_engines(
    model: nn.Module, kinds: list[str], device: torch.device, folder: Path
) -> dict[tuple[str, str], Engine]:
    """The network in each engine, for each form of the graph."""
    runs: dict[tuple[str, str], Engine] = {}
    still = copy.deepcopy(model).cpu()
    chosen = [
        (kind, precision, name)
        for kind in kinds
        for precision in RUNNERS.get(device.type, {}).get(kind, ())
        for name in possible_forms(still, kind, precision)
        if FORMS[name].fold
    ]
    for kind, precision, name in optional.bar(chosen, desc="export", leave=False, disable=None):
        target = FORMATS[kind]
        path = folder / f"{len(list(folder.iterdir()))}{target.suffix}"
        program = traced(deploy(still, dtype=target.dtype(precision), form=FORMS[name]), Feed())
        target.write(program, path, precision, [], {})
        runs[f"{kind} {precision}", name] = ENGINES[kind](
            str(path), precision, torch.get_num_threads(), str(device), tuned=True
        )
    return runs


def fast(model: nn.Module) -> list:
    """The forms of the graph in which BN is folded."""
    return [(name, form) for name, form in forms_of(model).items() if form.fold]


def timed(
    both: list[Runs],
    outside: Callable[[], object] | None,
    rounds: int,
    device: torch.device,
    title: dict,
    ratio: float,
) -> Iterator[dict]:
    """A row for each place in which the networks run, with its fastest form. ``outside``: the dense
    network in another process."""
    tasks = {
        (which, *name): task
        for which, runs in zip(("dense", "slim"), both, strict=True)
        for name, task in runs.items()
    }
    if outside:
        tasks["plain"] = outside
    seconds = measure.in_turns(tasks, rounds, device, f"batch {title['batch']}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    kept = medians["dense", "PyTorch", AS_IT_IS]
    bases = [kept, medians.pop("plain", kept)]
    places = dict.fromkeys(place for place, form in both[1] if form != AS_IT_IS)
    for place in places:
        best = {
            which: min((t, form) for (w, p, form), t in medians.items() if (w, p) == (which, place))
            for which in ("dense", "slim")
        }
        taken, form = best["slim"]
        figures = [round(ratio, 2), place, form, round(1e3 * best["dense"][0], 1)]
        figures += [round(1e3 * taken, 1), both[1][place, form].engine.micro_batch(title["batch"])]
        for base in bases:
            figures += [round(base / taken, 2), round(base / taken / ratio, 2)]
        yield {**title, **dict(zip(HEADER[3:], figures, strict=True))}


def _run(model: nn.Module, _: tuple[int, ...], size: int) -> Run:
    return lambda images: torch.cat([_forward(model, few) for few in images.split(size)])


@torch.no_grad()
def _forward(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


if __name__ == "__main__":
    entry.run(main)
