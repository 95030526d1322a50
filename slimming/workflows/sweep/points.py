"""Measure slim networks, choose one, report."""

import contextlib
from collections.abc import Iterator
from typing import Any

from slimming.errors import Interrupted
from slimming.measuring import profiling
from slimming.pruning import slicing
from slimming.pruning.front import front, knee
from slimming.pruning.liveness import liveness, liveness_warning
from slimming.pruning.slicing.proof import prove_equal
from slimming.reports import sweep_page, sweep_plot, sweep_text
from slimming.runtime import optional
from slimming.storage import files
from slimming.training import loop
from slimming.workflows.sweep.settings import SweepRun
from slimming.workflows.sweep.subject import Candidate, Subject, command

WITHIN, KNEE = (
    "the best within the budget",
    "the knee of the front, beyond which accuracy falls faster than cost",
)
SECONDS = 0.5  # of measuring the latency of a point


@contextlib.contextmanager
def continuable(subject: Subject) -> Iterator[None]:
    """Ctrl-C says that the finished points are saved."""
    try:
        yield
    except KeyboardInterrupt:
        count, path = len(subject.record.points), subject.record.path
        saved = f"{path} has {count} of the points" if count else "no point is finished yet"
        raise Interrupted(f"interrupted: {saved}; run the same command to continue") from None


def candidates(subject: Subject) -> list[Candidate]:
    """The candidates, by rising percentage; with a budget, those of search are fitted to it."""
    ratios = subject.run.points.ratios
    made = [Candidate(name, ratio) for ratio in ratios for name in subject.allocations]
    if subject.run.budget.given:
        return made
    count = len(subject.searched)
    ratios_tried = [ratios[int((i + 0.5) / count * len(ratios))] for i in range(count)]
    return made + [Candidate(*pair) for pair in zip(subject.searched, ratios_tried, strict=True)]


def within_budget(subject: Subject) -> list[Candidate]:
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


def measure(subject: Subject, tried: list[Candidate]) -> None:
    """Measure all candidates that the record does not have yet."""
    record = subject.record
    if "dense" not in record.facts:
        record.update(**_about(subject))
    print(sweep_text.dense(record.facts))
    left = [candidate for candidate in tried if not record.point(candidate.id)]
    if not left:
        return
    if len(left) < len(tried):
        print(f"{len(tried) - len(left)} of {len(tried)} points are in {record.path} already")
    print(sweep_text.header())
    with optional.bar(left, desc="sweep", leave=False, disable=None) as bar:
        for candidate in bar:
            record.add(_point(subject, candidate))
            bar.clear()
            print(sweep_text.line(record.points[-1]), flush=True)


def repair_front(subject: Subject) -> None:
    """With --exact, repair the points on the front layer by layer, and measure them again."""
    record = subject.record
    left = [p for p in on_front(subject) if "exact" not in p]
    if not subject.run.judging.exact or not left:
        return
    print(sweep_text.header(exact=True))
    with optional.bar(left, desc="front", leave=False, disable=None) as bar:
        for point in bar:
            _, slim, kept = subject.slim(Candidate(point["allocation"], point["ratio"]))
            point["exact"] = subject.top1(subject.layer_by_layer(slim, kept))
            record.update()
            bar.clear()
            print(sweep_text.line(point), flush=True)


def on_front(subject: Subject) -> list[dict[str, Any]]:
    """The points of the front of cost and repaired accuracy."""
    points = subject.record.points
    return [points[i] for i in front([_place(subject, point) for point in points])]


def choose(subject: Subject, fitted: list[Candidate]) -> dict[str, Any]:
    """The best point that keeps the budgets, if there are any, or the knee of the front."""
    run, points = subject.run, subject.record.points
    if not run.budget.given:
        accuracy = subject.record.facts["dense"]["held back"]
        return points[knee([_place(subject, p) for p in points], (1.0, accuracy))]
    names = {candidate.id for candidate in fitted}  # their latency was measured more often
    inside = [p for p in points if p["id"] in names or _keeps(run, p)]
    return max(inside, key=lambda point: _place(subject, point)[1])


def test(subject: Subject, point: dict[str, Any]) -> None:
    """Prove the chosen point on test images, and measure its test accuracy: the only time that test
    images are used to judge."""
    record, model, exact = subject.record, subject.prunable.model, subject.run.judging.exact
    known = record.facts.get("chosen")
    if known and (known["id"], known["exact"]) == (point["id"], exact):
        return
    _, slim, kept = subject.slim(Candidate(point["allocation"], point["ratio"]))
    difference = prove_equal(slim, slicing.masked(model, kept), subject.test.first(64))
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


def report(subject: Subject, point: dict[str, Any]) -> None:
    """Print what was chosen and the command that prunes there; write sweep.png and sweep.html."""
    record, folder = subject.record, subject.run.folder
    record.update(
        title=f"{subject.network}",
        cost=subject.run.points.cost,
        front=[p["id"] for p in on_front(subject)],
        why=WITHIN if subject.run.budget.given else KNEE,
    )
    print(sweep_text.chosen(record.facts, point))
    wrote = [record.path]
    wrote += sweep_plot.write(folder / "sweep.png", record.facts)
    files.write_bytes(folder / "sweep.html", sweep_page.page(record.facts).encode())
    print(f"\nwrote {', '.join(map(str, [*wrote, folder / 'sweep.html']))}")


def _about(subject: Subject) -> dict[str, Any]:
    model, size = subject.prunable.model, subject.network.image_size
    counts = profiling.count_all(model, (3, size, size))
    dense: dict[str, float] = {"parameters": counts.parameters, "FLOPs": counts.flops}
    dense["held back"] = subject.top1(model)
    model.cpu()
    return {"network": str(subject.network), "checkpoint": str(subject.path), "dense": dense}


def _point(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    """All figures of a candidate; costs are fractions of the dense network's."""
    dense, size = subject.record.facts["dense"], subject.network.image_size
    choice, slim, kept = subject.slim(candidate)
    counts = profiling.count_all(slim, (3, size, size))
    repaired = subject.one_pass.repaired(slim, kept)
    both = [repaired, subject.one_pass.dense]
    ours, theirs = profiling.latencies(both, subject.images, seconds=SECONDS)
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
            [name, int(alive.sum()), int(choice.keep[name].sum())]
            for name, alive in choice.alive.items()
        ],
        "command": command(subject, candidate),
    }


def _place(subject: Subject, point: dict[str, Any]) -> tuple[float, float]:
    """Cost and accuracy of a point."""
    return point[subject.run.points.cost], point.get("exact", point["repaired"])


def _keeps(run: SweepRun, point: dict[str, Any]) -> bool:
    costs = {f"--{name}": point[name] for name in ("flops", "params", "latency", "ms")}
    costs |= {"--mflops": point["FLOPs"] / 1e6, "--mparams": point["parameters"] / 1e6}
    return all(costs[name] <= limit for name, limit in run.budget.given.items())
