"""sweep.py: measure what each percentage of each allocation would give; choose, test, report."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.choosing import allocation as choosing_allocation
from slimming.choosing.allocation import Prunable
from slimming.choosing.budget import front, knee
from slimming.choosing.importance import scaled_norms
from slimming.choosing.threshold import Choice
from slimming.commands.experiment.settings import PruningSettings
from slimming.commands.prune.settings import PruneSettings
from slimming.commands.pruning import RepairSettings
from slimming.commands.sweep import report as sweep_report
from slimming.commands.sweep.settings import SEARCH, SweepRun
from slimming.data import loading
from slimming.data.batches import SIZE
from slimming.data.loading import Data
from slimming.errors import Interrupted, UserError
from slimming.measuring import figures
from slimming.repair.layer_by_layer import repair
from slimming.repair.one_pass import OnePass
from slimming.repair.streaming import FEWEST
from slimming.runtime import optional
from slimming.runtime.device import choose_device
from slimming.runtime.distributed import one_process
from slimming.slicing.proof import liveness, liveness_warning, prove_equal
from slimming.slicing.prune import groups
from slimming.slicing.slim import Kept, masked, slim_to
from slimming.storage import architecture, files
from slimming.storage.architecture import Architecture
from slimming.storage.files import digest
from slimming.training import loop

NAME = "sweep.json"
TEXTS = ("id", "allocation", "command")  # of a point
NUMBERS = ("ratio", "parameters", "FLOPs", "params", "flops", "latency", "ms", "pruned", "repaired")


class SweepRecord:
    """The ``facts`` of a sweep: its ``basis``, which decides the figures of a point; the "dense"
    network; the "points", each a dict with its "id"; what was "chosen". Those of an earlier sweep
    in ``folder`` with the same basis are continued. UserError if it had another basis."""

    def __init__(self, folder: Path, basis: dict[str, Any]):
        self.path = folder / NAME
        self.facts: dict[str, Any] = {"basis": basis, "points": []}
        if self.path.exists():
            self.facts = self._continued(basis)

    @property
    def points(self) -> list[dict[str, Any]]:
        return self.facts["points"]

    def point(self, name: str) -> dict[str, Any] | None:
        """The point with the id ``name``, if it is known."""
        return next((point for point in self.points if point["id"] == name), None)

    def add(self, point: dict[str, Any]) -> None:
        self.points.append(point)
        self.update()

    def update(self, **facts: Any) -> None:
        """Add ``facts``, and write the file."""
        self.facts.update(facts)
        files.write_bytes(self.path, json.dumps(self.facts, indent=1).encode())

    def _continued(self, basis: dict[str, Any]) -> dict[str, Any]:
        try:
            facts = json.loads(self.path.read_text())
            before, points = facts["basis"], facts["points"]
            known = isinstance(before, dict) and all(_is_whole(point) for point in points)
        except (ValueError, KeyError, TypeError, OSError):
            known = False
        if not known:
            raise UserError(
                f"{self.path} is damaged or not of a sweep: use another --save, or delete the file"
            )
        for name, value in json.loads(json.dumps(basis)).items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.path} is of a sweep with {name} {before.get(name)}, not {value}: use "
                    "another --save, or delete the file"
                )
        return facts


def _is_whole(point: dict[str, Any]) -> bool:
    numbers = [point[name] for name in NUMBERS] + [point.get("exact", 0)]
    texts = [point[name] for name in TEXTS]
    return all(isinstance(n, int | float) for n in numbers) and all(
        isinstance(text, str) for text in texts
    )


SCRIPTS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
BATCH = 256
THRESHOLD = "global"  # the allocation that needs scaling factors


@dataclass(frozen=True)
class Candidate:
    """A fraction to prune, and how it is allocated."""

    allocation: str
    ratio: float

    @property
    def id(self) -> str:
        return f"{self.allocation} {100 * self.ratio:.6g} %"


@dataclass
class Swept:
    """The network to prune, and the images that its slim ones are repaired and judged on."""

    run: SweepRun
    path: Path
    network: Architecture
    prunable: Prunable
    calibration: torch.Tensor
    judged: list[tuple[torch.Tensor, torch.Tensor]]
    test: Data
    record: SweepRecord

    @property
    def allocations(self) -> list[str]:
        """The allocations that make a curve, without search."""
        names = [name for name in self.run.points.allocation if name != SEARCH]
        scaled = scaled_norms(self.prunable.model)
        return [name for name in names if scaled or name != THRESHOLD]

    @property
    def searched(self) -> list[str]:
        """The random allocations that search tries."""
        points = self.run.points
        count = points.candidates if SEARCH in points.allocation else 0
        return [f"random-{i + 1}" for i in range(count)]

    @property
    def images(self) -> torch.Tensor:
        """The images that latency is measured with."""
        few, count = self.test.first(64), self.run.budget.latency_batch
        return few[torch.arange(count, device=few.device) % len(few)]

    def top1(self, model: nn.Module) -> float:
        """The accuracy on the held-back training images."""
        return loop.test(model.to(self.test.device), self.judged).prec1

    def slim(self, candidate: Candidate) -> tuple[Choice, nn.Module, Kept]:
        """The slim network of a candidate, not proved."""
        choice = choosing_allocation.choose(self.prunable, candidate.ratio, candidate.allocation)
        return choice, *slim_to(self.prunable.model, self.prunable.coupled, choice.kept)

    @cached_property
    def one_pass(self) -> OnePass:
        """Repair in closed form."""
        return OnePass(self.prunable.model, self.calibration, self.run.judging.repair_seed)

    def layer_by_layer(self, slim: nn.Module, kept: Kept) -> nn.Module:
        """``slim`` repaired as --repair does."""
        seed = self.run.judging.repair_seed
        return repair(slim, self.prunable.model, kept, self.calibration, seed).model


def load(run: SweepRun) -> Swept:
    """Load the network and the images of ``run``. UserError if one is unavailable, or if the
    network cannot be slimmed."""
    one_process("sweep.py")
    path, judging, data = run.subject.path, run.judging, run.data
    model, network, contents = architecture.load(path, run.subject.request(data))
    device = choose_device(data.device, data.no_cuda)
    size = data.test_batch_size
    training, test = (
        loading.batches_for(network, part, size, device, data) for part in ("train", "test")
    )
    loading.check_classes(test, network.num_classes, contents, path)
    wanted = judging.held_back + judging.repair_images
    images, labels = training.draw(wanted, judging.repair_seed)
    held_back = min(judging.held_back, len(images) // 3)
    if len(images) - held_back < FEWEST or not held_back:
        raise UserError(f"{len(images)} training images are too few to repair and to judge by")
    if len(images) < wanted:
        print(
            f"note: of {len(images)} training images, {held_back} are held back to measure "
            f"accuracy, and repair uses {len(images) - held_back}"
        )
    judged = list(
        zip(images[:held_back].split(BATCH), labels[:held_back].split(BATCH), strict=True)
    )
    coupled = groups(model, test.first(1))
    prunable = Prunable(model, coupled, run.points.round_to, least=run.points.least)
    basis: dict[str, Any] = {
        "checkpoint": digest(path),
        "dataset": network.dataset,
        "training images": training.num_images,
        "--held-back": judging.held_back,
        "--repair-images": judging.repair_images,
        "--repair-seed": judging.repair_seed,
        "--least": run.points.least,
        "--round-to": run.points.round_to,
        "--latency-batch": run.budget.latency_batch,
        "--device": device.type,
    }
    if THRESHOLD in run.points.allocation and not scaled_norms(model):
        print("note: the network has no BatchNorm, so there is no global threshold to try")
        if run.points.allocation == (THRESHOLD,):
            raise UserError("no allocation is left to try: use --allocation uniform,lamp")
    record = SweepRecord(run.folder, basis)
    return Swept(run, path, network, prunable, images[held_back:], judged, test, record)


def command(subject: Swept, candidate: Candidate) -> str:
    """The command that prunes at ``candidate``."""
    run, network = subject.run, subject.network
    ratio, name = f"{candidate.ratio:.9g}", candidate.allocation
    if network.arch in SCRIPTS:
        words = ["python", SCRIPTS[network.arch], "--model", str(subject.path), "--percent", ratio]
        words += [] if name == THRESHOLD else ["--allocation", name]
    else:
        words = ["python", "run.py", "--model", network.arch, "--dataset", network.dataset]
        words += ["--skip-base-training", "--model-path", str(subject.path)]
        words += ["--pruning-ratio", ratio, "--allocation", name, "--finetune-epochs", "0"]
    defaults = vars(RepairSettings())
    least = (PruneSettings if network.arch in SCRIPTS else PruningSettings).least  # the default
    more: dict[str, Any] = {
        "--least": run.points.least if run.points.least != least else None,
        "--round-to": run.points.round_to if run.points.round_to > 1 else None,
        "--depth": network.depth if network.arch not in SCRIPTS else run.subject.depth,
        "--image-size": network.image_size if network.image_size != SIZE else None,
        "--data": run.data.data,
        "--device": run.data.device,
    }
    for field in ("repair_images", "repair_seed"):
        value = getattr(run.judging, field)
        more[f"--{field.replace('_', '-')}"] = None if value == defaults[field] else value
    if network.arch in SCRIPTS:
        more |= {"--arch": run.subject.arch, "--dataset": run.data.dataset}
    words += [str(word) for pair in more.items() if pair[1] is not None for word in pair]
    words += ["--no-cuda"] if run.data.no_cuda else []
    folder = run.folder / f"{name}-{100 * candidate.ratio:.4g}"
    save = "--save" if network.arch in SCRIPTS else "--output-dir"
    return shlex.join([*words, "--repair", save, str(folder)])


WITHIN, KNEE = (
    "the best within the budget",
    "the knee of the front, beyond which accuracy falls faster than cost",
)
SECONDS = 0.5  # of measuring the latency of a point


@contextlib.contextmanager
def continuable(subject: Swept) -> Iterator[None]:
    """Ctrl-C says that the finished points are saved."""
    try:
        yield
    except KeyboardInterrupt:
        count, path = len(subject.record.points), subject.record.path
        saved = f"{path} has {count} of the points" if count else "no point is finished yet"
        raise Interrupted(f"interrupted: {saved}; run the same command to continue") from None


def candidates(subject: Swept) -> list[Candidate]:
    """The candidates, by rising percentage; with a budget, those of search are fitted to it."""
    ratios = subject.run.points.ratios
    made = [Candidate(name, ratio) for ratio in ratios for name in subject.allocations]
    if subject.run.budget.given:
        return made
    count = len(subject.searched)
    ratios_tried = [ratios[int((i + 0.5) / count * len(ratios))] for i in range(count)]
    return made + [Candidate(*pair) for pair in zip(subject.searched, ratios_tried, strict=True)]


def within_budget(subject: Swept) -> list[Candidate]:
    """For each allocation, the candidate that prunes as little as the budgets allow."""
    run, images, record = subject.run, subject.test.first(64), subject.record
    if not run.budget.given:
        return []
    budget = " ".join(f"{name} {limit:g}" for name, limit in run.budget.given.items())
    known: dict[str, float] = record.facts.get("budgets", {}).get(budget, {})
    for name in [*subject.allocations, *subject.searched]:
        if name not in known:
            known[name] = round(run.budget.find_ratio_for(subject.prunable, images, name), 9)
    record.facts.setdefault("budgets", {})[budget] = known
    return [Candidate(name, ratio) for name, ratio in known.items()]


def measure(subject: Swept, tried: list[Candidate]) -> None:
    """Measure all candidates that the record does not have yet."""
    record = subject.record
    if "dense" not in record.facts:
        record.update(**_about(subject))
    print(sweep_report.dense_line(record.facts))
    left = [candidate for candidate in tried if not record.point(candidate.id)]
    if not left:
        return
    if len(left) < len(tried):
        print(f"{len(tried) - len(left)} of {len(tried)} points are in {record.path} already")
    print(sweep_report.header())
    with optional.bar(left, desc="sweep", leave=False, disable=None) as bar:
        for candidate in bar:
            record.add(_point(subject, candidate))
            bar.clear()
            print(sweep_report.point_line(record.points[-1]), flush=True)


def repair_front(subject: Swept) -> None:
    """With --exact, repair the points on the front layer by layer, and measure them again."""
    record = subject.record
    left = [p for p in on_front(subject) if "exact" not in p]
    if not subject.run.judging.exact or not left:
        return
    print(sweep_report.header(exact=True))
    with optional.bar(left, desc="front", leave=False, disable=None) as bar:
        for point in bar:
            _, slim, kept = subject.slim(Candidate(point["allocation"], point["ratio"]))
            point["exact"] = subject.top1(subject.layer_by_layer(slim, kept))
            record.update()
            bar.clear()
            print(sweep_report.point_line(point), flush=True)


def on_front(subject: Swept) -> list[dict[str, Any]]:
    """The points of the front of cost and repaired accuracy."""
    points = subject.record.points
    return [points[i] for i in front([_place(subject, point) for point in points])]


def choose(subject: Swept, fitted: list[Candidate]) -> dict[str, Any]:
    """The best point that keeps the budgets, if there are any, or the knee of the front."""
    run, points = subject.run, subject.record.points
    if not run.budget.given:
        accuracy = subject.record.facts["dense"]["held back"]
        return points[knee([_place(subject, p) for p in points], (1.0, accuracy))]
    names = {candidate.id for candidate in fitted}  # their latency was measured more often
    inside = [p for p in points if p["id"] in names or _keeps(run, p)]
    return max(inside, key=lambda point: _place(subject, point)[1])


def test(subject: Swept, point: dict[str, Any]) -> None:
    """Prove the chosen point on test images, and measure its test accuracy: the only time that test
    images are used to judge."""
    record, model, exact = subject.record, subject.prunable.model, subject.run.judging.exact
    known = record.facts.get("chosen")
    if known and (known["id"], known["exact"]) == (point["id"], exact):
        return
    _, slim, kept = subject.slim(Candidate(point["allocation"], point["ratio"]))
    difference = prove_equal(slim, masked(model, kept), subject.test.first(64))
    repaired = (subject.layer_by_layer if exact else subject.one_pass.repaired)(slim, kept)
    dead = liveness_warning(liveness(repaired, model, subject.calibration[:64]), kept)
    if dead:
        print(f"warning: {dead}")
    stages = {"dense": model, "pruned": slim, "repaired": repaired}
    scores = {n: loop.test(m.to(subject.test.device), subject.test) for n, m in stages.items()}
    model.cpu()
    record.update(
        chosen={
            "id": point["id"],
            "exact": exact,
            "difference": difference,
            "test": {name: score._asdict() for name, score in scores.items()},
        }
    )


def report(subject: Swept, point: dict[str, Any]) -> None:
    """Print what was chosen and the command that prunes there; write sweep.png and sweep.html."""
    record, folder = subject.record, subject.run.folder
    record.update(
        title=f"{subject.network}",
        cost=subject.run.points.cost,
        front=[p["id"] for p in on_front(subject)],
        why=WITHIN if subject.run.budget.given else KNEE,
    )
    print(sweep_report.chosen_line(record.facts, point))
    wrote = [record.path]
    wrote += sweep_report.write_plot(folder / "sweep.png", record.facts)
    files.write_bytes(folder / "sweep.html", sweep_report.page(record.facts).encode())
    print(f"\nwrote {', '.join(map(str, [*wrote, folder / 'sweep.html']))}")


def _about(subject: Swept) -> dict[str, Any]:
    model, size = subject.prunable.model, subject.network.image_size
    counts = figures.count_all(model, (3, size, size))
    dense: dict[str, float] = {"parameters": counts.parameters, "FLOPs": counts.flops}
    dense["held back"] = subject.top1(model)
    model.cpu()
    return {"network": str(subject.network), "checkpoint": str(subject.path), "dense": dense}


def _point(subject: Swept, candidate: Candidate) -> dict[str, Any]:
    """All figures of a candidate; costs are fractions of the dense network's."""
    dense, size = subject.record.facts["dense"], subject.network.image_size
    choice, slim, kept = subject.slim(candidate)
    counts = figures.count_all(slim, (3, size, size))
    repaired = subject.one_pass.repaired(slim, kept)
    both = [repaired, subject.one_pass.dense]
    ours, theirs = figures.latencies(both, subject.images, seconds=SECONDS)
    return {
        "id": candidate.id,
        "allocation": candidate.allocation,
        "ratio": candidate.ratio,
        "parameters": counts.parameters,
        "FLOPs": counts.flops,
        "flops": counts.flops / dense["FLOPs"],
        "params": counts.parameters / dense["parameters"],
        "latency": ours / theirs,
        "ms": 1e3 * ours,
        "liveness": liveness(slim, subject.prunable.model, subject.calibration[:64]),
        "pruned": subject.top1(slim),
        "repaired": subject.top1(repaired),
        "layers": [
            [name, int(alive.sum()), int(choice.kept[name].sum())]
            for name, alive in choice.alive.items()
        ],
        "command": command(subject, candidate),
    }


def _place(subject: Swept, point: dict[str, Any]) -> tuple[float, float]:
    """Cost and accuracy of a point."""
    return point[subject.run.points.cost], point.get("exact", point["repaired"])


def _keeps(run: SweepRun, point: dict[str, Any]) -> bool:
    costs = {f"--{name}": point[name] for name in ("flops", "params", "latency", "ms")}
    costs |= {"--mflops": point["FLOPs"] / 1e6, "--mparams": point["parameters"] / 1e6}
    return all(costs[name] <= limit for name, limit in run.budget.given.items())
