"""The deployment form computes what the network computes, dense or pruned."""

import copy

import pytest
import torch
from conftest import keep_only, randomize
from torch import nn

from models import NETWORKS, PAPER_DEPTH
from slimming.measuring import deploy
from slimming.pruning.proof import prove_equal
from slimming.pruning.scaling import batch_norms
from slimming.pruning.threshold import choose_channels

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [None, 0.1, 0.4, 0.7, 0.95])
def test_deployed_equals_the_network(small, percent):
    if percent is not None:
        small = keep_only(small, choose_channels(small, percent).keep)
    before = copy.deepcopy(small.state_dict())
    deployed = deploy.deploy(small)
    assert prove_equal(deployed, small, IMAGES) <= 1e-4
    assert not batch_norms(deployed)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("arch, depth", PAPER_DEPTH.items())
def test_the_networks_of_the_paper_deployed(arch, depth):
    torch.manual_seed(0)
    dense = randomize(NETWORKS[arch](depth=depth, num_classes=10))
    slim = keep_only(dense, choose_channels(dense, 0.4).keep)
    for model in (dense, slim):
        assert prove_equal(deploy.deploy(model), model, IMAGES) <= 1e-4


def test_channels_without_a_scale_are_constants(small):
    """γ = 0 leaves ReLU(β); a γ of almost 0 puts the bend of the ReLU far away."""
    for bn in batch_norms(small).values():
        bn.weight.data[::3] = 0
        bn.weight.data[1::6] = 1e-35
        bn.weight.data[2::6] = -1e-12
    assert prove_equal(deploy.deploy(small), small, IMAGES) <= 1e-4


def test_two_sizes_and_layouts_of_images(small):
    deployed = deploy.deploy(small)
    for images in (IMAGES[:1], IMAGES.to(memory_format=torch.channels_last)):
        assert torch.allclose(deployed(images), small(images), rtol=1e-4, atol=1e-4)


def test_a_convolution_that_runs_twice_takes_no_batch_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 10)

        def forward(self, x):
            return self.fc((self.conv(self.bn(self.conv(x)))).mean((2, 3)))

    model = randomize(Twice())
    assert prove_equal(deploy.deploy(model), model, IMAGES) <= 1e-4
