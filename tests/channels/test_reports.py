"""Small networks in the shapes that users of pruning libraries report faults with: each is slimmed,
and equals the masked network."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small_networks import Net, faults, noise, pooled, prove, randomized, sizes
from torch import nn

from slimming.slicing.prune import prunable

IMAGES, TOKENS = noise(2, 3, 8, 8), noise(2, 5, 3)
REPORTS = []


def report(inputs, free):
    """The network that a function returns can lose channels of the layers in ``free``."""

    def add(build):
        REPORTS.append(pytest.param(build, inputs, free.split(), id=build.__name__))
        return build

    return add


def cbr(into, out, stride=1, **kwargs):
    layer = nn.Conv2d(into, out, 3, stride, 1, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU())


def classifier(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


# --- split and chunk


@report(IMAGES, "cv1.0 cv2.0 m.0")
def c2f_with_chunk():
    """Torch-Pruning 147 and 499, ultralytics 14171: YOLOv8's C2f."""

    def run(n, x):
        y = list(n.cv1(x).chunk(2, 1))
        y.append(n.m(y[-1]))
        return n.out(pooled(n.cv2(torch.cat(y, 1))))

    return Net(run, cv1=cbr(3, 16), m=cbr(8, 8), cv2=cbr(24, 8), out=nn.Linear(8, 4))


@report(IMAGES, "cv1.0 cv2.0 m.0")
def c2f_with_split():
    """The same by a number of the module."""

    def run(n, x):
        y = list(n.cv1(x).split((n.c, n.c), 1))
        y.append(n.m(y[-1]))
        return n.out(pooled(n.cv2(torch.cat(y, 1))))

    return Net(run, c=8, cv1=cbr(3, 16), m=cbr(8, 8), cv2=cbr(24, 8), out=nn.Linear(8, 4))


@report(IMAGES, "stem.0 out.0")
def partial_convolution():
    """NNI 5713: FasterNet convolves the first quarter only, whose size the module holds."""

    def run(n, x):
        first, rest = n.stem(x).split([n.dim_conv3, n.dim_untouched], 1)
        return n.head(n.out(torch.cat([n.partial(first), rest], 1)))

    parts = {"dim_conv3": 4, "dim_untouched": 12, "stem": cbr(3, 16), "out": cbr(16, 8)}
    return Net(run, **parts, partial=nn.Conv2d(4, 4, 3, 1, 1), head=classifier(width=8))


@report(IMAGES, "conv1 conv3")
def simple_gate():
    """NNI 5416: NAFNet multiplies two halves."""

    def run(n, x):
        first, second = n.conv2(n.conv1(x)).chunk(2, 1)
        x = first * second
        x = x * n.attention(x.mean((2, 3), keepdim=True))
        return n.head(n.conv3(x))

    parts = {
        "conv1": nn.Conv2d(3, 16, 1),
        "conv2": nn.Conv2d(16, 16, 3, padding=1, groups=16),
        "attention": nn.Conv2d(8, 8, 1),
        "conv3": nn.Conv2d(8, 6, 1),
    }
    return Net(run, **parts, head=classifier(width=6))


@report(noise(2, 3, 20), "0")
def gated_linear_unit():
    """Torch-Pruning 366."""
    layers = [nn.Conv1d(3, 24, 3, padding=1), nn.GLU(1), nn.Conv1d(12, 8, 3, dilation=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))


@report(IMAGES, "stem.0 right.0 right.4")
def shufflenet_unit():
    """NNCF 715: half of the channels take a shortcut, then both are shuffled."""

    def run(n, x):
        left, right = n.stem(x).chunk(2, 1)
        x = torch.cat([left, n.right(right)], 1)
        b, c, h, w = x.shape
        return n.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))

    depthwise = [nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)]
    right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), *depthwise, nn.Conv2d(8, 8, 1), nn.ReLU())
    return Net(run, stem=cbr(3, 16), right=right, head=classifier(width=16))


@report(IMAGES, "block.0 left right")
def two_parts_of_unequal_sizes():
    """OneFlow-Pruning 7: a third and two thirds, which the forward computes; they stay."""

    def run(n, x):
        x = n.block(x)
        third = x.shape[1] // 3
        first, second = x.split([third, x.shape[1] - third], 1)
        return n.out(torch.cat([pooled(n.left(first)), pooled(n.right(second))], 1))

    parts = {"block": nn.Sequential(nn.Conv2d(3, 6, 1), nn.GELU(), nn.Conv2d(6, 12, 1))}
    parts |= {"left": nn.Conv2d(4, 6, 1), "right": nn.Conv2d(8, 6, 1)}
    return Net(run, **parts, out=nn.Linear(12, 4))


@report(IMAGES, "stem.0 out.0")
def four_branches():
    """Torch-Pruning 100 and 505: Res2Net, each part added to the one before."""

    def run(n, x):
        parts, done = n.stem(x).chunk(4, 1), []
        for layer, part in zip(n.convs, parts, strict=True):
            done.append(layer(part + done[-1] if done else part))
        return n.head(n.out(torch.cat(done, 1)))

    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(4))
    return Net(run, stem=cbr(3, 16), convs=convs, out=cbr(16, 8), head=classifier(width=8))


@report(TOKENS, "embed mlp.0 proj_out")
def attention_with_normalised_queries():
    """Torch-Pruning 522 and 524: qkv by unbind, RMSNorm on queries and keys."""

    def run(n, x):
        x = n.embed(x)
        q, k, v = n.qkv(x).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (z * torch.rsqrt(z.pow(2).mean(-1, True) + 1e-6) * n.scale for z in (q, k))
        x = x + n.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = n.proj_out(x + n.mlp(x))
        return n.out(x.mean(1))

    parts = {"embed": nn.Linear(3, 8), "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}
    parts |= {"mlp": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))}
    parts |= {"proj_out": nn.Linear(8, 6), "scale": nn.Parameter(torch.ones(4))}
    return Net(run, **parts, out=nn.Linear(6, 4))


# --- transposed convolutions, pixel shuffle


@report(IMAGES, "0 1")
def transposed_between_convolutions():
    """Torch-Pruning 99."""
    layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.ConvTranspose2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.Conv2d(8, 3, 3, 1, 1))


@report(noise(2, 6), "linear up1 up2")
def generator():
    """Torch-Pruning 125: a linear layer, viewed with the channels of the next one."""

    def run(n, x):
        x = n.linear(x).relu().view(-1, n.up1.in_channels, 4, 4)
        return n.last(n.up2(n.up1(x).relu()).relu()).tanh()

    parts = {
        "linear": nn.Linear(6, 128),
        "up1": nn.ConvTranspose2d(8, 6, 4, 2, 1),
        "up2": nn.ConvTranspose2d(6, 5, 4, 2, 1),
    }
    return Net(run, **parts, last=nn.Conv2d(5, 3, 3, 1, 1))


@report(IMAGES, "e1.0 e2.0 up d.0 up2")
def unet():
    """Torch-Pruning 60: upsampled maps next to those of the encoder."""

    def run(n, x):
        a = n.e1(x)
        x = n.d(torch.cat([a, n.up(n.e2(a))], 1))
        return n.out(n.up2(x).relu())

    parts = {"e1": cbr(3, 8, 2), "e2": cbr(8, 12, 2), "up": nn.ConvTranspose2d(12, 8, 2, 2)}
    parts |= {"d": cbr(16, 8), "up2": nn.ConvTranspose2d(8, 6, 2, 2)}
    return Net(run, **parts, out=nn.Conv2d(6, 2, 1))


@report(noise(2, 3, 10, 10), "e1.0 up d.0")
def unet_that_pads():
    """Odd sizes: the decoder is padded to the encoder's."""

    def run(n, x):
        a = n.e1(x)
        b = n.up(n.e2(a))
        high, wide = a.shape[2] - b.shape[2], a.shape[3] - b.shape[3]
        return n.out(n.d(torch.cat([a, F.pad(b, (0, wide, 0, high))], 1)))

    parts = {"e1": cbr(3, 8, 2), "e2": nn.Conv2d(8, 6, 2, 2), "up": nn.ConvTranspose2d(6, 8, 2, 2)}
    return Net(run, **parts, d=cbr(16, 8), out=nn.Conv2d(8, 2, 1))


@report(IMAGES, "0 2")
def pixel_shuffle_before_a_convolution():
    """Torch-Pruning 98 and 420."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)
    )


@report(IMAGES, "head body.0")
def super_resolution():
    """The last layer writes pixels by PixelShuffle; only what is before can go."""

    def run(n, x):
        x = n.head(x)
        return n.shuffle(n.tail(x + n.body(x)))

    body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
    parts = {"head": nn.Conv2d(3, 8, 3, 1, 1), "body": body, "tail": nn.Conv2d(8, 12, 3, 1, 1)}
    return Net(run, **parts, shuffle=nn.PixelShuffle(2))


# --- norms over channels


@report(IMAGES, "0 3")
def group_norms():
    """Torch-Pruning 93, NNI 5069."""
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()]
    return classifier(*layers, nn.Conv2d(16, 8, 3), nn.GroupNorm(4, 8), width=8)


@report(IMAGES, "0")
def group_norm_before_grouped_convolution():
    """NNI 5069: 4 groups in both: those of the norm go whole, those of the convolution equally."""
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.Conv2d(16, 8, 3, groups=2)]
    return classifier(*layers, nn.ReLU(), width=8)


@report(IMAGES, "pw1")
def convnext_block():
    """Torch-Pruning 119 and 258: LayerNorm and layer scale on channels last; the inner layer."""

    def run(n, x):
        x = n.stem(x)
        y = n.norm(n.dw(x).permute(0, 2, 3, 1))
        y = n.gamma * n.pw2(F.gelu(n.pw1(y)))
        return n.head(x + y.permute(0, 3, 1, 2))

    parts = {"stem": nn.Conv2d(3, 8, 2, 2), "dw": nn.Conv2d(8, 8, 3, 1, 1, groups=8)}
    parts |= {"norm": nn.LayerNorm(8), "pw1": nn.Linear(8, 32), "pw2": nn.Linear(32, 8)}
    return Net(run, **parts, gamma=nn.Parameter(torch.ones(8)), head=classifier(width=8))


@report(IMAGES, "b.0")
def layer_norm_of_images():
    """Torch-Pruning 490: LayerNorm over channels and space pins what it normalises."""

    def run(n, x):
        return n.head(n.b(n.norm(n.a(x)).relu()))

    parts = {"a": nn.Conv2d(3, 8, 3, 1, 1), "norm": nn.LayerNorm([8, 8, 8]), "b": cbr(8, 8)}
    return Net(run, **parts, head=classifier(width=8))


@report(IMAGES, "0 3")
def instance_norms():
    """Torch-Pruning 200, NNCF 1089."""
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return classifier(*layers, nn.InstanceNorm2d(8, affine=True), nn.ReLU(), width=8)


@report(noise(2, 1, 8, 8, 8), "0 4")
def volumes():
    """NNCF 1057: Conv3d with InstanceNorm3d and BatchNorm3d."""
    layers = [nn.Conv3d(1, 8, 3, 1, 1), nn.InstanceNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)]
    layers += [nn.Conv3d(8, 8, 3, 1, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))


@report(IMAGES, "a.0 b.0")
def l2_norm_beside():
    """Torch-Pruning 24: SSD scales one of its maps by the norm over channels; the others can go."""

    def run(n, x):
        x = n.a(x)
        y = n.conf(x)
        return y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-6) * n.scale, n.out(n.b(x))

    parts = {"a": cbr(3, 8), "conf": nn.Conv2d(8, 4, 1), "b": cbr(8, 6)}
    return Net(run, **parts, scale=nn.Parameter(torch.ones(4, 1, 1)), out=nn.Conv2d(6, 2, 1))


# --- parameters outside of layers


@report(IMAGES, "a.0 b.0")
def soft_threshold():
    """Torch-Pruning 167: ISTA-Net, a threshold and convolutions of weights of its own."""

    def run(n, x):
        x = n.a(x)
        x = torch.sign(x) * (x.abs() - n.threshold).relu()
        return n.head(n.b(F.conv2d(x, n.weight, padding=1)))

    parts = {"a": cbr(3, 8), "threshold": nn.Parameter(torch.ones(1))}
    parts |= {"weight": nn.Parameter(torch.ones(8, 8, 3, 3)), "b": cbr(8, 6)}
    return Net(run, **parts, head=classifier(width=6))


@report(IMAGES, "patch fc1")
def class_token_and_positions():
    """Torch-Pruning 356: what a vision transformer adds to its patches."""

    def run(n, x):
        x = n.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([n.token.expand(len(x), -1, -1), x], 1) + n.positions
        return n.out((x + n.fc2(n.fc1(x).relu()))[:, 0])

    parts = {"patch": nn.Conv2d(3, 8, 4, 4), "token": nn.Parameter(torch.ones(1, 1, 8))}
    parts |= {"positions": nn.Parameter(torch.ones(1, 5, 8)), "fc1": nn.Linear(8, 16)}
    return Net(run, **parts, fc2=nn.Linear(16, 8), out=nn.Linear(8, 4))


@report(IMAGES, "a.0 b.0")
def channel_scales():
    """Torch-Pruning 364: a scale and a shift of each channel."""

    def run(n, x):
        return n.head(n.b(n.a(x) * n.scale + n.shift))

    shape = (1, 8, 1, 1)
    parts = {"scale": nn.Parameter(torch.ones(shape)), "shift": nn.Parameter(torch.ones(shape))}
    return Net(run, **parts, a=cbr(3, 8), b=cbr(8, 6), head=classifier(width=6))


@report(IMAGES, "a.0 b.0")
def weights_of_a_feature_pyramid():
    """A few learnable numbers weigh whole maps."""

    def run(n, x):
        y, w = n.a(x), n.w.relu()
        w = w / (w.sum() + 1e-4)
        return n.head(w[0] * y + w[1] * n.b(y))

    parts = {"w": nn.Parameter(torch.ones(2)), "a": cbr(3, 8), "b": cbr(8, 8)}
    return Net(run, **parts, head=classifier(cbr(8, 6), width=6))


# --- inputs and outputs


@report((IMAGES, IMAGES.flip(3)), "enc.0.0 enc.1.0")
def siamese():
    """Torch-Pruning 172: one encoder for two images."""

    def run(n, a, b):
        return n.out(torch.cat([pooled(n.enc(a)), pooled(n.enc(b))], 1))

    return Net(run, enc=nn.Sequential(cbr(3, 8), cbr(8, 8)), out=nn.Linear(16, 2))


@report({"image": IMAGES, "depth": IMAGES[:, :1]}, "rgb.0 d.0 both.0")
def image_and_depth():
    """Torch-Pruning 396: arguments by name."""

    def run(n, image, depth):
        return n.head(n.both(torch.cat([n.rgb(image), n.d(depth)], 1)))

    return Net(run, rgb=cbr(3, 8), d=cbr(1, 4), both=cbr(12, 6), head=classifier(width=6))


@report(IMAGES, "a.0 b.0")
def outputs_of_many_kinds():
    """Torch-Pruning 94: a dict of a list and a tuple."""

    def run(n, x):
        x = n.a(x)
        out = n.o(n.b(x))
        return {"maps": [out, out.amax((2, 3))], "rest": (n.o2(x), None)}

    return Net(run, a=cbr(3, 8), b=cbr(8, 6), o=nn.Conv2d(6, 4, 1), o2=nn.Conv2d(8, 2, 1))


@report((noise(2, 3), noise(2, 5)), "wide deep.0 deep.2")
def wide_and_deep():
    """Torch-Pruning 481: layers of different inputs are groups of their own."""

    def run(n, x, y):
        return n.out(torch.cat([n.wide(x), n.deep(y)], 1))

    deep = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
    return Net(run, wide=nn.Linear(3, 6), deep=deep, out=nn.Linear(12, 2))


@report(IMAGES, "backbone head.0.0")
def detector():
    """NNCF 851: one head for two maps; their outputs are viewed, permuted and joined."""

    def run(n, x):
        maps = [n.backbone(x)]
        maps.append(F.max_pool2d(maps[0], 2))
        outs = [n.head(m).view(len(x), 2, 5, *m.shape[2:]).permute(0, 1, 3, 4, 2) for m in maps]
        return torch.cat([o.reshape(len(x), -1, 5).sigmoid() for o in outs], 1)

    head = nn.Sequential(cbr(8, 8), nn.Conv2d(8, 10, 1))
    return Net(run, backbone=nn.Conv2d(3, 8, 3, 1, 1), head=head)


@report(IMAGES, "a.0 b.0")
def focus():
    """NNCF 851: YOLOv5 moves pixels to channels before the first convolution."""

    def run(n, x):
        x = torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        return n.head(n.b(n.a(x)))

    return Net(run, a=cbr(12, 8), b=cbr(8, 6), head=classifier(width=6))


# --- reshapes


@report(noise(2, 2, 5, 5), "conv1 linear1")
def convolution_to_linear():
    """Torch-Pruning 50."""

    def run(n, x):
        return n.out(n.linear1(n.conv1(x).relu().flatten(1)).relu())

    parts = {"conv1": nn.Conv2d(2, 4, 3), "linear1": nn.Linear(36, 8)}
    return Net(run, **parts, out=nn.Linear(8, 2))


@report(noise(3, 1, 4), "0 2 4")
def convolutions_of_signals():
    """Torch-Pruning 451."""
    layers = [nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)]
    return nn.Sequential(*layers)


@report(IMAGES, "a.0 b.0 fc.0")
def view_of_maps():
    """Torch-Pruning 511: x.view(x.size(0), -1), as tutorials do."""

    def run(n, x):
        x = n.b(n.a(x))
        return n.fc(x.view(x.size(0), -1))

    fc = nn.Sequential(nn.Linear(6 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return Net(run, a=cbr(3, 8), b=cbr(8, 6, 2), fc=fc)


@report(IMAGES, "a.0 b.0")
def rows_as_a_sequence():
    """Torch-Pruning 153: height and channels become one feature of an LSTM, which keeps them."""

    def run(n, x):
        x = n.c(n.b(n.a(x)))
        return n.out(n.lstm(x.permute(0, 3, 1, 2).flatten(2))[0])

    parts = {"a": cbr(3, 8), "b": cbr(8, 6), "c": cbr(6, 4)}
    return Net(run, **parts, lstm=nn.LSTM(32, 6, batch_first=True), out=nn.Linear(6, 4))


@report(noise(2, 3, 20), "tdnn1 tdnn2")
def statistics_pooling():
    """Speakers: mean and deviation over time, side by side."""

    def run(n, x):
        x = n.tdnn2(n.tdnn1(x).relu()).relu()
        return n.out(torch.cat([x.mean(2), x.std(2)], 1))

    parts = {"tdnn1": nn.Conv1d(3, 8, 5), "tdnn2": nn.Conv1d(8, 6, 3, dilation=2)}
    return Net(run, **parts, out=nn.Linear(12, 4))


@report(IMAGES, "a.0 b.0")
def windows():
    """Windows of pixels and back."""

    def run(n, x):
        x = n.a(x)
        b, c, h, w = x.shape
        x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        x = torch.softmax(x, 1) + x
        x = x.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return n.head(n.b(x))

    return Net(run, a=cbr(3, 8), b=cbr(8, 6), head=classifier(width=6))


# --- other shapes


@report(IMAGES, "backbone.0.0 out")
def backbone_of_a_pinned_head():
    """NNCF 482: attention in the head leaves the backbone free."""

    def run(n, x):
        x = n.proj(n.backbone(x)).flatten(2).transpose(1, 2)
        return n.last(n.out(n.mix(x, x, x)[0].mean(1)))

    parts = {"backbone": nn.Sequential(cbr(3, 8), cbr(8, 8)), "proj": nn.Conv2d(8, 8, 1)}
    parts |= {"mix": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 6)}
    return Net(run, **parts, last=nn.Linear(6, 2))


@report(IMAGES, "a.0 b c")
def tied_weights():
    """Two layers of one parameter."""

    def run(n, x):
        return n.head(n.d(n.c(n.b(n.a(x)).relu()).relu()))

    parts = {"a": cbr(3, 8), "b": nn.Conv2d(8, 8, 3, 1, 1), "c": nn.Conv2d(8, 8, 3, 1, 1)}
    net = Net(run, **parts, d=cbr(8, 6), head=classifier(width=6))
    net.c.weight = net.b.weight
    return net


@report(IMAGES, "a.0 fc.0 dw.0")
def inverted_residual():
    """Depthwise convolutions and squeeze and excite, as MobileNetV3."""

    def run(n, x):
        x = n.a(x)
        y = n.dw(n.expand(x))
        y = y * F.hardsigmoid(n.fc(y.mean((2, 3), keepdim=True)))
        return n.head(x + n.project(y))

    fc = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
    parts = {"a": cbr(3, 8), "expand": cbr(8, 16), "dw": cbr(16, 16, groups=16), "fc": fc}
    return Net(run, **parts, project=nn.Conv2d(16, 8, 1), head=classifier(width=8))


@report(IMAGES, "a.0 v")
def attention_over_pixels():
    """SAGAN and non-local networks: a number weighs what is added."""

    def run(n, x):
        x = n.a(x)
        q, k, v = (layer(x).flatten(2) for layer in (n.q, n.k, n.v))
        y = n.o((v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(len(x), -1, 8, 8))
        return n.head(x + n.gamma * y)

    parts = {name: nn.Conv2d(8, width, 1) for name, width in zip("qkvo", (2, 2, 8, 8), strict=True)}
    return Net(
        run, **parts, a=cbr(3, 8), gamma=nn.Parameter(torch.ones(1)), head=classifier(width=8)
    )


@report(IMAGES, "a.0 reduce.0 out.0")
def selective_kernel():
    """Branches are weighed by a softmax over branches, of each channel."""

    def run(n, x):
        first, second = n.a(x), n.b(x)
        z = n.reduce((first + second).mean((2, 3)))
        one, two = (layer(z) for layer in (n.fc1, n.fc2))
        total = one.exp() + two.exp()
        weights = (one.exp() / total)[..., None, None], (two.exp() / total)[..., None, None]
        return n.head(n.out(first * weights[0] + second * weights[1]))

    reduce = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    parts = {"a": cbr(3, 8), "b": cbr(3, 8), "reduce": reduce, "out": cbr(8, 6)}
    return Net(run, **parts, fc1=nn.Linear(4, 8), fc2=nn.Linear(4, 8), head=classifier(width=6))


@report(IMAGES, "a.0 branches.0 branches.1 out.0")
def atrous_pyramid():
    """DeepLab: the pooled branch is resized to the others."""

    def run(n, x):
        x = n.a(x)
        pooled_map = n.pool(x.mean((2, 3), keepdim=True))
        maps = [*(branch(x) for branch in n.branches), pooled_map.expand(-1, -1, *x.shape[2:])]
        return F.interpolate(n.last(n.out(torch.cat(maps, 1))), scale_factor=2)

    branches = nn.ModuleList(nn.Conv2d(8, 4, 3, 1, d, dilation=d) for d in (1, 2))
    parts = {"a": cbr(3, 8), "branches": branches, "pool": nn.Conv2d(8, 4, 1), "out": cbr(12, 6)}
    return Net(run, **parts, last=nn.Conv2d(6, 2, 1))


@report(IMAGES, "stem.0 layers.0.0 layers.1.0")
def dense_block():
    """Each layer reads what all before it wrote."""

    def run(n, x):
        x = n.stem(x)
        for layer in n.layers:
            x = torch.cat([x, layer(x)], 1)
        return n.head(x)

    layers = nn.ModuleList(cbr(8 + 4 * i, 4) for i in range(2))
    return Net(run, stem=cbr(3, 8), layers=layers, head=classifier(width=16))


@report(noise(2, 4, 3, 8, 8), "a.0 b.0")
def frames():
    """Frames of a video become a batch and come back."""

    def run(n, x):
        maps = n.b(n.a(x.flatten(0, 1)))
        return n.out(maps.mean((2, 3)).view(len(x), 4, -1).mean(1))

    return Net(run, a=cbr(3, 8), b=cbr(8, 6), out=nn.Linear(6, 4))


class Half(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@report(IMAGES, "a.0 b.0")
def named_tuples_inside():
    """A module returns a named tuple, the next one takes it apart."""

    def run(n, x):
        both = Half(*n.a(x).chunk(2, 1))
        return Half(n.head(n.b(both.first)), n.head(n.b(both.second)))

    return Net(run, a=cbr(3, 16), b=cbr(8, 6), head=classifier(width=6))


@pytest.mark.parametrize("build, inputs, free", REPORTS)
def test_a_reported_shape_is_slimmed_exactly(build, inputs, free):
    torch.manual_seed(0)
    model = randomized(build())
    found = prunable(model, inputs)
    assert faults(model, inputs) == []
    for seed in (0, 1):
        prove(model, found.groups, inputs, seed)
    layers = {member.layer for group in found.groups for member in group.members}
    assert layers.issuperset(free), (sizes(found), found.pinned)
