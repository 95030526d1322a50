"""The titles and formats of figures, for text and HTML."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slimming.measuring.figures import Figures
from slimming.reports import tables

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
    return tables.table(["", "before", "after", "before/after", "change"], lines)


def scores_text(scores: Mapping[str, tuple[float, float]]) -> str:
    """A table of (loss, top-1) by the name of the network."""
    rows = {row.key: row for row in ROWS}
    lines = [
        [name, rows["top-1"].text(top1), rows["loss"].text(loss)]
        for name, (loss, top1) in scores.items()
    ]
    return tables.table(["", "top-1", "loss"], lines)


def liveness_text(ratio: float | None) -> str:
    """A line on how much a slim network's outputs depend on the image: see `liveness.liveness`."""
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
