"""1x1 convolutions at unit stride compute the same, and are themselves again afterwards."""

import copy

import pytest
import torch
from torch import nn

from slimming.runtime.device import unit_strides


@pytest.mark.parametrize("channels", [3, 11])
@pytest.mark.parametrize("stride", [2, (2, 3)])
def test_outputs_and_gradients_are_the_same(channels, stride):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, stride)).double()
    other, images = copy.deepcopy(net), torch.randn(4, 3, 15, 17, dtype=torch.double)
    with unit_strides(other):
        assert other[1].stride == (1, 1) and other[0].stride == (1, 1)
        outputs = other(images)
        outputs.square().sum().backward()
    expected = net(images)
    expected.square().sum().backward()
    torch.testing.assert_close(outputs, expected)
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert other[1].stride == net[1].stride
    assert torch.equal(other(images), net(images)), "nothing is left of it"


def test_other_convolutions_are_left_alone():
    layers = [nn.Conv2d(16, 8, 1, 2), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, 2, groups=2)]
    with (
        pytest.raises(KeyError),
        unit_strides(net := nn.Sequential(*layers, nn.Conv2d(8, 8, 1, 2))),
    ):
        assert [conv.stride[0] for conv in net] == [2, 2, 2, 1]
        raise KeyError("whatever happens inside")
    assert [conv.stride[0] for conv in net] == [2, 2, 2, 2]
