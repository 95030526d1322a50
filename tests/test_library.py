"""The library by itself: built as a wheel, installed beside a foreign package called `models`."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import SMALLEST, randomize
from warm import ROOT

import slimming
from models import NETWORKS
from slimming.errors import UserError
from slimming.pruning.importance import MEASURES

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
        ({"measure": "fisher"}, "needs images"),
        ({"scope": "all"}, "'global' or 'layer'"),
        ({"ratio": 1}, "ratio"),
        ({"ignore": ["layer9"]}, "layer9"),
    ],
)
def test_wrong_arguments_say_what_is_right(wrong, says):
    net = NETWORKS["resnet"](depth=11).eval()
    with pytest.raises(UserError, match=says):
        slimming.prune(net, torch.rand(2, 3, 32, 32), **wrong)
