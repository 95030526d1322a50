"""Text tables: figures before and after, channels of layers, the sparsity of γ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from slimming.choosing.threshold import NEAR_ZERO, Choice, alive_factors, near_zero
from slimming.measuring.figures import Figures

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def sparsity_text(model: nn.Module) -> str:
    """The sparsity of γ, which tells how much can be pruned without harm."""
    factors = alive_factors(model)
    if not len(factors):
        return "scaling factors: none"
    values = factors.quantile(torch.tensor(QUANTILES)).tolist()
    return (
        f"scaling factors: {near_zero(model):.1%} of {len(factors)} channels have |γ| < "
        f"{NEAR_ZERO}\n"
        + table(
            ["quantile", *(f"{q:.0%}" for q in QUANTILES)],
            [["|γ|", *(f"{value:.2g}" for value in values)]],
        )
    )


def layers_text(choice: Choice) -> str:
    """The channels of each layer before and after pruning."""
    rows = []
    for name, alive in choice.alive.items():
        before, after = int(alive.sum()), int(choice.kept[name].sum())
        rows.append(_layer_row(name, before, after))
    rows.append(_layer_row("all", *choice.channels))
    return table(["BN layer", "before", "after", "pruned"], rows)


def _layer_row(name: str, before: int, after: int) -> list[str]:
    pruned = max(0, 1 - after / before) if before else 0
    return [name, str(before), str(after), f"{pruned:.1%}"]


def least_warnings(choice: Choice) -> list[str]:
    """A warning if layers keep only what they must."""
    if not choice.rescued:
        return []
    names = ", ".join(choice.rescued)
    return [f"these layers would lose more channels, but keep the least allowed: {names}"]


def rounding_warnings(choice: Choice) -> list[str]:
    """A warning if rounding undoes most of the pruning."""
    before, after = choice.channels
    if not choice.ratio or choice.spared <= before - after:
        return []
    would = choice.spared + before - after
    return [
        f"`round_to` keeps {choice.spared} of the {would} channels that would have been pruned: "
        "use a smaller multiple, or prune a larger fraction, to remove more"
    ]


FEWER, SMALLER, FASTER = ("fewer", "more"), ("smaller", "larger"), ("faster", "slower")


@dataclass(frozen=True)
class Row:
    """How one figure is shown: its value times ``scale``, in the format ``form``.

    ``key``: its name in metrics.json. ``words``: adjectives for a smaller and a larger value, None
    if ratios are meaningless. ``page_form``: the format on an HTML page, which has more space.
    ``part_of``: the key of the count that includes this one.
    """

    key: str
    title: str
    form: str
    scale: float = 1
    words: tuple[str, str] | None = None
    page_form: str | None = None
    part_of: str | None = None

    def text(self, value: float) -> str:
        return self.form.format(value * self.scale)

    def page_text(self, value: float) -> str:
        return (self.page_form or self.form).format(value * self.scale)

    def difference(self, old: float, new: float) -> str:
        """The signed difference; of percentages, in points."""
        if self.form.endswith("%}"):
            return f"{100 * (new - old):+.2f} points"
        return self.form.replace("{:", "{:+").format((new - old) * self.scale)


ROWS = (
    Row("top-1", "top-1", "{:.2%}"),
    Row("loss", "loss", "{:.4f}"),
    Row("parameters", "parameters", "{:,}", 1, FEWER),
    Row("effective parameters", "effective parameters", "{:,}", 1, FEWER, part_of="parameters"),
    Row("FLOPs", "MFLOPs an image", "{:,.1f}", 1e-6, FEWER),
    Row("effective FLOPs", "effective MFLOPs an image", "{:,.1f}", 1e-6, FEWER, part_of="FLOPs"),
    Row("bytes", "file size (MB)", "{:.2f}", 1e-6, SMALLER, "{:,.2f}"),
)
SECONDS = Row("seconds", "time taken (s)", "{:,.0f}")  # of a stage of run.py


def flat(record: Mapping) -> dict:
    """A record of `Figures` with one entry for the latency at each batch size."""
    latency = {f"latency {n}": value for n, value in (record.get("latency") or {}).items()}
    return {**record, **latency}


def rows_of(records: Iterable[Mapping]) -> dict[str, Row]:
    """The rows of flat records by key: ROWS, then one for the latency at each batch size; effective
    counts only if some weights are zero."""
    records = list(records)
    keys = dict.fromkeys(key for record in records for key in record)

    def differs(row: Row) -> bool:
        return any(r.get(row.key) not in (None, r.get(row.part_of)) for r in records)

    latency = [_latency_row(key) for key in keys if key.startswith("latency ")]
    rows = [row for row in ROWS if not row.part_of or differs(row)]
    return {row.key: row for row in (*rows, *latency)}


def _latency_row(key: str) -> Row:
    title = f"latency, batch {key.removeprefix('latency ')} (ms)"
    return Row(key, title, "{:.1f}", 1e3, FASTER, "{:,.2f}")


def before_after_text(before: Figures, after: Figures) -> str:
    """A table that compares both networks: before, after, ratio and difference."""
    old, new = flat(before.record()), flat(after.record())
    lines = []
    for key, row in rows_of([old, new]).items():
        if key in old:
            cells = [form(old[key], new[key]) for form in (ratio, row.difference)]
            lines.append([row.title, row.text(old[key]), row.text(new[key]), *cells])
    return table(["", "before", "after", "before/after", "change"], lines)


def scores_text(scores: Mapping[str, tuple[float, float]]) -> str:
    """A table of (loss, top-1) by the name of the network."""
    rows = {row.key: row for row in ROWS}
    lines = [
        [name, rows["top-1"].text(top1), rows["loss"].text(loss)]
        for name, (loss, top1) in scores.items()
    ]
    return table(["", "top-1", "loss"], lines)


def liveness_text(ratio: float | None) -> str:
    """A line on how much a slim network's outputs depend on the image: see `proof.liveness`."""
    if ratio is None:
        return "liveness: unknown without two images that the dense network tells apart"
    return (
        f"liveness: the outputs vary from image to image {ratio:.3g} times as much as those of the "
        "dense network"
    )


def ratio(first: float, second: float) -> str:
    """``first`` / ``second`` as text: 3.20x; "-" if ``second`` is 0."""
    return f"{first / second:.2f}x" if second else "-"


def size_text(figures: Figures) -> str:
    """Parameters and FLOPs, in one phrase."""
    return f"{figures.parameters:,} parameters, {figures.flops / 1e6:.1f} MFLOPs"


def stage_text(name: str, figures: Figures) -> str:
    """One line with the accuracy, size and FLOPs of the network ``name``."""
    text = f"{name}: top-1 {figures.top1:.2%}, loss {figures.loss:.4f}, "
    text += f"{size_text(figures)} an image"
    if figures.effective_parameters == figures.parameters:
        return text
    zeros = f"{figures.effective_parameters:,}, {figures.effective_flops / 1e6:.1f}"
    return f"{text} (not counting zeros: {zeros})"
