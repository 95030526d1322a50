"""The deployment form computes what the network computes, dense or pruned."""

import copy

import pytest
import torch

from slimming import deploy, pruning
from slimming.sparsity import batch_norms

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [None, 0.1, 0.4, 0.7, 0.95])
def test_deployed_equals_the_network(small, percent):
    if percent is not None:
        small = pruning.slim(small, pruning.choose_channels(small, percent).keep)
    before = copy.deepcopy(small.state_dict())
    deployed = deploy.deploy(small)
    assert pruning.prove_equal(deployed, small, IMAGES) <= 1e-4
    assert not batch_norms(deployed)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
