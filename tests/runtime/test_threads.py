"""--threads on a machine that several runs share, and the line that names it."""

import importlib
import json
import os
import sys

import pytest
import torch
from conftest import fails, make_images, succeed
from warm import run

import run as script_of_experiments
from slimming.cli import flags
from slimming.commands.experiment.run import config_of, same_settings
from slimming.commands.experiment.settings import read_settings
from slimming.runtime import device

SCRIPTS = "main vggprune resprune denseprune run flowprune eval".split()
SCRIPTS += ["mask-impl.main_mask", "mask-impl.prune_mask"]
SHORT = "--arch resnet --depth 11 --epochs 1 --batch-size 32 --no-tensorboard --no-cuda".split()


def busy():
    torch.set_num_threads(2)  # with one thread there is nothing to say
    os.getloadavg = lambda: (os.cpu_count() + 0.5, 0.0, 0.0)


def idle():
    os.getloadavg = lambda: (float(os.cpu_count()), 99.0, 99.0)


def unknown():
    def fail():
        raise OSError("Load averages are unobtainable")

    os.getloadavg = fail


def nowhere():
    """As on Windows."""
    del os.getloadavg


def watched():
    """Have a script say how many threads a convolution finds, each time that they are others."""
    plain, seen = torch.nn.Conv2d.forward, [None]

    def forward(self, images):
        if torch.get_num_threads() != seen[-1]:
            seen.append(torch.get_num_threads())
            print(f"computed by {seen[-1]} threads", file=sys.stderr)
        return plain(self, images)

    torch.nn.Conv2d.forward = forward


@pytest.fixture
def restored():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_it_at_once(script, restored):
    parser, before = importlib.import_module(script).make_parser(), torch.get_num_threads()
    assert flags.parse(parser, []).get("threads") is None
    assert torch.get_num_threads() == before, "without it PyTorch decides"
    assert flags.parse(parser, ["--threads", "3"])["threads"] == 3
    assert torch.get_num_threads() == 3


def test_an_experiment_goes_on_with_any_number(tmp_path, restored):
    def parse(*words):
        return read_settings(flags.parse(script_of_experiments.make_parser(), list(words)))

    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_of(parse("--threads", "2"))))
    assert same_settings(config, parse("--threads", "1"))
    assert same_settings(config, parse())
    assert not same_settings(config, parse("--seed", "2"))


@pytest.mark.slow
def test_all_work_is_done_by_so_many(few, tmp_path):
    def work(script, *words):
        done = run(script, *words, "--data", few, "--no-cuda", preexec_fn=watched)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if "computed" in line]

    train = ["--dataset", "folder", *SHORT, "--save", tmp_path]
    assert work("main.py", *train, "--threads", 3) == ["computed by 3 threads"]
    prune = ["--model", tmp_path, "--threads", 2]
    assert work("resprune.py", *prune) == ["computed by 2 threads"]
    resume = ["--resume", tmp_path / "checkpoint.pth.tar", "--epochs", 2, "--no-tensorboard"]
    assert work("main.py", *resume) == ["computed by 1 threads"], "of the machine, not of the run"
    assert work("eval.py", tmp_path / "pruned.pth.tar", "--threads=3") == ["computed by 3 threads"]


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "two", "100000"])
def test_what_is_no_number_of_threads(tmp_path, count):
    says = ["--threads", "integer of at least 1", count]
    fails(tmp_path, "main.py", "--dataset", "digits", "--threads", count, says=says)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("threads") / "images", train=8, test=4)


@pytest.mark.parametrize(
    "machine, words, told",
    [
        (busy, [], True),
        (idle, [], False),
        (unknown, [], False),
        (nowhere, [], False),
        (busy, ["--threads", "1"], False),
    ],
)
def test_a_busy_machine_is_told_when_training_starts(few, tmp_path, machine, words, told):
    words = ["--dataset", "folder", "--data", few, *SHORT, "--save", tmp_path, *words]
    lines = succeed("main.py", *words, preexec_fn=machine).splitlines()
    found = [number for number, line in enumerate(lines) if "one thread each" in line]
    assert len(found) == told
    if told:
        assert lines[found[0]].startswith("note: the load of this machine is ")
        assert any("Train Epoch" in line for line in lines[found[0] :])
        last = ["--resume", tmp_path / "checkpoint.pth.tar", "--data", few, "--no-tensorboard"]
        printed = succeed("main.py", *last, preexec_fn=machine)
        assert "all 1 epochs are done" in printed and "one thread each" not in printed


def test_a_gpu_does_not_mind(capsys, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0, 0), raising=False)
    device.print_load_note(torch.device("cuda"))
    assert not capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    device.print_load_note(torch.device("cpu"))
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # there is nothing to lower
    device.print_load_note(torch.device("cpu"))
    assert not capsys.readouterr().out
