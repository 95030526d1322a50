"""Channels that nothing reads are removed, and nothing else changes."""

import pytest
import torch
from conftest import keep_only, randomize
from torch import nn

from models import NETWORKS
from slimming.channels.scaling import batch_norms
from slimming.choosing.threshold import choose_channels
from slimming.measuring import figures
from slimming.slicing.proof import prove_equal
from slimming.slicing.unread import without_unread_channels

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [0.3, 0.6, 0.9])
def test_outputs_are_equal(small, percent):
    slim = keep_only(small, choose_channels(small, percent).kept)
    lean = without_unread_channels(slim)
    assert prove_equal(lean, slim, IMAGES) <= 1e-6
    fewer = figures.count_flops(slim) - figures.count_flops(lean)
    assert fewer > 0 if percent > 0.5 and not isinstance(small, NETWORKS["vgg"]) else fewer >= 0


CASES = [  # network, BNs whose selections all drop a channel, the channel, layers that write it
    ("densenet", 10, "dense1 trans1", 24, "dense1.0.conv1"),
    ("resnet", 11, "bn", 5, "layer3.0.conv3 layer3.0.downsample.0"),
]


@pytest.mark.parametrize("arch, depth, readers, channel, writers", CASES)
def test_a_channel_that_every_selection_drops_is_not_computed(
    arch, depth, readers, channel, writers
):
    torch.manual_seed(0)
    dense = randomize(NETWORKS[arch](depth=depth, num_classes=10))
    keep = {
        n: torch.ones(bn.num_features, dtype=torch.bool) for n, bn in batch_norms(dense).items()
    }
    for name in keep:
        if name.startswith(tuple(readers.split())) and "bn" in name:
            keep[name][channel : channel + 1] = False
    slim = keep_only(dense, keep)
    lean = without_unread_channels(slim)
    for name in writers.split():
        before, after = (net.get_submodule(name).out_channels for net in (slim, lean))
        assert after == before - 1
    assert prove_equal(lean, slim, IMAGES) <= 1e-6


def test_a_network_that_reads_everything_stays_itself(small):
    small.train()
    assert without_unread_channels(small) is small
    assert small.training


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
