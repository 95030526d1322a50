"""Channels that nothing reads are removed, and nothing else changes."""

import pytest
import torch
from conftest import keep_only, randomize
from torch import nn

from models import NETWORKS
from slimming.measuring import profiling
from slimming.pruning.proof import prove_equal
from slimming.pruning.scaling import batch_norms
from slimming.pruning.threshold import choose_channels
from slimming.pruning.unread import without_unread_channels

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [0.3, 0.6, 0.9])
def test_outputs_are_equal(small, percent):
    slim = keep_only(small, choose_channels(small, percent).keep)
    lean = without_unread_channels(slim)
    assert prove_equal(lean, slim, IMAGES) <= 1e-6
    assert profiling.count_flops(lean) <= profiling.count_flops(slim)


@pytest.mark.parametrize("arch, depth, writer", [("densenet", 10, "dense1.0"), ("resnet", 11, "")])
def test_a_channel_that_every_selection_drops_is_not_computed(arch, depth, writer):
    """Channel 3 of the first convolution, or the first new channel of a dense block."""
    torch.manual_seed(0)
    dense = randomize(NETWORKS[arch](depth=depth, num_classes=10))
    channel = 24 if writer else 3
    keep = {
        n: torch.ones(bn.num_features, dtype=torch.bool) for n, bn in batch_norms(dense).items()
    }
    stage = [n for n in keep if n.startswith(("dense1", "trans1", "layer1")) and n.endswith("bn1")]
    for name in stage:
        keep[name][channel : channel + 1] = False
    slim = keep_only(dense, keep)
    lean = without_unread_channels(slim)
    conv = lean.get_submodule(f"{writer}.conv1".lstrip("."))
    before = slim.get_submodule(f"{writer}.conv1".lstrip("."))
    downsampled = arch == "resnet"  # the shortcut of the first block reads every channel
    assert conv.out_channels == before.out_channels - (not downsampled)
    assert prove_equal(lean, slim, IMAGES) <= 1e-6


def test_a_network_that_reads_everything_stays_itself(small):
    assert without_unread_channels(small) is small


def test_a_network_that_cannot_be_traced_stays_itself():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))

    odd = Odd()
    assert without_unread_channels(odd) is odd


def test_an_operation_that_mixes_channels_keeps_what_it_reads():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = (
                nn.Conv2d(3, 8, 3),
                nn.GroupNorm(2, 8),
                nn.Conv2d(8, 5, 1),
            )

        def forward(self, x):
            return self.last(self.norm(self.conv(x))).mean((2, 3))

    model = Norm().eval()
    model.last.weight.data[:, 2] = 0
    assert without_unread_channels(model) is model
    model.norm = nn.BatchNorm2d(8).eval()
    assert without_unread_channels(model).conv.out_channels == 7
