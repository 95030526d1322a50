"""Random networks of blocks: what the rules find is exact, without a trial."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import noise, prove, randomized
from torch import nn

from slimming.channels.groups import channels, traced

IMAGES = noise(2, 3, 6, 6)
SIZE = 6  # of each map, so that any two can be added
BLOCKS = {}  # name -> function, see `block`


def block(function):
    """``function(a, b)`` for two maps of ``a`` and ``b`` channels: layers, and what they compute of
    the two; None if these numbers do not suit it."""
    BLOCKS[function.__name__] = function
    return function


def conv(into, out, size=3, **kwargs):
    return nn.Conv2d(into, out, size, padding=size // 2, **kwargs)


@block
def convolution(a, b):
    return [conv(a, 8), nn.BatchNorm2d(8)], lambda m, x, y: m[1](m[0](x)).relu()


@block
def grouped(a, b):
    if a % 2:
        return None
    return [conv(a, 12, groups=2)], lambda m, x, y: m[0](x).tanh()


@block
def depthwise(a, b):
    return [conv(a, 2 * a, groups=a), conv(2 * a, 6, 1)], lambda m, x, y: m[1](F.silu(m[0](x)))


@block
def transposed(a, b):
    layer = nn.ConvTranspose2d(a, 8, 3, padding=1)
    return [layer, nn.PReLU(8)], lambda m, x, y: m[1](m[0](x))


@block
def transposed_grouped(a, b):
    if a % 2:
        return None
    return [nn.ConvTranspose2d(a, 8, 3, padding=1, groups=2)], lambda m, x, y: m[0](x)


@block
def twice(a, b):
    """One convolution runs two times."""
    return [conv(a, a)], lambda m, x, y: m[0](m[0](x).relu())


@block
def shared(a, b):
    """One convolution of two maps."""
    if a != b:
        return None
    return [conv(a, 6)], lambda m, x, y: m[0](x) * m[0](y).sigmoid()


@block
def addition(a, b):
    return ([], lambda m, x, y: x + y) if a == b else ([conv(b, a, 1)], lambda m, x, y: x + m[0](y))


@block
def product(a, b):
    return ([], lambda m, x, y: x * y) if a == b else None


@block
def concatenation(a, b):
    return [], lambda m, x, y: torch.cat([x, y], 1)


@block
def interleaved(a, b):
    return ([], lambda m, x, y: torch.stack([x, y], 2).flatten(1, 2)) if a == b else None


@block
def chunk(a, b):
    if a % 2:
        return None

    def run(m, x, y):
        first, second = x.chunk(2, 1)
        return first * torch.sigmoid(second)

    return [], run


@block
def bottleneck_of_chunks(a, b):
    """As C2f of YOLOv8."""
    if a % 2:
        return None

    def run(m, x, y):
        first, second = x.chunk(2, 1)
        return torch.cat([first, second, m[0](second) + second], 1)

    return [conv(a // 2, a // 2)], run


@block
def squeeze_and_excite(a, b):
    def run(m, x, y):
        return x * m[1](m[0](x.mean((2, 3), keepdim=True)).tanh()).sigmoid()

    return [conv(a, 4, 1), conv(4, a, 1)], run


@block
def gate_of_another_map(a, b):
    return [conv(b, 1, 1)], lambda m, x, y: x * m[0](y).sigmoid()


@block
def instance_norm(a, b):
    return [nn.InstanceNorm2d(a, affine=True)], lambda m, x, y: m[0](x)


@block
def group_norm(a, b):
    return ([nn.GroupNorm(a // 2, a)], lambda m, x, y: m[0](x)) if a % 2 == 0 and a > 2 else None


@block
def layer_norm(a, b):
    return [nn.LayerNorm(a)], lambda m, x, y: m[0](x.movedim(1, -1)).movedim(-1, 1)


@block
def channel_shuffle(a, b):
    if a % 2 or a < 4:
        return None
    return (
        [],
        lambda m, x, y: (
            x.view(len(x), 2, -1, SIZE, SIZE).transpose(1, 2).reshape(len(x), -1, SIZE, SIZE)
        ),
    )


@block
def pixel_shuffle(a, b):
    return ([], lambda m, x, y: F.max_pool2d(F.pixel_shuffle(x, 2), 2)) if a % 4 == 0 else None


@block
def pixel_unshuffle(a, b):
    return [], lambda m, x, y: F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2)


@block
def repeated(a, b):
    return [], lambda m, x, y: x.repeat(1, 2, 1, 1)


@block
def reverse(a, b):
    return [], lambda m, x, y: x.flip(1, 2)


@block
def padded(a, b):
    return [], lambda m, x, y: F.pad(x.roll(1, 3), (0, 0, 0, 0, 1, 1))


@block
def attention(a, b):
    def run(m, x, y):
        q, k, v = (layer(x).flatten(2) for layer in m)
        return (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(
            len(x), -1, SIZE, SIZE
        )

    return [conv(a, 2, 1), conv(a, 2, 1), conv(a, 6, 1)], run


@block
def written(a, b):
    """A part of a map of zeros is written in place."""

    def run(m, x, y):
        new = x.new_zeros(x.shape)
        new[:, :, 1:] = x[:, :, :-1]
        return new

    return [], run


class Random(nn.Module):
    """Each step computes a map of two of those before it. The maps that none has as its first one
    go to the head."""

    def __init__(self, steps):
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList()
        self.steps, widths, left = [], [8], {0}
        for name, first, second in steps:
            x, y = first % len(widths), second % len(widths)
            made = BLOCKS[name](widths[x], widths[y])
            if made is None or widths[x] > 32:
                continue
            layers, run = made
            self.layers.append(nn.ModuleList(layers))
            self.steps.append((run, x, y))
            maps = (torch.zeros(2, width, SIZE, SIZE) for width in (widths[x], widths[y]))
            with torch.no_grad():
                widths.append(run(layers, *maps).shape[1])
            left = left - {x} | {len(widths) - 1}
        self.left = dict.fromkeys(sorted(left))  # no list: it would hold numbers of the code
        self.heads = nn.ModuleList(nn.Linear(widths[i] * 4, 3) for i in self.left)

    def forward(self, x):
        maps = [self.stem(x)]
        for layers, (run, first, second) in zip(self.layers, self.steps, strict=True):
            maps.append(run(layers, maps[first], maps[second]))
        ends = [F.adaptive_avg_pool2d(maps[i], 2).flatten(1) for i in self.left]
        return sum(head(end) for head, end in zip(self.heads, ends, strict=True))


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(0, 9), st.integers(0, 9)),
    min_size=3,
    max_size=8,
)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(STEPS)
def test_a_random_network_is_slimmed_exactly_by_the_rules_alone(steps):
    torch.manual_seed(0)
    model = randomized(Random(steps))
    assert traced(model, IMAGES)[0].faults == []
    prove(model, channels(model, IMAGES).groups, IMAGES)
