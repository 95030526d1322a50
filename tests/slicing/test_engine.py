"""One engine for every network: its groups are declared or traced, its selections keep masks."""

import subprocess
import sys

import pytest
import torch
from conftest import NARROW, SMALLEST, keep_only, randomize, zero_others
from torch import nn
from warm import ROOT

from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import count_filters, declared, wires
from slimming.channels.scaling import alive_channels, present_channels, scaling_factors, selections
from slimming.choosing.importance import MEASURES, Evidence
from slimming.choosing.threshold import choose_channels
from slimming.errors import UserError
from slimming.slicing import kernels
from slimming.slicing.prune import groups

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
BATCHES = [(IMAGES, torch.arange(6))]
INSIDE = {"vgg": "feature.8", "resnet": "layer2", "densenet": "dense2"}


def build(arch, cfg=None, **kwargs):
    return NETWORKS[arch](depth=SMALLEST[arch], num_classes=10, cfg=cfg, **kwargs)


@pytest.fixture(params=SMALLEST)
def dense(request):
    torch.manual_seed(0)
    return randomize(build(request.param, NARROW.get(request.param)))


@torch.no_grad()
def logits(model):
    return model.eval()(IMAGES)


def prune(model, ratio=0.5, measure="l1", **kwargs):
    batches = [] if measure == "l1" else BATCHES
    scores = MEASURES[measure](Evidence(model, batches))
    return slicing.prune(model, scores, ratio, IMAGES, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_slims_the_networks_of_the_paper_again_and_again(dense, measure):
    """Globally, then layer by layer with multiples, some layers left alone."""
    arch = type(dense).__name__
    first = prune(dense, 0.4, measure)
    coupled = groups(dense, IMAGES)
    gone = sum(int(g.filters[~first.choice.kept[g.name]].sum()) for g in coupled)
    assert 0.3 <= gone / count_filters(coupled) <= 0.4
    assert count_filters(groups(first.model, IMAGES)) == count_filters(coupled) - gone
    again = prune(first.model, 0.3, measure, local=True, round_to=2, ignore=[INSIDE[arch]])
    for slim in (first, again):
        assert slim.difference <= 1e-4
        rebuilt = build(arch, slim.cfg)
        rebuilt.load_state_dict(slim.model.state_dict())
        assert torch.equal(logits(rebuilt), logits(slim.model)) and slim.model.cfg == slim.cfg
    before, after = present_channels(first.model), present_channels(again.model)
    found = wires(dense)
    for name, mask in after.items():
        writers = [name, *(wire.layer for wire in found if wire.writes == name)]
        alone = any(f"{layer}.".startswith(f"{INSIDE[arch]}.") for layer in writers)
        assert alone or mask.sum() % 2 == 0 or mask.sum() == before[name].sum()
        assert not alone or torch.equal(mask, before[name])
        if name in selections(dense):
            assert (mask <= before[name]).all(), "a channel that was dropped came back"


def test_what_stays_are_the_weights_that_were_there(dense):
    """To the bit, in a dense network and in a slim one; γ and β that nothing reads are zero."""
    for _ in range(2):
        keep, present = choose_channels(dense, 0.4).kept, present_channels(dense)
        slim, whole, expected = keep_only(dense, keep), selections(dense), dense.state_dict()
        for layer, reads, writes in wires(dense):
            weight = expected[f"{layer}.weight"]
            weight = weight[keep[writes]] if writes else weight
            weight = weight[:, keep[reads][present[reads]]] if reads else weight
            expected[f"{layer}.weight"] = weight
        for name, mask in keep.items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                tensor = expected[f"{name}.{part}"]
                if name not in whole:
                    tensor = tensor[mask]
                elif part in ("weight", "bias"):  # zero where the selection drops a channel
                    tensor = tensor * mask
                expected[f"{name}.{part}"] = tensor
            if name in whole:
                expected[f"{whole[name]}.indexes"] = mask.float()
        assert list(slim.state_dict()) == list(expected)
        for name, tensor in slim.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        dense = slim


def test_what_nothing_reads_and_what_has_no_scale_is_the_same_mask(dense):
    keep = choose_channels(dense, 0.5).kept
    kept = slicing.kept_channels(declared(dense), keep)
    assert torch.equal(logits(slicing.masked(dense, kept)), logits(zero_others(dense, keep)))


def test_a_channel_that_a_selection_has_dropped_neither_counts_nor_comes_back():
    model = randomize(build("resnet"))
    name = "layer2.0.bn1"
    whole = next(g for g in declared(model) if g.name == name)
    keep = {n: torch.ones(len(f), dtype=torch.bool) for n, f in scaling_factors(model).items()}
    keep[name][::2] = False
    group = next(g for g in declared(keep_only(model, keep)) if g.name == name)
    assert group.size == whole.size == 64 and torch.equal(group.alive, keep[name])
    assert [int(g.filters.sum()) for g in (whole, group)] == [64, 32]
    assert [(m.layer, m.side) for m in group.members] == [
        (name, "mask"),
        ("layer2.0.conv1", "in"),
    ]
    assert group.members[1].units.tolist() == list(range(1, 64, 2))


@pytest.mark.parametrize("word", ["layer1.0.bn1", "layer1.0.select", "layer1.0"])
def test_a_selection_is_left_alone_by_its_name_or_that_of_its_batch_norm(word):
    slim = prune(randomize(build("resnet")), 0.6, local=True, ignore=[word])
    assert slim.model.layer1[0].select.indexes.all() and not slim.model.select.indexes.all()
    with pytest.raises(UserError, match="no layer called layer9"):
        prune(slim.model, ignore=["layer9"])


def test_momentum_and_initial_values_follow_their_channels(dense):
    slim = prune(dense)
    numbers = {n: torch.randn_like(p) for n, p in dense.named_parameters() if p.requires_grad}
    left = slicing.slice_tensors(dense, numbers, slim.kept)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(numbers[name])
    for name, parameter in slicing.sliced(dense, slim.kept).named_parameters():
        assert not parameter.requires_grad or torch.equal(left[name], parameter)


def test_a_batch_norm_that_averages_over_all_batches_goes_on_counting_them():
    """Its running statistics would be overwritten by the next batch; others count from 0."""
    model = randomize(build("vgg", NARROW["vgg"]))
    cut, averages = model.feature[1], model.feature[5]
    cut.num_batches_tracked += 7
    averages.num_batches_tracked, averages.momentum = torch.tensor(7), None
    slim = prune(model, local=True).model
    assert len(slim.feature[1].weight) == 6 and slim.feature[1].num_batches_tracked == 0
    assert len(slim.feature[5].weight) == 8 and slim.feature[5].num_batches_tracked == 7
    slim = keep_only(model, choose_channels(model, 0.5).kept)  # as vggprune.py does
    assert slim.feature[1].num_batches_tracked == slim.feature[5].num_batches_tracked == 7


def test_kernels_that_nothing_reads_leave_the_networks_of_the_paper(dense):
    with torch.no_grad():
        for layer in [m for m in dense.modules() if isinstance(m, nn.Conv2d)][1:]:
            layer.weight[:, ::2] = 0
    coupled = groups(dense, IMAGES)
    slim = slicing.apply(dense, coupled, kernels.unread_channels(dense, coupled), IMAGES)
    *inner, last = [entry for entry in dense.cfg if entry != "M"]  # the linear layer reads the last
    assert [entry for entry in slim.cfg if entry != "M"] == [*(c // 2 for c in inner), last]
    torch.testing.assert_close(logits(slim.model), logits(dense), rtol=1e-4, atol=1e-4)


def test_a_masked_network_stands_for_a_slim_one(dense):
    keep = choose_channels(dense, 0.5).kept
    slim = slicing.without_dead_channels(zero_others(dense, keep))
    assert slim.cfg == slicing.cfg_of(dense, keep)
    alive = alive_channels(slim)
    assert sum(int(mask.sum()) for mask in alive.values()) == sum(c for c in slim.cfg if c != "M")


def test_a_slim_state_dict_fits_the_dense_network(dense):
    slim = prune(prune(dense).model, local=True)
    fresh = build(type(dense).__name__, NARROW.get(type(dense).__name__))
    loaded = slicing.load_slim_state(fresh, slim.model.state_dict())
    assert loaded is fresh and loaded.cfg == slim.cfg
    assert torch.equal(logits(loaded), logits(slim.model))


def grouped(*widths):
    """A convolution of each kind, and what has channels beside them."""
    a, b, c = widths
    layers = [nn.Conv2d(3, a, 3), nn.BatchNorm2d(a), nn.PReLU(a), nn.Conv2d(a, a, 3, groups=a)]
    layers += [nn.Conv2d(a, b, 3, groups=2), nn.BatchNorm2d(b, affine=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(c), nn.Linear(c, 10)).eval()


def test_a_slim_state_dict_of_a_network_that_declares_nothing():
    torch.manual_seed(0)
    dense, other = grouped(16, 8, 12), grouped(16, 8, 12)
    logits(dense), logits(other)  # the lazy layers get their shapes
    slim = prune(dense, local=True)
    loaded = slicing.load_slim_state(other.requires_grad_(False), slim.model.state_dict())
    assert torch.equal(logits(loaded), logits(slim.model)) and slicing.cfg_of(loaded) == slim.cfg
    assert not any(p.requires_grad for p in loaded.parameters())
    wide = {**dense.state_dict(), "0.weight": torch.zeros(17, 3, 3, 3)}
    kernel = {**dense.state_dict(), "0.weight": torch.zeros(16, 3, 5, 5)}
    odd = {**dense.state_dict(), "4.weight": torch.zeros(7, 8, 3, 3)}
    for state in (wide, kernel, odd, {"0.weight": torch.zeros(16)}, {}, {"a": torch.zeros(1)}):
        with pytest.raises(
            UserError, match="not weights of a slim version of the network"
        ) as error:
            slicing.load_slim_state(grouped(16, 8, 12), state)
        assert "\n" not in str(error.value)


def test_a_choice_over_other_groups_is_an_error():
    model = randomize(build("resnet"))
    with pytest.raises(ValueError, match=r"has no groups called bn"):
        slicing.kept_channels(declared(model, ["bn"]), choose_channels(model, 0.5).kept)


FOREIGN = """
import models, torch, pkgutil, importlib, slimming.choosing, slimming.measuring
assert models.mine
for room in (slimming.choosing, slimming.measuring):
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
import sys
assert not any(name.startswith("models.") for name in sys.modules)
"""


@pytest.mark.slow
def test_the_engine_works_beside_a_package_called_models(tmp_path):
    """It needs none of the suite's networks."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("mine = True\n")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FOREIGN]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
