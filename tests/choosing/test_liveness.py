"""A slim network tells images apart, or the user is told that it does not."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import NARROW, SMALLEST, randomize
from torch import nn

import slimming
from models import NETWORKS
from slimming.channels.groups import declared
from slimming.channels.scaling import batch_norms
from slimming.choosing import ranking
from slimming.choosing.allocation import ALLOCATIONS, Prunable, choose
from slimming.choosing.importance import Evidence, l1
from slimming.choosing.threshold import LEAST, choose_channels
from slimming.commands.experiment.methods import Task, channels
from slimming.commands.experiment.settings import ExperimentSettings
from slimming.commands.prune.settings import PruneSettings
from slimming.commands.sweep.settings import PointsSettings
from slimming.slicing.proof import liveness, liveness_warning, spread_ratio
from slimming.slicing.prune import groups


class UNet(nn.Module):
    """One scale, with a concatenation and one output channel."""

    def __init__(self, width=16):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.deep = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU()
        )
        self.up = nn.Conv2d(5 * width, 2 * width, 3, padding=1)
        self.head = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x):
        down = F.relu(self.down(x))
        deep = F.interpolate(self.deep(F.max_pool2d(down, 2)), scale_factor=2.0)
        return self.head(F.relu(self.up(torch.cat([down, deep], 1))))


def chain():
    """Convolutions of 10, 20 and 30 channels; the first has by far the smallest weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.ReLU()),
        *(nn.Conv2d(20, 30, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30 * 100, 4)),
    )
    net[0][0].weight.data.mul_(1e-3)
    return net.eval()


@pytest.mark.parametrize(
    "build, ratio",
    [
        (lambda: torchvision.models.resnet18(num_classes=10), 0.5),
        (lambda: torchvision.models.resnet18(num_classes=10), 0.7),
        (UNet, 0.4),
    ],
)
def test_the_defaults_of_the_library_leave_a_network_that_works(build, ratio):
    """The ten lines of README, on small images."""
    torch.manual_seed(0)
    dense, images = build().eval(), torch.rand(8, 3, 32, 32)
    slim = slimming.prune(dense, images, ratio)
    assert slim.liveness is not None and slim.liveness > 0.05
    with torch.no_grad():
        spreads = [model(images).std(0).square().mean().sqrt() for model in (slim.model, dense)]
    assert slim.liveness == pytest.approx(float(spreads[0] / spreads[1]), rel=1e-3)
    for sides in slim.kept.values():
        assert all(mask.float().mean() >= 0.1 for side, mask in sides.items() if side == "out")


def test_the_spread_of_outputs_against_those_of_the_dense_network():
    dense = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    maps, constant = dense.view(6, 1, 2, 5), torch.ones(6, 3)
    assert spread_ratio([0.25 * dense + 7], [dense]) == pytest.approx(0.25)
    assert spread_ratio([dense, 0.5 * maps], [dense, maps]) == pytest.approx(0.5)
    assert spread_ratio([dense, constant], [dense, constant]) == pytest.approx(1)
    assert spread_ratio([constant], [torch.randn(6, 3)]) == 0


def test_what_cannot_be_told_is_no_number():
    constant = torch.ones(6, 3)
    assert spread_ratio([constant], [constant]) is None
    assert spread_ratio([constant[:1]], [torch.randn(1, 3)]) is None
    assert spread_ratio([constant], [constant + 1e-8 * torch.randn(6, 3)]) is None
    assert spread_ratio([], []) is None
    assert spread_ratio([torch.ones(())], [torch.ones(())]) is None
    assert spread_ratio([torch.arange(6)], [torch.arange(6)]) is None
    assert liveness_warning(None, {}) is None


def test_a_dead_network_is_equal_to_the_masked_one_and_called_dead():
    """The proof alone says 0.0e+00."""
    dense, images = chain(), torch.rand(4, 3, 16, 16)
    dense[0][0].bias.data.zero_()
    dense[0][0].weight.data[0] = -1  # 0 after ReLU, and the only large weights of the layer
    with pytest.warns(UserWarning, match=r"narrowest layer, 0\.0, keeps 1 of 10 channels"):
        slim = slimming.prune(dense, images, 0.15, measure="l1", scope="global", least=0)
    assert slim.difference < 1e-4 and slim.liveness == 0


@pytest.mark.parametrize("ratio, least", [(0.5, 0.1), (0.5, 0.25), (0.8, 0.1), (0.95, 0.1)])
def test_no_layer_falls_below_the_least_fraction(ratio, least):
    dense, images = chain(), torch.rand(2, 3, 16, 16)
    found = groups(dense, images)
    scores = l1(Evidence(dense, []))
    without, choice = (ranking.choose(found, scores, ratio, least=part) for part in (0.0, least))
    assert int(without.kept[found[0].name].sum()) == 1
    floor = min(least, 1 - ratio)
    for group in found:
        assert choice.kept[group.name].sum() >= floor * group.size - 1e-9
    assert choice.kept[found[0].name].sum() == max(1, -(-floor * 10 // 1))
    if ratio < 0.95:  # the others lose more instead
        assert choice.channels == without.channels
    assert choice.rescued[0] == "0.0"


@pytest.mark.parametrize("allocation", [*ALLOCATIONS, "random-1"])
@pytest.mark.parametrize("arch", SMALLEST)
def test_every_allocation_keeps_the_least_fraction_of_each_layer(arch, allocation):
    model = randomize(NETWORKS[arch](depth=SMALLEST[arch], num_classes=10, cfg=NARROW.get(arch)))
    first = next(iter(batch_norms(model)))
    model.get_submodule(first).weight.data.mul_(1e-4)
    found = declared(model)
    choice = choose(Prunable(model, found, least=0.2), 0.6, allocation)
    for name, alive in choice.alive.items():
        assert choice.kept[name].sum() >= 0.2 * alive.sum() - 1e-6
    if allocation == "global":
        assert first in choice.rescued
        before, after = choice.channels
        assert before - after == pytest.approx(0.6 * before, abs=1)


def test_without_a_floor_the_threshold_is_the_paper_s():
    model = randomize(NETWORKS["vgg"](depth=11, num_classes=10))
    every = torch.cat([bn.weight.detach().abs() for bn in batch_norms(model).values()]).sort()
    threshold = every.values[int(len(every.values) * 0.7)]
    choice = choose_channels(model, 0.7)
    assert choice.threshold == threshold and not choice.rescued
    for name, bn in batch_norms(model).items():
        assert torch.equal(choice.kept[name], bn.weight.detach().abs() > threshold)


def test_liveness_is_of_the_networks_in_eval_mode_and_leaves_them_alone():
    dense = chain().train()
    assert liveness(dense, dense, torch.rand(3, 3, 16, 16)) == pytest.approx(1)
    assert dense.training


@pytest.mark.parametrize("how", [{"measure": "l1"}, {"measure": "l1", "allocation": "lamp"}])
def test_the_methods_of_run_py_keep_the_least_fraction(how):
    dense, images = chain(), torch.rand(2, 3, 16, 16)
    kept = []
    for least in (LEAST, 0.4):
        task = Task(dense, images, list, 0.6, local=False, least=least, **how)
        kept.append([layer.out_channels for layer in channels(task).model[0][::2]])
    for wide, (few, many) in zip((10, 20), zip(*kept, strict=True), strict=True):
        assert few >= 0.1 * wide and many >= 0.4 * wide
    assert ExperimentSettings().pruning.least == PointsSettings().least == LEAST == 0.1
    assert PruneSettings().least == 0  # the paper's scripts keep the paper's rule
