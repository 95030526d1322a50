"""The deployment form computes what the network computes, dense or pruned."""

import copy

import pytest
import torch
from conftest import keep_only, randomize
from torch import nn
from torch.nn.utils import prune

from models import NETWORKS, PAPER_DEPTH, channel_selection
from slimming.channels.scaling import batch_norms
from slimming.choosing.threshold import choose_channels
from slimming.deploy import fold as deploy_fold
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.slicing.proof import prove_equal

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("percent", [None, 0.1, 0.4, 0.7, 0.95])
def test_deployed_equals_the_network(small, percent):
    if percent is not None:
        small = keep_only(small, choose_channels(small, percent).kept)
    before = copy.deepcopy(small.state_dict())
    deployed = deploy_fold.deploy(small)
    assert prove_equal(deployed, small, IMAGES) <= 1e-4
    assert not batch_norms(deployed)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("arch, depth", PAPER_DEPTH.items())
def test_the_networks_of_the_paper_deployed(arch, depth):
    torch.manual_seed(0)
    dense = randomize(NETWORKS[arch](depth=depth, num_classes=10))
    slim = keep_only(dense, choose_channels(dense, 0.4).kept)
    for model in (dense, slim):
        assert prove_equal(deploy_fold.deploy(model), model, IMAGES) <= 1e-4


def test_channels_without_a_scale_are_constants(small):
    """γ = 0 leaves ReLU(β); a γ of almost 0 puts the bend of the ReLU far away."""
    for bn in batch_norms(small).values():
        bn.weight.data[::3] = 0
        bn.weight.data[1::6] = 1e-35
        bn.weight.data[2::6] = -1e-12
    assert prove_equal(deploy_fold.deploy(small), small, IMAGES) <= 1e-4


def test_two_sizes_and_layouts_of_images(small):
    deployed = deploy_fold.deploy(small)
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
    assert prove_equal(deploy_fold.deploy(model), model, IMAGES) <= 1e-4


class Twice(nn.Module):
    """A network that lists its widths, with channel selection, whose only ReLU runs twice, or is a
    function, or has another reader."""

    cfg_per_norm = True

    def __init__(self, kind):
        super().__init__()
        self.stem, self.bn, self.select = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            channel_selection(6),
        )
        self.conv, self.bn2, self.fc = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 10)
        self.relu, self.kind, self.cfg = nn.ReLU(inplace=True), kind, [6, 6]

    def forward(self, x):
        x = self.select(self.bn(self.stem(x)))
        x = torch.relu(x) if self.kind == "function" else self.relu(x)
        y = self.bn2(self.conv(x))
        y = self.relu(y) if self.kind == "twice" else torch.relu(y)
        y = y + x if self.kind == "shortcut" else y
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("kind", ["once", "twice", "function", "shortcut"])
def test_a_relu_is_folded_only_if_nothing_else_needs_it(kind):
    torch.manual_seed(0)
    model = randomize(Twice(kind))
    deployed = deploy_fold.deploy(model)
    assert prove_equal(deployed, model, IMAGES) <= 1e-4
    clamped = any(isinstance(m, deploy_fold.SelectedClamp) for m in deployed.modules())
    assert clamped == (kind == "once")


class Unwired(nn.Module):
    """A convolution and a BN, and what keeps the one from being folded into the other."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.kind, self.bn = kind, nn.BatchNorm2d(3, track_running_stats=kind != "statistics")
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)
        if kind == "hook":
            self.conv.register_forward_hook(lambda _, __, out: out.relu())

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        if self.kind == "weight":
            y = y + nn.functional.conv2d(x, self.conv.weight, padding=1)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("kind", ["plain", "statistics", "hook", "weight", "masked", "normed"])
def test_a_batch_norm_is_folded_only_where_that_is_safe(kind):
    torch.manual_seed(0)
    model = Unwired(kind)
    if kind == "masked":
        prune.l1_unstructured(model.conv, "weight", 0.5)
    if kind == "normed":
        nn.utils.parametrizations.weight_norm(model.conv)
    model.bn.weight.data.uniform_(0.5, 2)
    with torch.no_grad():
        model.train()(IMAGES)
        model.eval()
        difference = (deploy_fold.deploy(model)(IMAGES) - model(IMAGES)).abs().max()
    assert difference <= 1e-5 and bool(batch_norms(deploy_fold.deploy(model))) == (kind != "plain")


def test_a_wrong_form_is_an_error_where_there_are_inputs(monkeypatch):
    model = Unwired().eval()
    assert deploy_fold.deploy(model, IMAGES)(IMAGES).shape == (8, 10)
    monkeypatch.setattr(deploy_fold, "_folded", lambda model, _: Unwired().eval())
    with pytest.raises(UserError, match="differs from the network by"):
        deploy_fold.deploy(model, IMAGES)


def test_what_a_run_takes_for_foldable_and_is_not_stays_as_it_was(monkeypatch):
    """Of several candidates those that are exact are folded, and no others."""
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh()) for _ in range(5)]
    model = randomize(nn.Sequential(*(layer for block in blocks for layer in block)))
    right, wrong = deploy_fold.fold, model[6].weight

    def fold(layer, norm):
        return copy.deepcopy(layer) if torch.equal(layer.weight, wrong) else right(layer, norm)

    monkeypatch.setattr(deploy_fold, "fold", fold)
    deployed = deploy_fold.deploy(model, IMAGES)
    assert list(batch_norms(deployed)) == ["7"] and type(deployed) is nn.Sequential
    assert prove_equal(deployed, model, IMAGES) <= 1e-4


class Everything(nn.Module):
    """Each kind of layer before a BN, behind control flow that torch.fx cannot trace; BNs that
    cannot be folded; two inputs by name, outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.flat, self.flat_norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.up, self.up_norm = nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6)
        self.map, self.map_norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.grow = nn.ConvTranspose2d(4, 4, 2, 2, groups=4)
        self.grow_norm = nn.BatchNorm2d(4, affine=False)
        self.solid, self.solid_norm = nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)
        self.fc, self.fc_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.tokens, self.tokens_norm = nn.Linear(6, 6), nn.BatchNorm1d(6)  # (N, 6, 6)
        self.read, self.read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, y=None):
        if x.sum() > 1e6:
            return x
        a = self.up_norm(self.up(self.flat_norm(self.flat(x)).relu()))
        b = self.grow_norm(self.grow(self.map_norm(self.map(y)).relu()))
        c = self.solid_norm(self.solid(y[:, :1, None].expand(-1, -1, 3, -1, -1)))
        d = self.tokens_norm(self.tokens(a[:, :, :6]))
        e = self.read(b)
        e = self.read_norm(e) * e.sigmoid()
        f = self.twice_norm(self.twice(self.twice_norm(self.twice(b))))
        parts = [c, self.fc_norm(self.fc(b.mean((2, 3))))]
        return {"a": a, "parts": parts, "rest": (d, e, f, len(a))}


def test_every_kind_of_layer_takes_the_batch_norm_behind_it():
    torch.manual_seed(0)
    model = Everything()
    for norm in batch_norms(model).values():
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    inputs = {"x": torch.randn(3, 3, 9), "y": torch.randn(3, 2, 8, 8)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = deploy_fold.deploy(model.eval(), inputs)
    assert list(batch_norms(deployed)) == ["tokens_norm", "read_norm", "twice_norm"]
    assert prove_equal(deployed, model, inputs) <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="Everything fails on these inputs"):
        deploy_fold.deploy(model, inputs["x"])


def test_the_former_order_of_arguments():
    model = Unwired().eval()
    assert isinstance(deploy_fold.deploy(model, torch.bfloat16), deploy_fold.InPrecision)
    plain = deploy_fold.deploy(model, torch.float32, deploy_fold.FORMS["plain"])
    assert batch_norms(plain) and not batch_norms(deploy_fold.deploy(model, images=IMAGES))


class Viewed(nn.Module):
    """A view of a map larger than 1x1, which is impossible in channels_last."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 900, 10)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.training and x.sum() > 0:  # torch.fx cannot trace it
            return x
        return self.fc(x.view(x.size(0), -1))


@pytest.mark.parametrize("images", [None, IMAGES])
def test_a_view_of_a_map(images):
    model = randomize(Viewed())
    assert prove_equal(deploy_fold.deploy(model, images=images), model, IMAGES) <= 1e-4
    assert figures.latencies([model], IMAGES, seconds=0)[0] > 0


def test_outputs_of_any_kind_and_volumes():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return {"maps": y, "more": (y.mean((2, 3, 4)), y.argmax(1))}

    model, volumes = Parts().eval(), torch.randn(2, 3, 4, 4, 4)
    for images in (None, volumes):
        with torch.no_grad():
            ours, theirs = (m(volumes) for m in (deploy_fold.deploy(model, images=images), model))
        torch.testing.assert_close(ours, theirs)
