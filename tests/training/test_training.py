"""The schedule, the epoch, and the two ways to name a run."""

import pytest
import torch
from conftest import NARROW, SMALLEST
from torch.utils.data import DataLoader, TensorDataset

from models import NETWORKS, resnet
from slimming.data.batches import Batches, Split, normalize
from slimming.errors import Diverged, UserError
from slimming.runtime.device import Precision
from slimming.training import loop
from slimming.training.penalties import L1Penalty
from slimming.training.trainer import learning_rate, load_momentum, make_optimizer


def loader(count=64, augment=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    images[labels == 1, 0] //= 4
    return Batches(Split(images, labels, ["a", "b"]), 16, augment=augment)


@pytest.mark.parametrize(
    "epochs, rates",
    [
        (4, [0.1, 0.1, 0.01, 0.001]),
        (5, [0.1, 0.1, 0.01, 0.001, 0.001]),
        (1, [0.1]),
        (7, [0.1] * 3 + [0.01] * 2 + [0.001] * 2),
    ],
)
def test_the_learning_rate_falls_twice_for_odd_counts_too(epochs, rates):
    assert [learning_rate(e, epochs, 0.1) for e in range(epochs)] == pytest.approx(rates)


def test_the_schedule_of_the_paper():
    rates = [learning_rate(e, 160, 0.1) for e in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_step_is_plain_sgd_with_the_penalty(scale):
    """One epoch of one batch against the update by hand; a gradient scaler changes nothing."""
    torch.manual_seed(0)
    model = resnet(depth=11, num_classes=2)
    batches = loader(16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, labels = next(iter(batches))
    torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer = make_optimizer(model, 0.1, 0.9, 1e-4)
    precision = Precision(torch.device("cpu"))
    if scale:
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    loop.train(model, batches, optimizer, 0, [L1Penalty(model, 0.01)], precision)
    for name, after in model.named_parameters():
        if name.endswith("indexes"):
            assert torch.equal(after, before[name])
            continue
        penalty = 0.01 * before[name].sign() if ".bn" in name or name.startswith("bn") else 0
        penalty = penalty if name.endswith("weight") else 0
        expected = before[name] - 0.1 * (grads[name] + penalty + 1e-4 * before[name])
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)


def test_a_temperature_softens_the_gradient_and_not_the_score():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3), torch.arange(4) % 2
    model = torch.nn.Linear(3, 2)
    logits = model(images)
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    softened = torch.nn.functional.cross_entropy(logits / 4, labels)
    gradients = torch.autograd.grad(softened, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    # four dimensions, as all images have
    wrapped = torch.nn.Sequential(torch.nn.Flatten(), model)
    batches = [(images.view(4, 3, 1, 1), labels)]
    score = loop.train(wrapped, batches, optimizer, temperature=4)
    assert score.loss == pytest.approx(plain, rel=1e-5)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
@pytest.mark.parametrize("amp", [False, True])
def test_every_network_learns(arch, amp):
    torch.manual_seed(0)
    model = NETWORKS[arch](depth=SMALLEST[arch], num_classes=2, cfg=NARROW.get(arch))
    optimizer = make_optimizer(model, 0.02, 0.9, 1e-4)
    precision = Precision(torch.device("cpu"), amp)
    batches = loader(32)
    for epoch in range(15):
        loop.train(model, batches, optimizer, epoch, precision=precision)
    assert loop.test(model, loader(32, augment=False), precision).prec1 > 0.9


def test_test_scores_the_whole_set_with_a_smaller_last_batch():
    model = resnet(depth=11, num_classes=2).eval()
    batches = loader(40, augment=False)
    images, labels, _ = batches.split
    score = loop.test(model, batches)
    with torch.no_grad():
        logits = model(normalize(images))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert score.loss == pytest.approx(loss, rel=1e-4)
    assert score.prec1 == (logits.argmax(1) == labels).sum().item() / 40


THREE = TensorDataset(torch.zeros(3, 3, 32, 32), torch.zeros(3).long())
EMPTY = {
    "Batches": loader(0),
    "list": [],
    "batch_sampler": DataLoader(THREE, batch_sampler=[]),
    "drop_last": DataLoader(THREE, 8, drop_last=True),
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_a_loader_without_batches_is_one_clear_error(empty):
    model = resnet(depth=11, num_classes=2)
    with pytest.raises(UserError, match="the loader has no batches"):
        loop.train(model, empty, make_optimizer(model, 0.1, 0.9, 0))
    with pytest.raises(UserError, match="the loader has no batches"):
        loop.test(model, empty)


def test_a_loss_that_is_not_finite_ends_the_run():
    model = resnet(depth=11, num_classes=2)
    model.fc.weight.data.fill_(float("nan"))
    with pytest.raises(Diverged, match="diverged"):
        loop.train(model, loader(), make_optimizer(model, 0.1, 0.9, 0))


def test_a_first_step_that_overflows_leaves_no_trace():
    """The scaler skips it; the momentum must not start from undefined memory."""
    torch.manual_seed(0)
    model = resnet(depth=11, num_classes=2)
    model.fc.weight.data.mul_(1000)  # a large loss
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, 0.9, 1e-4)
    precision = Precision(torch.device("cpu"))
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    loop.train(model, loader(16), optimizer, 0, precision=precision)
    assert precision.scaler.get_scale() < 2.0**127
    for name, after in model.named_parameters():
        assert torch.equal(after, before[name])
    assert all((s["momentum_buffer"] == 0).all() for s in optimizer.state.values())


def test_momentum_is_taken_in_the_layout_of_the_parameters_or_not_at_all():
    model = resnet(depth=11).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, 0.1, 0.9, 0)
    learned = optimizer.param_groups[0]["params"]
    buffers = {i: {"momentum_buffer": torch.randn(p.shape)} for i, p in enumerate(learned)}
    saved = {"state": dict(reversed(buffers.items()))}  # their numbers count, not their order
    assert load_momentum(optimizer, saved)
    for i, parameter in enumerate(learned):
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(buffer, saved["state"][i]["momentum_buffer"])
        assert buffer.stride() == parameter.stride()
    for wrong in (None, {}, {"state": {}}, {"state": {0: {"momentum_buffer": None}}}):
        assert not load_momentum(optimizer, wrong)


def test_masks_are_no_weights_of_the_optimizer():
    learned = make_optimizer(resnet(depth=11), 0.1, 0.9, 0).param_groups[0]["params"]
    assert all(p.requires_grad for p in learned)
    assert sum(p.numel() for p in learned) == sum(
        p.numel() for n, p in resnet(depth=11).named_parameters() if "indexes" not in n
    )
