"""sweep.json: the points of a sweep, saved one by one, so that an interrupted sweep continues."""

import hashlib
import json
from pathlib import Path
from typing import Any

from slimming.errors import UserError
from slimming.storage import files

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


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
