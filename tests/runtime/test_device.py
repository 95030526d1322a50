"""What is computed on --device is what the CPU computes in fp32. On a GPU:
`pytest -m device --device cuda`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, SMALLEST, make_images, randomize, same, succeed

from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import declared
from slimming.channels.scaling import zero_channels
from slimming.choosing.importance import MEASURES, Evidence
from slimming.choosing.threshold import choose_channels
from slimming.choosing.tracking import Tracker
from slimming.data.batches import Batches, Split
from slimming.repair.layer_by_layer import repair
from slimming.repair.one_pass import OnePass
from slimming.runtime.device import LAYOUT, Precision, compiled
from slimming.storage import checkpoint
from slimming.training import loop
from slimming.training.penalties import GradientMask, L1Penalty, updateBN
from slimming.training.trainer import load_momentum, make_optimizer

pytestmark = pytest.mark.device
CPU = torch.device("cpu")
BATCH, LR, S = 16, 0.01, 0.1


def network(arch, device, pruned=0.0):
    """A small network with random scaling factors; ``pruned`` through channel selection."""
    torch.manual_seed(0)
    model = NETWORKS[arch](depth=SMALLEST[arch], num_classes=10, cfg=NARROW.get(arch))
    model = randomize(model)
    if pruned:
        model = slim_of(model, pruned)[0]
    return model.to(device, memory_format=LAYOUT)


def slim_of(model, ratio):
    """A slim network, and what it keeps of each layer."""
    keep = choose_channels(model, ratio).kept
    kept = slicing.kept_channels(declared(model), keep)
    return slicing.sliced(model, kept), kept


def batches(device, steps, augment=True):
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(256, (steps * BATCH, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(10, (len(images),), generator=draw)
    return Batches(Split(images.to(device), labels.to(device), [""] * 10), BATCH, augment=augment)


def trained(arch, device, steps=1, pruned=0.0, callbacks=(), precision=None, wrap=None, lr=LR):
    """A network after so many steps with the penalty."""
    model = network(arch, device, pruned)
    optimizer = make_optimizer(model, lr, 0.9, 1e-4)
    callbacks = [L1Penalty(model, S), *callbacks]
    loop.train(
        wrap(model) if wrap else model, batches(device, steps), optimizer, 0, callbacks, precision
    )
    return model


def assert_alike(model, expected, rtol=1e-3, atol=1e-4):
    """Equal weights and statistics, on any devices."""
    ours, theirs = model.state_dict(), expected.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name].cpu(), value.cpu(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def another_than_the_cpu(device):
    """On the CPU, other files compare with what is right; here it would be with itself."""
    if device.type == "cpu":
        pytest.skip("the CPU is not compared with itself")


def image_batch(device, count=BATCH, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=draw).to(device)


@pytest.mark.parametrize("pruned", [0.0, 0.4], ids=["dense", "slim"])
@pytest.mark.parametrize("arch", SMALLEST)
def test_one_training_step_is_that_of_plain_pytorch_on_the_cpu(arch, pruned, device):
    """NCHW, SGD and the penalty parameter by parameter, the same augmented images."""
    plain = network(arch, CPU, pruned).to(memory_format=torch.contiguous_format).train()
    learned = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, LR, 0.9, weight_decay=1e-4, foreach=False, fused=False)
    ((images, labels),) = batches(CPU, 1)
    F.cross_entropy(plain(images), labels).backward()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.grad += S * module.weight.detach().sign()
    optimizer.step()
    assert_alike(trained(arch, device, pruned=pruned), plain)


def test_augmented_batches_are_those_of_the_cpu(device):
    another_than_the_cpu(device)
    for (ours, labels), (theirs, expected) in zip(batches(device, 2), batches(CPU, 2), strict=True):
        assert torch.equal(labels.cpu(), expected)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0**12], ids=["autocast", "scaler"])
def test_the_penalty_is_not_scaled_or_rounded(scale, device):
    """Under autocast, and with a gradient scaler: what it adds to the gradient of γ is s · sign(γ)
    in fp32."""
    precision = Precision(device, amp=True)
    if scale:
        precision.scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    model = network("resnet", device)
    gammas = {n: p for n, p in model.named_parameters() if "bn" in n and n.endswith("weight")}
    before, after, penalty = {}, {}, L1Penalty(model, S)

    class Look:
        def __init__(self, seen):
            self.seen = seen

        def on_gradients(self, batch):
            self.seen |= {n: p.grad.clone() for n, p in gammas.items()}

    optimizer = make_optimizer(model, 0.0, 0.0, 0.0)
    callbacks = [Look(before), penalty, Look(after)]
    loop.train(model, batches(device, 1), optimizer, 0, callbacks, precision)
    for name, gamma in gammas.items():
        assert after[name].dtype == torch.float32
        added = after[name] - before[name]
        torch.testing.assert_close(added, S * gamma.detach().sign(), rtol=1e-3, atol=1e-4)


def test_a_step_that_overflows_is_skipped_and_the_next_one_is_not(device):
    """Neither weights nor momentum change in it, although the penalty has been added."""
    precision = Precision(device)
    precision.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127)
    start = network("resnet", device)
    start.fc.weight.data.mul_(1000)  # a large loss
    model = copy.deepcopy(start)
    optimizer, penalty = make_optimizer(model, LR, 0.9, 1e-4), [L1Penalty(model, S)]
    loop.train(model, batches(device, 1), optimizer, 0, penalty, precision)
    assert precision.scaler.get_scale() == 2.0**126
    learned = dict(start.named_parameters())
    assert all(torch.equal(p, learned[n]) for n, p in model.named_parameters())
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())
    precision.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    loop.train(model, batches(device, 1), optimizer, 0, penalty, precision)
    assert not torch.equal(model.fc.weight, start.fc.weight)


def test_every_penalty_adds_the_same(device):
    """The fused one, that of the original scripts, and s · sign(γ) by hand; a mask keeps the
    gradients of pruned channels zero."""
    model = network("densenet", device)
    gammas = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    gammas[0].data[:3] = 0
    for add in (L1Penalty(model, S).on_gradients, lambda: updateBN(model, S)):
        for gamma in gammas:
            gamma.grad = torch.ones_like(gamma)
        add()
        for gamma in gammas:
            assert torch.equal(gamma.grad, 1 + S * gamma.detach().sign())
    masked = zero_channels(network("densenet", device), choose_channels(model, 0.4).kept)
    zeros = [m.weight == 0 for m in masked.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    optimizer = make_optimizer(masked, LR, 0.9, 1e-4)
    callbacks = [L1Penalty(masked, S), GradientMask(masked, optimizer)]
    loop.train(masked, batches(device, 2), optimizer, 0, callbacks)
    norms = [m for m in masked.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert any(zero.any() for zero in zeros)
    for norm, zero in zip(norms, zeros, strict=True):
        assert (norm.weight[zero] == 0).all() and (norm.bias[zero] == 0).all()


@pytest.mark.parametrize("arch", SMALLEST)
@torch.no_grad()
def test_slim_equals_masked(arch, device):
    dense = network(arch, CPU)
    keep = choose_channels(dense, 0.4).kept
    slim = slim_of(dense, 0.4)[0].to(device, memory_format=LAYOUT)
    masked = zero_channels(copy.deepcopy(dense), keep)
    images = image_batch(CPU)
    expected = masked.eval()(images)
    logits = slim.eval()(images.to(device, memory_format=LAYOUT)).cpu()
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_channel_selection_sees_every_write(device):
    model, images = network("resnet", device, pruned=0.4).eval(), image_batch(device, 2)
    selection = next(m for m in model.modules() if hasattr(m, "indexes"))
    with torch.no_grad():
        before = model(images)
        kept = selection.indexes.detach().clone()
        selection.indexes.data = kept.flip(0)  # as many channels
        changed = model(images)
        selection.indexes.mul_(0).add_(kept)
        again = model(images)
    assert not torch.equal(before, changed) and torch.equal(before, again)


@pytest.mark.parametrize("arch", ["vgg", "resnet"])
def test_twenty_steps_run_without_waiting_for_the_device(arch, device):
    """Between printed lines: loader, forward, backward, penalty, mask, tracker, step and meter."""
    if device.type != "cuda":
        pytest.skip("only CUDA tells of synchronisation")
    model = network(arch, device, pruned=0.4)
    optimizer = make_optimizer(model, LR, 0.9, 1e-4)
    quiet, tracker = Quiet(20), Tracker(model, "biased_loss_tracked", steps=24, batches=24)
    callbacks = [L1Penalty(model, S), GradientMask(model, optimizer), tracker, quiet]
    precision = Precision(device, amp=True)
    try:
        loop.train(model, batches(device, 24), optimizer, 0, callbacks, precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert quiet.steps == 24


class Quiet:
    """Any synchronisation in the ``count`` steps that follow the first one is an error."""

    def __init__(self, count):
        self.count, self.steps = count, 0

    def on_gradients(self, batch):
        self.steps += 1
        if self.steps == 1:
            torch.cuda.set_sync_debug_mode("error")
        if self.steps == 1 + self.count:
            torch.cuda.set_sync_debug_mode("default")


def losses_of(device, wrap=None, steps=20):
    """The loss in each step."""
    labels, losses = iter([labels for _, labels in batches(device, steps)]), []

    def note(module, inputs, logits):
        losses.append(F.cross_entropy(logits.detach(), next(labels)).item())

    def watched(model):
        model = wrap(model) if wrap else model
        model.register_forward_hook(note)
        return model

    trained("resnet", device, steps, 0.4, wrap=watched, lr=3e-4)
    return losses


def test_the_loss_curve_is_that_of_the_cpu(device):
    another_than_the_cpu(device)
    assert losses_of(device) == pytest.approx(losses_of(CPU), rel=1e-3)


def test_compiled_training_has_the_same_loss_curve(device):
    """On CUDA with its graphs, replayed in each step; on the CPU, see test_fast_path.py."""
    if device.type != "cuda":
        pytest.skip("--compile uses CUDA graphs on CUDA")
    assert losses_of(device, lambda m: compiled(m, device)) == pytest.approx(
        losses_of(device), rel=1e-3
    )


def test_two_compiled_epochs_with_a_smaller_last_batch(device):
    """Each size has a graph of its own; the evaluation between them, uncompiled, has none."""
    if device.type != "cuda":
        pytest.skip("--compile uses CUDA graphs on CUDA")
    images, labels, classes = batches(device, 3).split
    loader = Batches(Split(images[:40], labels[:40], classes), BATCH, augment=True)
    scores = []
    for wrap in (lambda m: m, lambda m: compiled(m, device)):
        model = network("vgg", device)
        optimizer, penalty = make_optimizer(model, 1e-3, 0.9, 1e-4), [L1Penalty(model, S)]
        fast = wrap(model)
        for epoch in range(2):
            loop.train(fast, loader, optimizer, epoch, penalty)
            scores.append(loop.test(model, loader).loss)
    assert scores[2:] == pytest.approx(scores[:2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arch, depth", [("resnet", 11), ("vgg", 11)])
def test_resumed_with_deterministic_kernels_is_bit_identical(tmp_path, arch, depth, device):
    if device.type == "cpu" and arch == "vgg":
        pytest.skip("the CPU is always deterministic, see test_resume.py")
    images = make_images(tmp_path / "images")
    command = f"main.py -sr --s 0.001 --dataset folder --data {images} --arch {arch} "
    command += f"--depth {depth} --batch-size 16 --deterministic --no-tensorboard --amp "
    command += f"--device {device} --save {tmp_path}"
    succeed(f"{command}/whole --epochs 2")
    succeed(f"{command}/part --epochs 1")
    succeed(f"{command}/part --epochs 2 --resume auto")
    whole, part = (
        checkpoint.read(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "part")
    )
    assert same(whole["state_dict"], part["state_dict"])
    assert same(whole["optimizer"]["state"], part["optimizer"]["state"])


def test_checkpoints_travel_to_the_cpu_and_back(tmp_path, device):
    """Weights, momentum and scaler: training goes on alike on both."""
    another_than_the_cpu(device)
    model = network("resnet", device, pruned=0.4)
    optimizer = make_optimizer(model, LR, 0.9, 1e-4)
    loop.train(model, batches(device, 2), optimizer, 0, [L1Penalty(model, S)])
    path = tmp_path / "there"
    contents = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.write(path, contents)
    read = checkpoint.read(path)
    assert all(value.device == CPU for value in read["state_dict"].values())
    results = []
    for place in (CPU, device):
        again = network("resnet", place, pruned=0.4)
        again.load_state_dict(read["state_dict"])
        assert_alike(again, model, rtol=0, atol=0)
        continued = make_optimizer(again, LR, 0.9, 1e-4)
        assert load_momentum(continued, read["optimizer"])
        loop.train(again, batches(place, 1), continued, 1, [L1Penalty(again, S)])
        results.append(again)
    assert_alike(results[1], results[0])


@pytest.mark.parametrize("arch", ["resnet", "densenet"])
def test_repair_is_that_of_the_cpu(arch, device):
    """Layer by layer and in one pass."""
    another_than_the_cpu(device)
    dense = network(arch, CPU)
    slim, kept = slim_of(dense, 0.3)
    probe, logits = image_batch(CPU, 8, seed=1), []
    for place in (CPU, device):
        images = image_batch(place, 40)
        repaired = repair(slim, dense, kept, images)
        assert repaired.model is not slim and repaired.before > 0
        fitted = OnePass(dense, images).repaired(slim, kept)
        with torch.no_grad():
            logits.append([m.eval().to(CPU)(probe) for m in (repaired.model, fitted)])
    for ours, theirs in zip(logits[1], logits[0], strict=True):
        assert (ours - theirs).abs().max() <= 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_of_importance_is_that_of_the_cpu(name, device):
    another_than_the_cpu(device)
    scores = {}
    for place in (CPU, device):
        model = network("resnet", place)
        evidence = Evidence(model, list(batches(place, 2, augment=False)))
        scores[place.type] = MEASURES[name](evidence)
    ours = scores[device.type]
    for layer, expected in scores["cpu"].items():
        assert ours[layer].device == CPU and ours[layer].dtype == torch.float32
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours[layer], expected, rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("name", ["taylor_group", "biased_loss_tracked", "grasp"])
def test_tracked_importance_is_that_of_the_cpu(name, device):
    another_than_the_cpu(device)
    averages = []
    for place in (CPU, device):
        model = network("vgg", place)
        tracker = Tracker(model, name, steps=3, batches=2)
        optimizer = make_optimizer(model, 1e-3, 0.9, 1e-4)
        loop.train(model, batches(place, 3), optimizer, 0, [tracker])
        averages.append(tracker.scores())
    for layer, expected in averages[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            averages[1][layer].cpu(), expected.cpu(), rtol=2e-2, atol=2e-3 * scale
        )
