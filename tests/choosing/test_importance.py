"""Each measure is its formula, filter by filter in double precision; a tracker is a plain loop."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch import nn

from models import densenet
from slimming.channels.groups import wires
from slimming.choosing.importance import GRADIENT_FREE, MEASURES, SECOND_ORDER, Evidence
from slimming.choosing.moments import Gram
from slimming.choosing.obs import elimination_errors
from slimming.choosing.tracking import Tracker
from slimming.errors import UserError

T = 3.0  # temperature
FILTERS, NORMS = ("0", "3", "8"), ("1", "4")
JUDGED = [f"{n}.weight" for n in (*FILTERS, *NORMS)] + [f"{n}.bias" for n in NORMS]
FORMULAS = {  # of a filter w, a list of weights t, their bias b, gradient g, E[g²] s and Hg h
    "mag_based": lambda w: sum(b * b for t, b, g, s, h in w) ** 0.5,
    "l1": lambda w: sum(b for t, b, g, s, h in w),
    "loss_based": lambda w: sum(b * abs(t * g) for t, b, g, s, h in w),
    "tfo": lambda w: abs(sum(b * t * g for t, b, g, s, h in w)),
    "fisher": lambda w: sum(b * t * t * s for t, b, g, s, h in w),
    "biased_loss": lambda w: sum(b * abs(t * g) for t, b, g, s, h in w),
    "biased_loss_tracked": lambda w: sum(b * abs(t * g) for t, b, g, s, h in w),
    "grasp": lambda w: sum(b * t * h for t, b, g, s, h in w),
    "grad_preserve": lambda w: abs(sum(b * t * h for t, b, g, s, h in w)),
}
BIASED_BY_DEFAULT = ("mag_based", "l1", "biased_loss", "biased_loss_tracked")  # b = |t|


def network(seed=0):
    torch.manual_seed(seed)
    first = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = (nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return randomize(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(5, 3))).double()


def minibatches(*sizes):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(sizes), 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def slow_gradient(model, images, labels):
    model = copy.deepcopy(model)
    F.cross_entropy(model(images) / T, labels).backward()
    return {name: model.get_parameter(name).grad for name in JUDGED}


def slow_product(model, images, labels, epsilon=1e-5):  # Hg = (∇L(θ + εg) − ∇L(θ − εg)) / 2ε
    g, ahead, behind = slow_gradient(model, images, labels), *map(copy.deepcopy, (model, model))
    for name in JUDGED:
        ahead.get_parameter(name).data += epsilon * g[name]
        behind.get_parameter(name).data -= epsilon * g[name]
    ahead, behind = (slow_gradient(moved, images, labels) for moved in (ahead, behind))
    return {name: (ahead[name] - behind[name]) / (2 * epsilon) for name in JUDGED}


@pytest.fixture(scope="module")
def slow():
    """Unequal minibatches, and what must come of them the slow way: g and Hg of the full batch."""
    model, batches, whole = network(), minibatches(5, 2, 4), minibatches(11)[0]
    each = [(len(batch[1]) / 11, slow_gradient(model, *batch)) for batch in batches]
    squares = {name: sum(share * g[name] ** 2 for share, g in each) for name in JUDGED}
    return model, batches, slow_gradient(model, *whole), squares, slow_product(model, *whole)


def assert_scores(ours, theirs):
    theirs = {name: torch.as_tensor(scores).float() for name, scores in theirs.items()}
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-9)  # names, fp32, CPU too


@pytest.mark.parametrize("option", [{}, {"use_l2": True}, {"use_init": True}], ids=str)
@pytest.mark.parametrize("measure", FORMULAS)
def test_a_measure_is_its_formula(slow, measure, option):
    model, batches, *slow_ones = slow
    start, expected = dict(network(seed=1).named_parameters()), {}
    for layer in FILTERS:
        theta = model.get_parameter(name := f"{layer}.weight").detach()
        bias = theta.abs() if option or measure in BIASED_BY_DEFAULT else torch.ones_like(theta)
        if "use_init" in option:
            bias = (theta - start[name].detach()).abs()
        weights = torch.stack([theta, bias, *(by_name[name] for by_name in slow_ones)], dim=-1)
        expected[layer] = [FORMULAS[measure](w.view(-1, 5).tolist()) for w in weights]
    assert_scores(MEASURES[measure](Evidence(model, batches, T, start, **option)), expected)


@pytest.mark.parametrize("option", [{}, {"use_l2": True}, {"use_init": True}], ids=str)
def test_measures_of_scaling_factors(slow, option):
    model, batches, _, squares, _ = slow
    start, energy, moved = dict(network(seed=1).named_parameters()), {}, {}
    for name in JUDGED:
        theta = model.get_parameter(name).detach()
        moved[name] = (theta - start[name].detach() if "use_init" in option else theta).abs()
        energy[name] = theta**2 * squares[name] * (moved[name] if option else 1)
    gammas = {n: moved[f"{n}.weight"] for n in NORMS}
    assert_scores(MEASURES["bn"](Evidence(model, [], initial=start, **option)), gammas)
    both = {n: energy[f"{n}.weight"] + energy[f"{n}.bias"] for n in NORMS}
    assert_scores(MEASURES["nvidia"](Evidence(model, batches, T, start, **option)), both)


def test_frozen_layers_are_judged_as_the_others():
    model, batches = network(), minibatches(4)
    whole = MEASURES["loss_based"](Evidence(model, batches))
    model[3].requires_grad_(False)
    assert_scores(MEASURES["loss_based"](Evidence(model, batches)), whole)
    assert not model[3].weight.requires_grad


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_taylor_scores_what_writes_and_what_reads_a_channel(groups):
    evidence = Evidence(nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)), [])
    evidence.gradient = {n: torch.randn_like(v) for n, v in evidence.values.items()}
    terms = {n: (v * evidence.gradient[n]).abs() for n, v in evidence.values.items()}
    filters, inputs = torch.zeros(8), torch.zeros(4)
    for f, i in itertools.product(range(8), range(4 // groups)):
        filters[f] += terms["0.weight"][f, i].sum()
        inputs[f // (8 // groups) * (4 // groups) + i] += terms["0.weight"][f, i].sum()
    expected = {"0": filters, "0:in": inputs, "1": terms["1.weight"]}
    assert_scores(MEASURES["taylor_group"](evidence), expected)


@pytest.mark.parametrize("measure", FORMULAS)
def test_what_reads_through_a_selection_is_scored_by_the_channels_that_it_reads(measure):
    """No filter writes those alone; and only there."""
    model = densenet(depth=7, growthRate=2, num_classes=3).double()
    model.select.keep(torch.arange(10) % 3 > 0)
    model.fc = nn.Linear(6, 3).double()
    evidence, expected = Evidence(model, []), {}
    for numbers in ("gradient", "squared_gradient", "hessian_gradient"):
        setattr(evidence, numbers, {n: torch.randn_like(v) for n, v in evidence.values.items()})
    for layer, _, _ in wires(model):
        theta = evidence.values[name := f"{layer}.weight"]
        bias = theta.abs() if measure in BIASED_BY_DEFAULT else torch.ones_like(theta)
        terms = [theta, bias, evidence.gradient[name], evidence.squared_gradient[name]]
        weights = torch.stack([*terms, evidence.hessian_gradient[name]], dim=-1).transpose(0, 1)
        own = [FORMULAS[measure](w.reshape(-1, 5).tolist()) for w in weights]
        expected[f"{layer}:in"] = own
    scores = MEASURES[measure](evidence)
    assert_scores({name: s for name, s in scores.items() if ":" in name}, expected)
    assert set(scores) == {*expected, "conv1", *(layer for layer, _, _ in wires(model))}


def test_lamp_divides_by_all_that_is_as_large():
    layer = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 1))
    layer[0].weight.data = torch.tensor([[3.0, 4], [1, 0], [0, 0], [0, 5], [2, 2], [0, 1]])
    layer[1].weight.data.zero_()
    energy = [25, 1, 0, 25, 8, 1]
    expected = [own / sum(other for other in energy if other >= own) for own in energy]
    assert_scores(MEASURES["lamp"](Evidence(layer, [])), {"0": expected, "1": [0.0]})


def test_random_scores_are_a_function_of_the_seed():
    one, same, other = (MEASURES["random"](Evidence(network(), [], seed=s))["3"] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_measuring_changes_nothing():
    model = network().train()
    model[1].eval()  # a frozen BN stays frozen
    F.cross_entropy(model(minibatches(4)[0][0]), torch.arange(4) % 3).backward()
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    before = copy.deepcopy(tensors), [module.training for module in model.modules()]
    with torch.no_grad():  # where it is called does not matter either
        for measure in MEASURES.values():
            measure(Evidence(model, minibatches(3, 2)))
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0)
    assert before[1] == [module.training for module in model.modules()]


def train(model, hooks, steps=range(10)):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for images, labels in minibatches(*[4] * 10)[steps.start : steps.stop]:
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        for hook in hooks:
            hook((images, labels))
        optimizer.step()


@pytest.mark.parametrize("measure", ["biased_loss_tracked", "loss_based", "fisher", "l1"])
def test_a_tracker_averages_the_last_minibatches_of_every_round(measure):
    model, terms = network(), []

    def keep_terms(batch):
        theta, g = model[3].weight.detach(), model[3].weight.grad
        terms.append({"l1": theta, "fisher": (theta * g) ** 2}.get(measure, theta * g).abs())

    tracker = Tracker(model, measure, steps=5, batches=3, alpha=0.6)
    train(model, [keep_terms, tracker.on_gradients])
    average = 0.6 * (0.6 * terms[7] + 0.4 * terms[8]) + 0.4 * terms[9]  # not of steps 5 and 6
    if measure == "biased_loss_tracked":
        average = average * model[3].weight.detach().abs()
    assert_scores({"3": tracker.scores()["3"]}, {"3": average.flatten(1).sum(1)})


def test_measures_of_second_order_are_tracked_by_passes_of_their_own():
    """On each of the last minibatches, with the weights that the network has there."""
    model, expected = network(), []
    tracker = Tracker(model, "grad_preserve", 10, 2, 0.6, temperature=T)

    def keep_scores(batch):
        expected.append(MEASURES["grad_preserve"](Evidence(model, [batch], T)))

    train(model, [keep_scores, tracker.on_gradients])
    average = {n: 0.6 * expected[8][n] + 0.4 * expected[9][n] for n in expected[9]}
    assert_scores(tracker.scores(), average)


def test_a_resumed_tracker_equals_an_uninterrupted_one():
    whole, parts = network(), network()
    trackers = [Tracker(m, "biased_loss_tracked", 10, batches=4) for m in (whole, parts, parts)]
    train(whole, [trackers[0].on_gradients])
    train(parts, [trackers[1].on_gradients], range(8))
    trackers[2].load_state_dict(copy.deepcopy(trackers[1].state_dict()))
    train(parts, [trackers[2].on_gradients], range(8, 10))
    torch.testing.assert_close(trackers[2].scores(), trackers[0].scores(), rtol=0, atol=0)


def test_a_minibatch_that_overflows_is_not_tracked():
    tracker = Tracker(model := network(), "tfo", steps=10)
    train(model, [tracker.on_gradients], range(1))
    before = tracker.scores()
    model[0].weight.grad.fill_(torch.inf)
    tracker.on_gradients()
    torch.testing.assert_close(tracker.scores(), before, rtol=0, atol=0)


def test_what_cannot_be_measured_is_said():
    plain, whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), network()
    wrong = [
        ("no minibatch", lambda: Tracker(whole, "tfo", steps=5).scores()),
        ("initial value", lambda: Evidence(whole, [], initial=plain.state_dict(), use_init=True)),
        ("initial value", lambda: Tracker(whole, "tfo", steps=5, use_init=True)),
        ("contradict", lambda: Evidence(whole, [], use_l2=True, use_init=True)),
    ]
    wrong += [("BatchNorm", lambda n=n: MEASURES[n](Evidence(plain, []))) for n in ("bn", "nvidia")]
    for name in SECOND_ORDER:
        tracker = Tracker(whole, name, steps=5)
        wrong.append(("needs the images of a batch", tracker.on_gradients))
    with_images = MEASURES.keys() - GRADIENT_FREE
    wrong += [("needs im", lambda n=n: MEASURES[n](Evidence(whole, []))) for n in with_images]
    for message, call in wrong:
        with pytest.raises(UserError, match=message):
            call()


def test_obs_eliminates_what_the_other_inputs_can_stand_in_for():
    """Against least squares in plain PyTorch: after each elimination the weights that are left are
    fitted anew, and the next to go is the one without which the fit is best."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 3).double()
    images = torch.randn(40, 5, 4, 4, dtype=torch.double)
    images[:, 3] = images[:, 0] + 0.1 * images[:, 3]  # nearly a copy
    gram = Gram(1, 45, images.device)
    patches = F.unfold(images, 3).mT.flatten(0, 1)
    gram.add_inputs(patches[None])
    scores = elimination_errors(conv.weight, gram)

    centred = patches - patches.mean(0)
    weight = conv.weight.detach().flatten(1).T
    damping = (gram.penalty(1e-3).item() * len(centred)) ** 0.5 * torch.eye(45, dtype=torch.double)
    inputs = torch.cat([centred, damping])
    variance = (centred @ weight).square().sum()
    left, error, expected = list(range(5)), 0.0, {}
    while left:
        errors = {}
        for candidate in left:
            columns = [9 * c + tap for c in left if c != candidate for tap in range(9)]
            fit = inputs[:, columns] @ torch.linalg.pinv(inputs[:, columns]) @ (inputs @ weight)
            errors[candidate] = (inputs @ weight - fit).square().sum().item()
        gone = min(errors, key=errors.get)
        cost = (errors[gone] - error) / variance.item()
        expected[gone] = max([cost, *expected.values()])
        error = errors[gone]
        left.remove(gone)
    assert scores.tolist() == pytest.approx([expected[c] for c in range(5)], rel=1e-4)
    assert scores.argmin() in (0, 3) and scores[[0, 3]].max() > 20 * scores.min()
