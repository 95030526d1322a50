"""Networks that people run, each pruned by a third and proved: what share can go, and what stays.

    pip install -r benchmarks/requirements-zoo.txt
    python benchmarks/zoo.py [--only 'timm/*'] [--limit 10] [--tool slimming] [--list]

Each network runs in a process of its own. A row is written as soon as it is measured, and networks
that have one are left out: the script continues where it was ended.
"""

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core: before PyTorch is there
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import measure, zoo_networks
from benchmarks.zoo_peers import PEERS, without
from slimming.channels import inputs as arguments
from slimming.channels.groups import Channels, Group, channels
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import Convolution
from slimming.channels.labels import OUTPUT
from slimming.choosing.threshold import Choice
from slimming.cli import entry
from slimming.errors import UserError
from slimming.slicing import proof
from slimming.slicing.prune import Slimmed, chosen
from slimming.slicing.slim import Masks, cuts, kept_channels, masked

OURS = "slimming"
TOOLS = (OURS, *PEERS)
ROWS = measure.RESULTS / "zoo-cpu.jsonl"
TABLE = measure.RESULTS / "zoo-cpu.md"
FORK = multiprocessing.get_context("fork")  # the packages are imported once
LIMIT = 60  # seconds of CPU time
MEMORY = 12 * 2**30  # bytes: a network that needs more fails, and the machine goes on
ALIVE = 1e-5  # outputs that change less between two inputs prove nothing
PACKAGES = [*PEERS, "torch", "torchvision", "torchaudio", "timm", "ultralytics", "monai", "easyocr"]
PACKAGES += ["segmentation-models-pytorch"]
HEADER = ["network", "parameters", "prunable", "kept", "verdict", "proof", "liveness"]
HEADER += ["seconds", "GB", "pinned most", *PEERS]
NOTES = """Random weights, scaling factors and BN statistics; a third of the units of each group is
removed. `prunable`: the share of
parameters of convolutions and linear layers that could go, of those that run; `kept`: the share of
all parameters that the slim network has; `proof`: the largest difference from the masked network,
relative to the largest output; `liveness`: how much the outputs of the slim network differ between
two inputs, on the second of which it must equal the masked one, too; `seconds`: CPU time on one
core, from the network to the proved slim network; `GB`: the most that the process held, PyTorch and
the packages included. The peers are asked for a third of each group too, and what
they return is compared with the dense network that lacks the same channels."""


class OverTime(BaseException):
    """The time limit: no handler of exceptions on the way takes it for another."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "names as in --list, * and ? match any; may be repeated"
    parser.add_argument("--only", metavar="PATTERN", action="append", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="measure N networks at most")
    parser.add_argument("--list", action="store_true", help="print the names, measure nothing")
    text = "the library to measure (default: all that are installed)"
    parser.add_argument("--tool", choices=TOOLS, action="append", help=text)
    parser.add_argument("--again", action="store_true", help="also what has a row")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    names = [n for n in zoo_networks.networks() if _matches(n, args.only or ["*"])]
    if args.list:
        print("\n".join(names))
        return
    done = {(row["network"], row["tool"]) for row in read_rows()} if not args.again else set()
    tools = [tool for tool in args.tool or TOOLS if tool == OURS or version(tool)]
    left = [(n, t) for n in names for t in tools if (n, t) not in done][: args.limit]
    zoo_networks.load([name for name, _ in left])
    for place, (name, tool) in enumerate(left):
        row = in_process(name, tool)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{place + 1}/{len(left)}] {tool}: {name}: {told(row)}", flush=True)
    summary = write_table(read_rows())
    print("\n".join(summary))


def version(package: str) -> str | None:
    """The version of a package, if it is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_rows() -> list[dict[str, Any]]:
    """The last row of each network and tool."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows = [json.loads(line) for line in lines]
    return list({(row["network"], row["tool"]): row for row in rows}.values())


def told(row: dict[str, Any]) -> str:
    """A row in a few words."""
    parts = [row["verdict"], row.get("reason", "")]
    parts += [f"{100 * row['prunable']:.1f} % prunable"] if "prunable" in row else []
    parts += [f"{row['seconds']:.1f} s"] if "seconds" in row else []
    return ", ".join(part for part in parts if part)


def in_process(name: str, tool: str) -> dict[str, Any]:
    """The row of a network, measured in a process of its own."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: theirs.send(measured(name, tool)))
    process.start()
    theirs.close()
    try:  # the process ends itself at `LIMIT`; what hangs in one operation is ended here
        if ours.poll(20 * LIMIT):
            return ours.recv()
        return {"network": name, "tool": tool, "verdict": "over time"}
    except EOFError:
        process.join()
        reason = f"exit status {process.exitcode}"
        return {"network": name, "tool": tool, "verdict": "crashed", "reason": reason}
    finally:
        process.kill()
        process.join()


def measured(name: str, tool: str) -> dict[str, Any]:
    """The row of a network, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {"network": name, "tool": tool}
    with contextlib.redirect_stdout(sys.stderr):
        try:
            model, inputs = zoo_networks.networks()[name]()
            zoo_networks.randomize(model, inputs)
        except Exception as error:
            return {**row, "verdict": "not built", "reason": _words(error)}
        row["parameters"] = parameters(model)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        try:
            proved = None
            with limited(row):
                if tool in PEERS:
                    by_peer(tool, model, inputs, row)
                else:
                    proved = by_us(model, inputs, row)
            if proved is not None:
                check(row, model, *proved)
        except OverTime:
            row["verdict"] = "over time"
        except UserError as error:
            row |= {"verdict": "refused", "reason": _words(error)}
        except Exception as error:
            row |= {"verdict": "fails", "reason": _words(error)}
    row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def limited(row: dict[str, Any]) -> Iterator[None]:
    """Raise `OverTime` after `LIMIT` seconds of CPU time; add the seconds to ``row``."""

    def over(*_: object) -> None:
        raise OverTime

    signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        row["seconds"] = round(time.process_time() - cpu, 2)
        row["wall"] = round(time.perf_counter() - wall, 2)


def by_us(model: nn.Module, inputs: Inputs, row: dict[str, Any]) -> tuple[Slimmed, Inputs] | None:
    """Find the groups, remove a third of each, and prove, as `slicing.prune` does; with the least
    inputs that the network takes."""
    found = channels(model, inputs)
    row |= share(model, found)
    if not found.groups:
        row["verdict"] = "nothing to prune"
        return None
    slimmed = chosen(model, found, two_thirds_of_each, inputs)
    left = [group for group in found.groups if group.name in slimmed.choice.kept]
    row |= share(model, replace(found, groups=left))
    row |= {"kept": parameters(slimmed.model) / parameters(model), "proof": slimmed.difference}
    row["verdict"] = "proved"
    return slimmed, found.inputs


def two_thirds_of_each(groups: list[Group]) -> Choice:
    alive = {group.name: group.alive for group in groups}
    return Choice(1 / 3, 0.0, alive, {group.name: two_thirds(group) for group in groups}, [])


def check(row: dict[str, Any], model: nn.Module, slimmed: Slimmed, inputs: Inputs) -> None:
    """Compare the networks once more, for other inputs, on which their outputs must differ from
    those of before."""
    other = arguments.mapped(inputs, lambda t: t.flip(-1) * 0.9 if t.is_floating_point() else t)
    if not proof.compared(slimmed.model, masked(model, slimmed.kept), other) <= proof.TOLERANCE:
        row["verdict"] = "wrong"
    ours, theirs = (proof.outputs(slimmed.model, x) for x in (inputs, other))
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape == b.shape]
    found = proof.difference([a for a, _ in both], [b for _, b in both])
    row["liveness"] = found if len(both) == len(ours) else max(found, 1.0)
    if row["verdict"] == "proved" and row["liveness"] < ALIVE:
        row["verdict"] = "not alive"


def two_thirds(group: Group) -> torch.Tensor:
    """Two of three units of a group; at least one of each layer."""
    generator = torch.Generator().manual_seed(group.size + 1)
    keep = group.alive.clone()
    keep[torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]] = False
    for member in group.members:
        if not keep[member.units].any():
            keep[member.units[-1]] = True
    return keep


def share(model: nn.Module, found: Channels) -> dict[str, Any]:
    """``prunable``: the share of the parameters of convolutions and linear layers that can go, of
    those that run; ``pinned``: the share that stays because of each reason, the largest first."""
    nothing: Masks = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in found.groups}
    masks = cuts(model, kept_channels(found.groups, nothing))
    stays: dict[str, int] = {}
    total, seen = 0, set()
    for name, layer in model.named_modules():
        if not isinstance(layer, Convolution | nn.Linear) or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        if name in found.unseen:
            continue
        for part, tensor in layer.named_parameters(recurse=False):
            left = tensor.numel()
            for dim, mask in masks.get(f"{name}.{part}".lstrip("."), {}).items():
                left = left // tensor.shape[dim] * int(mask.sum())
            total += tensor.numel()
            stays[name] = stays.get(name, 0) + left
    reasons = {
        reason: round(sum(stays.get(layer, 0) for layer in layers) / max(1, total), 4)
        for reason, layers in found.pinned.items()
    }
    top = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    pinned = [(reason, part) for reason, part in top if part]
    return {"prunable": 1 - sum(stays.values()) / max(1, total), "pinned": pinned}


def by_peer(tool: str, model: nn.Module, inputs: Inputs, row: dict[str, Any]) -> None:
    """What another library returns, compared with the dense network without the same channels."""
    dense = proof.copied(model)
    slim = PEERS[tool](model, inputs)
    row["kept"] = parameters(slim) / parameters(dense)
    if row["kept"] == 1:
        row["verdict"] = "nothing removed"
        return
    try:
        outputs = proof.outputs(slim, inputs)
    except Exception as error:
        row |= {"verdict": "does not run", "reason": _words(error)}
        return
    del outputs
    row["proof"] = proof.compared(slim, without(dense, slim), inputs)
    row["verdict"] = "proved" if row["proof"] <= proof.TOLERANCE else "wrong"


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write_table(rows: list[dict[str, Any]]) -> list[str]:
    """Write the table in the order of the zoo; return the lines of its summary."""
    by_name = {(row["network"], row["tool"]): row for row in rows}
    names = [name for name in zoo_networks.networks() if (name, OURS) in by_name]
    lines = [_cells(by_name[name, OURS], [by_name.get((name, t)) for t in PEERS]) for name in names]
    ours = [by_name[name, OURS] for name in names]
    summary = [*_summary(ours), *(_of_peer(tool, rows, ours) for tool in PEERS)]
    about = measure.machine(torch.device("cpu")) | {"command": "python benchmarks/zoo.py"}
    versions = {package: version(package) for package in PACKAGES}
    facts = [f"- {key}: {value}" for key, value in (versions | about).items() if value]
    table = measure.markdown(HEADER, [dict(zip(HEADER, line, strict=True)) for line in lines])
    text = ["# zoo-cpu", "", *facts, "", *summary, "", NOTES, "", *table]
    TABLE.write_text("\n".join(text) + "\n")
    return summary


def _cells(row: dict[str, Any], peers: list[dict[str, Any] | None]) -> list[str]:
    """The cells of a line of the table."""
    pinned = [(why, part) for why, part in row.get("pinned", []) if why != OUTPUT]
    return [
        row["network"],
        f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else "",
        f"{100 * row['prunable']:.1f} %" if "prunable" in row else "",
        f"{100 * row['kept']:.1f} %" if "kept" in row else "",
        row["verdict"],
        f"{row['proof']:.0e}" if "proof" in row else "",
        f"{row['liveness']:.0e}" if "liveness" in row else "",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['memory'] / 2**30:.1f}" if "memory" in row else "",
        f"{pinned[0][0]}: {100 * pinned[0][1]:.1f} %" if pinned else "",
        *(_of_row(peer) for peer in peers),
    ]


def _of_row(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['verdict']}, {100 * row['kept']:.0f} % kept" if "kept" in row else row["verdict"]


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    """The figures of all networks, and of each source."""
    built = [row for row in rows if row["verdict"] != "not built"]
    groups = {"all": built}
    for source in zoo_networks.sources([row["network"] for row in built]):
        groups[source] = [row for row in built if row["network"].startswith(f"{source}/")]
    header = ["source", "networks", "proved", "wrong", "over time", "other"]
    header += ["median prunable", "median seconds", "most seconds", "most GB"]
    lines = []
    for source, found in groups.items():
        if not found:
            continue
        verdicts = [row["verdict"] for row in found]
        known = [verdicts.count(verdict) for verdict in ("proved", "wrong", "over time")]
        prunable_shares = [row["prunable"] for row in found if "prunable" in row]
        seconds = [row["seconds"] for row in found if "seconds" in row]
        memory = [row["memory"] for row in found if "memory" in row]
        cells = [
            source,
            len(found),
            f"{known[0]} ({100 * known[0] / len(found):.1f} %)",
            *known[1:],
        ]
        cells += [len(found) - sum(known)]
        cells += [f"{100 * statistics.median(prunable_shares):.1f} %" if prunable_shares else ""]
        cells += (
            [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else [""] * 2
        )
        cells += [f"{max(memory) / 2**30:.1f}" if memory else ""]
        lines.append(dict(zip(header, cells, strict=True)))
    return measure.markdown(header, lines)


def _of_peer(tool: str, rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """What came of the networks with another library."""
    found = Counter(row["verdict"] for row in rows if row["tool"] == tool)
    found.pop("not built", None)
    words = ", ".join(f"{verdict} {count}" for verdict, count in found.most_common())
    return f"\n{tool}: {found.total()} of {len(ours)} networks tried: {words or 'none'}"


if __name__ == "__main__":
    entry.run(main)
