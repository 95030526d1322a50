"""The output of eval.py, as JSON or as text and tables."""

import itertools
import json

from slimming.reports.tables import ratio, table

LINES = {  # the text of each part of the answer
    "network": "{network}: {checkpoint}, {file_bytes:,} bytes",
    "epoch": "recorded in the file: epoch {epoch}, best top-1 {best}; evaluated on {device}",
    "test": "test: top-1 {test[prec1]:.2%}, loss {test[loss]:.4f}",
    "train": "train: top-1 {train[prec1]:.2%}, loss {train[loss]:.4f}",
    "FLOPs": "{FLOPs:,} FLOPs an image, {effective_FLOPs:,} without zero weights",
    "compression": "compression: parameters {compression[parameters]:.2f}x, FLOPs "
    "{compression[FLOPs]:.2f}x, bytes {compression[bytes]:.2f}x",
}
IN_TABLE = ("FLOPs", "compression")  # shown in the table that compares both networks


def as_json(answer: dict) -> str:
    """A JSON object, with null for NaN and infinity, which JSON does not support."""
    return json.dumps(json.loads(json.dumps(answer), parse_constant=lambda _: None))


def as_text(answer: dict) -> str:
    """A line for each part of the answer; for a full answer, tables that compare both networks."""
    whole, best = "dense" in answer, answer.get("best_prec1")
    known = {**answer, "best": "unknown" if best is None else f"{best:.2%}"}
    names = [name for name in LINES if name in answer and not (whole and name in IN_TABLE)]
    lines = [LINES[name].format(**known) for name in names]
    if whole:
        lines += ["", layers_table(answer["layers"]), "", sizes_table(answer)]
    return "\n".join(lines)


def layers_table(layers: dict[str, list[int]]) -> str:
    """The channels of each layer; adjacent layers of equal width share a row."""
    rows = []
    for counts, group in itertools.groupby(layers.items(), key=lambda item: item[1]):
        names = [name for name, _ in group]
        rows.append([" ... ".join(dict.fromkeys((names[0], names[-1]))), *map(str, counts)])
    return table(["layers", "channels", "dense"], rows)


def sizes_table(answer: dict) -> str:
    """Sizes and latencies of the network and the dense one, by the keys of `Figures.answer`."""
    rows = []
    for name, dense in answer["dense"].items():
        cells = [f"{round(value, 3):,}" for value in (answer[name], dense)]
        rows.append([name, *cells, ratio(dense, answer[name])])
    return table(["", "this", "dense", "dense / this"], rows)
