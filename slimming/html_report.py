"""The page that an experiment leaves behind: one HTML file without scripts, links or other files."""

import base64
from html import escape
from pathlib import Path

import torch
from torch import nn

from slimming import files
from slimming.reporting import blank_figure, to_png

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
    "of a forward pass, with batch normalisation folded into the convolutions where possible."
)
EFFECTIVE = (
    "Effective counts leave out weights that are exactly zero: what a program that skips them "
    "would need. The other counts are what a plain program needs."
)
STYLE = """
:root { color-scheme: light dark; --page: #f5f7fa; --card: #fff; --text: #1c2733; --soft: #5b6875;
  --line: #dde3ea; --accent: #1f5a96; --warn: #fff4dc; --warn-line: #d99a1c; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12171d; --card: #1b222b;
  --text: #e3e9ef; --soft: #98a6b5; --line: #303b47; --accent: #79b4f0; --warn: #362c16; }
  img { filter: invert(.88) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.tile, .scroll, pre { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.tile { padding: .9rem 1rem; break-inside: avoid; }
.tile strong { display: block; color: var(--accent); font-size: 1.6rem; line-height: 1.35; }
.tile span { display: block; color: var(--soft); font-size: .85rem; }
.warning { padding: .5rem .9rem; background: var(--warn);
  border-left: .25rem solid var(--warn-line); border-radius: .3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { width: 100%; border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap; }
tr + tr > *, thead + tbody tr > * { border-top: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
th:first-child { text-align: left; }
.words th { vertical-align: top; color: var(--soft); }
.words td { width: 99%; text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.5rem; overflow-x: auto; break-inside: avoid; }
img { display: block; width: 100%; min-width: 34rem; border-radius: .6rem; }
pre { padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .88rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media print { body { padding: 0; font-size: 11pt; background: none; } img { min-width: 0; }
  .scroll { overflow: visible; } tr, h2 { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write_report(path: str | Path, config: dict, metrics: dict, pictures: dict[str, bytes]) -> None:
    """Write the page of one experiment to ``path``. UserError if that fails.

    ``config``: every setting by its name; ``config["command"]`` is the line that repeats the run.
    ``metrics``: network, device, versions, method, ratio, stages, layers, difference, warnings;
    what is missing or None is left out. ``pictures``: caption -> PNG.
    """
    files.write_bytes(path, page(config, metrics, pictures).encode())


def page(config: dict, metrics: dict, pictures: dict[str, bytes]) -> str:
    """The report as HTML; all arguments as in `write_report`."""
    title = f"{metrics.get('network', 'Network')}, pruned"
    if metrics.get("ratio") is not None:
        title = f"{title} by {metrics['ratio']:.0%}"
    where = [metrics.get("method"), metrics.get("device")]
    where += [f"{name} {version}" for name, version in (metrics.get("versions") or {}).items()]
    stages = [flat(stage) for stage in metrics.get("stages") or []]
    command = config.get("command")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{text(title)}</h1>",
        f'<p class="soft">{text(" · ".join(str(part) for part in where if part))}</p>',
        tiles(stages),
        *(f'<p class="warning">{text(warning)}</p>' for warning in metrics.get("warnings") or []),
        stages_table(stages),
        proof(metrics.get("difference")),
        *(picture(caption, png) for caption, png in pictures.items()),
        layers_table(metrics.get("layers") or []),
        f"<h2>Repeat this run</h2>\n<pre>{text(command)}</pre>" if command else "",
        settings({name: value for name, value in config.items() if name != "command"}),
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
    """The `MEASURES` that tell something about these stages, and each batch size's latency."""
    shown = {
        key: measure
        for key, measure in MEASURES.items()
        if not key.startswith("effective ") or any(is_masked(s, key) for s in stages)
    }
    for key in dict.fromkeys(key for s in stages for key in s if key.startswith("latency ")):
        shown[key] = (f"latency, batch {key.split()[-1]} (ms)", "{:,.2f}", 1e3, FASTER)
    return shown


def is_masked(stage: dict, effective: str) -> bool:
    """Whether an effective count is known and differs from the one of all weights."""
    return stage.get(effective) not in (None, stage.get(effective.removeprefix("effective ")))


def shown(stage: dict, key: str, form: str, scale: float) -> str:
    """One figure of a stage as text."""
    value = stage.get(key)
    return NONE if value is None else form.format(value if scale == 1 else value * scale)


def change(stages: list[dict], key: str, words: tuple[str, str] | None) -> str:
    """From the first stage to the last: "3.20× fewer", a difference, or NONE where unknown."""
    old, new = stages[0].get(key), stages[-1].get(key)
    if old is None or new is None:
        return NONE
    if words is None:
        return f"{100 * (new - old):+.2f} points" if key == "top-1" else f"{new - old:+.4f}"
    if not old or not new:
        return NONE
    ratio, word = (old / new, words[0]) if old >= new else (new / old, words[1])
    return f"{ratio:,.2f}× {word}" if ratio >= 1.005 else "the same"
