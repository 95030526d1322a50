"""Repair: exact where algebra allows, better elsewhere, and never worse."""

import copy
import importlib
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, SMALLEST, fails, same, save_network, succeed
from torch import nn

import slimming
from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import declared
from slimming.choosing import importance, moments
from slimming.choosing.moments import (
    add_to_weight,
    channel_dim,
    draw,
    matrix,
    patches,
    picked,
    positions,
)
from slimming.choosing.threshold import choose_channels
from slimming.errors import UserError
from slimming.repair import streaming
from slimming.repair.layer_by_layer import divergence, repair
from slimming.repair.one_pass import OnePass
from slimming.slicing.prune import groups
from slimming.storage import architecture, checkpoint

IMAGES = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def with_statistics(model: nn.Module, images: torch.Tensor = IMAGES) -> nn.Module:
    """``model`` in eval mode with γ, β and running statistics as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 1, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def plain(padding: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return with_statistics(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=padding, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        )
    )


def cut(model: nn.Module, lost: dict[str, list[int]]) -> tuple[nn.Module, slicing.Kept]:
    """``model`` without these channels of these layers, and what is kept."""
    coupled, keep = groups(model, IMAGES), {}
    for group in coupled:
        stays = torch.ones(group.size, dtype=torch.bool)
        stays[lost.get(group.name, [])] = False
        keep[group.name] = stays
    kept = slicing.kept_channels(coupled, keep)
    return slicing.sliced(model, kept), kept


@torch.no_grad()
def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_channels_that_are_constant_are_restored_exactly():
    dense = plain()
    dense[1].weight.data[:3], dense[4].weight.data[5:] = 0, 0
    slim, kept = cut(dense, {"0": [0, 1, 2], "3": [5, 6, 7]})
    assert relative(slim(IMAGES), dense(IMAGES)) > 0.01
    repaired = repair(slim, dense, kept, IMAGES).model
    assert relative(repaired(IMAGES), dense(IMAGES)) < 1e-5
    for name, weight in slim.named_parameters():  # a shift alone: no weight had to be fitted
        if name != "8.bias":
            assert torch.equal(weight, repaired.get_parameter(name))


def test_behind_padding_constants_are_restored_away_from_the_borders():
    dense = plain(padding=1)
    dense[1].weight.data[:3] = 0
    slim, kept = cut(dense, {"0": [0, 1, 2]})
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    before, wanted = (model[:5](IMAGES)[inner] for model in (slim, dense))
    after = repair(slim, dense, kept, IMAGES).model[:5](IMAGES)[inner]
    assert relative(before, wanted) > 0.01 and relative(after, wanted) < 1e-5


def test_without_a_loss_nothing_changes():
    dense = plain()
    slim, kept = cut(dense, {})
    result = repair(slim, dense, kept, IMAGES)
    assert not result.helped and result.before == 0
    for name, value in dense.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_linear_combinations_of_the_kept_channels_are_restored():
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(600, 4))
    with torch.no_grad():  # channels 3 to 7 of the first layer are those of its inputs, mixed
        mix = torch.randn(5, 3)
        dense[0].weight[3:] = (mix @ dense[0].weight[:3].flatten(1)).view(5, 3, 1, 1)
        dense[0].bias[3:] = mix @ dense[0].bias[:3]
    slim, kept = cut(dense, {"0": [3, 4, 5, 6, 7]})
    result = repair(slim, dense, kept, IMAGES)
    assert relative(slim(IMAGES), dense(IMAGES)) > 0.1
    assert relative(result.model(IMAGES), dense(IMAGES)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("arch, depth", [("vgg", 11), ("resnet", 20), ("densenet", 10)])
def test_the_networks_of_the_paper_are_repaired_the_same_way_twice(arch, depth):
    torch.manual_seed(0)
    images = F.interpolate(IMAGES, 32)
    dense = NETWORKS[arch](depth=depth, num_classes=10, cfg=NARROW.get(arch))
    with_statistics(dense, images)
    choice = choose_channels(dense, 0.3)
    kept = slicing.kept_channels(declared(dense), choice.kept)
    slim = slicing.sliced(dense, kept)
    first, second = (repair(slim, dense, kept, images, seed=4) for _ in range(2))
    assert first.helped and first.after < 0.7 * first.before and not first.notes
    state = second.model.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in first.model.state_dict().items())
    assert any(not torch.equal(value, state[n]) for n, value in slim.state_dict().items())


class Mixed(nn.Module):
    """A residual sum, depthwise and grouped convolutions, squeeze and excite, a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project, self.norm2 = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.classifier = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        y = self.depthwise(self.expand(x).relu_()).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        y = self.norm2(self.project(y))
        y += x
        pooled = torch.cat((y.mean((2, 3)), self.grouped(y).relu().mean((2, 3))), 1)
        return self.classifier(pooled)


def test_every_kind_of_layer():
    torch.manual_seed(0)
    dense = with_statistics(Mixed())
    scores = importance.l1(importance.Evidence(dense, []))
    slimmed = slicing.prune(dense, scores, 0.4, IMAGES, local=True)
    result = repair(slimmed.model, dense, slimmed.kept, IMAGES)
    assert result.after < 0.3 * result.before and not result.notes
    assert divergence(slimmed.model, dense, IMAGES) > divergence(result.model, dense, IMAGES)


class Doubled(nn.Conv2d):
    """A layer that does not compute what its weights say."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_cannot_be_fitted_is_named():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), Doubled(8, 6, 3), nn.ReLU(), nn.Flatten()]
    dense = nn.Sequential(*layers, nn.Linear(384, 4))
    slim, kept = cut(dense, {"0": [0, 1]})
    (note,) = repair(slim, dense, kept, IMAGES).notes
    assert note.startswith("2 is left as it was") and "something else than its weights" in note


def test_a_repair_that_does_not_help_is_not_kept():
    dense = plain()
    slim, kept = cut(dense, {"0": [0]})
    others = IMAGES.clone()
    others[12:] = others[12:13]  # fitted to one image, and judged by twelve
    result = repair(slim, dense, kept, others)
    assert not result.helped and result.after > result.before
    for name, value in slim.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("images", ["the same", torch.float32])
def test_any_dtype_is_repaired_and_kept(dtype, images):
    dense = plain().to(dtype)
    read = IMAGES.to(dtype if images == "the same" else images)
    slim, kept = cut(dense, {"0": [0, 1, 2]})
    result = repair(slim, dense, kept, read)
    assert {value.dtype for value in result.model.parameters()} == {dtype}
    assert result.after < 0.5 * result.before
    if dtype == torch.float64:  # computed in it: fp32 would not hold the weights
        weight = result.model.get_parameter("3.weight")
        assert not torch.equal(weight, weight.float().double())
    with torch.no_grad():
        outputs = [model.double()(IMAGES.double()) for model in (slim, result.model, dense)]
    assert relative(outputs[1], outputs[2]) < 0.8 * relative(outputs[0], outputs[2])


def test_a_network_that_fails_in_the_dtype_of_the_repair_is_one_error():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2).half()

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)).half())

    with pytest.raises(UserError, match="float32, where it fails"):
        repair(Half(), Half(), {}, IMAGES)


class Weighted(nn.Module):
    """A residual sum x + alpha · branch, in which the branch may also be broadcast."""

    def __init__(self, alpha=1.0, corner=False):
        super().__init__()
        self.stem, self.inner, self.branch = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8))
        self.alpha, self.corner = alpha, corner

    def forward(self, x):
        x = self.stem(x).relu()
        y = x[..., :1, :1] if self.corner else x
        y = self.branch(self.inner(y).relu())
        return torch.add(x, y, alpha=self.alpha).mean((2, 3))


@pytest.mark.parametrize("how", [{"alpha": -2.0}, {"corner": True}, {}])
def test_sums_that_weight_or_broadcast_a_branch(how):
    torch.manual_seed(0)
    dense = with_statistics(Weighted(**how))
    slim, kept = cut(dense, {"inner": [0, 1, 2, 3]})
    result = repair(slim, dense, kept, IMAGES)
    assert result.helped and result.after < 0.5 * result.before


@pytest.mark.parametrize("norm", [{"track_running_stats": False}, {"affine": False}])
def test_batch_norms_without_statistics_or_scales(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, **norm)]
    dense = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    slim, kept = cut(dense, {"0": [0, 1, 2]})
    assert repair(slim, dense, kept, IMAGES).helped
    assert OnePass(dense, IMAGES).repaired(slim, kept)(IMAGES).isfinite().all()


class Viewed(nn.Module):
    """A view of a map larger than 1x1, which is impossible in channels_last."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = F.avg_pool2d(self.b(self.norm(self.a(x)).relu()), 4)
        return self.fc(x.view(x.size(0), -1))


def test_a_view_of_a_map_is_repaired_layer_by_layer_and_in_one_pass():
    torch.manual_seed(0)
    dense = with_statistics(Viewed())
    slim, kept = cut(dense, {"a": [0, 1, 2]})
    assert repair(slim, dense, kept, IMAGES).helped
    repaired = OnePass(dense, IMAGES).repaired(slim, kept)
    assert divergence(repaired, dense, IMAGES) < divergence(slim, dense, IMAGES)


@pytest.mark.parametrize("head", [[], [nn.Flatten(0)]], ids=["maps (N, 1, H, W)", "values (N,)"])
def test_one_output_is_judged_by_its_relative_error(head):
    """The divergence of predictions is 0 for any two of them."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 1, 10) if head else nn.Conv2d(8, 1, 1)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), last, *head).eval()
    slim, kept = cut(dense, {"0": [0, 1, 2]})
    result = repair(slim, dense, kept, IMAGES)
    assert result.measure == "relative error" and 0 < result.after < result.before
    with torch.no_grad():
        error = [(m(IMAGES) - dense(IMAGES)).norm() for m in (slim, result.model)]
    assert error[1] < error[0]


def test_what_was_left_as_it_was_or_discarded_is_in_the_result_and_warned_of():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), Doubled(8, 6, 3), nn.Flatten(), nn.Linear(384, 4)]
    dense = nn.Sequential(*layers)
    slim = slimming.prune(dense, IMAGES[:2], 0.3, scope="layer")
    with pytest.warns(UserWarning, match="2 is left as it was"):
        fixed = slimming.repair(slim, dense, IMAGES)
    assert fixed.notes[0].startswith("2 is left as it was") and not slim.notes
    others = IMAGES.clone()
    others[12:] = others[12:13]  # fitted to one image, and judged by twelve
    dense = plain()
    slim = slimming.prune(dense, IMAGES[:2], 0.3, scope="layer")
    with pytest.warns(UserWarning, match="discarded"):
        fixed = slimming.repair(slim, dense, others)
    assert fixed.model is slim.model and "discarded" in fixed.notes[-1]


class Keeps(nn.Module):
    """A network with an attribute that is a tensor of a graph."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        self.last = self.net[:6](x)
        return self.net[6:](self.last)


def test_a_network_that_has_just_been_trained_is_repaired():
    dense = with_statistics(Keeps())
    slim = slimming.prune(dense, IMAGES, 0.3)
    for model in (dense, slim.model):
        assert model(IMAGES).requires_grad and not model.last.is_leaf
    repaired = slimming.repair(slim, dense, IMAGES)
    with torch.no_grad():
        before, after = (relative(s.model(IMAGES), dense(IMAGES)) for s in (slim, repaired))
    assert after < before


class AnyShape(nn.Module):
    """What torch.fx cannot trace: control flow, two inputs by name; chunk and split; layers of
    other dimensions; a layer that runs twice; outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.halves, self.mix = nn.Conv2d(12, 16, 1), nn.Conv2d(8, 10, 3, padding="same")
        self.up = nn.ConvTranspose2d(10, 8, 3, 2, groups=2)
        self.wave, self.solid = nn.Conv1d(2, 10, 3), nn.Conv3d(1, 6, 3)
        self.wave_norm, self.wave_more = nn.BatchNorm1d(10), nn.Conv1d(10, 6, 3, padding=1)
        self.solid_more, self.head = nn.Conv3d(6, 4, 1), nn.Linear(8, 3)
        self.shared = nn.Conv2d(8, 3, 1)

    def forward(self, x, wave=None):
        if x.sum() > 1e9:
            return None
        y = self.norm(self.stem(x)).relu()
        a, b = self.halves(y).chunk(2, 1)
        y = self.mix(a * b.sigmoid()).relu()
        maps = self.up(y).relu_()
        w = self.wave_more(self.wave_norm(self.wave(wave)).relu())
        s = self.solid_more(self.solid(x[:, None]).relu())
        small = nn.functional.max_pool2d(maps, 2)
        return {
            "maps": [self.shared(maps), self.shared(small)],
            "rest": (w, s, self.head(maps.mean((2, 3))), x.argmax(1)),
        }


def test_any_network_with_inputs_and_outputs_of_any_kind():
    torch.manual_seed(0)
    dense = AnyShape()
    inputs = {"x": IMAGES, "wave": torch.randn(96, 2, 9)}
    for norm in (dense.norm, dense.wave_norm):
        norm.momentum = None
    with torch.no_grad():
        dense.train()(**inputs)
    few = {name: value[:2] for name, value in inputs.items()}
    scores = importance.l1(importance.Evidence(dense.eval(), []))
    slim = slicing.prune(dense, scores, 0.4, few, local=True)
    lost = [name for name, sides in slim.kept.items() if "in" in sides]
    assert {"mix", "up", "wave_more", "solid_more", "shared", "head"} <= set(lost)
    result = repair(slim.model, dense, slim.kept, inputs)
    assert result.measure == "relative error" and not result.notes
    assert result.after < 0.6 * result.before
    for name in lost:
        weights = (model.get_submodule(name).weight for model in (slim.model, result.model))
        assert not torch.equal(*weights), name


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(6, 4, 3, padding="same", dilation=2), (6, 9)),
        (nn.Conv2d(6, 4, (3, 2), padding=(1, 2), stride=2, groups=2, padding_mode="reflect"), None),
        (nn.Conv2d(6, 12, 3, padding=1, groups=6), None),
        (nn.Conv3d(6, 4, (3, 2, 1), padding=(1, 0, 0), stride=(1, 2, 1)), (6, 5, 4, 3)),
        (nn.ConvTranspose1d(6, 4, 4, stride=2, dilation=2), (6, 5)),
        (nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1, groups=2), None),
        (nn.ConvTranspose3d(6, 4, (2, 1, 3), stride=2), (6, 3, 4, 2)),
        (nn.Linear(6, 4), (5, 7, 6)),
        (nn.Linear(6, 4), (6,)),
    ],
)
@pytest.mark.parametrize("count", [9, 10**6], ids=["sampled", "all"])
def test_outputs_are_patches_times_weights(layer, shape, count):
    read = torch.randn(3, *(shape or (6, 7, 8)))
    with torch.no_grad():
        out, dim = layer(read), channel_dim(layer)
        places = draw(positions(out, dim), count, torch.Generator().manual_seed(0))
        ours = (patches(layer, read, places) @ matrix(layer).mT).transpose(0, 1).flatten(1)
        torch.testing.assert_close(ours + layer.bias, picked(out, dim, places))
        twice = copy.deepcopy(layer)
        add_to_weight(twice, matrix(layer))
        torch.testing.assert_close(twice.weight, 2 * layer.weight)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 10, 1), nn.BatchNorm2d(10), nn.Conv2d(10, 8, 1)

    def forward(self, x):
        y = self.b(self.norm(self.a(x)).relu_())
        y += x
        return y.relu_()


class Blocks(nn.Module):
    """Residual blocks in a row, with in-place operations, and a skip over all of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=False))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.last, self.fc = nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        first = self.stem(x)
        y = torch.cat((first, self.blocks(first)), 1)
        return self.fc(self.last(y).relu_().mean((2, 3)))


def test_resuming_where_nothing_changes_finds_what_a_full_run_finds(monkeypatch):
    torch.manual_seed(0)
    dense = with_statistics(Blocks())
    slim, kept = cut(dense, {"stem.0": [0, 1], "blocks.1.a": [3, 4, 5], "last": [0, 1]})
    runs, forward = [], nn.Conv2d.forward

    def counted(self, x):
        runs.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    resumed, few = repair(slim, dense, kept, IMAGES), len(runs)
    runs.clear()
    monkeypatch.setattr(streaming, "MEMORY", 0)
    full = repair(slim, dense, kept, IMAGES)
    assert few < 0.7 * len(runs) and resumed.helped
    for name, value in full.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


class Depends(nn.Module):
    """Which layers run depends on the images of a batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3)
        self.extra = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.extra(x) if x[0, 0, 0, 0] > 0 else x
        return self.c(self.b(self.a(y).relu()).relu()).mean((2, 3))


def test_a_flow_of_control_that_depends_on_the_images():
    torch.manual_seed(0)
    dense = Depends().eval()
    slim, kept = cut(dense, {"a": [0, 1, 2], "b": [0, 1]})
    result = repair(slim, dense, kept, IMAGES)
    assert result.helped and not result.notes


def test_an_in_place_operation_inside_a_module_is_no_trap():
    """A module that writes into what it reads is run again: what it wrote is read later on."""
    torch.manual_seed(0)

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu, self.b = (
                nn.Conv2d(3, 8, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(8, 8, 1),
            )
            self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x)
            self.relu(y)  # what it returns is not used
            return self.c(self.b(y).relu_()).mean((2, 3))

    dense = InPlace().eval()
    slim, kept = cut(dense, {"a": [0, 1, 2, 3], "b": [0, 1]})
    before = {n: v.clone() for n, v in slim.state_dict().items()}
    result = repair(slim, dense, kept, IMAGES)
    assert result.helped and result.after < 0.8 * result.before
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())


def test_wrong_arguments():
    dense = plain()
    slim, kept = cut(dense, {"0": [0]})
    with pytest.raises(UserError, match="at least 32 images"):
        repair(slim, dense, kept, IMAGES[:8])


PRUNERS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}


def scores_of(printed: str) -> dict[str, float]:
    """Top-1 in percent by the name of the network."""
    found = re.findall(r"^(dense|pruned|repaired) +([\d.]+)%", printed, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize("arch", PRUNERS)
def test_repair_in_the_pruning_scripts(arch, images, tmp_path):
    path = tmp_path / "dense.pth.tar"
    save_network(path, arch, SMALLEST[arch], "folder", 2, NARROW.get(arch))
    where = f"--percent 0.4 --data {images} --no-cuda --repair --repair-images 32 --save {tmp_path}"
    printed = succeed(f"{PRUNERS[arch]} --model {path} {where}/slim")
    assert list(scores_of(printed)) == ["dense", "pruned", "repaired"]
    assert "repair on 32 training images" in printed
    contents = checkpoint.read(tmp_path / "slim" / "pruned.pth.tar")
    assert list(contents["repair"]) == ["dense", "pruned", "repaired"]
    again = succeed(f"{PRUNERS[arch]} --model {path} {where}/again")
    assert scores_of(again) == scores_of(printed)
    assert same(
        checkpoint.read(tmp_path / "again" / "pruned.pth.tar")["state_dict"], contents["state_dict"]
    )

    printed = succeed(f"mask-impl/prune_mask.py --model {path} {where}/mask")
    assert list(scores_of(printed)) == ["dense", "pruned", "repaired"]
    networks = importlib.import_module("mask-impl.models").NETWORKS
    masked, _, _ = architecture.load(tmp_path / "mask" / "pruned.pth.tar", networks=networks)
    slim = slicing.without_dead_channels(masked)
    batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(slim(batch), masked.eval()(batch)) < 1e-5
    assert not same(masked.state_dict(), checkpoint.read(path)["state_dict"])


def test_a_mask_and_its_slim_network_are_repaired_to_the_same_weights(images, tmp_path):
    """Where no layer loses every channel the two scripts prune the same channels."""
    path = tmp_path / "dense.pth.tar"
    save_network(path, "resnet", SMALLEST["resnet"], "folder", 2)
    where = f"--percent 0.3 --data {images} --no-cuda --repair --repair-images 32 --save {tmp_path}"
    succeed(f"resprune.py --model {path} {where}/slim")
    succeed(f"mask-impl/prune_mask.py --model {path} {where}/mask")
    networks = importlib.import_module("mask-impl.models").NETWORKS
    masked, _, _ = architecture.load(tmp_path / "mask" / "pruned.pth.tar", networks=networks)
    slim, _, _ = architecture.load(tmp_path / "slim" / "pruned.pth.tar")
    batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(slim.eval()(batch), masked.eval()(batch)) < 1e-5


def test_repair_in_run_py(images, tmp_path):
    command = (
        f"run.py --dataset folder --data {images} --model resnet --depth 11 --no-cuda --resume "
    )
    command += "--base-train-epochs 1 --finetune-epochs 1 --batch-size 16 --save-model --repair "
    command += f"--repair-images 32 --output-dir {tmp_path}/out"
    printed = succeed(command)
    assert "repair on 32 training images" in printed and "repaired: top-1" in printed
    (metrics,) = (tmp_path / "out").rglob("metrics.json")
    stages = json.loads(metrics.read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["base", "pruned", "repaired", "fine-tuned"]
    assert "repaired" in metrics.with_name("report.html").read_text()
    fails(tmp_path, f"{command} --pruning-method kernel", says="--repair needs --pruning-method")


def test_repair_after_each_round_of_flowprune(images, tmp_path):
    command = (
        f"flowprune.py --model resnet --depth 11 --data_path {images} --n_rounds 2 --epochs 6 "
    )
    command += "--warmup_epochs 1 --batch-size 16 --prune_percent 40 --no-cuda --no-tensorboard"
    printed = succeed(f"{command} --repair --repair-images 32 --save {tmp_path}/out")
    assert printed.count("repair on 32 training images") == 2


@pytest.mark.parametrize("script", [*PRUNERS.values(), "mask-impl/prune_mask.py", "run.py"])
def test_too_few_images_are_one_line(script, tmp_path):
    fails(
        tmp_path, f"{script} --repair --repair-images 31", says=["--repair-images", "at least 32"]
    )


def test_a_wide_layer_chooses_its_strength_by_some_outputs(monkeypatch):
    """Noise calls for the strongest ridge, its absence for the weakest; in both forms."""
    torch.manual_seed(0)
    weight = torch.randn(40, 130)
    for noise, strength in ((0.0, 1e-6), (30.0, 1e-1)):
        chosen = []
        for wide in (10**6, 0):
            monkeypatch.setattr(moments, "WIDE", wide)
            fitted, held_back = (moments.Moments(1, 40, 130, weight.device) for _ in range(2))
            for part, count in ((fitted, 60), (held_back, 400)):
                x = torch.randn(1, count, 40)
                part.add(x, x @ weight + noise * torch.randn(1, count, 130))
            slope, _ = moments.best_ridge(fitted, held_back, (1e-6, 1e-1))  # adds both
            chosen.append(slope)
            assert torch.equal(slope, moments.ridge(fitted, strength))
