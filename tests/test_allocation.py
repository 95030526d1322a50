"""Allocations: how a fraction of the channels is shared among layers."""

import math

import pytest
import torch
from conftest import NARROW, SMALLEST, fails, save_network, succeed

from models import constructor
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import allocation
from slimming.pruning.allocation import ALLOCATIONS, Prunable
from slimming.pruning.coupling import count_filters
from slimming.pruning.groups import declared, groups
from slimming.pruning.proof import prove_equal
from slimming.pruning.slicing import masked
from slimming.pruning.threshold import choose_channels
from slimming.storage import architecture
from slimming.workflows.budgets import BudgetSettings

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SCRIPTS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}


def other_network(arch="resnet18"):
    torch.manual_seed(0)
    model = constructor(arch)(num_classes=10).eval()
    return Prunable(model, groups(model, IMAGES[:1]))


def test_global_is_the_threshold_of_the_paper(small):
    ours = allocation.choose(Prunable(small, declared(small), round_to=4), 0.4)
    theirs = choose_channels(small, 0.4, round_to=4)
    assert ours.threshold == theirs.threshold
    assert all(torch.equal(ours.keep[name], mask) for name, mask in theirs.keep.items())


def test_uniform_takes_the_same_fraction_of_each_layer(small):
    choice = allocation.choose(Prunable(small, declared(small)), 0.3, "uniform")
    for name, alive in choice.alive.items():
        assert int(alive.sum() - choice.keep[name].sum()) == int(int(alive.sum()) * 0.3 + 1e-9)
    assert math.isnan(choice.threshold)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9])
def test_a_random_candidate_is_its_seed_and_removes_the_fraction(small, ratio):
    prunable = Prunable(small, declared(small))
    shares = allocation.random_shares(prunable.coupled, ratio, 7)
    assert shares == allocation.random_shares(prunable.coupled, ratio, 7)
    assert shares != allocation.random_shares(prunable.coupled, ratio, 8)
    assert all(0 <= share <= 1 for share in shares.values())
    removed = sum(shares[group.name] * int(group.filters.sum()) for group in prunable.coupled)
    assert removed == pytest.approx(ratio * count_filters(prunable.coupled))
    assert len({round(share, 6) for share in shares.values()}) > 1


@pytest.mark.parametrize("name", [*ALLOCATIONS, "random-3"])
def test_every_allocation_gives_a_network_that_equals_the_masked_one(small, name):
    for prunable in (Prunable(small, declared(small)), other_network()):
        slim, kept = prunable.slim(allocation.choose(prunable, 0.5, name))
        prove_equal(slim, masked(prunable.model, kept), IMAGES)
        assert profiling.count_parameters(slim) < 0.8 * profiling.count_parameters(prunable.model)


def test_without_batchnorm_there_is_no_threshold():
    prunable = other_network("vgg11")
    with pytest.raises(UserError, match="no BatchNorm"):
        allocation.choose(prunable, 0.5)
    slim, _ = prunable.slim(allocation.choose(prunable, 0.5, "uniform"))
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
        expected, _ = prunable.slim(allocation.choose(prunable, 0.4, name))
        state = expected.state_dict()
        assert all(torch.equal(value, state[n]) for n, value in slim.state_dict().items())
    assert "slim equals masked" in succeed(
        f"mask-impl/prune_mask.py {command}/mask --percent 0.4 --allocation uniform"
    )
    fails(tmp_path, f"{SCRIPTS[arch]} {command}/x --allocation best", says="random-N, not 'best'")


def test_a_budget_holds_with_every_allocation():
    prunable = other_network()
    full = profiling.count_flops(prunable.model)
    for name in (*ALLOCATIONS, "random-2"):
        ratio = BudgetSettings(flops=0.5).of(prunable, IMAGES, name)
        at, before = (
            profiling.count_flops(prunable.slim(allocation.choose(prunable, r, name))[0]) / full
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
