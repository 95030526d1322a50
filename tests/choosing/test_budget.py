"""Budgets: as little is pruned as keeps them, and no less."""

import re

import pytest
import torch
from conftest import NARROW, SMALLEST, fails, keep_only, randomize, save_network, succeed

from models import NETWORKS, cifar_resnet
from slimming import slicing
from slimming.channels.groups import count_filters, declared
from slimming.choosing import budget, importance, ranking
from slimming.choosing.threshold import choose_channels
from slimming.commands.pruning import BudgetSettings
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.slicing.prune import groups
from slimming.storage import architecture

PRUNERS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
IMAGES = torch.zeros(64, 3, 32, 32)


def of_the_paper(arch, round_to=1):
    """A network, what makes it slim, and how many channels it has."""
    torch.manual_seed(0)
    model = randomize(NETWORKS[arch](depth=SMALLEST[arch], num_classes=10))
    coupled = declared(model)

    def prune(ratio):
        return keep_only(model, choose_channels(model, ratio, round_to=round_to).kept, coupled)

    return model, prune, choose_channels(model, 0).channels[0]


def traced():
    """The same for any network."""
    torch.manual_seed(0)
    model = cifar_resnet(8).eval()
    coupled = groups(model, IMAGES[:1])
    scores = importance.lamp(importance.Evidence(model, []))

    def prune(ratio):
        choice = ranking.choose(coupled, scores, ratio)
        return slicing.sliced(model, slicing.kept_channels(coupled, choice.kept))

    return model, prune, count_filters(coupled)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*SMALLEST, "traced"])
@pytest.mark.parametrize("flag, count", [("flops", "count_flops"), ("params", "count_parameters")])
def test_one_channel_less_would_be_past_the_budget(arch, flag, count):
    model, prune, total = of_the_paper(arch) if arch in SMALLEST else traced()
    cost = getattr(figures, count)
    for limit in (0.4, 0.7):
        ratio = BudgetSettings(**{flag: limit}).find_ratio(model, IMAGES, prune, total)
        at, before = (cost(prune(r)) / cost(model) for r in (ratio, ratio - 1 / total))
        assert at <= limit < before


@pytest.mark.slow
def test_two_budgets_hold_together_and_rounding_counts():
    model, prune, total = of_the_paper("vgg", round_to=8)
    size = {"mflops": 30.0, "mparams": 1.0}
    slim = prune(BudgetSettings(**size).find_ratio(model, IMAGES, prune, total))
    assert figures.count_flops(slim) <= 30e6 and figures.count_parameters(slim) <= 1e6
    assert all(bn.num_features % 8 == 0 for bn in slim.modules() if hasattr(bn, "running_mean"))
    alone = [
        BudgetSettings(**{n: v}).find_ratio(model, IMAGES, prune, total) for n, v in size.items()
    ]
    assert BudgetSettings(**size).find_ratio(model, IMAGES, prune, total) == max(alone)


@pytest.mark.slow
@pytest.mark.parametrize("flag, limit", [("latency", 0.5), ("ms", 40.0)])
def test_latency_is_that_of_the_deployment_form(flag, limit, monkeypatch):
    """With a clock that takes 80 ms for the dense network, and for others by their parameters."""
    model, prune, total = of_the_paper("resnet")
    full = figures.count_parameters(model)

    def latencies(models, images, seconds):
        assert len(images) == 16
        return [0.08 * figures.count_parameters(m) / full for m in models]

    monkeypatch.setattr(figures, "latencies", latencies)
    settings = BudgetSettings(**{flag: limit}, latency_batch=16)
    size = figures.count_parameters(prune(settings.find_ratio(model, IMAGES, prune, total))) / full
    assert 0.475 <= size <= 0.5


def test_what_cannot_be_met_says_what_the_smallest_is():
    model, prune, total = of_the_paper("densenet")
    with pytest.raises(UserError, match=r"cannot be met: .* needs --mflops [\d.]+ \(limit 0.001\)"):
        BudgetSettings(mflops=0.001).find_ratio(model, IMAGES, prune, total)
    fit = budget.smallest_fit(prune, lambda slim: {"one": 1.0}, {"one": 2.0}, total)
    assert fit.ratio < 1 / total  # what is within the budget already loses nothing


@pytest.mark.slow
@pytest.mark.parametrize("arch", PRUNERS)
def test_budgets_of_the_pruning_scripts(arch, images, tmp_path):
    path = tmp_path / "dense.pth.tar"
    save_network(path, arch, SMALLEST[arch], "folder", 2, NARROW.get(arch))
    command = f"--model {path} --data {images} --no-cuda --save {tmp_path}"
    printed = succeed(f"{PRUNERS[arch]} {command}/slim --flops 0.6 --params 0.9")
    assert re.search(r"budget: .* --flops 0\.\d+ \(limit 0\.6\), --params 0\.\d+", printed)
    slim, _, _ = architecture.load(tmp_path / "slim" / "pruned.pth.tar")
    dense, _, _ = architecture.load(path)
    assert 0.5 < figures.count_flops(slim) / figures.count_flops(dense) <= 0.6
    assert "budget: " in succeed(f"mask-impl/prune_mask.py {command}/mask --params 0.7")
    says = "--percent and --flops contradict each other"
    fails(tmp_path, f"{PRUNERS[arch]} {command}/x --flops 0.5 --percent 0.5", says=says)
    for wrong in ("--flops 0", "--flops 1.5", "--ms -1", "--latency x", "--latency-batch 0"):
        fails(tmp_path, f"{PRUNERS[arch]} {command}/x {wrong}", says=wrong.split()[0])
    fails(tmp_path, f"{PRUNERS[arch]} {command}/x --mflops 1e-6", says="cannot be met")


@pytest.mark.slow
def test_budgets_of_run_py(images, tmp_path):
    command = f"run.py --dataset folder --data {images} --model resnet --depth 11 --no-cuda "
    command += (
        f"--batch-size 16 --base-train-epochs 1 --finetune-epochs 0 --output-dir {tmp_path}/out"
    )
    for more in ("", "--pruning-method slimming --global-pruning"):
        assert "--flops 0.4" in succeed(f"{command} --flops 0.5 {more}")
    fails(tmp_path, f"{command} --flops 0.5 --pruning-ratio 0.2", says="contradict each other")
    fails(tmp_path, f"{command} --flops 0.5 --pruning-method kernel", says="a budget needs")
