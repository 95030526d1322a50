"""The page an experiment leaves behind: one HTML file without scripts, links or other files."""

import base64
from html import escape
from pathlib import Path

from slimming.storage import files

NONE = "–"
FEWER, SMALLER, FASTER = ("fewer", "more"), ("smaller", "larger"), ("faster", "slower")
MEASURES = {  # of a stage: title, format, scale, words for a better and a worse ratio
    "top-1": ("top-1", "{:.2%}", 1, None),
    "loss": ("loss", "{:.4f}", 1, None),
    "parameters": ("parameters", "{:,}", 1, FEWER),
    "effective parameters": ("effective parameters", "{:,}", 1, FEWER),
    "FLOPs": ("MFLOPs an image", "{:,.1f}", 1e-6, FEWER),
    "effective FLOPs": ("effective MFLOPs an image", "{:,.1f}", 1e-6, FEWER),
    "bytes": ("file size (MB)", "{:,.2f}", 1e-6, SMALLER),
}
NOTE = (
    "FLOPs are 2 × multiply-accumulates of convolutions and linear layers. Latency is the median "
    "of a forward pass of the deployment form."
)
EFFECTIVE = (
    "Effective counts leave out weights that are exactly zero: what a program that skips them "
    "would need. The other counts are what a plain program needs."
)
PROOF = (
    "The slim network computes what the dense one computes with the pruned weights set to zero: "
    "the logits differ by {:.1e} at most (relative)."
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
    """Write the page of one experiment to ``path``. UserError if that fails.

    ``config``: every setting by its name; ``config["command"]`` is the line that repeats the run.
    ``metrics``: network, device, versions, method, ratio, stages, layers (what is counted -> rows
    of name, before, after), difference, warnings, date, base_from (the file of a base network that
    was not trained here); what is missing or None is left out. ``pictures``: caption -> PNG.
    """
    files.write_bytes(path, page(config, metrics, pictures).encode())


def page(config: dict, metrics: dict, pictures: dict[str, bytes]) -> str:
    """The report as HTML; all arguments as in `write_report`."""
    title = str(metrics.get("network", "Network"))
    if metrics.get("ratio") is not None:
        title = f"{title}, pruned by {metrics['ratio']:.0%}"
    where = [metrics.get("method"), metrics.get("date"), metrics.get("device")]
    where += [f"{name} {version}" for name, version in (metrics.get("versions") or {}).items()]
    stages = [flat(stage) for stage in metrics.get("stages") or []]
    given = metrics.get("base_from")
    command, difference = config.get("command"), metrics.get("difference")
    settings = [item for item in config.items() if item[0] != "command"]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{text(title)}</h1>",
        f'<p class="soft">{text(" · ".join(str(part) for part in where if part))}</p>',
        f'<p class="soft">The base network was given: {text(given)}</p>' if given else "",
        tiles(stages) if stages else "",
        *(f'<p class="warning">{text(warning)}</p>' for warning in metrics.get("warnings") or []),
        stages_table(stages) if stages else "",
        f'<p class="soft">{PROOF.format(difference)}</p>' if difference is not None else "",
        *(picture(caption, png) for caption, png in pictures.items()),
        *(layers_table(*told) for told in (metrics.get("layers") or {}).items()),
        f"<h2>Repeat this run</h2>\n<pre>{text(command)}</pre>" if command else "",
        "<h2>Settings</h2>\n" + table([], settings, "words") if settings else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def text(value: object) -> str:
    """Any value as text of an HTML page, inside or outside quotes."""
    return NONE if value is None else escape(str(value))


def flat(stage: dict) -> dict:
    """A stage with one entry for each batch size of its latency, and the name that is shown."""
    times = {f"latency {batch}": value for batch, value in (stage.get("latency") or {}).items()}
    return {**stage, **times, "name": "dense" if stage["name"] == "base" else stage["name"]}


def measures(stages: list[dict]) -> dict[str, tuple]:
    """The `MEASURES` that these stages call for: effective counts only where weights are zero."""
    found = dict(MEASURES)
    for key in ("parameters", "FLOPs"):
        if all(s.get(f"effective {key}") in (None, s.get(key)) for s in stages):
            del found[f"effective {key}"]
    for key in dict.fromkeys(key for s in stages for key in s if key.startswith("latency ")):
        found[key] = (f"latency, batch {key.split()[-1]} (ms)", "{:,.2f}", 1e3, FASTER)
    return found | {"seconds": ("time taken (s)", "{:,.0f}", 1, None)}


def cell(stage: dict, key: str, measure: tuple) -> str:
    """One figure of a stage as text."""
    value = stage.get(key)
    return NONE if value is None else measure[1].format(value * measure[2])


def change(stages: list[dict], key: str, measure: tuple) -> str:
    """From the first stage to the last: "3.20× fewer", a difference, or NONE where unknown."""
    old, new = stages[0].get(key), stages[-1].get(key)
    if None in (old, new) or key == "seconds" or len(stages) == 1:
        return NONE
    if key == "top-1":
        return f"{100 * (new - old):+.2f} points"
    if key == "loss" or not old or not new:
        return f"{new - old:+,.4g}"
    better, worse = measure[3]
    ratio, word = (old / new, better) if old >= new else (new / old, worse)
    return f"{ratio:,.2f}× {word}" if ratio >= 1.005 else "the same"


def tiles(stages: list[dict]) -> str:
    """The key figures: what came of top-1, and how much smaller and faster the last stage is."""
    known, made = measures(stages), []
    latency = [key for key in known if key.startswith("latency ")][-1:]
    for key in ("top-1", "parameters", "FLOPs", *latency):
        values = [cell(stage, key, known[key]) for stage in stages]
        big, lines = change(stages, key, known[key]), [f"{values[0]} → {values[-1]}"]
        if key == "top-1" or len(stages) == 1:
            big = values[-1]
            lines = [f"{s['name']} {value}" for s, value in zip(stages, values, strict=True)]
        if (effective := f"effective {key}") in known:
            lines.append(f"effective: {change(stages, effective, known[effective])}")
        below = "".join(f"<span>{text(line)}</span>" for line in lines)
        made.append(f'<div class="tile">{text(known[key][0])}<strong>{big}</strong>{below}</div>')
    return '<div class="tiles">' + "\n".join(made) + "</div>"


def stages_table(stages: list[dict]) -> str:
    """All figures of all stages, and what changed from the first to the last."""
    known, rows = measures(stages), []
    for key, measure in known.items():
        values = [cell(stage, key, measure) for stage in stages]
        rows.append([measure[0], *values, change(stages, key, measure)])
    header = ["", *(stage["name"] for stage in stages), "change"]
    note = f"{NOTE} {EFFECTIVE}" if any("effective" in key for key in known) else NOTE
    return f'<h2>Stages</h2>\n{table(header, rows)}\n<p class="soft">{note}</p>'


def layers_table(counted: str, layers: list) -> str:
    """How many filters, or whatever is ``counted``, each layer and all together had and have."""
    total = ["all", *(sum(layer[i] for layer in layers) for i in (1, 2))]
    rows = [
        [name, f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}" if before else NONE]
        for name, before, after in [*layers, total]
    ]
    header = ["layer", "before", "after", "removed"]
    return f"<h2>Layers: {text(counted)}</h2>\n{table(header, rows)}"


def table(header: list[str], rows: list[list], kind: str = "") -> str:
    """Rows of text; the first cell of each names it."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = [f"<thead><tr>{head}</tr></thead>\n" if header else "", "<tbody>"]
    for name, *cells in rows:
        rest = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{text(name)}</th>{rest}</tr>\n')
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</tbody></table></div>'


def picture(caption: str, png: bytes) -> str:
    """A picture inside the page, its caption also its alt text."""
    data, words = base64.b64encode(png).decode(), text(caption)
    source = f'<img alt="{words}" src="data:image/png;base64,{data}">'
    return f"<figure>{source}<figcaption>{words}</figcaption></figure>"
