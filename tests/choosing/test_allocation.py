"""Allocations: how a fraction of the channels is shared among layers."""

import math

import pytest
import torch
from conftest import NARROW, SMALLEST, fails, keep_only, save_network, succeed, zero_others

from models import constructor
from slimming.channels.groups import count_filters, declared
from slimming.choosing import allocation
from slimming.choosing.allocation import ALLOCATIONS, Prunable
from slimming.choosing.threshold import Choice, choose_channels
from slimming.commands.pruning import BudgetSettings
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.reports import tables
from slimming.slicing import masked, slim_to
from slimming.slicing.proof import prove_equal
from slimming.slicing.prune import groups
from slimming.storage import architecture

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SCRIPTS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}


def other_network(arch="resnet18"):
    torch.manual_seed(0)
    model = constructor(arch)(num_classes=10).eval()
    return Prunable(model, groups(model, IMAGES[:1]))


def slimmed(prunable, ratio, name):
    choice = allocation.choose(prunable, ratio, name)
    return slim_to(prunable.model, prunable.coupled, choice.kept)


def test_global_is_the_threshold_of_the_paper(small):
    ours = allocation.choose(Prunable(small, declared(small), round_to=4), 0.4)
    theirs = choose_channels(small, 0.4, round_to=4)
    assert ours.threshold == theirs.threshold
    assert all(torch.equal(ours.kept[name], mask) for name, mask in theirs.kept.items())


def test_uniform_takes_the_same_fraction_of_each_layer(small):
    choice = allocation.choose(Prunable(small, declared(small)), 0.3, "uniform")
    for name, alive in choice.alive.items():
        assert abs(int(alive.sum() - choice.kept[name].sum()) - 0.3 * int(alive.sum())) <= 1
    assert math.isnan(choice.threshold)


@pytest.mark.parametrize("name", ["uniform", "random-7"])
def test_uniform_and_random_allocations_remove_the_fraction(small, name):
    prunable = Prunable(small, declared(small))
    total = count_filters(prunable.coupled)
    for ratio in (0.05, 0.3, 0.5):
        keep = allocation.choose(prunable, ratio, name).kept
        removed = sum(int(g.filters[~keep[g.name]].sum()) for g in prunable.coupled)
        assert 0 <= ratio * total - removed <= max(int(g.filters.max()) for g in prunable.coupled)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
@pytest.mark.parametrize("name", ["global", "uniform", "lamp", "random-3"])
def test_a_ratio_out_of_range_is_an_error(small, name, ratio):
    with pytest.raises(UserError, match="ratio must be at least 0 and less than 1"):
        allocation.choose(Prunable(small, declared(small)), ratio, name)


def test_an_unknown_allocation_is_an_error(small):
    with pytest.raises(UserError, match="'lamb': use global, uniform, lamp or random-N"):
        allocation.choose(Prunable(small, declared(small)), 0.5, "lamb")


def test_layers_without_alive_channels_have_a_table():
    none = torch.zeros(4, dtype=torch.bool)
    text = tables.layers_text(Choice(0.5, 0.0, {"bn": none}, {"bn": none}, []))
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["bn", "0", "0", "0.0%"],
        ["all", "0", "0", "0.0%"],
    ]


def test_a_random_allocation_is_that_of_its_seed(small):
    prunable = Prunable(small, declared(small))
    first, again, other = (
        {n: int(mask.sum()) for n, mask in allocation.choose(prunable, 0.5, name).kept.items()}
        for name in ("random-7", "random-7", "random-8")
    )
    assert first == again != other
    names = list(first)
    shares = allocation.random_shares(names, 7)
    left = {n: first[n] / int(prunable.coupled[i].alive.sum()) for i, n in enumerate(names)}
    most, least = max(shares, key=shares.get), min(shares, key=shares.get)
    assert left[most] < 0.5 < left[least]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global", "uniform", "random-1"])
def test_channels_that_a_mask_has_removed_do_not_count(small, name):
    """A masked network loses the same channels as the slim one that it equals."""
    first = choose_channels(small, 0.3)
    dead = zero_others(small, first.kept)
    slim = keep_only(small, first.kept)
    parts = [Prunable(model, declared(model)) for model in (dead, slim)]
    assert parts[0].total == parts[1].total
    ours, theirs = (slimmed(p, 0.4, name)[0] for p in parts)
    assert figures.count_flops(ours) == figures.count_flops(theirs)
    assert ours.cfg == theirs.cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALLOCATIONS, "random-3"])
def test_every_allocation_gives_a_network_that_equals_the_masked_one(narrow, name):
    for prunable in (Prunable(narrow, declared(narrow)), other_network()):
        slim, kept = slimmed(prunable, 0.5, name)
        prove_equal(slim, masked(prunable.model, kept), IMAGES)
        assert figures.count_parameters(slim) < 0.8 * figures.count_parameters(prunable.model)


@pytest.mark.slow
def test_without_batchnorm_there_is_no_threshold():
    prunable = other_network("vgg11")
    with pytest.raises(UserError, match="no BatchNorm"):
        allocation.choose(prunable, 0.5)
    slim, _ = slimmed(prunable, 0.5, "uniform")
    assert slim.features[0].out_channels == 32


@pytest.mark.parametrize("arch", SCRIPTS)
def test_allocations_of_the_pruning_scripts(arch, images, tmp_path):
    path = save_network(
        tmp_path / "dense.pth.tar", arch, SMALLEST[arch], "folder", 2, NARROW.get(arch)
    )
    command = f"--model {path} --data {images} --no-cuda --save {tmp_path}"
    dense, _, _ = architecture.load(path)
    for name in ("uniform", "lamp", "random-5"):
        more = f"{command}/{name} --percent 0.4 --allocation {name}"
        assert "slim equals masked" in succeed(f"{SCRIPTS[arch]} {more}")
        slim, _, _ = architecture.load(tmp_path / name / "pruned.pth.tar")
        prunable = Prunable(dense, declared(dense))
        expected, _ = slimmed(prunable, 0.4, name)
        state = expected.state_dict()
        assert all(torch.equal(value, state[n]) for n, value in slim.state_dict().items())
    assert "slim equals masked" in succeed(
        f"mask-impl/prune_mask.py {command}/mask --percent 0.4 --allocation uniform"
    )
    fails(tmp_path, f"{SCRIPTS[arch]} {command}/x --allocation best", says="random-N, not 'best'")


@pytest.mark.slow
def test_a_budget_holds_with_every_allocation():
    prunable = other_network()
    full = figures.count_flops(prunable.model)
    for name in (*ALLOCATIONS, "random-2"):  # no two layers step at once
        ratio = BudgetSettings(flops=0.5).find_ratio_for(prunable, IMAGES, name)
        at, before = (
            figures.count_flops(slimmed(prunable, r, name)[0]) / full
            for r in (ratio, ratio - 1 / prunable.total)
        )
        assert at <= 0.5 < before


def test_allocations_of_run_py(images, tmp_path):
    command = f"run.py --dataset folder --data {images} --model resnet18 --no-cuda --batch-size 16 "
    command += f"--base-train-epochs 1 --finetune-epochs 0 --output-dir {tmp_path}/out"
    assert "slim equals masked" in succeed(f"{command} --allocation lamp --pruning-ratio 0.9")
    says = "--allocation and --importance contradict each other"
    fails(tmp_path, f"{command} --allocation lamp --importance l1", says=says)
    says = "--allocation needs --pruning-method channel or slimming"
    fails(tmp_path, f"{command} --allocation lamp --pruning-method kernel", says=says)
    vgg = command.replace("resnet18", "vgg11")
    fails(tmp_path, f"{vgg} --allocation global", says="no BatchNorm")
