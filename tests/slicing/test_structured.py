"""A slim network of any architecture computes what the dense one does without those channels."""

import pytest
import torch
from conftest import randomize
from torch import nn

from models import PAPER_DEPTH, channel_selection, cifar_resnet, constructor
from slimming import slicing
from slimming.channels import operations
from slimming.channels.groups import count_filters
from slimming.choosing import ranking
from slimming.choosing.importance import MEASURES, Evidence
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.slicing.prune import groups
from slimming.storage import architecture, checkpoint

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ARCHS = {  # ours, resnet-18 is torchvision's resnet18: at which ratios
    **dict.fromkeys("vgg mobilenet resnet-56 resnet18".split(), (0.3, 0.5, 0.8)),
    **dict.fromkeys("mobilenet_v2 mobilenet_v3_large".split(), (0.3, 0.5)),
    **dict.fromkeys(("vgg16", "vgg16_bn"), (0.5,)),
}
LARGE = "resnet50 densenet121 efficientnet_b0 regnet_y_400mf googlenet".split()
BY_FACTORS = ("densenet121", "mobilenet_v2")
MEASURE = {0.3: "mag_based", 0.5: "l1", 0.8: "l1"}
SHALLOW = 14  # layers of a residual network: two blocks in each stage


def build(arch, **kwargs):
    torch.manual_seed(0)
    depth = {"depth": 11} if arch in PAPER_DEPTH else {}
    return constructor(arch)(num_classes=10, **depth, **kwargs)


def scores(model, measure="l1"):
    return MEASURES[measure](Evidence(model, []))


def prune(model, ratio=0.5, measure="l1", images=IMAGES, **kwargs):
    return slicing.prune(model, scores(model, measure), ratio, images, **kwargs)


@torch.no_grad()
def logits(model, images=IMAGES):
    return model.eval()(images)


@torch.no_grad()
def logits_without(model, kept, images=IMAGES):
    """Of the dense network, whose layers are given zeros for the channels that were removed."""
    hooks = []
    for name, sides in kept.items():
        if "in" in sides:
            layer = model.get_submodule(name)
            shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
            mask = sides["in"].float().view(shape)
            hooks.append(layer.register_forward_pre_hook(lambda _, x, mask=mask: x[0] * mask))
    result = logits(model, images)
    for hook in hooks:
        hook.remove()
    return result


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, ratios",
    [*ARCHS.items(), *(pytest.param(a, (0.3, 0.5), marks=pytest.mark.slow) for a in LARGE)],
)
def test_slim_is_the_dense_network_without_the_channels_and_its_cfg_rebuilds_it(
    arch, ratios, tmp_path
):
    dense = randomize(build(arch))
    found = groups(dense, IMAGES)
    for ratio in ratios:
        measure = "bn" if ratio == 0.5 and arch in BY_FACTORS else MEASURE[ratio]
        choice = ranking.choose(found, scores(dense, measure), ratio, local=ratio == 0.5)
        slim = slicing.apply(dense, found, choice, IMAGES)
        assert slim.difference <= 1e-4
        assert relative(logits(slim.model), logits_without(dense, slim.kept)) <= 1e-4
        gone = sum(int(g.filters[~slim.choice.kept[g.name]].sum()) for g in found)
        assert ratio - 0.06 <= gone / count_filters(found) <= ratio + 1e-9
        size = figures.count_parameters
        assert size(slim.model) < (1 - ratio / 3) * size(dense)

    again = build(arch, cfg=slicing.cfg_of(slim.model))
    again.load_state_dict(slim.model.state_dict())
    assert torch.equal(logits(again), logits(slim.model))
    depth = 11 if arch in PAPER_DEPTH else None
    network = architecture.Architecture(arch, depth, "cifar10", 10, slicing.cfg_of(slim.model))
    checkpoint.write(tmp_path / "slim", architecture.contents_of(slim.model, network, 1, 0.5))
    loaded, read, _ = architecture.load(tmp_path / "slim")
    assert read == network and torch.equal(logits(loaded), logits(slim.model))


class Mixed(nn.Module):
    """All at once: grouped, depthwise with a multiplier, sum, concatenation, SE, PReLU, flatten."""

    def __init__(self, mix=lambda x: x):
        super().__init__()
        self.stem, self.slope = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)
        self.grouped, self.shortcut = nn.Conv2d(16, 32, 3, 1, 1, groups=4), nn.Conv2d(16, 32, 1)
        self.one_slope, self.multiplied = nn.PReLU(), nn.Conv2d(32, 64, 3, groups=32)
        self.norm, self.squeeze = nn.BatchNorm2d(64, affine=False), nn.Conv2d(64, 8, 1)
        self.excite, self.left = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 12, 3, 2)
        self.right, self.last = nn.Conv2d(64, 6, 3, 2), nn.Conv2d(18, 9, 3, 5)
        self.hidden, self.fc, self.mix = nn.Linear(81, 20), nn.Linear(20, 10), mix

    def forward(self, x):
        x = self.slope(self.stem(x))
        x = self.one_slope(self.grouped(x) + self.shortcut(x))
        x = self.norm(self.multiplied(x))
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.mix(x)
        x = self.last(torch.cat([self.left(x), self.right(x)], 1))
        return self.fc(self.hidden(x.flatten(1)).relu())


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_network_of_the_user_s_own(ratio, local):
    torch.manual_seed(0)
    dense = Mixed().eval()
    slim = prune(dense, ratio, local=local)
    assert logits(dense).std(0).min() > 1e-4  # else equal logits would say nothing
    assert relative(logits(slim.model), logits_without(dense, slim.kept)) <= 1e-4
    assert slim.model.stem.out_channels % 4 == 0
    sliced = slicing.slice_tensors(dense, dense.state_dict(), slim.kept)
    for name, value in slim.model.state_dict().items():
        assert torch.equal(sliced[name], value)


def test_nothing_goes_at_zero_and_each_layer_keeps_a_channel_at_99_percent():
    dense = Mixed().eval()
    same = prune(dense, 0.0)
    assert not same.kept and torch.equal(logits(same.model), logits(dense))
    for local in (True, False):
        assert all(mask.any() for mask in prune(dense, 0.99, local=local).choice.kept.values())


def test_widths_are_multiples_if_asked_for():
    slim = prune(cifar_resnet(SHALLOW), 0.5, round_to=4)
    convs = [m for m in slim.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.out_channels % 4 == 0 for conv in convs)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["layer2.0.conv1", "layer2"])
def test_ignored_layers_and_the_classifier_stay_whole(word):
    dense = build("resnet18")
    slim, dense = prune(dense, 0.7, local=True, ignore=[word]).model, dict(dense.named_modules())
    for name, layer in slim.named_modules():
        if isinstance(layer, nn.Conv2d):
            ignored = name == word or name.startswith(f"{word}.")
            assert (layer.out_channels == dense[name].out_channels) == ignored
    assert slim.fc.out_features == 10
    with pytest.raises(UserError, match="no layer called conv9"):
        prune(slim, ignore=["conv9"])


def test_a_slim_network_is_pruned_again():
    dense = randomize(cifar_resnet(SHALLOW))
    second = prune(prune(dense, 0.4, local=True).model, 0.5, local=True)
    again = cifar_resnet(SHALLOW, cfg=slicing.cfg_of(second.model))
    again.load_state_dict(second.model.state_dict())
    assert torch.equal(logits(again), logits(second.model)) and second.difference <= 1e-4


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.low, self.high = (nn.Conv2d(3, width, 3) for width in (16, 8, 8))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc((self.whole(x) + torch.cat([self.low(x), self.high(x)], 1)).mean((2, 3)))


def test_the_score_of_a_unit_is_the_mean_of_the_layers_that_have_it():
    dense, pairs = Sum(), torch.tensor([3.0, 2.0])
    keep = slicing.prune(dense, {"whole": pairs.repeat(8), "low": pairs.repeat(4)}, 0.5, IMAGES)
    assert keep.kept["fc"]["in"].tolist() == [True, False] * 8


MIXING = {
    "softmax": lambda x: x.softmax(1),
    "relative": lambda x: x / (1 + x.abs().mean(1, keepdim=True)),
}


@pytest.mark.parametrize("mix", MIXING)
def test_what_an_operation_over_channels_reads_stays(mix):
    torch.manual_seed(0)
    dense = Mixed(MIXING[mix]).eval()
    slim = prune(dense, 0.5, local=True)
    assert slim.model.multiplied.out_channels == 64 and slim.model.left.out_channels == 6


def test_the_proof_does_not_rely_on_outputs_that_are_constant(monkeypatch):
    dense = Mixed(MIXING["relative"]).eval()
    nn.init.zeros_(dense.fc.weight)
    monkeypatch.setattr(operations.Trace, "reduce", lambda *_: None)  # a rule that is wrong
    slim = prune(dense, 0.5, local=True)
    assert slim.model.multiplied.out_channels == 64 and slim.model.left.out_channels == 6


def once_refused():
    conv, head = nn.Conv2d(3, 8, 3), [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    yield "GroupNorm", nn.Sequential(conv, nn.GroupNorm(2, 8), *head, nn.Linear(128, 10)), 4
    norm = [nn.BatchNorm2d(8), channel_selection(8)]
    yield "a selection", nn.Sequential(conv, *norm, *head, nn.Linear(128, 10)), 8  # by its BN
    shuffle = nn.Sequential(conv, nn.PixelShuffle(2), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1))
    yield "PixelShuffle", shuffle, 4
    yield "LayerNorm2d", build("convnext_tiny"), None
    yield "ShuffleNet", build("shufflenet_v2_x1_0"), None


@pytest.mark.slow
@pytest.mark.parametrize(
    "net, first", [pytest.param(*case[1:], id=case[0]) for case in once_refused()]
)
def test_what_was_refused_is_slimmed(net, first):
    measure = "bn" if any(hasattr(layer, "indexes") for layer in net.modules()) else "l1"
    slim = prune(net.eval(), measure=measure, local=True)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, slim.model))
    assert slim.difference <= 1e-4 and (after < before or first == 8)
    assert first is None or slim.model[0].out_channels == first


def test_a_network_of_which_nothing_can_go_is_refused_with_the_reason_in_one_line():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(2), nn.Flatten(), nn.Linear(7200, 10)
    )
    with pytest.raises(UserError, match=r"no layer of the network can be pruned: .*0") as error:
        prune(net.eval())
    assert "\n" not in str(error.value)


def test_no_branch_of_a_concatenation_is_emptied():
    """Though one ranking over its sum with another layer would take all of it."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.a, self.b = (nn.Conv2d(3, n, 3, padding=1) for n in (12, 8, 4))
            self.fc = nn.Linear(12, 10)

        def forward(self, x):
            x = self.wide(x) + torch.cat([self.a(x), self.b(x)], 1)
            return self.fc(x.mean((2, 3)))

    dense = Branches().eval()
    with torch.no_grad():
        dense.b.weight.mul_(1e-3)
        dense.wide.weight[8:].mul_(1e-3)
    slim = prune(dense, 0.8).model
    assert slim.b.out_channels >= 1 and slim.a.out_channels >= 1


def test_equal_scores_go_from_all_layers_alike():
    """As those of γ before training do."""
    slim = prune(cifar_resnet(SHALLOW), 0.5, "bn").model
    for name, (_, *out) in slicing.cfg_of(slim).items():
        full = 16 * 2 ** (int(name[5]) - 1) if name.startswith("layer") else 16
        assert not name.endswith("conv1") or out[0] == pytest.approx(full / 2, abs=1)


def test_layers_keep_what_they_must():
    dense, least = cifar_resnet(SHALLOW), {"layer3.0.conv1": 9, "layer1.1.conv2": 3}
    with torch.no_grad():
        for name in least:
            dense.get_submodule(name).weight.mul_(1e-6)
    found = groups(dense, IMAGES)
    choice = ranking.choose(found, scores(dense, "l1"), 0.9, least=least)
    cfg = slicing.apply(dense, found, choice, IMAGES).cfg
    assert cfg["layer3.0.conv1"][1] == 9 and cfg["layer1.1.conv2"][1] >= 3
    assert "layer3.0.conv1" in choice.rescued


def test_a_unit_counts_the_filters_that_write_it():
    """A concatenation, summed with a layer: two filters a unit, and the depthwise one."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.whole = (nn.Conv2d(3, n, 1) for n in (8, 8, 16))
            self.depthwise, self.fc = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10)

        def forward(self, x):
            x = torch.cat([self.a(x), self.b(x)], 1) + self.whole(x)
            return self.fc(self.depthwise(x).mean((2, 3)))

    found = groups(Joined(), IMAGES)
    assert count_filters(found) == 16 + 16 + 16


def test_a_layer_of_training_alone_loses_what_it_reads():
    class Auxiliary(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[2](self[1](x)) if self.training else self[2](x)

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    net = Auxiliary(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), head).eval()
    slim = prune(net, 0.5).model
    assert slim[0].out_channels < 8 and slim.train()(IMAGES).shape == (len(IMAGES), 10)


@pytest.mark.parametrize("output", [lambda y: (y, y), lambda y: {"logits": y}])
def test_outputs_that_are_not_logits_are_compared_too(output):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 10))

        def forward(self, x):
            return output(self.net(x))

    assert prune(Several()).difference <= 1e-4


def test_widths_written_into_forward_pin_what_they_are_of():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 10)
            self.cfg = [1, 2]  # means nothing here

        def forward(self, x):
            x = self.a(x)
            assert x.shape[1] == 16
            return self.fc(self.b(x).mean((2, 3)))

    slim = prune(Split()).model
    assert slim.a.out_channels == 16 and slim.b.out_channels < 8


def test_shares_scores_and_images_that_cannot_be_are_refused():
    dense = cifar_resnet(SHALLOW)
    with pytest.raises(UserError, match="cifar_resnet fails on these inputs"):
        prune(dense, images=(IMAGES, IMAGES))
    with pytest.raises(UserError, match="8 scores for conv1"):
        slicing.prune(dense, {"conv1": torch.rand(8)}, 0.5, IMAGES)
    for wrong in ({"ratio": 1.0}, {"ratio": -0.1}, {"round_to": 0}):
        with pytest.raises(UserError, match="at least 0 and less than 1"):
            prune(dense, **wrong)
