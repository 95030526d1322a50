"""Libraries that are not installed: what they add is left out, or one line says what to install."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from conftest import NARROW, fails, make_images, save_network, succeed
from torch import nn
from warm import ROOT

import export
import slimming
import sweep
import vggprune
from models import resnet
from slimming.data.batches import Batches, Split
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.runtime import optional
from slimming.storage import architecture
from slimming.training import loop
from slimming.training.trainer import make_optimizer

NEEDED = {"torch", "torchvision", "numpy", "pillow"}  # pillow comes with torchvision
PARTS = {"sklearn": "scikit-learn", "scipy": "scipy"}
SHORT = "--arch resnet --depth 11 --batch-size 32 --no-cuda".split()


def hide(libraries):
    """Let no import find ``libraries``, nor what PyTorch has for TensorBoard without it."""
    if "tensorboard" in libraries:
        libraries = [*libraries, "torch.utils.tensorboard"]
    for name in list(sys.modules):
        if any(name == library or name.startswith(f"{library}.") for library in libraries):
            del sys.modules[name]
    sys.meta_path.insert(0, _Hidden(libraries))


class _Hidden:
    def __init__(self, libraries):
        self.libraries = [name for name in libraries if "." not in name]

    def find_spec(self, name, path=None, target=None):
        if name in self.libraries:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without(libraries):
    """For `warm.run`: start the script where these are not installed."""
    return functools.partial(hide, list(libraries))


BARE = without([*optional.LEFT_OUT, *PARTS])


EXPORTING = ["onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao"]


@pytest.fixture
def hidden(monkeypatch):
    """Hide libraries from this process, as `hide` does from a new one."""

    def hide_here(libraries):
        optional.load.cache_clear()
        for library in libraries:
            places = [library, *(["torch.utils.tensorboard"] if library == "tensorboard" else [])]
            known = [n for n in sys.modules if any(n.startswith(f"{place}.") for place in places)]
            for name in (*places, *known):
                monkeypatch.setitem(sys.modules, name, None)

    yield hide_here
    optional.load.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("library", [*optional.LEFT_OUT, *PARTS, *EXPORTING])
def test_the_library_works_without_each(library, hidden, tmp_path):
    """All that it offers, with the one message that `PARTS` are needed for."""
    hidden([library])
    narrow = {"arch": "vgg", "depth": 11, "num_classes": 4, "cfg": NARROW["vgg"]}
    net = architecture.Architecture(dataset="digits", **narrow).build().eval()
    images = torch.rand(32, 3, 32, 32)
    slim = slimming.prune(net, images[:2], 0.3, scope="layer")
    slim = slimming.repair(slim, net, images)
    slimming.save(slim, tmp_path / "slim.pth")
    again = slimming.load(tmp_path / "slim.pth", lambda: net)
    torch.testing.assert_close(again(images), slim.model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slimming.deploy(again)(images), again(images), rtol=1e-3, atol=1e-4)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    assert slimming.prune(other, images[:2]).figures.parameters > 0


@pytest.mark.slow
def test_repair_sweep_and_export_are_left_with_what_is_there(
    hidden, images, tmp_path, monkeypatch, capsys
):
    hidden([*optional.LEFT_OUT, *PARTS, *EXPORTING])
    path = save_network(tmp_path / "net.pth", "vgg", 11, "folder", 2, NARROW["vgg"])
    monkeypatch.setattr(figures, "in_turns", lambda tasks, *_, **__: [1e-3] * len(tasks))

    def call(script, words):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
        script.main()
        return capsys.readouterr().out

    where = ["--data", images, "--no-cuda", "--save"]
    words = ["--model", path, *where, tmp_path / "slim", "--round-to", "auto"]
    printed = call(vggprune, [*words, "--percent", 0.3, "--repair", "--repair-images", 32])
    assert told_once(printed, "tqdm", "matplotlib") and "repaired" in printed
    few = ["--points", 1, "--allocation", "uniform", "--repair-images", 32, "--held-back", 4]
    call(sweep, [path, *where, tmp_path / "sweep", *few, "--exact"])
    call(
        export,
        [
            path,
            *where,
            tmp_path / "files",
            "--format",
            "torch",
            "--threads",
            1,
            "--form",
            "folded",
            "--batch",
            4,
        ],
    )
    assert list(tmp_path.glob("files/*.pt2"))
    with pytest.raises(UserError, match=r"pip install -r requirements-export.txt"):
        call(export, [path, *where, tmp_path / "more", "--format", "onnx"])


def told_once(printed, *libraries):
    """Of what can be left out, a line of ``printed`` names each of ``libraries`` and no other."""
    for library in optional.LEFT_OUT:
        lines = [line for line in printed.splitlines() if f"pip install {library}" in line]
        assert len(lines) == (library in libraries), printed
        assert all(optional.LEFT_OUT[library] in line for line in lines)
    return True


def test_torch_torchvision_and_numpy_are_enough_for_the_workflow(images, tmp_path):
    words = ["--data", images, "--save", tmp_path / "out"]
    train = [*words, *SHORT, "--dataset", "folder", "--epochs", "2"]
    printed = succeed("main.py", "-sr", *train, preexec_fn=BARE)
    assert told_once(printed, "tensorboard", "matplotlib", "tqdm") and "Train Epoch: 1" in printed
    printed = succeed("resprune.py", "--model", tmp_path / "out", *words, preexec_fn=BARE)
    assert told_once(printed, "matplotlib"), "no bar, no event files: nothing else is left out"
    assert "prune.png" not in printed and "wrote" in printed
    words = ["--refine", tmp_path / "out", "--epochs", "1", "--data", images]
    printed = succeed("main.py", *words, "--save", tmp_path / "fine", preexec_fn=BARE)
    assert told_once(printed, "tensorboard", "matplotlib", "tqdm")
    assert "curves.png" not in printed and "before/after" in printed
    found = {path.name for folder in ("out", "fine") for path in (tmp_path / folder).iterdir()}
    assert found == {"checkpoint.pth.tar", "model_best.pth.tar", "pruned.pth.tar", "prune.txt"}


@pytest.mark.parametrize("library", optional.LEFT_OUT)
def test_one_library_alone_is_left_out(library, images, tmp_path):
    words = ["--dataset", "folder", "--data", images, *SHORT, "--epochs", "1", "--save", tmp_path]
    assert told_once(succeed("main.py", *words, preexec_fn=without([library])), library)
    assert (tmp_path / "curves.png").exists() == (library != "matplotlib")
    assert bool(list(tmp_path.glob("tensorboard/events*"))) == (library != "tensorboard")


def test_what_was_not_wanted_is_not_missed(images, tmp_path):
    words = ["--dataset", "folder", "--data", images, *SHORT, "--epochs", "1", "--save", tmp_path]
    told = succeed("mask-impl/main_mask.py", *words, "--no-tensorboard", preexec_fn=BARE)
    assert told_once(told, "matplotlib", "tqdm")
    told = succeed("mask-impl/prune_mask.py", *words[2:4], "--model", tmp_path, preexec_fn=BARE)
    assert told_once(told, "matplotlib")
    path = save_network(tmp_path / "net", "resnet", 11, "folder", 2)
    assert "FLOPs" in json.loads(succeed("eval.py", path, *words[2:4], "--json", preexec_fn=BARE))


def test_experiments_without_pictures(tmp_path):
    images = make_images(tmp_path / "few", train=8, test=4)
    words = ["--base-train-epochs", 1, "--finetune-epochs", 1, "--pruning-method", "intra-kernel"]
    words += ["--model", "mobilenet", "--output-dir", tmp_path / "out", "--no-cuda"]
    printed = succeed("run.py", "--dataset", "folder", "--data", images, *words, preexec_fn=BARE)
    assert told_once(printed, "tensorboard", "matplotlib", "tqdm")
    (page,) = tmp_path.glob("out/*/*/report.html")
    assert "<img" not in page.read_text() and not list(page.parent.rglob("*.png"))
    words = ["--data_path", images, "--save", tmp_path / "flow"]
    words += "--model mobilenet --epochs 1 --bypass --no-cuda".split()
    hidden = without(optional.LEFT_OUT)
    printed = succeed("flowprune.py", *words, preexec_fn=hidden)
    assert told_once(printed, "tensorboard", "matplotlib", "tqdm") and "round 1" in printed
    assert (tmp_path / "flow" / "checkpoint.pth.tar").exists() and "flow.png" not in printed


@pytest.mark.parametrize(
    "library, words",
    [
        ("sklearn", "main.py --dataset digits"),
        ("scipy", "main.py --dataset svhn"),
    ],
)
def test_what_a_run_needs_is_one_line_before_any_work(library, words, tmp_path):
    says = [f"needs {PARTS[library]}, which is unavailable", f"pip install {PARTS[library]}"]
    fails(tmp_path, *words.split(), preexec_fn=without([library]), says=says)


def test_without_a_bar_a_terminal_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(optional, "load", lambda *_: None)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    split = Split(torch.zeros(64, 3, 32, 32).byte(), torch.zeros(64).long(), ["a"])
    model = resnet(depth=11, num_classes=1)
    optimizer = make_optimizer(model, 0.1, 0.9, 0)
    loop.train(model, Batches(split, 16), optimizer, log_interval=1)
    assert capsys.readouterr().out.count("Train Epoch: 0") == 4


def test_a_broken_library_is_told_in_one_line_with_its_reason(monkeypatch, capsys):
    def fail(_):
        raise ImportError("\nA module that was compiled using NumPy 1.x\ncannot be run\n")

    monkeypatch.setattr(optional.importlib, "import_module", fail)
    assert optional.load.__wrapped__("matplotlib") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "compiled using NumPy 1.x cannot be run" in line


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_used(images, tmp_path):
    code = (
        "import sys, torch, main, vggprune, resprune, denseprune, run, flowprune, eval\n"
        "unused = {'matplotlib', 'tensorboard', 'torch_pruning', 'scipy', 'sklearn'}\n"
        "assert not unused & sys.modules.keys(), unused & sys.modules.keys()\n"
        "main.main()\n"
        "unused -= {'matplotlib'}  # draws the curves\n"
        "assert not unused & sys.modules.keys(), unused & sys.modules.keys()\n"
    )
    words = ["--dataset", "folder", "--data", images, *SHORT, "--epochs", "1", "--save", tmp_path]
    command = [sys.executable, "-c", code, *map(str, words), "--no-tensorboard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_requirements_say_what_is_needed_and_what_adds_what():
    groups = (ROOT / "requirements.txt").read_text().split("\n\n")[1:]
    needed, added, parts = (
        {line.partition(">")[0] for line in group.splitlines() if not line.startswith("#")}
        for group in groups
    )
    assert (needed, added, parts) == (
        NEEDED,
        set(optional.LEFT_OUT),
        {*PARTS.values(), "safetensors"},
    )
    assert [group.split()[1].strip(":,") for group in groups] == ["Needed", "Left", "Needed"]
