"""The table of export.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slimming.reports.tables import ratio, table


@dataclass(frozen=True)
class FileRow:
    """The figures of an exported file: the ``device`` that it ran on, ``seconds`` by batch size,
    those of the dense network in fp32 in the same engine and in PyTorch, the ratio of FLOPs
    (dense / this), and the size of the micro-batches in which the engine runs the largest batch."""

    format: str
    precision: str
    device: str
    form: str
    bytes: int
    difference: float
    top1: float | None
    seconds: Mapping[int, float]
    dense: Mapping[int, float]
    pytorch: Mapping[int, float]
    flop_ratio: float
    micro_batch: int


def as_text(rows: Sequence[FileRow], images: int) -> str:
    """A row for each file. ``images``: the number of test images that lower precisions were
    evaluated on."""
    batches = list(rows[0].seconds)
    last = batches[-1]
    header = ["file", "form", "MB", "difference", "top-1"]
    header += [f"ms, batch {batch}" for batch in batches]
    header += ["micro-batch", "vs dense", "vs dense PyTorch", "realised"]
    lines = [_line(row, last) for row in rows]
    any_judged = any(row.top1 is not None for row in rows)
    judged = f"top-1: on {images:,} test images; " if any_judged else ""
    devices = ", ".join(dict.fromkeys(f"{row.format} on {row.device}" for row in rows))
    return f"""{table(header, lines)}
{judged}measured: {devices}, and the dense network in PyTorch there
at batch {last}, `micro-batch`: number of images that run at once
`vs dense`, `vs dense PyTorch`: speed-up over the dense network, fp32, in that engine, in PyTorch
`realised`: `vs dense PyTorch` / the ratio of FLOPs, {rows[0].flop_ratio:.2f}"""


def _line(row: FileRow, batch: int) -> list[str]:
    own = row.seconds[batch]
    cells = [f"{row.format} {row.precision}", row.form, f"{row.bytes / 1e6:.3f}"]
    cells += [f"{row.difference:.1e}", "-" if row.top1 is None else f"{row.top1:.2%}"]
    cells += [f"{1e3 * seconds:.2f}" for seconds in row.seconds.values()]
    cells += [str(row.micro_batch), ratio(row.dense[batch], own), ratio(row.pytorch[batch], own)]
    return [*cells, f"{row.pytorch[batch] / own / row.flop_ratio:.2f}"]
