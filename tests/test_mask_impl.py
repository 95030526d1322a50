"""mask-impl by itself."""

import copy
import importlib
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import SMALLEST, randomize
from warm import ROOT

import models
from slimming import pruning

MASK_NETWORKS = importlib.import_module("mask-impl.models").NETWORKS
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ORIGINAL = """
import copy, pickle, sys
import torch
import torch.nn as nn
import models
from models import *
from models.densenet import densenet
from models.preresnet import resnet
from models.vgg import vgg

folder = sys.argv[1]
images = torch.load(folder + '/images')
for arch, depth in {'vgg': 11, 'resnet': 11, 'densenet': 7}.items():
    assert isinstance(models.__dict__[arch], type) and models.__dict__[arch] is globals()[arch]
    torch.manual_seed(0)
    model = models.__dict__[arch](dataset='cifar10', depth=depth)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.weight.data.normal_(0, 0.5)
        m.bias.data.normal_(0, 0.2)
    if arch != 'vgg':
        norms[1].weight.data.mul_(1e-4)  # a layer that dies
    gammas = torch.cat([m.weight.data.abs() for m in norms])
    thre = gammas.sort()[0][int(len(gammas) * 0.6)]
    cfg = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            mask = m.weight.data.abs().gt(thre).float()
            m.weight.data.mul_(mask)
            m.bias.data.mul_(mask)
            cfg.append(int(mask.sum()))
        elif isinstance(m, nn.MaxPool2d):
            cfg.append('M')
    assert not any('indexes' in name for name in model.state_dict())
    torch.save({'cfg': cfg, 'state_dict': model.state_dict()}, folder + '/' + arch + '.pth.tar')
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(copied) is type(model)
    torch.save(copied.eval()(images).detach(), folder + '/' + arch + '.logits')
sys.path.append('..')
from slimming import pruning
slim = pruning.slim(copied, pruning.keep_one(copied, pruning.alive_channels(copied)))
assert 'select.indexes' in slim.state_dict() and type(slim) is not type(model)
assert pruning.prove_equal(slim, copied, images) <= 1e-4
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Pruned files as a program of the original's users writes them in mask-impl, and logits."""
    folder = tmp_path_factory.mktemp("original")
    torch.save(IMAGES, folder / "images")
    command = [sys.executable, "-c", ORIGINAL, str(folder)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=ROOT / "mask-impl", env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def test_inside_mask_impl_models_are_its_own(original):
    """What ORIGINAL imports and asserts there."""
    assert {f"{arch}.pth.tar" for arch in SMALLEST} <= {path.name for path in original.iterdir()}


@pytest.mark.parametrize("arch", SMALLEST)
def test_the_networks_are_classes_beside_those_of_the_suite(arch):
    build = MASK_NETWORKS[arch]
    assert isinstance(build, type) and issubclass(build, models.NETWORKS[arch])
    model = randomize(build(depth=SMALLEST[arch], dataset="cifar10"))
    assert not any("indexes" in name for name in model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is build and torch.equal(logits(copied), logits(model))
    slim = pruning.slim(model, pruning.choose_channels(model, 0.4).keep)
    assert type(slim) is models.NETWORKS[arch]
    assert arch == "vgg" or isinstance(slim.select, models.channel_selection)
