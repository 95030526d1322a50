"""A slim network computes what the masked network computes; the threshold is the paper's."""

import importlib

import pytest
import torch
from conftest import SMALLEST, keep_only, randomize, zero_others

from models import densenet, resnet, vgg
from slimming.channels.scaling import (
    alive_channels,
    batch_norms,
    scaling_factors,
    selections,
    zero_channels,
)
from slimming.choosing.threshold import choose_channels, keep_one
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.reports import tables
from slimming.slicing.proof import prove_equal
from slimming.storage import architecture
from slimming.storage.architecture import Architecture

MASK_NETWORKS = importlib.import_module("mask-impl.models").NETWORKS
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_batch_norm_without_gamma_keeps_its_channels():
    small = randomize(vgg(depth=11, cfg=[8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8]))
    small.set_submodule("feature.5", torch.nn.BatchNorm2d(8, affine=False))
    assert "feature.5" not in scaling_factors(small) and alive_channels(small)["feature.5"].all()
    choice = choose_channels(small, 0.5)
    assert choice.kept["feature.5"].all() and choice.channels == (64, 8 + 27 + len(choice.rescued))
    slim, masked = keep_only(small, choice.kept), zero_others(small, choice.kept)
    assert relative(slim, masked) <= 1e-4
    with pytest.raises(UserError, match="not finite, or it has none"):
        choose_channels(torch.nn.Sequential(torch.nn.BatchNorm2d(3, affine=False)), 0.5)


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def relative(a, b):
    return float((logits(a) - logits(b)).abs().max() / logits(b).abs().max())


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.4, 0.7, 0.95, 0.999])
def test_slim_equals_masked(small, percent):
    keep = choose_channels(small, percent).kept
    slim, masked = keep_only(small, keep), zero_others(small, keep)
    assert relative(slim, masked) <= 1e-4
    assert figures.count_parameters(slim) < figures.count_parameters(small)


@pytest.mark.parametrize("build, depth", [(vgg, 19), (resnet, 56), (densenet, 40)])
def test_slim_equals_masked_at_the_depths_people_use(build, depth):
    torch.manual_seed(0)
    model = randomize(build(depth=depth))
    keep = choose_channels(model, 0.6).kept
    assert relative(keep_only(model, keep), zero_others(model, keep)) <= 1e-4


@pytest.mark.parametrize("percent", [0.1, 0.4, 0.7, 0.95])
def test_slim_equals_the_mask_implementation_with_the_same_weights(small, percent):
    arch = type(small).__name__
    keep = choose_channels(small, percent).kept
    network = Architecture(arch, SMALLEST[arch], "digits", 10)
    contents = {"state_dict": small.state_dict()}
    without_selection = architecture.load_network("x", contents, network, MASK_NETWORKS)
    assert not any("indexes" in name for name in without_selection.state_dict())
    zero_channels(without_selection, keep)
    assert relative(keep_only(small, keep), without_selection) <= 1e-4


def test_pruning_a_slim_network_again(small):
    first = keep_only(small, choose_channels(small, 0.4).kept)
    choice = choose_channels(first, 0.5)
    second = keep_only(first, choice.kept)
    assert relative(second, zero_others(first, choice.kept)) <= 1e-4
    before, after = choice.channels
    assert before == sum(int(k.sum()) for k in alive_channels(first).values())
    assert after == sum(c for c in second.cfg if c != "M")
    assert 0.4 <= after / before <= 0.51  # half of what was left, not of the full network


def test_scaling_factors_that_a_selection_drops_are_zero(small):
    """As the original writes them; also after a second pass."""
    once = keep_only(small, choose_channels(small, 0.4).kept)
    twice = keep_only(once, choose_channels(once, 0.4).kept)
    for slim in (once, twice):
        dropped = 0
        for name, selection in selections(slim).items():
            mask = slim.get_submodule(selection).indexes != 0
            bn = slim.get_submodule(name)
            assert torch.equal(bn.weight != 0, mask) and torch.equal(bn.bias != 0, mask)
            dropped += int((~mask).sum())
        assert dropped or not selections(slim)


def test_both_passes_equal_one_pass_with_the_same_channels(small):
    """Slicing a slice is slicing: 30 % and then more ends where going there at once ends."""
    at_once = choose_channels(small, 0.7)
    first = keep_only(small, choose_channels(small, 0.3).kept)
    alive = alive_channels(first)
    factors = scaling_factors(first)
    keep = keep_one(first, {n: alive[n] & (factors[n] > at_once.threshold) for n in alive})
    assert relative(keep_only(first, keep), keep_only(small, at_once.kept)) <= 1e-4


def test_the_threshold_is_the_value_at_the_paper_s_position():
    model = vgg(depth=11)
    values = torch.linspace(-1, 1, 2752)[torch.randperm(2752)]
    for bn, part in zip(
        batch_norms(model).values(),
        values.split([bn.num_features for bn in batch_norms(model).values()]),
        strict=True,
    ):
        bn.weight.data.copy_(part)
    choice = choose_channels(model, 0.7)
    ranked = sorted(values.abs().tolist())
    assert choice.threshold == ranked[int(2752 * 0.7)]
    assert choice.channels == (2752, sum(v > choice.threshold for v in ranked))
    assert choose_channels(model, 0.0).threshold == ranked[0]


def test_a_layer_that_would_be_empty_keeps_its_largest_factor(small):
    name, bn = list(batch_norms(small).items())[1]
    bn.weight.data.mul_(1e-6)
    choice = choose_channels(small, 0.5)
    assert choice.rescued == [name]
    assert choice.kept[name].nonzero().flatten().tolist() == [int(bn.weight.abs().argmax())]
    unguarded = choose_channels(small, 0.5, at_least_one=False)
    assert not unguarded.kept[name].any() and not unguarded.rescued


def test_a_fully_zeroed_layer_has_a_slim_network_too(small):
    """The mask implementation may lose whole layers; one zero channel stands for each."""
    keep = choose_channels(small, 0.5, at_least_one=False).kept
    for name in list(keep)[1:3]:
        keep[name][:] = False
    masked = zero_others(small, keep)
    assert relative(keep_only(masked, keep_one(masked, keep)), masked) <= 1e-4


def test_dead_channels_do_not_count(small):
    keep = choose_channels(small, 0.4).kept
    masked = zero_others(small, keep)
    again = choose_channels(masked, 0.0)
    assert again.channels[0] == sum(int(k.sum()) for k in keep.values())


def test_scaling_factors_that_are_not_finite_are_refused(small):
    next(iter(batch_norms(small).values())).weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        choose_channels(small, 0.5)


def test_the_proof_finds_a_slim_network_that_is_wrong(small):
    keep = choose_channels(small, 0.4).kept
    slim, masked = keep_only(small, keep), zero_others(small, keep)
    assert prove_equal(slim, masked, IMAGES) <= 1e-4
    list(batch_norms(slim).values())[-1].bias.data += 0.1
    with pytest.raises(UserError, match="nothing is written"):
        prove_equal(slim, masked, IMAGES)
    list(batch_norms(slim).values())[-1].bias.data[0] = float("nan")
    with pytest.raises(UserError, match="nothing is written"):
        prove_equal(slim, masked, IMAGES)


def test_parameters_and_flops_fall_with_the_channels():
    model = randomize(resnet(depth=20))
    keep = {n: torch.arange(bn.num_features) % 2 == 0 for n, bn in batch_norms(model).items()}
    slim = keep_only(model, keep)
    assert figures.count_flops(slim) < 0.5 * figures.count_flops(model)
    assert slim.cfg == [c // 2 for c in model.cfg]


def test_rounding_keeps_more_of_the_largest_never_fewer(small):
    plain = choose_channels(small, 0.6)
    rounded = choose_channels(small, 0.6, round_to=8)
    factors = scaling_factors(small)
    for name, mask in rounded.kept.items():
        assert mask.sum() % 8 == 0 or torch.equal(mask, rounded.alive[name])
        assert mask.sum() - plain.kept[name].sum() < 8
        assert (mask >= plain.kept[name]).all()
        if not mask.all():
            assert factors[name][mask].min() >= factors[name][~mask].max()
    slim = keep_only(small, rounded.kept)
    assert relative(slim, zero_others(small, rounded.kept)) <= 1e-4


@pytest.mark.parametrize("percent, round_to, warned", [(0.6, 2, 0), (0.1, 128, 1), (0.6, 4096, 1)])
def test_rounding_that_undoes_the_pruning_is_a_warning(small, percent, round_to, warned):
    plain, choice = (choose_channels(small, percent, round_to=n) for n in (1, round_to))
    gone, left = (before - after for before, after in (plain.channels, choice.channels))
    assert choice.spared == gone - left and (choice.spared > left) == bool(warned)
    found = tables.rounding_warnings(choice)
    assert len(found) == warned and not tables.rounding_warnings(plain)
    assert not found or f"`round_to` keeps {gone - left} of the {gone} channels" in found[0]
    assert not tables.rounding_warnings(choose_channels(small, 0, round_to=round_to))
