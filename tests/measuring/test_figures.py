"""One network has one set of figures, whichever command tells them."""

import importlib
import json
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import NARROW, make_images, save_network
from torch import nn

import flowprune
import main
import resprune
import run
from slimming.commands.evaluate.report import as_text
from slimming.commands.experiment import page
from slimming.measuring import figures as measuring_figures
from slimming.measuring.figures import Figures, latency_by_batch, measure
from slimming.reports import plots
from slimming.reports.tables import before_after_text, ratio, size_text, stage_text
from slimming.storage import checkpoint

judge = importlib.import_module("eval")  # the name of a builtin
BEFORE = Figures(1_000_000, 1_000_000, 20_000_000, 20_000_000, 4_000_000, {64: 0.02}, 0.9, 0.25)
AFTER = Figures(250_000, 200_000, 5_000_000, 4_000_000, 1_000_000, {64: 0.01}, 0.85, 0.5)


def with_zeros(channels=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model[0].weight.data[:2] = 0
    return model


def test_the_figures_are_those_of_plain_counts(quick):
    models = [with_zeros(), nn.Conv2d(3, 4, 3)]
    scores = [(0.5, 0.75), (1.5, 0.25)]
    images = torch.zeros(3, 3, 16, 16)
    for i, figures in enumerate(measure(models, images, (1, 3), scores)):
        assert figures.parameters == measuring_figures.count_parameters(models[i])
        assert figures.flops == measuring_figures.count_flops(models[i], 16)
        effective = figures.effective_parameters, figures.effective_flops
        assert effective == measuring_figures.count_effective(models[i], 16)
        assert figures.bytes == measuring_figures.count_bytes(models[i])
        assert figures.latency == {1: (1 + i) / 1e3, 3: (3 + i) / 1e3}
        assert (figures.loss, figures.top1) == scores[i]
    (sparse,) = measure(models[:1], images)
    assert sparse.effective_parameters == sparse.parameters - 2 * 27
    assert sparse.effective_flops == sparse.flops - 2 * 2 * 27 * 14 * 14
    assert (sparse.top1, sparse.loss, sparse.latency) == (None, None, {})


@pytest.mark.parametrize("first, count", [(0, 3), (140, 3), (159, 1)])
def test_every_epoch_is_in_the_picture_of_the_curves(first, count, monkeypatch):
    """Also of a run that was resumed without the history of its first epochs."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "to_png", lambda figure, title: figure)
    names = ("train_loss", "train_prec1", "test_loss", "test_prec1")
    history = [{"epoch": first + i, **dict.fromkeys(names, 0.5)} for i in range(count)]
    for axes in plots.draw_curves(history, "").axes:
        left, right = axes.get_xlim()
        for line in axes.lines:
            assert left < min(line.get_xdata()) <= max(line.get_xdata()) < right
            assert list(line.get_xdata()) == [first + 1 + i for i in range(count)]


def test_images_need_not_be_three_channels():
    (figures,) = measure([with_zeros(channels=1)], torch.zeros(1, 1, 16, 16))
    assert figures.flops == 2 * 14 * 14 * (8 * 9 + 4 * 8)


class Slow(nn.Module):
    def __init__(self, milliseconds):
        super().__init__()
        self.seconds = milliseconds / 1e3

    def forward(self, x):
        time.sleep(self.seconds * len(x))
        return x


def test_latency_is_the_time_of_a_forward_pass():
    images, models = torch.zeros(2, 3, 8, 8), [Slow(2), Slow(6)]
    one, two = (measuring_figures.latencies(models, images[:n], seconds=0.1) for n in (1, 2))
    assert 0.002 <= one[0] < one[1] >= 0.006
    assert 0.004 <= two[0] < two[1] >= 0.012


@pytest.mark.slow
def test_a_script_measures_latency_as_long_as_it_says(tmp_path, monkeypatch, capsys):
    """Tests measure it briefly, if at all; this one as a user does."""
    path = save_network(tmp_path / "net.pth", "vgg", 11, "folder", 2, NARROW["vgg"])
    images = make_images(tmp_path / "images", train=2, test=32)
    words = ["eval.py", path, "--data", images, "--json", "--no-cuda", "--threads", 1]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    judge.main()
    found = json.loads(capsys.readouterr().out)
    assert 0.01 < found["latency_1_ms"] < found["latency_64_ms"] < 10_000


class Shared(nn.Module):
    """A layer with two names that runs twice, and a product outside of layers."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.again(self.first(x)).mean((2, 3)) @ torch.ones(3, 2)


def test_zeros_of_a_layer_with_two_names_count_for_each_call():
    model = Shared()
    model.first.weight.data[0] = 0
    assert measuring_figures.count_flops(model, 4) == 2 * (2 * 16 * 9 + 3 * 2)
    assert measuring_figures.count_effective(model, 4)[1] == 2 * (2 * 16 * 6 + 3 * 2)
    assert measuring_figures.flops_of_layers(model, 4) == {"first": 2 * 2 * 16 * 9}


def test_a_flop_counter_that_misses_layers_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring_figures.FlopCounterMode, "get_total_flops", lambda self: 0)
    with pytest.raises(RuntimeError, match="counts no FLOPs of the layer 0"):
        measuring_figures.count_effective(with_zeros(), 8)


def test_a_network_runs_once_to_be_counted():
    model, passes = with_zeros(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    measure([model], torch.zeros(1, 3, 16, 16))
    assert len(passes) == 1


def test_a_batch_that_the_images_do_not_fill_is_an_error():
    with pytest.raises(ValueError, match="a batch of 64 needs more than 2 images"):
        latency_by_batch([with_zeros()], torch.zeros(2, 3, 16, 16))


def test_what_was_not_measured_is_not_recorded():
    untested = Figures(10, 9, 80, 72, 100)
    sizes = {"parameters": 10, "effective parameters": 9, "FLOPs": 80, "effective FLOPs": 72}
    assert untested.record() == {**sizes, "bytes": 100}
    tested = BEFORE.record()
    assert tested["top-1"] == 0.9 and tested["latency"] == {"64": 0.02}
    assert json.loads(json.dumps(tested)) == tested
    answer = BEFORE.answer()
    assert answer["effective_FLOPs"] == 20_000_000 and answer["latency_64_ms"] == 20


def table_of(text):
    """The cells of each line of a table by the first one."""
    lines = [re.split(r" {2,}", line) for line in text.splitlines()]
    return {title: cells for title, *cells in lines if len(cells) > 1 and title.strip("-")}


TABLE = """\
                              before    after  before/after        change
-------------------------  ---------  -------  ------------  ------------
top-1                         90.00%   85.00%         1.06x  -5.00 points
loss                          0.2500   0.5000         0.50x       +0.2500
parameters                 1,000,000  250,000         4.00x      -750,000
effective parameters       1,000,000  200,000         5.00x      -800,000
MFLOPs an image                 20.0      5.0         4.00x         -15.0
effective MFLOPs an image       20.0      4.0         5.00x         -16.0
file size (MB)                  4.00     1.00         4.00x         -3.00
latency, batch 64 (ms)          20.0     10.0         2.00x         -10.0"""


def test_the_lines_and_the_table_to_the_letter():
    assert before_after_text(BEFORE, AFTER) == TABLE
    whole = before_after_text(BEFORE, replace(BEFORE, parameters=9, effective_parameters=9))
    assert "effective" not in whole  # no weight is zero
    assert size_text(AFTER) == "250,000 parameters, 5.0 MFLOPs"
    line = "dense: top-1 90.00%, loss 0.2500, 1,000,000 parameters, 20.0 MFLOPs an image"
    assert stage_text("dense", BEFORE) == line
    assert stage_text("slim", AFTER).endswith("image (not counting zeros: 200,000, 4.0)")
    assert ratio(2, 3) == "0.67x" and ratio(2, 0) == "-"


def test_the_page_and_the_text_have_the_same_rows():
    stages = [{"name": name, **f.record()} for name, f in (("base", BEFORE), ("pruned", AFTER))]
    html = page.stages_table([page.entries(stage) for stage in stages])
    for title, (before, after, *_) in table_of(before_after_text(BEFORE, AFTER)).items():
        assert f'<th scope="row">{title}</th><td>{before}' in html
        assert f"<td>{after}" in html
    assert "effective MFLOPs an image" in html and page.EFFECTIVE in html


@pytest.fixture
def type_in(monkeypatch, capsys, quick):
    """Type a command; what it prints."""

    def type_in(script, words):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words.split()])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return type_in


@pytest.mark.slow
def test_four_commands_tell_the_same_figures(type_in, tmp_path):
    """Of the same file: rounds of flowprune.py, eval.py, run.py, and the table of main.py."""
    images = make_images(tmp_path / "images", train=8, test=4)
    path, short = tmp_path / "flow" / "checkpoint.pth.tar", "--epochs 1 --batch-size 8 --no-cuda"
    pruning = f"--model mobilenet --prune_percent 50 --bypass --imp_samples 8 {short}"
    place = f"--no-tensorboard --save {path.parent}"
    said = type_in(flowprune, f"--data_path {images} {pruning} {place}")
    rounds = checkpoint.read(path)["flow"]["rounds"][-1]
    data = f"--data {images} --no-cuda"
    answer = json.loads(type_in(judge, f"{path} {data} --json"))
    again = f"--skip-base-training --skip-pruning --model-path {path} --output-dir {tmp_path}/out"
    line = type_in(run, f"--dataset folder {data} --model mobilenet {again}")
    (metrics,) = (tmp_path / "out").glob("folder/*/metrics.json")
    (stage,) = json.loads(metrics.read_text())["stages"]
    place = f"--no-tensorboard --save {tmp_path}/tuned"
    table = type_in(main, f"--refine {path} --data {images} {short} {place}")

    for key in ("parameters", "FLOPs", "effective parameters", "effective FLOPs", "bytes"):
        assert answer[key.replace(" ", "_")] == stage[key], key
    assert (rounds["parameters"], rounds["flops"]) == (stage["parameters"], stage["FLOPs"])
    assert (answer["test"]["prec1"], answer["test"]["loss"]) == (stage["top-1"], stage["loss"])
    for batch, seconds in stage["latency"].items():
        assert answer[f"latency_{batch}_ms"] == 1e3 * seconds
    phrase = f"{stage['parameters']:,} parameters, {stage['FLOPs'] / 1e6:.1f} MFLOPs"
    assert phrase in said and phrase in line
    after = {title: cells[1] for title, cells in table_of(table).items()}
    assert after["parameters"] == f"{stage['parameters']:,}"
    assert after["MFLOPs an image"] == f"{stage['FLOPs'] / 1e6:,.1f}"
    assert after["file size (MB)"] == f"{stage['bytes'] / 1e6:.2f}"
    assert f"{stage['parameters']:,}" in as_text(answer)


def test_a_pruning_script_tells_what_eval_tells(type_in, tmp_path):
    path = save_network(tmp_path / "net", "resnet", 11, "folder", 2)
    data = f"--data {make_images(tmp_path / 'images', train=1, test=4)} --no-cuda"
    printed = type_in(resprune, f"--model {path} --percent 0.5 {data}")
    answer = json.loads(type_in(judge, f"{tmp_path / 'pruned.pth.tar'} {data} --json"))
    rows, both = table_of(printed), (answer["dense"], answer)
    for title, key, form, scale in (
        ("parameters", "parameters", "{:,}", 1),
        ("MFLOPs an image", "FLOPs", "{:,.1f}", 1e-6),
        ("file size (MB)", "bytes", "{:.2f}", 1e-6),
    ):
        assert rows[title][:2] == [form.format(each[key] * scale) for each in both]
    assert rows["top-1"][1] == f"{answer['test']['prec1']:.2%}"
    assert rows["loss"][1] == f"{answer['test']['loss']:.4f}"
