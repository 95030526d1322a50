"""Kernels and patterns: the smallest go and stay zero; channels that nothing reads are removed."""

import pytest
import torch
from conftest import NARROW, randomize, same, save_network, succeed
from torch import nn

import main
from models import mobilenet, resnet, vgg
from slimming import slicing
from slimming.commands.experiment.methods import Task, whole_kernels
from slimming.measuring import figures
from slimming.slicing import kernels
from slimming.slicing.prune import groups
from slimming.storage import architecture, checkpoint
from slimming.training.penalties import GradientMask
from slimming.training.trainer import Trainer

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2)]
    layers += [nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 12, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return randomize(net)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8])
def test_each_layer_loses_its_smallest_kernels(ratio):
    net = network()
    masks = kernels.kernel_masks(net, ratio)
    assert list(masks) == ["0", "3", "6"]  # not the depthwise one
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight.detach()
        out, inputs = weight.shape[:2]
        sizes = {(o, i): float(weight[o, i].abs().sum()) for o in range(out) for i in range(inputs)}
        gone = set(sorted(sizes, key=sizes.get)[: int(len(sizes) * ratio)])
        gone -= {max(((o, i) for i in range(inputs)), key=sizes.get) for o in range(out)}
        for place in sizes:
            assert mask[place].all() if place not in gone else not mask[place].any()


def test_globally_the_layers_of_small_weights_lose_more_and_each_filter_keeps_its_largest():
    net = network()
    net[3].weight.data /= 100
    local, together = (kernels.kernel_masks(net, 0.5, local) for local in (True, False))
    assert abs(float(local["3"].float().mean()) - 0.5) < 0.01
    assert together["3"].flatten(2).any(2).sum(1).eq(1).all()
    assert together["0"].float().mean() > local["0"].float().mean()


@pytest.mark.slow
@pytest.mark.parametrize("ratio, kept", [(0.2, 7), (0.5, 4), (0.8, 2), (0.99, 1)])
def test_each_kernel_takes_the_best_of_few_patterns(ratio, kept):
    net = vgg(cfg=[64, "M", 128, "M", 128, 128, "M", 128, 128, "M", 128, 128])
    masks = kernels.pattern_masks(net, ratio)
    for name, mask in masks.items():
        size = net.get_submodule(name).weight.detach().abs().flatten(2).flatten(0, 1)
        own = mask.flatten(2).flatten(0, 1)
        patterns = own.unique(dim=0)
        assert len(patterns) <= kernels.PATTERNS and own.sum(1).eq(kept).all()
        best = (size[:, None] * patterns).sum(2).amax(1)
        torch.testing.assert_close((size * own).sum(1), best)
    assert all(mask.all() for mask in kernels.pattern_masks(net, 0.0).values())
    assert list(kernels.pattern_masks(network(), ratio)) == ["0", "3", "5"]  # 1x1 have none


@pytest.mark.parametrize("choose", [kernels.kernel_masks, kernels.pattern_masks])
def test_zeros_stay_zero_through_training_with_momentum_and_weight_decay(choose):
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    def step(mask=None):
        optimizer.zero_grad()
        net(IMAGES).logsumexp(1).sum().backward()
        if mask:
            mask.on_gradients()
        optimizer.step()

    step()  # so that there is momentum
    masks = choose(net, 0.5)
    kernels.zero_weights(net, masks)
    before = {name: net.get_submodule(name).weight.detach().clone() for name in masks}
    mask = GradientMask(net, optimizer, kernels.zero_masks(net))
    step(mask)
    step(mask)
    for name, keep in masks.items():
        weight = net.get_submodule(name).weight
        assert not weight[~keep].any() and not torch.equal(weight[keep], before[name][keep])


@pytest.mark.parametrize(
    "build", [network, lambda: randomize(vgg(depth=11)), lambda: mobilenet().eval()]
)
def test_channels_that_nothing_reads_are_removed_and_nothing_changes(build):
    net = build()
    convs = list(kernels.convolutions(net).values())
    with torch.no_grad():
        for conv in convs[1:]:
            conv.weight[:, ::2] = 0
        dense = net(IMAGES)
        found = groups(net, IMAGES)
        slim = slicing.apply(net, found, kernels.unread_channels(net, found), IMAGES).model
        difference = (slim(IMAGES) - dense).abs().max() / dense.abs().max()
    assert difference <= 1e-5
    assert figures.count_parameters(slim) < 0.8 * figures.count_parameters(net)


@pytest.mark.slow
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("arch", ["vgg", "resnet", "mobilenet"])
def test_channels_with_small_kernels_go_first_and_as_a_whole(arch, local, monkeypatch):
    """Of the kernels as many go as without them; the result is proved by `Pruned.difference`."""
    torch.manual_seed(0)
    builds = {"vgg": lambda: vgg(depth=11, cfg=NARROW["vgg"]), "resnet": lambda: resnet(depth=11)}
    net = randomize(builds.get(arch, mobilenet)())
    coupled = groups(net, IMAGES)
    gone = {}
    for group in coupled:  # the last of a ResNet is read by a linear layer alone
        convs = [m for m in group.members if m.side == "out" or "conv" in m.layer]
        gone[group.name] = torch.arange(group.size) % 4 == (1 if arch != "resnet" or convs else 4)
    with torch.no_grad():  # a fourth of the channels has small kernels
        for name, small in kernels.kernels_of(net, coupled, gone).items():
            net.get_submodule(name).weight[small] /= 100
    task = Task(net, IMAGES, list, 0.5, "l1", local)
    pruned = whole_kernels(task)
    monkeypatch.setattr(kernels, "WHOLE", 0.0)
    alone = whole_kernels(task).model
    assert pruned.difference <= 1e-4
    for name, keep in pruned.choice.kept.items():
        assert (
            not (~keep & ~gone[name]).any() and keep.numel() - keep.sum() >= 0.13 * gone[name].sum()
        )
    models = (net, alone, pruned.model)
    assert figures.count_parameters(models[2]) < figures.count_parameters(models[1])
    convs = [kernels.convolutions(model).values() for model in models]
    total, without, left = (sum(int(c.weight.count_nonzero()) for c in some) for some in convs)
    assert left / total == pytest.approx(without / total, abs=0.01)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_half_of_the_kernels_go_with_whole_channels(ratio):
    net = randomize(vgg(depth=11))
    coupled, masks = groups(net, IMAGES), kernels.kernel_masks(net, ratio)
    weak = kernels.weak_channels(net, coupled, masks, ratio)
    gone = kernels.kernels_of(net, coupled, weak)
    shares = [float(gone[name].float().mean()) for name in list(masks)[1:]]
    assert shares == pytest.approx([ratio / 2] * len(shares), abs=0.02)


def test_a_group_that_nothing_reads_keeps_one_channel():
    net = network()
    net[3].weight.data.zero_()
    found = groups(net, IMAGES)
    keep = kernels.unread_channels(net, found).kept
    assert keep[found[0].name].sum() == 1


def test_depthwise_kernels_have_patterns_and_keep_their_filters():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    assert not kernels.kernel_masks(net, 0.5).keys() & {"0"}
    masks = kernels.pattern_masks(net, 0.5)
    assert set(masks) == {"0"} and masks["0"].flatten(2).sum(2).unique().tolist() == [4]
    kernels.zero_weights(net, masks)
    assert [list(keep.shape) for keep in kernels.zero_masks(net).values()] == [[8, 1, 3, 3]]


@pytest.mark.parametrize(
    "build, choose, ratio",
    [(lambda: vgg(depth=11), kernels.kernel_masks, 0.1), (mobilenet, kernels.pattern_masks, 0.5)],
    ids=["vgg", "mobilenet: depthwise kernels alone have patterns, 1 % of the weights"],
)
def test_the_masks_of_zeros_are_those_of_the_pruned_weights(build, choose, ratio):
    net = build()
    masks = choose(net, ratio)
    kernels.zero_weights(net, masks)
    held = kernels.zero_masks(net)
    for name, keep in masks.items():
        weight = net.get_submodule(name).weight
        assert torch.equal(held[weight], (weight != 0).float()) and (weight != 0).sum() > 0
        assert not held[weight][~keep].any()


@pytest.mark.slow
@pytest.mark.parametrize("choose", [kernels.kernel_masks, kernels.pattern_masks, None])
def test_refine_holds_the_zeros_that_a_file_says_were_pruned(
    images, tmp_path, monkeypatch, capsys, choose
):
    """Stopped and resumed it ends as if it had not been. Zeros of another file learn."""
    start = save_network(tmp_path / "start", "resnet", 11, "folder", 2)
    net, network, _ = architecture.load(start)
    masks = (choose or kernels.kernel_masks)(net, 0.5)
    kernels.zero_weights(net, masks)
    says = {"holds_zeros": True} if choose else {}
    checkpoint.write(start, architecture.contents_of(net, network, 0, 0.0, **says))
    words = ["main.py", "--refine", start, "--data", images, "-sr", "--epochs", 2, "--amp"]
    words += ["--batch-size", 32, "--no-cuda", "--no-tensorboard", "--resume", "auto", "--save"]

    def refine(folder):
        monkeypatch.setattr("sys.argv", list(map(str, [*words, tmp_path / folder])))
        main.main()
        return checkpoint.read(tmp_path / folder / "checkpoint.pth.tar")

    whole = refine("whole")
    end_epoch = Trainer.end_epoch

    def stopped(self, epoch, *scores):
        if epoch == 1:
            raise KeyError("killed")
        end_epoch(self, epoch, *scores)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(Trainer, "end_epoch", stopped)
        refine("stopped")
    assert same(refine("stopped"), whole)
    pruned = sum(int((~keep).sum()) for keep in masks.values())
    printed = capsys.readouterr().out
    assert whole["holds_zeros"] == bool(choose)
    assert (f"{pruned:,} pruned weights stay zero" in printed) == bool(choose)
    assert (f"{pruned:,} weights of convolutions are zero" in printed) != bool(choose)
    for name, keep in masks.items():
        weight = whole["state_dict"][f"{name}.weight"]
        assert weight[keep].count_nonzero() == keep.sum()
        assert weight[~keep].any() != bool(choose)


@pytest.mark.parametrize("repair", ["", "--repair"])
def test_a_slim_network_has_the_zeros_of_the_network_before_it(images, tmp_path, repair):
    """But not after repair, which fits all weights."""
    shape = ("vgg", 11, "folder", 2, NARROW["vgg"])
    path = save_network(tmp_path / "zeros", *shape, holds_zeros=True)
    prune = f"vggprune.py --model {path} --percent 0.2 {repair} --save {tmp_path} --data {images}"
    succeed(f"{prune} --no-cuda")
    assert ("holds_zeros" in checkpoint.read(tmp_path / "pruned.pth.tar")) != bool(repair)


def test_a_network_of_depthwise_convolutions_has_no_kernels_to_prune():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 2))
    assert kernels.kernel_masks(net, 0.5, local=False) == {}
    assert kernels.pattern_masks(nn.Sequential(nn.Conv2d(8, 8, 1)), 0.5, local=False) == {}


def test_what_counts_is_what_is_not_zero():
    net = network()
    assert figures.count_effective(net) == (
        figures.count_parameters(net),
        figures.count_flops(net),
    )
    kernels.zero_weights(net, kernels.kernel_masks(net, 0.6))
    pixels = {"0": 30 * 30, "3": 28 * 28, "5": 26 * 26, "6": 26 * 26, "9": 1}
    flops = sum(2 * p * int(net.get_submodule(n).weight.count_nonzero()) for n, p in pixels.items())
    others = [p for n, p in net.named_parameters() if n[0] == "1" or n.endswith("bias")]
    weights = sum(int(net.get_submodule(n).weight.count_nonzero()) for n in pixels)
    assert figures.count_effective(net) == (weights + sum(p.numel() for p in others), flops)
