"""The HTML of an experiment: one file without scripts, links or other files."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from slimming.reports.tables import SECONDS, Row, flat, liveness_text, rows_of
from slimming.storage import files

NONE = "–"
NOTE = (
    "FLOPs are 2 × multiply-accumulates of convolutions and linear layers. Latency is the median "
    "of a forward pass of the deployment form."
)
EFFECTIVE = (
    "Effective counts exclude weights that are exactly zero: they are the cost for a program that "
    "skips zeros. The other counts are the cost for a program that does not."
)
PROOF = (
    "The slim network computes the same as the dense network with the pruned weights set to zero: "
    "the logits differ by at most {:.1e} (relative)."
)
STYLE = """
:root { color-scheme: light dark; --page: #f5f7fa; --card: #fff; --text: #1c2733; --soft: #5b6875;
--line: #dde3ea; --accent: #1f5a96; --warn: #fff4dc; } @media screen and (prefers-color-scheme:
dark) { :root { --page: #12171d; --card: #1b222b; --text: #e3e9ef; --soft: #98a6b5; --line:
#303b47; --accent: #79b4f0; --warn: #362c16; } img { filter: invert(.88) hue-rotate(180deg); } } *
{ box-sizing: border-box; overflow-wrap: anywhere; } body { margin: 0 auto; padding: 2rem 1rem;
max-width: 62rem; background: var(--page); color: var(--text); font: 16px/1.5 system-ui,
-apple-system, "Segoe UI", Roboto, sans-serif; } h1 { margin: 0; font-size: 1.7rem; line-height:
1.25; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; break-after: avoid; } p, .scroll { margin:
.6rem 0; } .soft, figcaption, .tile span { color: var(--soft); font-size: .88rem; } .tiles {
display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin:
1.5rem 0; } .tile, .scroll, pre { background: var(--card); border: 1px solid var(--line);
border-radius: 9px; } .tile, pre { padding: .8rem 1rem; break-inside: avoid; font-size: .92rem; }
.tile * { display: block; } .tile strong { color: var(--accent); font-size: 1.5rem; line-height:
1.4; } .warning { padding: .5rem .9rem; background: var(--warn); border-left: 4px solid #d99a1c; }
.scroll, figure { overflow-x: auto; } table { width: 100%; border-collapse: collapse; font-size:
.92rem; } th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap;
font-variant-numeric: tabular-nums; } tbody > tr > * { border-top: 1px solid var(--line);
font-weight: 400; } th:first-child { position: sticky; left: 0; text-align: left; background:
var(--card); } .words td { width: 99%; text-align: left; white-space: normal; } figure { margin:
1rem 0 1.5rem; break-inside: avoid; } img { display: block; width: 100%; min-width: 34rem;
border-radius: 9px; } pre { white-space: pre-wrap; } @media (max-width: 40rem) { th, td { padding:
.35rem .5rem; font-size: .82rem; } .tile strong { font-size: 1.2rem; } tbody th { white-space:
normal; min-width: 6rem; } } @media print { body { padding: 0; background: none; } img { min-width:
0; } }
"""


def write_report(path: str | Path, config: dict, metrics: dict, pictures: dict[str, bytes]) -> None:
    """Write the report of an experiment to ``path``. UserError if that fails.

    ``config``: every setting by name; ``config["command"]`` is the command that repeats the run.
    ``metrics``: network, device, versions, method, ratio, stages, layers (what is counted -> rows
    of name, before, after), difference, warnings, date, base_from (the file of a base network that
    was not trained here); missing entries and None are skipped. ``pictures``: caption -> PNG.
    """
    files.write_bytes(path, page(config, metrics, pictures).encode())


def page(config: dict, metrics: dict, pictures: dict[str, bytes]) -> str:
    """The report as HTML; all arguments as in `write_report`."""
    title = str(metrics.get("network", "Network"))
    if metrics.get("ratio") is not None:
        title = f"{title}, pruned by {metrics['ratio']:.0%}"
    where = [metrics.get("method"), metrics.get("date"), metrics.get("device")]
    where += [f"{name} {version}" for name, version in (metrics.get("versions") or {}).items()]
    stages = [entries(stage) for stage in metrics.get("stages") or []]
    given = metrics.get("base_from")
    command, difference = config.get("command"), metrics.get("difference")
    settings = [item for item in config.items() if item[0] != "command"]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{text(title)}</h1>",
        f'<p class="soft">{text(" · ".join(str(part) for part in where if part))}</p>',
        f'<p class="soft">The base network was loaded from {text(given)}</p>' if given else "",
        tiles(stages) if stages else "",
        *(f'<p class="warning">{text(warning)}</p>' for warning in metrics.get("warnings") or []),
        stages_table(stages) if stages else "",
        f'<p class="soft">{PROOF.format(difference)}</p>' if difference is not None else "",
        f'<p class="soft">{text(liveness_text(metrics["liveness"]))}</p>'
        if "liveness" in metrics
        else "",
        *(picture(caption, png) for caption, png in pictures.items()),
        *(layers_table(*layers) for layers in (metrics.get("layers") or {}).items()),
        f"<h2>Repeat this run</h2>\n<pre>{text(command)}</pre>" if command else "",
        "<h2>Settings</h2>\n" + table([], settings, "words") if settings else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def text(value: object) -> str:
    """Any value as HTML text, escaped for use inside and outside of quotes."""
    return NONE if value is None else escape(str(value))


def entries(stage: dict) -> dict:
    """The figures of a stage, with one entry for the latency at each batch size, and its title."""
    return {**flat(stage), "name": "dense" if stage["name"] == "base" else stage["name"]}


def shown_rows(stages: list[dict]) -> dict[str, Row]:
    """The rows for these stages by key, and their time."""
    return {**rows_of(stages), SECONDS.key: SECONDS}


def cell(stage: dict, row: Row) -> str:
    """One figure of a stage as text."""
    value = stage.get(row.key)
    return NONE if value is None else row.page_text(value)


def change(stages: list[dict], row: Row) -> str:
    """The change from the first stage to the last: "3.20× fewer", a difference, or NONE."""
    old, new = stages[0].get(row.key), stages[-1].get(row.key)
    if old is None or new is None or row == SECONDS or len(stages) == 1:
        return NONE
    if row.key == "top-1":
        return row.difference(old, new)
    if not row.words or not old or not new:
        return f"{new - old:+,.4g}"
    better, worse = row.words
    ratio, word = (old / new, better) if old >= new else (new / old, worse)
    return f"{ratio:,.2f}× {word}" if ratio >= 1.005 else "the same"


def tiles(stages: list[dict]) -> str:
    """The key figures: top-1, and how much smaller and faster the last stage is."""
    rows, made = shown_rows(stages), []
    latency = [key for key in rows if key.startswith("latency ")][-1:]
    for key in ("top-1", "parameters", "FLOPs", *latency):
        values = [cell(stage, rows[key]) for stage in stages]
        big, lines = change(stages, rows[key]), [f"{values[0]} → {values[-1]}"]
        if key == "top-1" or len(stages) == 1:
            big = values[-1]
            lines = [f"{s['name']} {value}" for s, value in zip(stages, values, strict=True)]
        if (effective := f"effective {key}") in rows:
            lines.append(f"effective: {change(stages, rows[effective])}")
        below = "".join(f"<span>{text(line)}</span>" for line in lines)
        made.append(f'<div class="tile">{text(rows[key].title)}<strong>{big}</strong>{below}</div>')
    return '<div class="tiles">' + "\n".join(made) + "</div>"


def stages_table(stages: list[dict]) -> str:
    """All figures of all stages, and the change from the first to the last."""
    rows = shown_rows(stages)
    cells = [
        [row.title, *(cell(stage, row) for stage in stages), change(stages, row)]
        for row in rows.values()
    ]
    header = ["", *(stage["name"] for stage in stages), "change"]
    note = f"{NOTE} {EFFECTIVE}" if any(row.part_of for row in rows.values()) else NOTE
    return f'<h2>Stages</h2>\n{table(header, cells)}\n<p class="soft">{note}</p>'


def layers_table(counted: str, layers: list) -> str:
    """The number of filters (or of what is ``counted``) before and after, per layer and total."""
    sums = ["all", *(sum(layer[i] for layer in layers) for i in (1, 2))]
    rows = [
        [name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else NONE]
        for name, before, after in [*layers, sums]
    ]
    header = ["layer", "before", "after", "removed"]
    return f"<h2>Layers: {text(counted)}</h2>\n{table(header, rows)}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """An HTML table; the first cell of each row is its title."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = [f"<thead><tr>{head}</tr></thead>\n" if header else "", "<tbody>"]
    for name, *cells in rows:
        rest = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{text(name)}</th>{rest}</tr>\n')
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</tbody></table></div>'


def picture(caption: str, png: bytes) -> str:
    """An embedded picture; its caption is also its alt text."""
    data, words = base64.b64encode(png).decode(), text(caption)
    source = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{source}<figcaption>{words}</figcaption></figure>"
