"""The page of an experiment: whole, self-contained, and it says every figure."""

import copy
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from slimming.commands.experiment import page
from slimming.reports import plots

OPEN_ENDED = {"meta", "img"}
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a reader sees, and what a browser would load; fails where tags do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.words, self.loads, self.tags, self.alts = [], [], [], set(), []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        self.alts += [value for name, value in attributes if name == "alt"]
        if tag not in OPEN_ENDED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def seen(self):
        return " ".join(self.words)


def stage(name, prec1, parameters, **more):
    flops = 40 * parameters
    return {
        "name": name,
        "top-1": prec1,
        "loss": 0.25,
        "parameters": parameters,
        "effective parameters": parameters,
        "FLOPs": flops,
        "effective FLOPs": flops,
        "bytes": 4 * parameters,
        "latency": {"1": parameters / 5e9, "64": parameters / 1e9},
        "seconds": 75.0,
        **more,
    }


@pytest.fixture
def metrics():
    return {
        "network": "VGG-19, CIFAR-10",
        "device": "NVIDIA H100",
        "versions": {"torch": "2.15.0"},
        "method": "taylor",
        "ratio": 0.7,
        "stages": [
            stage("base", 0.9381, 20_000_000),
            stage("pruned", 0.1, 2_500_000),
            stage("fine-tuned", 0.9352, 2_500_000),
        ],
        "layers": {"filters": [["features.0", 64, 48], ["features.3", 1064, 13]]},
        "difference": 3.4e-7,
        "warnings": ["the ratio is high"],
    }


CONFIG = {"command": "python run.py --ratio 0.7", "lr": 0.05, "milestones": [80, 120], "seed": None}


def test_the_page_says_every_figure_and_loads_nothing(tmp_path, metrics):
    path = tmp_path / "new" / "report.html"
    page.write_report(path, CONFIG, metrics, {"Loss and top-1": PNG})
    source = path.read_text(encoding="utf-8")
    seen = Page(source)
    for words in (
        "VGG-19, CIFAR-10, pruned by 70%|taylor · NVIDIA H100 · torch 2.15.0|the ratio is high"
        "|dense 93.81% pruned 10.00% fine-tuned 93.52%|-0.29 points|0.2500|+0"
        "|20,000,000|2,500,000|8.00× fewer|800.0|100.0|80.00|10.00|8.00× smaller"
        "|latency, batch 1 (ms)|4.00|0.50|latency, batch 64 (ms)|20.00|2.50|8.00× faster|75"
        "|features.0|64|48|25.0%|1,064|13|98.8%|1,128|61|94.6%|3.4e-07"
        "|python run.py --ratio 0.7|lr|0.05|[80, 120]|seed"
    ).split("|"):
        assert words in seen.seen, words
    assert "effective" not in seen.seen.lower()
    assert all(address.startswith("data:image/png;base64,") for address in seen.loads)
    assert seen.alts == ["Loss and top-1"]
    assert not seen.tags & {"script", "link", "a", "iframe"}
    assert "http:" not in source and "https:" not in source and "url(" not in source


def test_text_from_outside_never_becomes_html(metrics):
    evil = '<b>"x"</b>'
    metrics |= {"network": evil, "device": evil, "method": evil, "versions": {evil: evil}}
    metrics |= {"warnings": [evil], "layers": {evil: [[evil, 2, 1]]}}
    metrics["stages"][1]["name"] = evil
    metrics["stages"][1]["latency"] = {evil: 1.0}
    source = page.page({"command": evil, evil: evil}, metrics, {evil: PNG})
    assert "<b>" not in source
    assert Page(source).seen.count("<b>") >= 10


def test_effective_counts_are_shown_and_explained_where_weights_are_zero(metrics):
    metrics["stages"][-1] |= {"effective parameters": 1_000_000, "effective FLOPs": 50_000_000}
    seen = Page(page.page(CONFIG, metrics, {})).seen
    assert page.EFFECTIVE in seen
    for words in "effective: 20.00× fewer|effective: 16.00× fewer|1,000,000|50.0".split("|"):
        assert words in seen


def test_a_larger_and_slower_network_is_called_so(metrics):
    metrics["stages"] = [stage("base", 0.9, 1_000_000), stage("fine-tuned", 0.9, 2_000_000)]
    seen = Page(page.page(CONFIG, metrics, {})).seen
    assert "2.00× more" in seen and "2.00× larger" in seen and "2.00× slower" in seen
    metrics["stages"][1] = metrics["stages"][0]
    assert "the same" in Page(page.page(CONFIG, metrics, {})).seen


def test_missing_pieces_leave_a_whole_page(metrics):
    unknown = {"top-1": None, "loss": None, "latency": {}, "seconds": None}
    for stages in (
        [],
        [stage("base", None, 1000)],
        [{"name": "base"}, stage("pruned", 0.5, 1000)],
        [stage("base", 0.5, 1000), stage("pruned", float("nan"), 1000) | unknown],
        [stage("base", 0.5, 1000), stage("pruned", 0.1, 0)],
    ):
        metrics |= {"stages": stages, "layers": {}, "difference": None, "warnings": []}
        seen = Page(page.page({}, metrics, {})).seen
        assert "None" not in seen and "Layers" not in seen and "Settings" not in seen
    Page(page.page({}, {}, {}))
    Page(page.page({}, dict.fromkeys(metrics), {}))


@pytest.mark.slow
def test_weights_and_layers_are_drawn():
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    after = copy.deepcopy(before)
    prune.l1_unstructured(after[0], "weight", 0.5)
    weights = plots.conv_weights(after)
    assert len(weights) == 216 + 288 and int((weights == 0).sum()) == 108
    after[2].weight.data.fill_(float("nan"))
    for model in (after, nn.Linear(2, 2)):
        assert plots.draw_weights(before, model).startswith(PNG)
    assert plots.draw_weights(nn.Linear(2, 2), nn.Linear(2, 2)).startswith(PNG)
    assert torch.equal(plots.conv_weights(nn.Linear(2, 2)), torch.zeros(0))
    for count in (0, 3, 60):
        rows = [(f"features.{i}", 64, 64 - i) for i in range(count)]
        assert plots.draw_layers(rows, "filters").startswith(PNG)
