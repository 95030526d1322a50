"""What networks of timm, torchvision, Ultralytics and others do, in a few lines each: how many
units can go, and that the network without them equals the masked one."""

import pytest
import torch
from small_networks import Net, faults, noise, pooled, prove, randomized, sizes
from torch import nn

from slimming.channels.groups import channels
from slimming.slicing.prune import prunable

MAPS = noise(2, 3, 8, 8)
CASES = []


def case(inputs, units):
    """The network that a function returns has these free units, by the first layer of a group."""

    def add(build):
        CASES.append(pytest.param(build, inputs, units, id=build.__name__))
        return build

    return add


def conv(into, out, size=3, **kwargs):
    return nn.Conv2d(into, out, size, padding=size // 2, **kwargs)


@case(MAPS, {"a": 8, "b": 6})
def rows_written_by_index():
    """torchvision's MultiScaleRoIAlign: the features of each level are written to their rows."""

    def run(n, x):
        x = n.a(x)
        rows = x.new_zeros(x.shape)
        for index in (torch.tensor([1]), torch.tensor([0])):
            rows[index] = x[index]
        return n.out(pooled(n.b(rows)))

    return Net(run, a=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, {"a": 8})
def anchors_of_several_levels():
    """torchvision's RPN: (N, A·4, H, W) -> (N, H·W·A, 4), of all levels; the 4 are taken apart."""

    def flat(x):
        return x.view(len(x), -1, 4, *x.shape[2:]).permute(0, 3, 4, 1, 2).reshape(len(x), -1, 4)

    def run(n, x):
        x = n.a(x)
        rows = torch.cat([flat(n.b(x)), flat(n.b(x[..., ::2, ::2]))], 1).reshape(-1, 4)
        return rows[:, 0::4] * rows[:, 1::4] + rows[:, 2:].sum()

    return Net(run, a=conv(3, 8), b=conv(8, 12))


@pytest.mark.parametrize("shape", [(2, 3, 256, 192), (1, 3, 96, 160, 128)])
def test_large_images_and_volumes_are_traced_and_tried_at_a_smaller_size(shape):
    seen = []

    def run(n, x):
        seen.append(tuple(x.shape))
        return n.b(n.a(x)).flatten(2).mean(2)

    layer = nn.Conv2d if len(shape) == 4 else nn.Conv3d
    model = randomized(Net(run, a=layer(3, 4, 1), b=layer(4, 2, 1)))
    assert sizes(prunable(model, noise(*shape))) == {"a": 4}
    assert set(seen) == {(1, 3, 128, 96) if len(shape) == 4 else (1, 3, 32, 64, 64)}


def test_a_network_that_takes_one_size_is_traced_and_tried_at_that_size():
    model = Net(
        lambda n, x: n.out(n.a(x).flatten(1)), a=conv(3, 4), out=nn.Linear(4 * 160 * 160, 2)
    )
    assert sizes(prunable(randomized(model), noise(2, 3, 160, 160))) == {"a": 4}


@pytest.mark.parametrize("build, inputs, units", CASES)
def test_what_can_go_and_that_it_is_exact(build, inputs, units):
    torch.manual_seed(0)
    model = randomized(build())
    found = prunable(model, inputs)
    assert sizes(found) == units, found.pinned
    assert sizes(channels(model, inputs)) == units, "only the trial finds it"
    for seed in (0, 1):
        prove(model, found.groups, inputs, seed)
    assert faults(model, inputs) == []
