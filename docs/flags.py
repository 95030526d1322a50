"""Generate docs/flags.md: the flags of every script, from its parser.

python docs/flags.py
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slimming.cli import flags

SCRIPTS = {  # title -> module with the parser
    "`main.py`, `mask-impl/main_mask.py`": "main",
    "`vggprune.py`, `denseprune.py`, `mask-impl/prune_mask.py`": "vggprune",
    "`resprune.py`": "resprune",
    "`run.py`": "run",
    "`flowprune.py`": "flowprune",
    "`sweep.py`": "sweep",
    "`eval.py`": "eval",
    "`export.py`": "export",
}
HEAD = """# Flags

Generated from the settings by `python docs/flags.py`; every script prints its own flags with
`--help`. A flag that contradicts the checkpoint is an error, which shows both values. An error is
one line on stderr; the exit status is 2, or 1 if the loss is not finite, or 130 after
Ctrl-C, SIGTERM or SIGHUP. With `SLIMMING_DEBUG=1` in the environment its traceback comes first.
"""


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, module in SCRIPTS.items():
        parser = importlib.import_module(module).make_parser()
        parts.append(f"## {title}\n\n| flag | meaning |\n|---|---|\n{rows(parser)}\n")
    return "\n".join(parts)


def rows(parser: "flags.Parser") -> str:
    """A row of the table for each flag."""
    lines = []
    for action in parser.declared:
        if action.dest == "help":
            continue
        names = [name for name in action.option_strings if not name.startswith("--no-s")]
        choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
        value = f" {action.metavar or choices}" if action.nargs != 0 else ""
        flags = ", ".join(f"`{name}{value}`" for name in names) or f"`{action.metavar}`"
        meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
        lines.append(f"| {flags} | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "flags.md").write_text(text(), encoding="utf-8")
