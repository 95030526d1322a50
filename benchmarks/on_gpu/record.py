"""The results of all steps on one GPU, as JSON and as Markdown."""

import json
from pathlib import Path
from typing import Any

from benchmarks import measure
from slimming.storage import files


class Record:
    """The results in ``folder``: gpu.json, and gpu.md (``text``) to read."""

    def __init__(self, folder: Path, about: dict[str, str]):
        self.file, self.text = folder / "gpu.json", folder / "gpu.md"
        folder.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.steps = json.loads(self.file.read_text(encoding="utf-8"))["steps"]
        self.about = {key: fact for key, fact in about.items() if key != "command"}

    def is_done(self, step: str) -> bool:
        return self.steps.get(step, {}).get("state") == "done"

    def has_failed(self, step: str) -> bool:
        return self.steps.get(step, {}).get("state") == "failed"

    def add(self, step: str, result: dict[str, Any]) -> None:
        """Add the result of a step, instead of an earlier one, and write both files."""
        self.steps[step] = result
        contents = {"about": self.about, "steps": self.steps}
        files.write_bytes(self.file, json.dumps(contents, indent=1).encode())
        files.write_bytes(self.text, self.markdown().encode())

    def markdown(self) -> str:
        """All results as a page."""
        facts = [f"- {key}: {value}" for key, value in self.about.items()]
        header = ["step", "state", "seconds", "date", "summary"]
        rows = [{"step": name, **result} for name, result in self.steps.items()]
        lines = [f"# {self.about['device']}", "", *facts, "", *measure.markdown(header, rows)]
        for name, result in self.steps.items():
            for title, table in result["tables"].items():
                lines += ["", f"## {name}: {title}", "", *_facts_of(table["about"], self.about)]
                rows = table["rows"]
                lines += measure.markdown(list(rows[0]), rows) if rows else ["no rows"]
            if "error" in result:
                lines += ["", f"## {name}: {result['state']}", "", "```", *result["error"], "```"]
        return "\n".join(lines) + "\n"


def _facts_of(table: dict[str, str], known: dict[str, str]) -> list[str]:
    """What a table says of itself that is not known already."""
    facts = [f"- {key}: {value}" for key, value in table.items() if known.get(key) != value]
    return [*facts, ""]
