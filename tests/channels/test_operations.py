"""Each kind of layer and operation in a tiny network: how many units can go follows from what it
computes, and the network without them equals the masked one."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import Net, faults, noise, pooled, prove, randomized, sizes
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as weight_norm_by_hook

from models.channel_selection import channel_selection
from slimming.channels.groups import channels
from slimming.slicing.prune import prunable

MAPS, TOKENS, ROWS = noise(2, 3, 8, 8), noise(2, 5, 3), noise(4, 3)
CASES = []


def case(inputs, units, tried=False):
    """The network that a function returns has these free units: their number, by the name of the
    first layer of their group. The rules alone find them; or, with ``tried``, a trial, because of
    numbers in the code."""

    def add(build):
        CASES.append(pytest.param(build, inputs, units, tried, id=build.__name__))
        return build

    return add


def conv(into, out, size=3, **kwargs):
    return nn.Conv2d(into, out, size, padding=size // 2, **kwargs)


def mapped(function, width=8, **parts):
    """conv a, ``function(net, x)``, conv b, head: all of the 8 channels of a can go, if what
    stands between leaves them."""

    def run(net, x):
        return net.out(pooled(net.b(function(net, net.a(x)))))

    return Net(run, a=conv(3, 8), **parts, b=conv(width, 6), out=nn.Linear(6, 3))


def between(layer, width=8):
    return mapped(lambda net, x: net.layer(x), width, layer=layer)


def sequence(function, width=8, **parts):
    """The same with linear layers on tokens (N, T, C)."""

    def run(net, x):
        return net.out(net.b(function(net, net.a(x))).mean(1))

    return Net(run, a=nn.Linear(3, 8), **parts, b=nn.Linear(width, 6), out=nn.Linear(6, 3))


FREE, PINNED = {"a": 8, "b": 6}, {"b": 6}  # with `mapped`, `between` and `sequence`

# --- layers with weights

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def add_convolutions(d):
    """conv a, a layer of each kind in ``d`` dimensions, BN, conv c, head."""
    c, t = CONVS[d], TRANSPOSED[d]
    kinds = {
        "convolution": (c(8, 6, 3), {"a": 8, "layer": 6}),
        # groups lose equal positions: of 4 of the channels that they read, and 6 that they write
        "grouped": (c(8, 12, 3, groups=2), {"a": 4, "layer": 6}),
        "depthwise": (c(8, 8, 3, groups=8), {"a": 8}),
        "depthwise_times_3": (c(8, 24, 3, groups=8), {"a": 8}),
        "transposed": (t(8, 6, 2, stride=2), {"a": 8, "layer": 6}),
        "transposed_grouped": (t(8, 12, 2, groups=2), {"a": 4, "layer": 6}),
        "transposed_depthwise": (t(8, 8, 2, stride=2, groups=8), {"a": 8}),
    }
    for name, (layer, units) in kinds.items():
        width = layer.out_channels

        def run(net, x):
            return net.out(pooled(net.c(net.bn(net.layer(net.a(x))).relu())))

        def build(layer=layer, width=width, run=run):
            parts = {"a": c(3, 8, 1), "layer": layer, "bn": NORMS[d](width), "c": c(width, 5, 1)}
            return Net(run, **parts, out=nn.Linear(5, 3))

        build.__name__ = f"{name}_{d}d"
        case(noise(2, 3, *[5] * d), {**units, "c": 5})(build)


for dimensions in CONVS:
    add_convolutions(dimensions)


@case(ROWS, FREE)
def linear():
    parts = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 6), "bn": nn.BatchNorm1d(6)}
    return Net(lambda n, x: n.out(n.bn(n.b(n.a(x).relu())).relu()), **parts, out=nn.Linear(6, 3))


@case(TOKENS, FREE)
def linear_on_tokens():
    return sequence(lambda n, x: F.gelu(x))


@case(MAPS, FREE)
def batch_norm_without_affine():
    return between(nn.BatchNorm2d(8, affine=False))


@case(MAPS, FREE)
def batch_norm_without_statistics():
    return between(nn.BatchNorm2d(8, track_running_stats=False))


@case(MAPS, FREE)
def synchronized_batch_norm():
    return between(nn.SyncBatchNorm(8))


@case(MAPS, FREE)
def functional_batch_norm():
    """Statistics and scales that are parameters of a module of one's own."""
    names = ("mean", "var", "gamma", "beta")
    parts = {name: nn.Parameter(torch.empty(8)) for name in names}
    return mapped(lambda n, x: F.batch_norm(x, n.mean, n.var.abs(), n.gamma, n.beta), **parts)


@case(MAPS, FREE)
def instance_norm():
    return between(nn.InstanceNorm2d(8))


@case(MAPS, FREE)
def instance_norm_with_affine():
    return between(nn.InstanceNorm2d(8, affine=True))


@case(MAPS, FREE)
def instance_norm_with_statistics():
    return between(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


@case(noise(2, 3, 9), {"a": 8, "b": 6})
def instance_norm_1d():
    def run(n, x):
        return n.out(pooled(n.b(n.norm(n.a(x)).relu())))

    parts = {"a": nn.Conv1d(3, 8, 3), "norm": nn.InstanceNorm1d(8), "b": nn.Conv1d(8, 6, 3)}
    return Net(run, **parts, out=nn.Linear(6, 3))


@case(MAPS, {"a": 4, "b": 6})
def group_norm():
    """Whole groups go: 4 of 2 channels."""
    return between(nn.GroupNorm(4, 8))


@case(MAPS, {"a": 4, "b": 6})
def group_norm_without_affine():
    return between(nn.GroupNorm(4, 8, affine=False))


@case(MAPS, {"a": 8, "b": 6})
def group_norm_of_each_channel():
    return between(nn.GroupNorm(8, 8))


@case(MAPS, PINNED)
def group_norm_of_one_group():
    return between(nn.GroupNorm(1, 8))


@case(TOKENS, PINNED)
def layer_norm():
    return sequence(lambda n, x: n.norm(x), norm=nn.LayerNorm(8))


@case(TOKENS, PINNED)
def layer_norm_without_affine():
    return sequence(lambda n, x: F.layer_norm(x, (8,)))


@case(TOKENS, FREE)
def layer_norm_over_tokens():
    """Each channel by itself, whatever the scales of the 5 tokens are."""
    return sequence(lambda n, x: n.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.LayerNorm(5))


@case(MAPS, PINNED)
def layer_norm_channels_last():
    def run(n, x):
        return n.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return mapped(run, norm=nn.LayerNorm(8))


@case(TOKENS, PINNED)
def rms_norm():
    return sequence(lambda n, x: n.norm(x), norm=nn.RMSNorm(8))


@case(TOKENS, PINNED)
def rms_norm_by_hand():
    def run(n, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * n.scale

    return sequence(run, scale=nn.Parameter(torch.empty(8)))


@case(MAPS, FREE)
def prelu():
    return between(nn.PReLU(8))


@case(MAPS, FREE)
def prelu_with_one_weight():
    return between(nn.PReLU())


@case(torch.arange(10).view(2, 5), {"a": 8, "b": 6})
def embedding():
    parts = {"a": nn.Embedding(10, 8), "b": nn.Linear(8, 6), "out": nn.Linear(6, 3)}
    return Net(lambda n, x: n.out(n.b(n.a(x)).relu().mean(1)), **parts)


@case(TOKENS, PINNED)
def multihead_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return sequence(lambda n, x: x + n.attention(x, x, x)[0], attention=attention)


@case(TOKENS, {"layer.linear1": 16, "b": 6})
def transformer_encoder_layer():
    """Only what stands between its two linear layers can go."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return sequence(lambda n, x: n.layer(x), layer=layer)


@case(TOKENS, PINNED)
def lstm():
    lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
    return sequence(lambda n, x: n.lstm(x)[0], 10, lstm=lstm)


@case(TOKENS, PINNED)
def gru():
    return sequence(lambda n, x: n.gru(x)[0], 5, gru=nn.GRU(8, 5, batch_first=True))


@case(MAPS, {"select": 8, "b": 6})
def selection():
    """A gate: conv b stops reading channels that the shortcut still needs."""
    return mapped(lambda n, x: n.select(x), select=channel_selection(8))


@case(MAPS, FREE)
def frozen_batch_norm():
    """As torchvision's: scales and shifts are buffers."""
    frozen = nn.Module()
    for name in ("weight", "bias", "running_mean", "running_var"):
        frozen.register_buffer(name, torch.empty(8))

    def run(n, x):
        weight, bias, mean, var = (t.view(1, -1, 1, 1) for t in n.frozen.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)

    return mapped(run, frozen=frozen)


class Standardized(nn.Conv2d):
    """The weights of each filter have mean 0 and variance 1."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=self.padding)


@case(MAPS, {"layer": 8, "b": 6})
def weight_standardisation():
    """The mean over what a filter reads would change; the filters themselves can go."""
    return between(Standardized(8, 8, 3, padding=1))


@case(MAPS, {"layer": 8, "b": 6})
def weight_norm_old():
    return between(weight_norm_by_hook(conv(8, 8)))


@case(MAPS, {"layer": 8, "b": 6})
def weight_norm_of_a_parametrization():
    return between(parametrizations.weight_norm(conv(8, 8)))


@case(TOKENS, {"layer": 8, "b": 6})
def weight_norm_of_a_linear_layer():
    layer = weight_norm_by_hook(nn.Linear(8, 8))
    return sequence(lambda n, x: n.layer(x), layer=layer)


@case(MAPS, {"layer": 8, "b": 6})
def pruning_mask():
    """The weight is computed from weight_orig and weight_mask before each run."""
    return between(prune.random_unstructured(conv(8, 8), "weight", 0.3))


# --- data movement


@case(MAPS, {"a": 8, "a2": 5, "b": 6})
def concatenation():
    def run(n, x):
        return n.out(pooled(n.b(torch.cat([n.a(x), n.a2(x)], 1))))

    return Net(run, a=conv(3, 8), a2=conv(3, 5), b=conv(13, 6), out=nn.Linear(6, 3))


@case(MAPS, FREE)
def concatenation_over_space():
    """Each channel of the two maps is read by one column of b."""
    return mapped(lambda n, x: torch.cat([x, x.flip(3)], 2))


@case(MAPS, {"a": 8, "b": 6})
def concatenation_of_two_maps_over_space():
    def run(n, x):
        return n.out(pooled(n.b(torch.cat([n.a(x), n.a2(x)], 3))))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, {"a": 8, "b": 6})
def stack():
    """Interleaved: b reads a channel of a, one of a2, ... What is stacked has equal widths."""

    def run(n, x):
        return n.out(pooled(n.b(torch.stack([n.a(x), n.a2(x)], 2).flatten(1, 2))))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(16, 6), out=nn.Linear(6, 3))


@case(MAPS, {"a": 4, "b": 6})
def chunk():
    def run(n, x):
        first, second = x.chunk(2, 1)
        return first * second.sigmoid()

    return mapped(run, 4)


@case(MAPS, {"a": 4, "b": 6, "c": 6})
def chunks_that_go_their_ways():
    """Two halves are equal also of the slim network, so they lose equal positions."""

    def run(n, x):
        first, second = n.a(x).chunk(2, 1)
        return n.out(pooled(torch.cat([n.b(first), n.c(second)], 1)))

    return Net(run, a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), out=nn.Linear(12, 3))


@case(MAPS, PINNED)
def chunks_of_unequal_sizes():
    """3, 3 and 2 channels: with 1, 1 and 2, chunk would make two of two."""
    return mapped(lambda n, x: torch.cat(x.chunk(3, 1)[::-1], 1))


@case(MAPS, {"a": 4, "b": 6})
def split_by_a_number_of_the_module():
    """As C2f of YOLOv8: self.c is the size of both parts."""

    def run(n, x):
        first, second = x.split((n.c, n.c), 1)
        return torch.cat([first, second, first + second], 1)

    return mapped(run, 12, c=4)


@case(MAPS, {"a": 8, "b": 6})
def split_by_two_numbers():
    """3 may become 2 and 5 become 3: both numbers are set at once."""

    def run(n, x):
        first, second = x.split(n.sizes, 1)
        return torch.cat([second, first], 1)

    return mapped(run, sizes=[5, 3])


@case(MAPS, PINNED, tried=True)
def split_by_a_number_in_the_code():
    return mapped(lambda n, x: torch.cat(x.split([5, 3], 1)[::-1], 1))


@case(MAPS, {"a": 4, "b": 6})
def unbind():
    def run(n, x):
        first, second = x.unflatten(1, (2, -1)).unbind(1)
        return first - second

    return mapped(run, 4)


@case(MAPS, PINNED)
def index_of_channels():
    return mapped(lambda n, x: x[:, n.order], order=torch.tensor([3, 1, 7, 0, 2, 5, 4, 6]))


@case(MAPS, FREE)
def index_of_positions():
    return mapped(lambda n, x: x[:, :, [3, 1, 2]][:, :, :, ::2])


@case(MAPS, PINNED)
def slice_of_channels():
    return mapped(lambda n, x: x[:, :5], 5)


@case(MAPS, FREE)
def slice_of_positions():
    """Focus of YOLOv5: space to channels by strides."""

    def run(n, x):
        parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return torch.cat(parts, 1)

    return mapped(run, 32)


@case(MAPS, FREE)
def gather_of_positions():
    return mapped(lambda n, x: x.gather(3, x.argsort(3)))


@case(MAPS, {"a": 8, "b": 6})
def gather_at_positions_of_another_map():
    """Where channel c of a is read stands in channel c of a2."""

    def run(n, x):
        return n.out(pooled(n.b(n.a(x).gather(3, n.a2(x).argsort(3))[..., :3])))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, PINNED)
def gather_of_channels():
    return mapped(lambda n, x: x.gather(1, x.argsort(1)))


@case(MAPS, FREE)
def padding_of_space():
    def run(n, x):
        x = F.pad(F.pad(x, (1, 1, 1, 1)), (2, 0, 1, 0), mode="reflect")
        return F.pad(F.pad(x, (0, 1, 0, 1), mode="replicate"), (1, 1, 1, 1), mode="circular")

    return mapped(run)


@case(MAPS, {"a": 8, "b": 6})
def padding_of_channels():
    """The shortcut A of ResNet: 2 channels of zeros before and after; b reads 12."""
    return mapped(lambda n, x: F.pad(x, (0, 0, 0, 0, 2, 2)), 12)


@case(MAPS, {"a": 8, "c": 6})
def padding_of_channels_added():
    """Those of the other branch that meet zeros stay; the 8 between go with those of a."""

    def run(n, x):
        x = n.a(x)
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + n.b(x)
        return n.out(pooled(n.c(x.relu())))

    return Net(run, a=conv(3, 8), b=conv(8, 12, stride=2), c=conv(12, 6), out=nn.Linear(6, 3))


@case(MAPS, FREE)
def roll_of_space():
    return mapped(lambda n, x: x.roll((1, -2), (2, 3)) - x)


@case(MAPS, PINNED)
def roll_of_channels():
    return mapped(lambda n, x: x.roll(3, 1))


@case(MAPS, FREE)
def flip():
    """Of channels too: what stays is in the reverse order."""
    return mapped(lambda n, x: x.flip(1) + 0 * x.flip(1, 3)[..., :1])


@case(MAPS, {"a": 4, "b": 6})
def flip_added():
    """Channel 0 goes with channel 7, 1 with 6, ..."""
    return mapped(lambda n, x: x + x.flip(1))


@case(MAPS, FREE)
def repeat():
    return mapped(lambda n, x: x.repeat(1, 3, 1, 1), 24)


@case(MAPS, FREE)
def repeat_interleave():
    return mapped(lambda n, x: x.repeat_interleave(3, dim=1), 24)


@case(MAPS, FREE)
def expand():
    def run(n, x):
        return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)

    return mapped(run, 16)


@case(MAPS, {"a": 2, "b": 6})
def pixel_shuffle():
    """(8, H, W) -> (2, 2H, 2W): the four channels of an output go together."""
    return between(nn.PixelShuffle(2), 2)


@case(MAPS, {"a": 2, "b": 6})
def pixel_shuffle_by_hand():
    def run(n, x):
        b, c, h, w = x.shape
        x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)

    return mapped(run, 2)


@case(MAPS, FREE)
def pixel_unshuffle():
    return between(nn.PixelUnshuffle(2), 32)


@case(MAPS, FREE)
def unfold():
    """Nine columns of the linear layer for each channel."""

    def run(n, x):
        return n.out(n.b(F.unfold(n.a(x), 3).transpose(1, 2)).mean(1))

    return Net(run, a=conv(3, 8), b=nn.Linear(72, 6), out=nn.Linear(6, 3))


@case(MAPS, FREE)
def fold():
    return mapped(lambda n, x: F.fold(F.unfold(x, 2, stride=2).tanh(), (8, 8), 2, stride=2))


@case(MAPS, {"a": 2, "b": 6})
def fold_of_channels():
    """Each four channels of a are the pixels of one channel."""
    return mapped(lambda n, x: F.fold(x.flatten(2), (16, 16), 2, stride=2), 2)


@case(MAPS, {"a": 8, "w": 8, "b": 6})
def weight_of_a_module_of_ones_own():
    """Read by F.conv2d: what goes with channels of a is zero in the masked network."""
    return mapped(lambda n, x: F.conv2d(x, n.w, padding=1), w=nn.Parameter(torch.empty(8, 8, 3, 3)))


@case(MAPS, PINNED, tried=True)
def parts_of_sizes_that_the_code_computes():
    """A third and two thirds of what is left are other channels."""

    def run(n, x):
        size = x.shape[1] // 3
        first, second = x.split([size, x.shape[1] - size], 1)
        return torch.cat([second, first], 1)

    return mapped(run)


@case(MAPS, FREE)
def unfold_of_a_tensor():
    return mapped(lambda n, x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)))


@case(MAPS, {"a": 4, "b": 6})
def channel_shuffle():
    """Two groups that are interleaved lose equal positions."""

    def run(n, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    return mapped(run)


@case(MAPS, {"a": 2, "b": 6})
def channel_shuffle_of_small_groups():
    """Four groups of two: the code leaves the size of a group open, not how many there are."""

    def run(n, x):
        b, c, h, w = x.shape
        return x.view(b, 4, -1, h, w).transpose(1, 2).reshape(b, c, h, w)

    return mapped(run)


@case(MAPS, {"a": 2, "b": 6})
def parts_of_four_channels():
    """Here the number of parts is open: whole parts go."""

    def run(n, x):
        b, _, h, w = x.shape
        return x.reshape(b, -1, 4, h, w).flip(2).flatten(1, 2)

    return mapped(run)


@case(MAPS, {"a": 4, "b": 6})
def channel_shuffle_of_pytorch():
    return between(nn.ChannelShuffle(2))


@case(MAPS, FREE)
def flatten():
    """64 columns of the linear layer for each channel."""
    parts = {"a": conv(3, 8), "b": nn.Linear(512, 6), "out": nn.Linear(6, 3)}
    return Net(lambda n, x: n.out(n.b(n.a(x).view(len(x), -1)).relu()), **parts)


@case(MAPS, FREE)
def flatten_channels_last():
    parts = {"a": conv(3, 8), "b": nn.Linear(512, 6), "out": nn.Linear(6, 3)}
    return Net(lambda n, x: n.out(n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)).relu()), **parts)


@case(ROWS, {"a": 8, "b": 6})
def maps_from_a_linear_layer():
    """As a generator: 16 rows of the linear layer for each channel."""

    def run(n, x):
        return n.out(pooled(n.b(n.a(x).view(len(x), -1, 4, 4))))

    return Net(run, a=nn.Linear(3, 128), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, FREE)
def resizing():
    def run(n, x):
        x = F.interpolate(x, scale_factor=2, mode="bilinear") + F.interpolate(x, scale_factor=2)
        return F.adaptive_avg_pool2d(F.max_pool2d(x, 2) - F.avg_pool2d(x, 2), 3)

    return mapped(run)


@case(MAPS, {"a": 8, "b": 6})
def unpooling_at_positions_of_another_map():
    """As SegNet: channel c of a2 is written where channel c of a has its maxima."""

    def run(n, x):
        _, places = F.max_pool2d(n.a(x), 2, return_indices=True)
        return n.out(n.b(F.max_unpool2d(n.a2(x), places, 2)).relu().mean((2, 3)))

    return Net(run, a=conv(3, 8), a2=conv(3, 8, stride=2), b=conv(8, 6), out=nn.Linear(6, 3))


# --- sums, products, gates


@case(MAPS, {"a": 8, "b": 6})
def addition():
    def run(n, x):
        return n.out(pooled(n.b((n.a(x) + n.a2(x)).relu())))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, {"a": 8, "b": 6})
def gate_of_one_channel():
    """Spatial attention: one channel, which stays, for all of a."""
    return mapped(lambda n, x: x * n.gate(x).sigmoid(), gate=conv(8, 1))


@case(MAPS, PINNED)
def gate_of_statistics_over_channels():
    """CBAM: the mean over channels would change."""

    def run(n, x):
        return x * n.gate(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid()

    return mapped(run, gate=conv(2, 1))


@case(MAPS, {"a": 8, "fc1": 4, "b": 6})
def squeeze_and_excite():
    def run(n, x):
        gate = n.fc2(n.fc1(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]

    return mapped(run, fc1=nn.Linear(8, 4), fc2=nn.Linear(4, 8))


@case(MAPS, PINNED)
def efficient_channel_attention():
    """ECA: a convolution over the channels mixes neighbours."""

    def run(n, x):
        gate = n.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.view(len(x), -1, 1, 1)

    return mapped(run, eca=nn.Conv1d(1, 1, 3, padding=1))


@case(MAPS, {"a": 8, "b": 6})
def learnable_gates():
    """BiFPN: two numbers weigh two maps."""

    def run(n, x):
        w = n.w.relu()
        w = w / (w.sum() + 1e-4)
        return n.out(pooled(n.b(w[0] * n.a(x) + w[1] * n.a2(x))))

    gates = {"w": nn.Parameter(torch.ones(2))}
    return Net(run, **gates, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(TOKENS, FREE)
def layer_scale():
    return sequence(lambda n, x: x + n.gamma * x.tanh(), gamma=nn.Parameter(torch.empty(8)))


@case(MAPS, FREE)
def layer_scale_of_maps():
    return mapped(lambda n, x: n.gamma * x, gamma=nn.Parameter(torch.empty(8, 1, 1)))


@case(TOKENS, FREE)
def position_embeddings():
    return sequence(lambda n, x: x + n.places, places=nn.Parameter(torch.empty(1, 5, 8)))


@case(MAPS, FREE)
def position_embeddings_of_pixels():
    """One number for each pixel, the same for all channels."""
    return mapped(lambda n, x: x + n.places, places=nn.Parameter(torch.empty(1, 1, 8, 8)))


@case(MAPS, FREE)
def grid_times_channels():
    """(N, C, 1, 1) times (1, 1, H, W): the grid stays, the channels can go."""

    def run(n, x):
        return x.mean((2, 3), keepdim=True) * n.grid

    return mapped(run, grid=nn.Parameter(torch.empty(1, 1, 4, 4)))


@case(TOKENS, FREE)
def class_token():
    def run(n, x):
        return torch.cat([n.token.expand(len(x), -1, -1), x], 1)

    return sequence(run, token=nn.Parameter(torch.empty(1, 1, 8)))


@case(MAPS, FREE)
def pointwise_functions():
    def run(n, x):
        x = torch.where(x > 0, x.exp().clamp(max=3), F.softplus(x))
        x = x.masked_fill(x > 2, 1.0) + F.hardswish(x) * F.elu(x)
        return torch.lerp(x, x.abs().sqrt(), 0.3).nan_to_num()

    return mapped(run)


@case(MAPS, PINNED)
def softmax_over_channels():
    return mapped(lambda n, x: x.softmax(1))


@case(MAPS, FREE)
def softmax_over_space():
    return mapped(lambda n, x: x * x.flatten(2).softmax(2).view(x.shape))


@case(MAPS, PINNED)
def normalised_over_channels():
    return mapped(lambda n, x: F.normalize(x, dim=1))


@case(MAPS, FREE)
def reductions_over_space():
    def run(n, x):
        rows = x.flatten(2)
        rows = rows + rows.amax(2, True) * rows.std(2, keepdim=True) - rows.norm(dim=2)[..., None]
        return x + rows.logsumexp(2)[..., None, None] + rows.var(2).view(len(x), -1, 1, 1)

    return mapped(run)


@case(MAPS, PINNED)
def maxima_over_channels():
    return mapped(lambda n, x: x - x.max(1, keepdim=True).values)


@case(MAPS, FREE)
def sorting_of_positions():
    return mapped(lambda n, x: x.flatten(2).sort(2).values.view(x.shape) + x.topk(8, 3).values)


@case(MAPS, PINNED)
def sorting_of_channels():
    return mapped(lambda n, x: x.topk(5, 1).values, 5)


@case(MAPS, PINNED)
def cumulative_sum_of_channels():
    return mapped(lambda n, x: x.cumsum(1))


# --- attention


@case(TOKENS, {"a": 8, "v": 8, "b": 6})
def attention_by_hand():
    """The channels of v go on; the products of q and k would change."""

    def run(n, x):
        weights = (n.q(x) @ n.k(x).transpose(1, 2)).softmax(-1)
        return weights @ n.v(x)

    return sequence(run, q=nn.Linear(8, 4), k=nn.Linear(8, 4), v=nn.Linear(8, 8))


def heads(x):
    """4 of them, of a width that the code computes."""
    return x.view(*x.shape[:2], 4, x.shape[2] // 4).transpose(1, 2)


@case(TOKENS, {"a": 8, "v": 2, "b": 6})
def attention_of_heads():
    """4 heads of 2 channels: those of v lose equal positions, no head goes without its q and k."""

    def run(n, x):
        q, k, v = (heads(layer(x)) for layer in (n.q, n.k, n.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return sequence(run, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8))


@case(TOKENS, {"a": 8, "v": 2, "b": 6})
def attention_of_heads_by_hand():
    def run(n, x):
        q, k, v = (heads(layer(x)) for layer in (n.q, n.k, n.v))
        return ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    return sequence(run, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8))


@case(TOKENS, {"a": 8, "b": 6})
def attention_of_one_layer():
    """q, k and v are three equal parts of one layer: v stays, as q and k do."""

    def run(n, x):
        q, k, v = n.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    return sequence(run, qkv=nn.Linear(8, 24))


@case(MAPS, {"a": 8, "v": 8, "b": 6})
def attention_over_pixels():
    """SAGAN: the result is added to what it is computed from."""

    def run(n, x):
        q, k, v = (layer(x).flatten(2) for layer in (n.q, n.k, n.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return n.gamma * n.o((v @ weights.transpose(1, 2)).view(len(x), -1, 8, 8)) + x

    parts = {name: nn.Conv2d(8, width, 1) for name, width in (("q", 2), ("k", 2), ("v", 8))}
    return mapped(run, **parts, o=nn.Conv2d(8, 8, 1), gamma=nn.Parameter(torch.ones(1)))


@case(MAPS, PINNED)
def gram_matrix():
    def run(n, x):
        x = x.flatten(2)
        return (x @ x.transpose(1, 2))[:, :, :, None]

    return mapped(run)


# --- the same layer or tensor in two places


@case(MAPS, {"a": 8, "b": 6})
def layer_that_runs_twice():
    """What it writes it reads again."""
    return mapped(lambda n, x: n.twice(n.twice(x).relu()), twice=conv(8, 8))


@case((MAPS, MAPS.flip(3)), {"a": 8, "b": 6})
def siamese_encoder():
    def run(n, x, y):
        first, second = (n.b(n.a(z).relu()).mean((2, 3)) for z in (x, y))
        return n.out(torch.cat([first, second], 1))

    return Net(run, a=conv(3, 8), b=conv(8, 6), out=nn.Linear(12, 3))


@case(MAPS, {"a": 8, "b": 6})
def head_that_two_maps_share():
    def run(n, x):
        return n.out(pooled(n.b(n.a(x)))) + n.out(pooled(n.b(n.a2(x))))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@case(MAPS, {"a": 8, "b": 6})
def tied_parameters():
    """One weight of two layers: they read and write the same channels."""
    net = mapped(lambda n, x: n.d(n.c(x).relu()), c=conv(8, 8), d=conv(8, 8))
    net.d.weight = net.c.weight
    return net


@case(MAPS, {"a": 8, "c": 5, "b": 6})
def cached_activations():
    """A module keeps what it computed for another one."""

    def run(n, x):
        n.cache = n.c(x)
        return torch.cat([x, n.cache.relu()], 1)

    return mapped(run, 13, c=conv(8, 5))


# --- writes in place


@case(MAPS, FREE)
def shift_over_space():
    """A write to a part of new storage."""

    def run(n, x):
        out = torch.zeros_like(x)
        out[:, :, 1:] = x[:, :, :-1]
        out[:, :, :1] += 1
        return out

    return mapped(run)


@case(MAPS, {"a2": 5, "b": 6})
def concatenation_by_writes():
    """Where the second write starts may be a number in the code: a stays."""

    def run(n, x):
        first, second = n.a(x), n.a2(x)
        width = first.shape[1]
        both = x.new_empty(len(x), width + second.shape[1], 8, 8)
        both[:, :width], both[:, width:] = first, second
        return n.out(pooled(n.b(both)))

    return Net(run, a=conv(3, 8), a2=conv(3, 5), b=conv(13, 6), out=nn.Linear(6, 3))


@case(MAPS, FREE)
def writes_to_a_view():
    def run(n, x):
        x.flatten(2).relu_().mul_(2)
        x[:, :, ::2].add_(1)
        return x

    return mapped(run)


@case(MAPS, PINNED)
def writes_to_some_channels():
    """Temporal shift: which channels move stands in the code."""

    def run(n, x):
        x[:, :2, 1:] = x[:, :2, :-1].clone()
        return x

    return mapped(run)


@case(MAPS, {"a": 8, "b": 6})
def addition_in_place():
    def run(n, x):
        y = n.a2(x)
        y += n.a(x)
        return n.out(pooled(n.b(F.relu_(y))))

    return Net(run, a=conv(3, 8), a2=conv(3, 8), b=conv(8, 6), out=nn.Linear(6, 3))


@pytest.mark.parametrize("build, inputs, units, tried", CASES)
def test_what_can_go_and_that_it_is_exact(build, inputs, units, tried):
    torch.manual_seed(0)
    model = randomized(build())
    found = prunable(model, inputs)
    assert sizes(found) == units, found.pinned
    assert tried or sizes(channels(model, inputs)) == units, "only the trial finds it"
    for seed in (0, 1):
        prove(model, found.groups, inputs, seed)
    assert faults(model, inputs) == []


def test_a_weight_is_not_computed_while_a_network_is_sliced(monkeypatch):
    """Of lengths and directions of which one has been sliced: PyTorch writes beyond its memory."""
    names = [f"layer{i}" for i in range(8)]
    layers = {name: parametrizations.weight_norm(conv(8, 8)) for name in names}

    def run(n, x):
        for name in names:
            x = getattr(n, name)(x)
        return x

    model, compute, sizes_of = randomized(mapped(run, **layers)), torch._weight_norm, []

    def seen(v, g, dim):
        sizes_of.append((len(v), len(g)))
        return compute(v, g, dim) if len(v) == len(g) else v

    monkeypatch.setattr(torch, "_weight_norm", seen)
    prove(model, prunable(model, MAPS).groups, MAPS)
    assert sizes_of and all(v == g for v, g in sizes_of)
