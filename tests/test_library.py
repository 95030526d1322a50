"""The library by itself: built as a wheel, installed beside a foreign package called `models`."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import NARROW, SMALLEST, randomize
from torch import nn
from warm import ROOT

import slimming
from models import NETWORKS
from slimming.channels.scaling import batch_norms
from slimming.errors import UserError
from slimming.pruning.importance import MEASURES
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.training import penalties

PROGRAM = """
import models, slimming, torch, torchvision
assert models.theirs and "site" in slimming.__file__
net = torchvision.models.resnet18(num_classes=10).eval()
images = torch.rand(4, 3, 64, 64)
slim = slimming.prune(net, images, ratio=0.5)
slimming.save(slim, "slim.pth")
again = slimming.load("slim.pth", build=lambda: torchvision.models.resnet18(num_classes=10))
assert torch.equal(again(images), slim.model(images)) and slim.difference <= 1e-4
torch.testing.assert_close(slimming.deploy(again)(images), again(images), rtol=1e-3, atol=1e-4)
print(slim.figures.parameters)
"""


@pytest.mark.slow
def test_the_wheel_works_beside_a_foreign_package_called_models(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "slimming", source / "slimming")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", site, wheel], check=True)
    assert {path.name for path in site.iterdir() if path.is_dir()} >= {"slimming"}
    assert not (site / "models").exists()
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "models" / "__init__.py").write_text("theirs = True\n")
    (tmp_path / "mine" / "program.py").write_text(PROGRAM)
    libraries = sysconfig.get_paths()["purelib"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), libraries])}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path / "mine",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 11_181_642


@pytest.mark.parametrize("arch", SMALLEST)
def test_the_paper_s_networks_come_back_from_a_file(arch, tmp_path):
    def build():
        return NETWORKS[arch](depth=SMALLEST[arch], num_classes=10)

    images = torch.rand(2, 3, 32, 32)
    slim = slimming.prune(randomize(build()), images, ratio=0.4, measure="bn")
    slimming.save(slim.model, tmp_path / "slim.pth")
    again = slimming.load(tmp_path / "slim.pth", build)
    assert torch.equal(again(images), slim.model(images)) and again.cfg == slim.cfg


class Wrapper(nn.Module):
    """A network whose only child has the name of DataParallel's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("build", [Wrapper, lambda: Wrapper().module])
def test_a_child_called_module_is_no_data_parallel(build, wrap, tmp_path):
    images = torch.rand(2, 3, 8, 8)
    slim = slimming.prune(build(), images)
    slimming.save(wrap(slim.model), tmp_path / "slim.pth")
    assert torch.equal(slimming.load(tmp_path / "slim.pth", build)(images), slim.model(images))


@pytest.mark.parametrize("arch", SMALLEST)
def test_a_checkpoint_without_masks_or_counts_loads_as_in_the_scripts(arch, tmp_path):
    """mask-impl has no channel selection, and PyTorch before 0.4.1 counts no batches."""
    network = Architecture(arch, SMALLEST[arch], "digits", 10)
    masked = importlib.import_module("mask-impl.models").NETWORKS[arch](depth=network.depth)
    randomize(masked)
    for name, value in batch_norms(masked).items():
        if name.endswith("bn2"):
            value.weight.data[:2] = value.bias.data[:2] = 0
    contents = architecture.contents_of(masked, network, 1, 0.5)
    state = contents["state_dict"]
    for counts in (True, False):
        kept = {n: v for n, v in state.items() if counts or "num_batches" not in n}
        checkpoint.write(tmp_path / "masked", {**contents, "state_dict": kept})
        ours = slimming.load(tmp_path / "masked", network.build)
        theirs = architecture.load(tmp_path / "masked")[0].eval()
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "biased_loss_tracked"])
def test_every_measure_by_its_name(measure):
    net, images = randomize(NETWORKS["resnet"](depth=11)), torch.rand(4, 3, 32, 32)
    slim = slimming.prune(net, images, 0.3, measure=measure, labels=torch.arange(4), scope="layer")
    assert slim.difference <= 1e-4


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"measure": "l3"}, "unknown measure 'l3': use mag_based"),
        ({"measure": "biased_loss_tracked"}, "unknown measure"),
        ({"measure": "fisher"}, "needs images with labels"),
        ({"least": 1.5}, "least must be between 0 and 1"),
        ({"scope": "all"}, "'global' or 'layer'"),
        ({"ratio": 1}, "ratio"),
        ({"ignore": ["layer9"]}, "layer9"),
    ],
)
def test_wrong_arguments_say_what_is_right(wrong, says):
    net = NETWORKS["resnet"](depth=11).eval()
    with pytest.raises(UserError, match=says):
        slimming.prune(net, torch.rand(2, 3, 32, 32), **wrong)


def test_sparsity_training_in_a_loop_of_one_s_own():
    """The penalty is that of the scripts, and importing it does not import the data sets."""
    assert slimming.L1Penalty is penalties.L1Penalty and slimming.updateBN is penalties.updateBN
    assert {"L1Penalty", "updateBN"} <= set(slimming.__all__)
    code = "import slimming, sys; slimming.L1Penalty; print('slimming.data' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
    torch.manual_seed(0)
    model = NETWORKS["vgg"](depth=11, cfg=NARROW["vgg"], num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = slimming.L1Penalty(model, s=0.5)
    for _ in range(9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4) % 2).backward()
        penalty.on_gradients()
        optimizer.step()
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gammas.abs().mean() < 0.2, "they start at 0.5"


NEEDS_LABELS = {"loss_based", "tfo", "fisher", "nvidia", "biased_loss", "grasp", "grad_preserve"}
NEEDS_LABELS |= {"taylor_group"}


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "biased_loss_tracked"])
def test_labels_are_needed_by_gradients_alone(measure):
    net, images = randomize(NETWORKS["resnet"](depth=11)), torch.rand(32, 3, 32, 32)
    if measure in NEEDS_LABELS:
        with pytest.raises(UserError, match="needs images with labels"):
            slimming.prune(net, images, 0.3, measure=measure)
    else:
        assert slimming.prune(net, images, 0.3, measure=measure).difference <= 1e-4
