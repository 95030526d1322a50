"""Repair: exact where algebra allows, better elsewhere, and never worse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import NETWORKS
from slimming.errors import UserError
from slimming.pruning import importance, slicing
from slimming.pruning.activations import Activations
from slimming.pruning.groups import declared, groups
from slimming.pruning.repair import divergence, repair
from slimming.pruning.threshold import choose_channels

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
    kept = slicing.kept_channels(model, coupled, keep)
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


@pytest.mark.parametrize("arch, depth", [("vgg", 11), ("resnet", 20), ("densenet", 22)])
def test_the_networks_of_the_paper_are_repaired_the_same_way_twice(arch, depth):
    torch.manual_seed(0)
    images = F.interpolate(IMAGES, 32)
    dense = NETWORKS[arch](depth=depth, num_classes=10)
    with_statistics(dense, images)
    choice = choose_channels(dense, 0.3)
    kept = slicing.kept_channels(dense, declared(dense), choice.keep)
    slim = slicing.sliced(dense, kept)
    first, second = (repair(slim, dense, kept, images, seed=4) for _ in range(2))
    assert first.helped and first.after < 0.5 * first.before and not first.notes
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


def test_what_cannot_be_fitted_is_named():
    torch.manual_seed(0)
    mirrored = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
    dense = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), mirrored, nn.ReLU(), nn.Flatten(), nn.Linear(600, 4))
    )
    slim, kept = cut(dense, {"0": [0, 1]})
    (note,) = repair(slim, dense, kept, IMAGES).notes
    assert note.startswith("2 is left as it was") and "reflect" in note


def test_a_repair_that_does_not_help_is_not_kept():
    dense = plain()
    slim, kept = cut(dense, {"0": [0]})
    others = IMAGES.clone()
    others[12:] = others[12:13]  # fitted to one image, and judged by twelve
    result = repair(slim, dense, kept, others)
    assert not result.helped and result.after > result.before
    for name, value in slim.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_wrong_arguments():
    dense = plain()
    slim, kept = cut(dense, {"0": [0]})
    with pytest.raises(UserError, match="at least 32 images"):
        repair(slim, dense, kept, IMAGES[:8])

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="trace"):
        repair(Branching(), Branching(), {}, IMAGES)


def test_activations_are_those_of_a_forward_pass_and_are_forgotten_when_read():
    model = with_statistics(Mixed())
    batches = list(IMAGES.split(32))
    activations = Activations(model, batches)
    most = 0
    for node in activations.order:
        activations.compute(node)
        most = max(most, len(activations.kept))
    (last,) = activations.kept
    assert torch.equal(torch.cat(activations.kept[last]), torch.cat([model(b) for b in batches]))
    assert most <= 4
