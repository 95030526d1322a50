"""The fast path and the classic loop, written plainly, learn the same."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, SMALLEST, keep_only, randomize

from benchmarks.reference import ClassicSelection, update_bn_by_loop
from models import NETWORKS
from slimming.choosing.threshold import choose_channels
from slimming.data.batches import Batches, Split
from slimming.runtime.device import LAYOUT, compiled
from slimming.training import loop
from slimming.training.penalties import L1Penalty
from slimming.training.trainer import make_optimizer

# lr and batch keep the rounding of fp32 from growing by chaos; s is so large that it shows
STEPS, BATCH, LR, S = 10, 16, 0.0003, 1.0
SETTINGS = {"momentum": 0.9, "weight_decay": 1e-4}


def batches():
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(256, (STEPS * BATCH, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(10, (len(images),), generator=draw)
    return Batches(Split(images, labels, [""] * 10), BATCH, augment=True)


def network(arch, pruned):
    torch.manual_seed(0)
    model = NETWORKS[arch](depth=SMALLEST[arch], num_classes=10, cfg=NARROW.get(arch))
    if not pruned:
        return model
    model = randomize(model)
    return keep_only(model, choose_channels(model, 0.4).kept)


def classic_losses(model, s=S):
    """NCHW, fp32, a loop over the modules for the penalty, SGD parameter by parameter."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "indexes"):
            plain = ClassicSelection(len(module.indexes)).requires_grad_(False)
            plain.indexes.copy_(module.indexes)
            model.set_submodule(name, plain)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, LR, **SETTINGS, foreach=False, fused=False)
    losses = []
    model.train()
    for images, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.contiguous()), labels)
        loss.backward()
        update_bn_by_loop(model, s)
        optimizer.step()
        losses.append(loss.item())
    return losses


def suite_losses(model, wrap=lambda model: model):
    """`slimming.training.loop.train` as main.py calls it; a hook sees what each step computes."""
    model = model.to(memory_format=LAYOUT)
    optimizer = make_optimizer(model, LR, **SETTINGS)
    labels = iter([labels for _, labels in batches()])
    losses = []

    def note(module, inputs, logits):
        losses.append(F.cross_entropy(logits.detach(), next(labels)).item())

    trained = wrap(model)
    trained.register_forward_hook(note)
    loop.train(trained, batches(), optimizer, 0, [L1Penalty(model, S)])
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("arch", SMALLEST)
def test_the_loss_curve_is_that_of_the_classic_loop(arch, pruned):
    model = network(arch, pruned)
    classic, ours = classic_losses(copy.deepcopy(model)), suite_losses(model)
    assert len(ours) == STEPS and ours == pytest.approx(classic, rel=1e-4)


@pytest.mark.slow
def test_the_loss_curve_shows_the_penalty():
    model = network("resnet", False)
    curves = [classic_losses(copy.deepcopy(model), s) for s in (S, 0)]
    assert curves[0] != pytest.approx(curves[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on the CPU")
def test_the_compiled_network_has_the_same_loss_curve():
    model = network("densenet", True)
    plain = suite_losses(copy.deepcopy(model))
    wrapped = suite_losses(model, lambda m: compiled(m, torch.device("cpu")))
    assert wrapped == pytest.approx(plain, rel=1e-4)
